"""The decode loop: rows leave the batch when their answer ends, and waiting prompts take their place.

All rows end at the same column of the cache, so that a step writes one column. A row that joins is put there by its end.

Shapes: ``B`` active rows, ``R`` rows there is room for, ``M`` prompt tokens, ``T`` new tokens, ``V`` vocabulary, ``K`` candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bbopd.rollouts.cache import RowCache
from bbopd.rollouts.candidates import with_own_tokens
from bbopd.rollouts.requests import Request, Requests
from bbopd.rollouts.sampling import draw_uniforms, sample_tokens
from bbopd.types import FinishReason, Rollout, Sampling

_PREFILL_TOKENS = 2048
_SPARE_COLUMNS = 64  # steps between two moves of the cache, where rows join
_JOIN_SHARE = 8  # one row in so many must be free before others join: a prefill costs about a step


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine allows a batch: rows, rows times columns, and ids below ``vocab_size`` (None: all)."""

    rows: int
    tokens: int
    vocab_size: int | None
    pad_token_id: int


class Decoder:
    """Writes one batch until it is empty; every finished rollout goes to ``emit``.

    ``is_wanted`` says that somebody waits for the weights: then no more rows join.
    """

    def __init__(
        self,
        model: Any,
        limits: Limits,
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        version: int,
        candidates: int,
        cache_dtype: torch.dtype | None,
        emit: Callable[[Rollout], None],
        is_wanted: Callable[[], bool],
        abandoned: threading.Event,
    ) -> None:
        self._model, self._limits, self._sampling = model, limits, sampling
        self._stop_ids, self._version, self._cache_dtype = stop_ids, version, cache_dtype
        self._candidates = candidates
        self._emit, self._is_wanted, self._abandoned = emit, is_wanted, abandoned
        self._device = next(model.parameters()).device

    def run(self, first: Sequence[Request], requests: Requests) -> None:
        """Answer ``first``, and of ``requests`` those that find a free row and are no longer than the longest of ``first``."""
        first = sorted(first, key=lambda request: (-len(request.prompt.token_ids), request.draw))
        steps = self._sampling.max_new_tokens
        longest = len(first[0].prompt.token_ids)
        rows = self._rows_of(longest - 1 + steps + _SPARE_COLUMNS)
        if len(first) <= rows and requests.is_over:  # nobody will join
            rows, spare = min(len(first), self._rows_of(longest - 1 + steps)), 0
        else:
            spare = _SPARE_COLUMNS
        requests.put_back(first[rows:])
        self._begin(rows, longest, spare)
        self._join(first[:rows])
        while self._cache.active and not self._abandoned.is_set():
            self._step()
            free = rows - self._cache.active
            if free * _JOIN_SHARE >= rows and self._cache.active and not requests.is_over and not self._is_wanted():
                self._join(requests.take(free, lambda request: len(request.prompt.token_ids) <= longest))

    def _rows_of(self, columns: int) -> int:
        return min(self._limits.rows, max(1, self._limits.tokens // columns))

    def _begin(self, rows: int, longest: int, spare: int) -> None:
        steps, device = self._sampling.max_new_tokens, self._device
        layers = self._model.config.get_text_config(decoder=True).num_hidden_layers
        self._cache = RowCache(layers, rows, longest - 1 + steps + spare, longest - 1, self._cache_dtype)
        self._cache.active = 0
        self._requests: list[Request] = []
        self._starts_R = torch.zeros(rows, dtype=torch.long, device=device)
        self._counts_R = torch.zeros(rows, dtype=torch.long, device=device)  # tokens written
        self._current_R = torch.zeros(rows, dtype=torch.long, device=device)
        self._uniforms_RT = torch.zeros(rows, steps, dtype=torch.float64, device=device)
        self._ids_RT = torch.zeros(rows, steps, dtype=torch.long, device=device)
        self._logprobs_RT = torch.zeros(rows, steps, device=device)
        self._candidates_RTK = torch.zeros(rows, steps, self._candidates, dtype=torch.int32, device=device)

    # ------------------------------------------------------------ rows come and go

    def _join(self, requests: Sequence[Request]) -> None:
        """Read the prompts, all but their last tokens, and put them in the rows after the active ones."""
        if not requests:
            return
        cache, before = self._cache, self._cache.active
        missing = max(len(request.prompt.token_ids) for request in requests) - 1 - cache.column
        if missing > 0:
            self._move(missing)
        for row, request in enumerate(requests, start=before):
            ids = request.prompt.token_ids
            self._requests.append(request)
            self._starts_R[row] = cache.column - (len(ids) - 1)
            self._current_R[row] = ids[-1]
            self._uniforms_RT[row] = draw_uniforms(self._sampling.seed, request.draw, self._sampling.max_new_tokens)
        self._counts_R[before : before + len(requests)] = 0
        self._prefill(requests, before)
        cache.active += len(requests)
        self._note_starts()

    def _prefill(self, requests: Sequence[Request], before: int) -> None:
        """Read every distinct prompt once, all but its last token, which the next step reads."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, request in enumerate(requests, start=before):
            rows_of.setdefault(request.prompt.token_ids[:-1], []).append(row)
        prompts = [(ids, rows) for ids, rows in sorted(rows_of.items(), key=lambda item: len(item[0])) if ids]
        while prompts and not self._abandoned.is_set():
            M = len(prompts[-1][0])
            chunk = prompts[-max(1, _PREFILL_TOKENS // M) :]
            del prompts[-len(chunk) :]
            padded = [ids + (self._limits.pad_token_id,) * (M - len(ids)) for ids, _ in chunk]
            self._cache.targets = [(rows, len(ids)) for ids, rows in chunk]
            self._model(
                input_ids=torch.tensor(padded, device=self._device),
                position_ids=torch.arange(M, device=self._device)[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache.targets = None

    def _finish(self, row: int, reason: FinishReason) -> None:
        """Hand the answer of ``row`` out; the last active row takes its place."""
        request, length = self._requests[row], int(self._counts_R[row])
        candidate_ids = self._candidates_RTK[row, :length].to("cpu", copy=True).numpy()
        self._emit(
            Rollout(
                rollout_id=f"{request.prompt.prompt_id}#{request.draw}",
                prompt=request.prompt,
                token_ids=tuple(self._ids_RT[row, :length].tolist()),
                finish_reason=reason,
                logprobs=self._logprobs_RT[row, :length].to("cpu", copy=True).numpy(),
                temperature=self._sampling.temperature,
                weights_version=self._version,
                draw=request.draw,
                candidate_ids=candidate_ids if self._candidates else None,
            )
        )
        self._cache.drop_row(row)
        last = self._cache.active
        self._requests[row] = self._requests[last]
        del self._requests[last]
        for rows in self._of_rows():
            rows[row] = rows[last]

    def _of_rows(self) -> tuple[Tensor, ...]:
        return (
            self._starts_R,
            self._counts_R,
            self._current_R,
            self._uniforms_RT,
            self._ids_RT,
            self._logprobs_RT,
            self._candidates_RTK,
        )

    def _move(self, by: int) -> None:
        self._cache.move(by)
        self._starts_R += by

    def _note_starts(self) -> None:
        starts_B = self._starts_R[: self._cache.active]
        self._cache.first = int(starts_B.min()) if len(starts_B) else 0
        self._is_ragged = bool((starts_B != self._cache.first).any())

    # ------------------------------------------------------------ one token for every row

    def _step(self) -> None:
        cache = self._cache
        if cache.column == cache.columns:  # the longest row is shorter than that, as rows join only where columns are spare
            self._move(-cache.first)
            self._note_starts()
        B = cache.active
        starts_B1 = self._starts_R[:B, None]
        logits_BV = self._model(
            input_ids=self._current_R[:B, None],
            attention_mask=torch.arange(cache.first, cache.column + 1, device=self._device) >= starts_B1 if self._is_ragged else None,
            position_ids=cache.column - starts_B1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1, : self._limits.vocab_size]
        rows_B, counts_B = torch.arange(B, device=self._device), self._counts_R[:B]
        best_BK = logits_BV.topk(self._candidates).indices if self._candidates else None  # drawing overwrites the logits
        ids_B, logprobs_B = sample_tokens(logits_BV, self._uniforms_RT[rows_B, counts_B], self._sampling)
        if best_BK is not None:
            self._candidates_RTK[rows_B, counts_B] = with_own_tokens(best_BK, ids_B).int()
        self._current_R[:B] = self._ids_RT[rows_B, counts_B] = ids_B
        self._logprobs_RT[rows_B, counts_B] = logprobs_B
        self._counts_R[:B] += 1
        written, lengths = ids_B.tolist(), self._counts_R[:B].tolist()
        for row in reversed(range(B)):
            if written[row] in self._stop_ids:
                self._finish(row, "stop")
            elif lengths[row] == self._sampling.max_new_tokens:
                self._finish(row, "length")
        cache.column += 1
        if cache.active < B:
            self._note_starts()
