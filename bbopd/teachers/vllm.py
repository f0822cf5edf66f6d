"""A teacher served by vLLM: quantised and very large models that transformers runs slowly or not at all, at the levels that vLLM knows.

vLLM scores a prompt at temperature 1 and gives its best ids with their logprobs, no more: so there is no ``full``, T is 1, and the tail is
*derived* as 1 − Σp, which the offers say. Student-chosen ids need its V2 model runner, and are offered where the engine runs that.

Shape suffixes: ``L`` response tokens of one rollout, ``K`` top-k, ``M`` candidates, ``V`` vocabulary.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bbopd.config import ServeConfig
from bbopd.errors import ConfigError, EngineError, ModelError
from bbopd.modeling import (
    chat_template_sha256,
    compute_dtype,
    load_model,
    load_tokenizer,
    resolve_device,
    tokenizer_sha256,
    used_vocabulary,
    vocabulary_sha256,
)
from bbopd.modeling.load import quiet
from bbopd.rpc.backend import CandidateRollout
from bbopd.types import Completion, FinishReason, Level, Offer, Prompt, Rollout, Sampling, SignalSpec, TeacherInfo, TeacherSignal
from bbopd.vllm_setup import kv_bytes_of_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VLLMBackend", "read_scores", "tail_of"]

_LEVELS = ("candidates", "topk", "sampled", "text")  # at most
_AT_ONCE = 64  # sequences
_KV_BLOCK = 128  # tokens; vLLM's on a CPU, and more than its own on a GPU
_LOGIT_BYTES = {"cpu": 2**29, "cuda": 2**32}  # of a step's logits and their logprobs, which vLLM's memory profile does not see
_LOGIT_COPIES = 3  # of a row of float32 logits while its logprobs are taken
_MOST_ENTRIES = 2**23  # ids with a logprob in vLLM's lists at a time: about 100 bytes each
_TAIL_RESOLUTION = 2.0**-23  # of a sum of float32 probabilities: less than that is not known to be there
_TEMPERATURES = (0.01, 100.0)  # of written answers


class VLLMBackend:
    """A vLLM engine in this process as a `TeacherBackend`; made by `from_config`."""

    def __init__(self, engine: Any, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], info: TeacherInfo) -> None:
        self.info = info
        self._engine = engine
        self._tokenizer = tokenizer
        self._end_ids = tuple(end_ids)
        self._numbers = itertools.count()

    @classmethod
    def from_config(cls, config: ServeConfig) -> VLLMBackend:
        """Load what a teacher's configuration names.

        Raises
        ------
        ConfigError : none of its ``levels`` is one that vLLM gives.
        ModelError : no model or tokenizer is there.
        EngineError : vLLM does not take the model, or has no room for it.
        """
        _check_levels(config.levels, _LEVELS)
        device = resolve_device(config.device)
        source: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        tokenizer = load_tokenizer(config.model, **source)
        dtype = compute_dtype(config.dtype, device)
        allowed = os.sched_getaffinity(0)
        with ExitStack() as cleanup:
            name = config.model
            if name.endswith(".gguf"):
                name = _unpacked(name, dtype, cleanup.enter_context(tempfile.TemporaryDirectory()))
            try:
                engine = _make_engine(config, name, device.type, dtype)
            except (ModelError, ConfigError):
                raise
            except Exception as error:  # anything that its layers raise
                reason = " ".join(str(error).split())[:400] or type(error).__name__
                raise EngineError(
                    f"vLLM cannot serve {config.model}: {reason}; where memory is short, lower max_sequence_tokens "
                    f"({config.max_sequence_tokens or 'the model’s own'}) or batch_tokens ({config.batch_tokens}), or set engine=hf"
                ) from error
            finally:
                os.sched_setaffinity(0, allowed)  # loading has bound this thread to one core, and threads to come inherit that
            end_ids = _end_of_sequence(name, tokenizer, config)
        vocab_size = used_vocabulary(tokenizer, engine.vllm_config.model_config.get_vocab_size())
        engine.apply_model(partial(_leave_out_padding, vocab_size=vocab_size))
        backend = cls(engine, tokenizer, end_ids, _describe(engine, tokenizer, config, vocab_size))
        backend.score([Rollout("first", Prompt("first", (0,)), (0,))], SignalSpec("topk", top_k=1))  # the first one takes seconds longer
        return backend

    def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        """vLLM reads each rollout as a prompt; rows of the prompt proper are made too, and dropped."""
        width = want.top_k if want.level == "topk" else 0
        signals: list[TeacherSignal | None] = [None] * len(rollouts)

        def read(place: int, output: Any) -> None:
            signals[place] = read_scores(output, rollouts[place], want)

        asked = [(rollout.all_ids, self._scoring(rollout, want), len(rollout.all_ids) * (width + 1)) for rollout in rollouts]
        self._run(asked, read)
        return [signal for signal in signals if signal is not None]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Let it write. An answer's random numbers come from the seed and its prompt alone."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        completions: list[Completion | None] = [None] * len(prompts)

        def read(place: int, output: Any) -> None:
            completions[place] = self._completion(prompts[place], output.outputs[0])

        is_greedy = sampling.top_k == 1
        how = {} if is_greedy else {"top_p": sampling.top_p, "top_k": sampling.top_k}
        asked = [
            (
                prompt.token_ids,
                SamplingParams(
                    max_tokens=sampling.max_new_tokens,
                    temperature=0.0 if is_greedy else sampling.temperature,
                    seed=_mixed_seed(sampling.seed, prompt),
                    stop_token_ids=sorted({*self._end_ids, *sampling.stop_token_ids}),
                    ignore_eos=True,  # the ids above are all that end an answer
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    **how,
                ),
                0,
            )
            for prompt in prompts
        ]
        self._run(asked, read)
        return [completion for completion in completions if completion is not None]

    def _scoring(self, rollout: Rollout, want: SignalSpec) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        chosen: dict[str, Any] = {}
        if want.level == "candidates":
            assert isinstance(rollout, CandidateRollout)
            chosen = {
                "prompt_logprob_token_ids": np.ascontiguousarray(rollout.candidate_ids, np.int32),
                "prompt_logprob_start": len(rollout.prompt.token_ids) - 1,
            }
        return SamplingParams(
            max_tokens=1,  # the least there is; it comes with the last row of the prompt
            temperature=0.0,
            prompt_logprobs=min(want.top_k, self.info.vocab_size) if want.level == "topk" else 0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **chosen,
        )

    def _run(self, asked: Sequence[tuple[tuple[int, ...], Any, int]], read: Callable[[int, Any], None]) -> None:
        """Run requests (ids, parameters, entries of logprobs that it will hold), as many at a time as memory allows, until all are read."""
        waiting, running, held = deque(enumerate(asked)), dict[str, tuple[int, int]](), 0
        try:
            while waiting or running:
                while waiting and (not running or held + waiting[0][1][2] <= _MOST_ENTRIES):
                    place, (ids, parameters, entries) = waiting.popleft()
                    number = str(next(self._numbers))
                    self._engine.add_request(number, {"prompt_token_ids": list(ids)}, parameters)
                    running[number] = (place, entries)
                    held += entries
                for output in self._engine.step():
                    if output.finished:
                        place, entries = running.pop(output.request_id)
                        held -= entries
                        read(place, output)
        finally:
            if running:
                self._engine.abort_request(list(running))

    def _completion(self, prompt: Prompt, written: Any) -> Completion:
        reasons: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
        if written.finish_reason not in reasons:
            raise EngineError(f"vLLM ended the answer to prompt {prompt.prompt_id} with {written.finish_reason!r}")
        ids = tuple(written.token_ids)
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        return Completion(prompt, ids, text, reasons[written.finish_reason])


def read_scores(output: Any, rollout: Rollout, want: SignalSpec) -> TeacherSignal:
    """What vLLM said of one rollout's response tokens, as a signal.

    Parameters
    ----------
    output : a finished ``RequestOutput`` with ``FlatLogprobs``: nothing for the first token of the prompt; for each further one the
        token itself, then the best ids in falling order.

    Raises
    ------
    ModelError : it holds fewer rows than the prompt has tokens, or numbers that are no logprobs.
    """
    width = want.top_k + 1 if want.level == "topk" else 1
    count, first = len(rollout.all_ids), len(rollout.prompt.token_ids)
    flat = output.prompt_logprobs
    start = (first - 1) * width
    if flat is None or len(flat.logprobs) != (count - 1) * width:
        raise ModelError(f"rollout {rollout.rollout_id}: vLLM gave {0 if flat is None else len(flat.logprobs)} logprobs for {count} tokens")
    logprobs = np.array(flat.logprobs[start:], np.float32).reshape(-1, width)
    sampled = np.ascontiguousarray(logprobs[:, 0])
    if want.level == "sampled":
        return TeacherSignal("sampled", want.temperature, sampled=sampled)
    if want.level == "topk":
        ids = np.array(flat.token_ids[start:], np.int32).reshape(-1, width)
        found = np.ascontiguousarray(logprobs[:, 1:])
        return TeacherSignal(
            "topk", want.temperature, ids=np.ascontiguousarray(ids[:, 1:]), logprobs=found, log_tail=tail_of(found), sampled=sampled
        )
    assert isinstance(rollout, CandidateRollout)
    assert rollout.candidate_ids is not None, "check_rollout comes first"
    found = np.array(output.prompt_token_id_logprobs, np.float32)
    ids = rollout.candidate_ids.astype(np.int32, copy=False)
    return TeacherSignal("candidates", want.temperature, ids=ids, logprobs=found, log_tail=tail_of(found), sampled=sampled)


def tail_of(logprobs: np.ndarray) -> np.ndarray:
    """log(1 − Σp) [L] float32 of ``logprobs`` [L, K], at least the resolution of such a sum: a tail that small is not told from none."""
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    return np.log(np.maximum(1.0 - mass, _TAIL_RESOLUTION)).astype(np.float32)


def _make_engine(config: ServeConfig, name: str, device_type: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    with quiet():
        described = AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    decoder = described.get_text_config(decoder=True)
    longest = config.max_sequence_tokens
    positions = getattr(decoder, "max_position_embeddings", None)
    length = min((limit for limit in (longest and longest + 1, positions) if limit), default=4096)
    step_tokens = _LOGIT_BYTES[device_type] // (4 * _LOGIT_COPIES * decoder.vocab_size)
    arguments = EngineArgs(
        model=name,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        skip_tokenizer_init=True,
        generation_config="vllm",  # sampling is what the client asks, not what a file suggests
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=length,
        max_num_seqs=_AT_ONCE,
        max_num_batched_tokens=max(_AT_ONCE, min(step_tokens, max(config.batch_tokens, _AT_ONCE))),
        kv_cache_memory_bytes=(max(config.batch_tokens, length) + _AT_ONCE * _KV_BLOCK) * kv_bytes_of_token(decoder, dtype.itemsize),
        gpu_memory_utilization=config.gpu_memory,
        enforce_eager=device_type == "cpu",  # compiling takes longer than it saves
        enable_prefix_caching="text" in config.levels,  # scoring cannot use it
        logprobs_mode="raw_logprobs",
        max_logprobs=min(config.max_top_k, decoder.vocab_size),
        disable_log_stats=True,
    )
    return LLMEngine.from_engine_args(arguments)


def _leave_out_padding(model: torch.nn.Module, vocab_size: int) -> None:
    """Have vLLM cut its logits after the last entry that a token has, as it cuts its own padding: what only pads a head has no mass."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    found = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    for module in found:
        module.org_vocab_size = min(module.org_vocab_size, vocab_size)
    if not found:
        raise EngineError(f"vLLM's {type(model).__name__} makes its logits in a way that is not known here: set engine=hf")


