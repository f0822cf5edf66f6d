"""Rollouts by transformers, with the model that is being trained: no second copy of the weights, no other process.

A decode loop of its own instead of ``model.generate``: the cache is written in place (see `cache`), a prompt asked several times is
read once, and a finished rollout leaves the batch at once, so that a straggler costs one row and not the whole batch.

Shapes: ``B`` rows, ``M`` prompt tokens, ``T`` new tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bbopd.errors import DataError, ModelError
from bbopd.rollouts.cache import RowCache, grouped_attention
from bbopd.rollouts.sampling import draw_uniforms, sample_tokens
from bbopd.types import FinishReason, Prompt, Rollout, Sampling

_PREFILL_TOKENS = 2048
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


@dataclass(frozen=True, slots=True)
class _Request:
    prompt: Prompt
    draw: int


class HFEngine:
    """A `RolloutEngine` over a transformers causal LM, which it uses in place.

    Parameters
    ----------
    model
        The trainer's own model. Its mode (train, eval) is put back after every batch.
    eos_token_ids
        Tokens that end an answer; the one that did is the answer's last token.
    pad_token_id
        Any id of the vocabulary; fills up the shorter prompts of one prefill.
    max_batch
        Rollouts written at a time, and prompts collected before writing starts.
    max_batch_tokens
        Bound of rows times columns of one batch, hence of the cache: 46 KB a token for a 135M-parameter model in float32.
    vocab_size
        Ids from there on only pad the head and are never sampled; None: all are tokens.
    compute_dtype
        Where it is not the weights' own, passes run under autocast.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_batch: int = 64,
        max_batch_tokens: int = 65536,
        vocab_size: int | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.version = 0
        self._config = model.config.get_text_config(decoder=True)
        kinds = set(getattr(self._config, "layer_types", None) or ()) - _ATTENTION_LAYERS
        if kinds:
            raise ModelError(f"engine hf keeps keys and values only; this model has layers of kind {', '.join(sorted(kinds))}")
        self._stop_ids = frozenset(eos_token_ids)
        self._pad_token_id = pad_token_id
        self._vocab_size = vocab_size
        self._max_batch, self._max_batch_tokens = max_batch, max_batch_tokens
        weights_dtype = next(model.parameters()).dtype
        self._autocast_dtype = compute_dtype if compute_dtype not in (None, weights_dtype) else None
        self._in_use = threading.Lock()

    async def generate(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Rollout]:
        """Write one answer to every prompt; each is yielded as it ends, in any order.

        ``draw`` is a prompt's place in the stream, and with ``sampling.seed`` all that decides what is drawn; neighbours in
        the batch change an answer only as far as rounding does. Ask a prompt twice for two answers.

        Raises
        ------
        DataError
            For a prompt that leaves no room for ``sampling.max_new_tokens`` among the model's positions.
        ModelError
            For logits that are not finite.
        """
        if sampling.temperature <= 0 or sampling.max_new_tokens < 1:
            raise ValueError(f"cannot sample {sampling}: temperature and max_new_tokens must be positive (top_k=1 always takes the best)")
        async for batch in self._batches(prompts, sampling):
            async with aclosing(self._write(batch, sampling)) as rollouts:
                async for rollout in rollouts:
                    yield rollout

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy ``weights`` in (those that already are the model's own are left alone) and call them ``version``.

        Waits for the batch being written. Raises `ModelError` for a name or shape the model does not have.
        """
        await asyncio.to_thread(self._load, weights, version)

    def _load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        own = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers(remove_duplicate=False))
        with self._in_use, torch.no_grad():
            for name, tensor in weights:
                if name not in own:
                    raise ModelError(f"weights for {name!r}, which this model does not have: they belong to another architecture")
                target = own[name]
                if target.shape != tensor.shape:
                    raise ModelError(f"weights for {name!r} have shape {tuple(tensor.shape)}, the model's {tuple(target.shape)}")
                if target.data_ptr() != tensor.data_ptr():
                    target.copy_(tensor)
            self.version = version

    def _check_length(self, prompt: Prompt, sampling: Sampling) -> None:
        positions = getattr(self._config, "max_position_embeddings", None)
        length, room = len(prompt.token_ids), sampling.max_new_tokens
        if not length:
            raise DataError(f"prompt {prompt.prompt_id} is empty: a model needs at least one token to go on from")
        if positions is not None and length + room > positions:
            raise DataError(
                f"prompt {prompt.prompt_id} has {length} tokens; with rollouts.max_new_tokens {room} that is more than the "
                f"{positions} positions of the model: shorten the prompt, or lower max_new_tokens"
            )

    # ------------------------------------------------------------ the worker thread and the event loop

    async def _batches(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[list[_Request]]:
        """Collect prompts until ``max_batch`` are there or the stream ends."""
        waiting: list[_Request] = []
        draw = 0
        async for prompt in prompts:
            self._check_length(prompt, sampling)
            waiting.append(_Request(prompt, draw))
            draw += 1
            if len(waiting) == self._max_batch:
                for batch in self._split(waiting, sampling.max_new_tokens):
                    yield batch
                waiting = []
        for batch in self._split(waiting, sampling.max_new_tokens):
            yield batch

    def _split(self, requests: list[_Request], new_tokens: int) -> Iterator[list[_Request]]:
        """Prompts of like length together, as many at a time as ``max_batch_tokens`` holds (one at least)."""
        batch: list[_Request] = []
        for request in sorted(requests, key=lambda r: (len(r.prompt.token_ids), r.draw)):
            columns = len(request.prompt.token_ids) + new_tokens
            if batch and columns * (len(batch) + 1) > self._max_batch_tokens:
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    async def _write(self, requests: list[_Request], sampling: Sampling) -> AsyncGenerator[Rollout, None]:
        loop = asyncio.get_running_loop()
        finished: asyncio.Queue[Rollout | None] = asyncio.Queue()  # bounded by the batch
        abandoned = threading.Event()

        def emit(rollout: Rollout | None) -> None:
            loop.call_soon_threadsafe(finished.put_nowait, rollout)

        def work() -> None:
            try:
                with self._in_use, self._sampling_mode():
                    self._decode(requests, sampling, emit, abandoned)
            finally:
                emit(None)

        worker = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            while (rollout := await finished.get()) is not None:
                yield rollout
            await worker
        finally:  # a cancelled or closed generator leaves no thread behind in the trainer's model
            abandoned.set()
            await asyncio.wait([worker])
            worker.exception()  # seen, where nobody waits for it any more

    @contextmanager
    def _sampling_mode(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        device_type = next(self.model.parameters()).device.type
        autocast = torch.autocast(device_type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None)
        self.model.eval()
        try:
            with torch.no_grad(), autocast, grouped_attention(self._config):
                yield
        finally:
            for module in training:
                module.training = True

    # ------------------------------------------------------------ the loop itself

    def _decode(self, requests: list[_Request], sampling: Sampling, emit: Callable[[Rollout], None], abandoned: threading.Event) -> None:
        device = next(self.model.parameters()).device
        steps, version = sampling.max_new_tokens, self.version
        stop_ids = self._stop_ids | set(sampling.stop_token_ids)
        longest = max(len(request.prompt.token_ids) for request in requests)
        cache = RowCache(self._config.num_hidden_layers, len(requests), longest - 1 + steps, longest - 1, self._autocast_dtype)
        self._prefill(requests, cache, device, abandoned)

        order = list(range(len(requests)))  # row -> request
        start_B = torch.tensor([longest - len(request.prompt.token_ids) for request in requests], device=device)
        padded = bool(start_B.any())
        uniforms_BT = torch.stack([draw_uniforms(sampling.seed, request.draw, steps) for request in requests]).to(device)
        current_B = torch.tensor([request.prompt.token_ids[-1] for request in requests], device=device)
        ids_BT = torch.zeros(len(requests), steps, dtype=torch.long, device=device)
        logprobs_BT = torch.zeros(len(requests), steps, device=device)

        def finish(row: int, length: int, reason: FinishReason) -> None:
            request = requests[order[row]]
            emit(
                Rollout(
                    rollout_id=f"{request.prompt.prompt_id}#{request.draw}",
                    prompt=request.prompt,
                    token_ids=tuple(ids_BT[row, :length].tolist()),
                    finish_reason=reason,
                    logprobs=logprobs_BT[row, :length].to("cpu", copy=True).numpy(),
                    temperature=sampling.temperature,
                    weights_version=version,
                    draw=request.draw,
                )
            )

        for step in range(steps):
            if abandoned.is_set():
                return
            B = cache.active
            seen = torch.arange(cache.column + 1, device=device) >= start_B[:B, None] if padded else None
            logits_BV = self.model(
                input_ids=current_B[:B, None],
                attention_mask=seen,
                position_ids=(cache.column - start_B[:B])[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1, : self._vocab_size]
            current_B, logprobs_BT[:B, step] = sample_tokens(logits_BV, uniforms_BT[:B, step], sampling)
            ids_BT[:B, step] = current_B
            written = current_B.tolist()
            for row in reversed(range(B)):
                if written[row] not in stop_ids:
                    continue
                finish(row, step + 1, "stop")
                cache.drop_row(row)
                last = cache.active
                order[row] = order[last]
                for rows in (start_B, uniforms_BT, current_B, ids_BT, logprobs_BT):
                    rows[row] = rows[last]
            if not cache.active:
                return
            cache.column += 1
        for row in range(cache.active):
            finish(row, steps, "length")

    def _prefill(self, requests: list[_Request], cache: RowCache, device: torch.device, abandoned: threading.Event) -> None:
        """Read every distinct prompt once, all but its last token, which the first step of the loop reads."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, request in enumerate(requests):
            rows_of.setdefault(request.prompt.token_ids[:-1], []).append(row)
        prompts = [(ids, rows) for ids, rows in sorted(rows_of.items(), key=lambda item: len(item[0])) if ids]
        while prompts and not abandoned.is_set():
            M = len(prompts[-1][0])
            chunk = prompts[-max(1, _PREFILL_TOKENS // M) :]
            del prompts[-len(chunk) :]
            input_ids = torch.tensor([ids + (self._pad_token_id,) * (M - len(ids)) for ids, _ in chunk], device=device)
            cache.targets = [(rows, len(ids)) for ids, rows in chunk]
            self.model(
                input_ids=input_ids,
                position_ids=torch.arange(M, device=device)[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache.targets = None
