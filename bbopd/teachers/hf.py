"""A teacher from any Hugging Face causal language model, scored without its logits ever existing (but at ``full``).

Shape suffixes: ``N`` response tokens of a batch, ``D`` hidden, ``V`` vocabulary, ``M`` candidates.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bbopd.config import ServeConfig
from bbopd.modeling import (
    chat_template_sha256,
    compute_dtype,
    load_model,
    load_tokenizer,
    max_positions,
    output_head,
    resolve_device,
    tokenizer_sha256,
    used_vocabulary,
    vocabulary_sha256,
)
from bbopd.modeling.shared_prompts import response_hidden
from bbopd.ops import linear_logprobs
from bbopd.teachers.prompt_ids import prompt_ids
from bbopd.types import LEVELS, Completion, FinishReason, Level, Offer, Prompt, Rollout, Sampling, SignalSpec, TeacherInfo, TeacherSignal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HFBackend"]

_TEMPERATURES = (0.01, 100.0)
_CHUNK_ELEMENTS = 2**24  # logits in fp32 at a time, at level full


class HFBackend:
    """A loaded model as a `TeacherBackend`. It owns the model from here on.

    Parameters
    ----------
    model : a causal language model with a linear head, in eval mode.
    tokenizer : for fingerprints and for the text of completions; without one, level ``text`` is not offered. Logits beyond its last
        token only pad the head: they have no probability.
    levels, max_top_k, max_sequence_tokens : what is offered; None takes the model's own limit.
    name, revision : what it calls itself.
    compute_dtype : torch.bfloat16 multiplies a float32 model in it by autocast, as the trainer does; None is the model's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        levels: Collection[Level] = LEVELS,
        max_top_k: int = 1024,
        max_sequence_tokens: int | None = None,
        name: str = "",
        revision: str = "",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        head = output_head(model)
        self._rows = head.weight_VD.shape[0]
        vocab_size = used_vocabulary(tokenizer, self._rows) if tokenizer is not None else self._rows
        self._head = replace(head, vocab_size=vocab_size).without_padding()
        self._compute_dtype = compute_dtype or head.weight_VD.dtype
        self._end_ids = _end_of_sequence(model, tokenizer) if "text" in levels else ()
        limits = [limit for limit in (max_sequence_tokens, max_positions(model)) if limit]
        self.info = TeacherInfo(
            model=name or type(model).__name__,
            vocab_size=vocab_size,
            offers=tuple(
                Offer(level, min(max_top_k, vocab_size) if level in ("topk", "candidates") else 0, *_TEMPERATURES)
                for level in levels
                if level != "text" or tokenizer is not None
            ),
            revision=revision,
            vocab_sha256=vocabulary_sha256(tokenizer, vocab_size) if tokenizer else "",
            tokenizer_sha256=tokenizer_sha256(tokenizer) if tokenizer else "",
            chat_template_sha256=chat_template_sha256(tokenizer) if tokenizer else "",
            max_sequence_tokens=min(limits, default=0),
            takes_text=tokenizer is not None and "text" in levels,
        )

    @classmethod
    def from_config(cls, config: ServeConfig) -> HFBackend:
        """Load what a teacher's configuration names. Raises `ModelError` where it cannot be."""
        source: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        dtype = compute_dtype(config.dtype, resolve_device(config.device))
        return cls(
            load_model(config.model, device=config.device, dtype=dtype, **source),
            load_tokenizer(config.model, **source),
            levels=config.levels,
            max_top_k=config.max_top_k,
            max_sequence_tokens=config.max_sequence_tokens,
            name=config.model,
            revision=config.revision or "",
        )

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        """One packed forward of the body, then the head on the rows that predict response tokens, and on no others."""
        is_rounded = self._compute_dtype != self._head.weight_VD.dtype
        with torch.autocast(self._model.device.type, dtype=self._compute_dtype, enabled=is_rounded):
            hidden_ND = response_hidden(self._model, rollouts).to(self._compute_dtype)
        bounds = np.cumsum([0, *(len(rollout) for rollout in rollouts)])
        rows = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        if want.level == "full":
            logits_NV = self._shifted_logits(hidden_ND)
            return [TeacherSignal("full", logits=logits_NV[part]) for part in rows]
        found = linear_logprobs(
            hidden_ND,
            self._head.weight_VD.to(self._compute_dtype),
            token_ids=self._tensor([token for rollout in rollouts for token in rollout.token_ids]),
            top_k=min(want.top_k, self.info.vocab_size) if want.level == "topk" else 0,
            candidate_ids=self._candidates(rollouts) if want.level == "candidates" else None,
            temperature=want.temperature,
            **self._head.options,
        )
        sampled = _array(found.sampled)
        if want.level == "sampled":
            return [TeacherSignal("sampled", want.temperature, sampled=sampled[part]) for part in rows]
        if want.level == "topk":
            ids, logprobs, log_tail = _array(found.topk_ids, np.int32), _array(found.topk_logprobs), _array(found.log_tail)
            return [
                TeacherSignal(
                    "topk", want.temperature, ids=ids[part], logprobs=logprobs[part], log_tail=log_tail[part], sampled=sampled[part]
                )
                for part in rows
            ]
        logprobs, log_tail = _array(found.candidates), _array(found.candidates_log_tail)
        return [
            TeacherSignal(
                "candidates",
                want.temperature,
                ids=_candidate_ids(rollout),
                logprobs=np.ascontiguousarray(logprobs[part, : _candidate_ids(rollout).shape[1]]),
                log_tail=log_tail[part],
                sampled=sampled[part],
            )
            for rollout, part in zip(rollouts, rows, strict=True)
        ]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Let the model write, padded on the left. The same batch with the same seed gives the same answers."""
        from transformers import GenerationConfig

        assert self._tokenizer is not None, "without a tokenizer, level text is not offered"
        width = max(len(prompt.token_ids) for prompt in prompts)
        end_ids = sorted({*self._end_ids, *sampling.stop_token_ids})
        ids = self._tensor([[0] * (width - len(prompt.token_ids)) + list(prompt.token_ids) for prompt in prompts])
        mask = self._tensor([[0] * (width - len(prompt.token_ids)) + [1] * len(prompt.token_ids) for prompt in prompts])
        is_greedy = sampling.top_k == 1
        how = {} if is_greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not is_greedy,
            eos_token_id=end_ids or None,
            pad_token_id=0,
            suppress_tokens=list(range(self.info.vocab_size, self._rows)) or None,
            **how,
        )
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        own = _OwnLogprobs(sampling.temperature)
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(_mixed_seed(sampling.seed, prompts))
            written = self._model.generate(
                ids, attention_mask=mask, generation_config=config, logits_processor=[own.see], stopping_criteria=[own.take]
            )[:, width:].tolist()
        answers = zip(prompts, written, torch.stack(own.taken, dim=1).tolist(), strict=True)
        return [self._completion(prompt, answer, logprobs, end_ids) for prompt, answer, logprobs in answers]

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a prompt that is text or messages (see `prompt_ids`)."""
        assert self._tokenizer is not None, "without a tokenizer, no text is taken"
        return prompt_ids(prompt, self._tokenizer, self.info.model)

    def _shifted_logits(self, hidden_ND: Tensor) -> np.ndarray:
        """z − max(z) [N, V] as float16, from fp32 logits, a chunk of rows at a time."""
        head, count = self._head, hidden_ND.shape[0]
        weight_VD = head.weight_VD.to(self._compute_dtype)
        shifted_NV = torch.empty((count, self.info.vocab_size), dtype=torch.float16)
        step = max(1, _CHUNK_ELEMENTS // self.info.vocab_size)
        for start in range(0, count, step):
            z_nV = _product_in_fp32(hidden_ND[start : start + step], weight_VD)
            if head.bias is not None:
                z_nV += head.bias
            z_nV *= head.logit_scale
            if head.logit_softcap is not None:
                z_nV = head.logit_softcap * torch.tanh(z_nV / head.logit_softcap)
            shifted_NV[start : start + step] = z_nV.sub_(z_nV.amax(dim=1, keepdim=True))
        return shifted_NV.numpy()

    def _candidates(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Candidate ids [N, M] of the batch, the narrower ones filled up with empty slots."""
        width = max(_candidate_ids(rollout).shape[1] for rollout in rollouts)
        blocks = [np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=-1) for ids in map(_candidate_ids, rollouts)]
        return torch.from_numpy(np.concatenate(blocks).astype(np.int64)).to(self._model.device)

    def _completion(self, prompt: Prompt, written: list[int], logprobs: list[float], end_ids: Collection[int]) -> Completion:
        assert self._tokenizer is not None
        end = next((index for index, token in enumerate(written) if token in end_ids), None)
        ids = written if end is None else written[: end + 1]
        reason: FinishReason = "length" if end is None else "stop"
        return Completion(
            prompt, tuple(ids), str(self._tokenizer.decode(ids, skip_special_tokens=True)), reason, tuple(logprobs[: len(ids)])
        )

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)


class _OwnLogprobs:
    """Follows ``generate`` step by step and keeps the logprobs of what it chose, one row [B] of them in memory with its logits."""

    def __init__(self, temperature: float) -> None:
        self.taken: list[Tensor] = []
        self._temperature = temperature
        self._logits_BV: Tensor | None = None

    def see(self, ids: Tensor, logits_BV: Tensor) -> Tensor:
        """A logits processor that changes nothing; temperature, top-k and top-p come after it."""
        self._logits_BV = logits_BV
        return logits_BV

    def take(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        """A stopping criterion that stops nobody; the last of ``ids`` has just been chosen."""
        assert self._logits_BV is not None, "logits come before a choice"
        scaled_BV = self._logits_BV.float() / self._temperature
        self.taken.append((scaled_BV.gather(1, ids[:, -1:])[:, 0] - scaled_BV.logsumexp(1)).clamp(max=0.0).cpu())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _product_in_fp32(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """``hidden @ weight.T`` whose result is never rounded to bfloat16."""
    if weight_VD.is_cuda and weight_VD.dtype != torch.float32:
        return torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
    return hidden_ND.float() @ weight_VD.float().T


def _candidate_ids(rollout: Rollout) -> np.ndarray:
    assert rollout.candidate_ids is not None, "check_rollout comes first"
    return rollout.candidate_ids.astype(np.int32, copy=False)


def _array(tensor: Tensor | None, dtype: type = np.float32) -> np.ndarray:
    assert tensor is not None
    return np.ascontiguousarray(tensor.cpu().numpy().astype(dtype, copy=False))


def _end_of_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """The ids at which the model stops; its other generation defaults are dropped, so that `Sampling` says all."""
    from transformers import GenerationConfig

    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    model.generation_config = GenerationConfig()
    return tuple(_flatten(ids))


def _flatten(ids: int | Sequence[int] | None) -> Iterator[int]:
    if isinstance(ids, int):
        yield ids
    elif ids is not None:
        yield from ids


def _mixed_seed(seed: int, prompts: Sequence[Prompt]) -> int:
    """A seed of the batch: asking the same seed for other prompts must not repeat the same random numbers."""
    named = repr((seed, [(prompt.prompt_id, prompt.token_ids) for prompt in prompts]))
    return zlib.crc32(named.encode())  # PyTorch's CPU generator takes no more than 32 bits of a seed
