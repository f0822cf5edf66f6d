"""The decode loop's memory: keys and values in place, and attention that reads them without copying.

``generate`` in transformers concatenates the whole cache at every token and repeats every key for every query head of its group;
here each step writes one column into a fixed block, a finished row is overwritten by the last one, and the query heads of a group are
attended as if they were positions.

Shapes: ``B`` rows, ``H`` key heads, ``G`` query heads of one key head, ``C`` columns, ``D`` head width, ``M`` prompt tokens of a prefill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "bbopd_grouped_sdpa"


def grouped_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """SDPA for transformers; one new token a row (query [B, H*G, 1, D]) never repeats ``key`` and ``value`` [B, H, C, D]."""
    B, heads, length, D = query.shape
    H = key.shape[1]
    scaling = options.get("scaling")
    if length != 1 or heads == H or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    out_BHGD = nn.functional.scaled_dot_product_attention(
        query.reshape(B, H, heads // H, D), key, value, attn_mask=attention_mask, scale=scaling
    )
    return out_BHGD.reshape(B, 1, heads, value.shape[-1]), None


AttentionInterface.register(GROUPED, grouped_attention_forward)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def grouped_attention(config: Any) -> Iterator[None]:
    """Let a model that uses SDPA use `grouped_attention_forward` meanwhile; any other implementation is left alone."""
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = before


class _Layer(CacheLayerMixin):
    """One layer's block of keys and values, allocated at its first use; see `RowCache`."""

    is_sliding = False  # sliding layers keep everything too: transformers then masks what has slid out

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def block(states: Tensor) -> Tensor:
            shape = (self.cache.rows, states.shape[1], self.cache.columns, states.shape[3])
            return states.new_zeros(shape, dtype=self.cache.dtype or states.dtype)

        self.keys, self.values = block(key_states), block(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        cache = self.cache
        if cache.targets is not None:
            for source, (rows, length) in enumerate(cache.targets):
                for row in rows:
                    self.keys[row, :, cache.column - length : cache.column] = key_states[source, :, :length]
                    self.values[row, :, cache.column - length : cache.column] = value_states[source, :, :length]
            return key_states, value_states
        self.keys[: cache.active, :, cache.column] = key_states[:, :, 0]
        self.values[: cache.active, :, cache.column] = value_states[:, :, 0]
        read = (slice(cache.active), slice(None), slice(cache.first, cache.column + 1))
        return self.keys[read], self.values[read]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.cache.targets is not None else self.cache.column - self.cache.first

    def get_max_length(self) -> int:
        return self.cache.columns


class RowCache(Cache):
    """Keys and values of ``rows`` sequences that end at the same column, so that each step writes one column.

    Prompts are right-padded where they are computed and stored without their padding, ending before ``column``. While ``targets``
    is set, a forward pass is a prefill: its sequence ``i`` goes to the rows ``targets[i][0]``, with its first ``targets[i][1]``
    tokens. Otherwise a pass adds one token to each of the first ``active`` rows, at ``column``, and reads from ``first`` on, before which
    no active row has anything.
    """

    def __init__(self, layers: int, rows: int, columns: int, column: int, dtype: torch.dtype | None) -> None:
        super().__init__(layers=[_Layer(self) for _ in range(layers)])
        self.rows, self.columns, self.column, self.dtype = rows, columns, column, dtype
        self.active, self.first = rows, 0
        self.targets: Sequence[tuple[Sequence[int], int]] | None = None

    def drop_row(self, row: int) -> None:
        """Forget ``row``: the last active row takes its place."""
        self.active -= 1
        if row == self.active:
            return
        used = slice(self.first, self.column + 1)
        for block in self._blocks():
            block[row, :, used] = block[self.active, :, used]

    def move(self, by: int) -> None:
        """Let every active row end ``by`` columns further on (back, where that is negative)."""
        used, there = slice(self.first, self.column), slice(self.first + by, self.column + by)
        for block in self._blocks():
            block[: self.active, :, there] = block[: self.active, :, used].clone()  # the two may overlap
        self.first, self.column = self.first + by, self.column + by

    def _blocks(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if layer.is_initialized:
                yield layer.keys
                yield layer.values
