"""Rollouts by transformers, with the model that is being trained: no second copy of the weights, no other process.

A decode loop of its own instead of ``model.generate`` (see `decode`): the cache is written in place, a prompt asked several times is read
once, a finished rollout leaves the batch at once and a waiting prompt takes its place, so that a straggler costs one row and not the
whole batch.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bbopd.errors import DataError, ModelError
from bbopd.rollouts.cache import grouped_attention
from bbopd.rollouts.decode import Decoder, Limits
from bbopd.rollouts.requests import Requests
from bbopd.types import Prompt, Rollout, Sampling

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


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
        Rollouts written at a time, prompts that may wait meanwhile, and those collected before writing starts.
    max_batch_tokens
        Bound of rows times columns of one batch, hence of the cache: 46 KB a token for a 135M-parameter model in float32.
    vocab_size
        Ids from there on only pad the head and are never sampled; None: all are tokens.
    compute_dtype
        Where it is not the weights' own, passes run under autocast.
    candidates
        Ids of every token to name in the rollout (``candidate_ids``): the student's best, and the token itself; 0 names none.
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
        candidates: int = 0,
    ) -> None:
        self.model = model
        self.version = 0
        self._config = model.config.get_text_config(decoder=True)
        kinds = set(getattr(self._config, "layer_types", None) or ()) - _ATTENTION_LAYERS
        if kinds:
            raise ModelError(f"engine hf keeps keys and values only; this model has layers of kind {', '.join(sorted(kinds))}")
        self._stop_ids = frozenset(eos_token_ids)
        self._limits = Limits(rows=max_batch, tokens=max_batch_tokens, vocab_size=vocab_size, pad_token_id=pad_token_id)
        weights_dtype = next(model.parameters()).dtype
        self._autocast_dtype = compute_dtype if compute_dtype not in (None, weights_dtype) else None
        self._candidates = candidates
        self._in_use, self._next = threading.Lock(), threading.Lock()

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
        loop = asyncio.get_running_loop()
        requests = Requests(self._limits.rows)
        finished: asyncio.Queue[Rollout | None] = asyncio.Queue()  # no longer than the stream; a reader that is slow holds nothing up
        abandoned = threading.Event()

        def emit(rollout: Rollout | None) -> None:
            loop.call_soon_threadsafe(finished.put_nowait, rollout)

        def work() -> None:
            try:
                self._decode(requests, sampling, emit, abandoned)
            finally:
                emit(None)

        def stop_where_it_failed(fed: asyncio.Task[None]) -> None:
            if not fed.cancelled() and fed.exception() is not None:
                abandoned.set()

        feeding = asyncio.create_task(requests.feed(prompts, partial(self._check_length, sampling=sampling)))
        feeding.add_done_callback(stop_where_it_failed)
        worker = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            while (rollout := await finished.get()) is not None:
                yield rollout
            await worker
            await feeding
        finally:  # a cancelled or closed generator leaves no thread behind in the trainer's model
            abandoned.set()
            feeding.cancel()
            requests.close()
            await asyncio.wait([worker, feeding])
            worker.exception()  # seen, where nobody waits for it any more

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy ``weights`` in (those that already are the model's own are left alone) and call them ``version``.

        Waits for the rollouts being written, and holds back those that are not begun. Raises `ModelError` for a name or shape the model
        does not have.
        """
        await asyncio.to_thread(self._load, weights, version)

    def _load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        own = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers(remove_duplicate=False))
        with self._model_taken(), torch.no_grad():
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

    def _decode(self, requests: Requests, sampling: Sampling, emit: Callable[[Rollout], None], abandoned: threading.Event) -> None:
        """Answer all requests, one batch after another; between two batches others may have the model."""
        while (first := requests.take_first(self._limits.rows)) and not abandoned.is_set():
            with self._model_taken(), self._sampling_mode():
                Decoder(
                    self.model,
                    self._limits,
                    sampling,
                    stop_ids=self._stop_ids | set(sampling.stop_token_ids),
                    version=self.version,
                    candidates=self._candidates,
                    cache_dtype=self._autocast_dtype,
                    emit=emit,
                    is_wanted=self._next.locked,
                    abandoned=abandoned,
                ).run(first, requests)

    @contextmanager
    def _model_taken(self) -> Iterator[None]:
        """Hold the model. Whoever waits for it holds ``_next``, which keeps who had it last from taking it again first."""
        with self._next:
            self._in_use.acquire()
        try:
            yield
        finally:
            self._in_use.release()

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