def _describe(engine: Any, tokenizer: PreTrainedTokenizerBase, config: ServeConfig, vocab_size: int) -> TeacherInfo:
    """What this engine can give of what the configuration allows."""
    length = engine.vllm_config.model_config.max_model_len
    width = min(config.max_top_k, vocab_size, max(1, _MOST_ENTRIES // length))
    offers = {
        "topk": Offer("topk", width, tail="derived"),
        "sampled": Offer("sampled"),
        "text": Offer("text", 0, *_TEMPERATURES),
    }
    if engine.vllm_config.use_v2_model_runner:
        offers["candidates"] = Offer("candidates", width, tail="derived")
    levels: list[Level] = [level for level in config.levels if level in offers]
    _check_levels(levels, offers)
    return TeacherInfo(
        model=config.model,
        vocab_size=vocab_size,
        offers=tuple(offers[level] for level in levels),
        revision=config.revision or "",
        vocab_sha256=vocabulary_sha256(tokenizer, vocab_size),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=chat_template_sha256(tokenizer),
        max_sequence_tokens=length - 1,  # vLLM keeps a place for the token that it must write
    )


def _check_levels(levels: Sequence[Level], offered: Collection[str]) -> None:
    if not set(levels) & set(offered):
        raise ConfigError(f"levels {list(levels)}: engine vllm gives {', '.join(offered)} here; set levels to some of these, or engine=hf")


def _unpacked(path: str, dtype: torch.dtype, folder: str) -> str:
    """The same model as a folder that vLLM reads; of no use once it is loaded."""
    load_model(path, dtype=dtype).save_pretrained(folder)
    return folder


def _end_of_sequence(name: str, tokenizer: PreTrainedTokenizerBase, config: ServeConfig) -> list[int]:
    """The ids at which the model stops, as its files say."""
    from transformers import AutoConfig, GenerationConfig

    where: dict[str, Any] = {"revision": config.revision} if not Path(name).is_dir() else {}
    with quiet():
        try:
            ids = GenerationConfig.from_pretrained(name, **where).eos_token_id
        except OSError:  # there is no such file
            ids = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code, **where).eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return [ids] if isinstance(ids, int) else list(ids or ())


def _mixed_seed(seed: int, prompt: Prompt) -> int:
    """A seed of one answer: asking the same seed for another prompt must not repeat the same random numbers."""
    return zlib.crc32(repr((seed, prompt.prompt_id, prompt.token_ids)).encode())
