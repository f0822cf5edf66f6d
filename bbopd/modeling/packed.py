"""Run a model's body over sequences laid end to end: no padding, no attention across sequences, no logits.

Shape suffixes: ``P`` packed tokens, ``S`` sequences, ``L`` tokens of one sequence, ``H`` heads, ``D`` hidden (or head) width.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface

from bbopd.errors import ModelError
from bbopd.modeling.head import undisturbed
from bbopd.modeling.layers import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IMPLEMENTATION = "bbopd_packed"
_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
_packable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(slots=True)
class _Packing:
    """Travels from the call of the body to each attention layer, also when activation checkpointing runs a layer again."""

    lengths: list[int]
    prefixes: list[int | None]  # the sequence that each one goes on from, seeing all of it
    windows: list[int | None] = field(default_factory=list)  # what each attention layer asked for
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    runs: list[tuple[int, int]] = field(default_factory=list)  # neighbours of one length, attended to in one call: that, and how many

    def __post_init__(self) -> None:
        if any(prefix is not None for prefix in self.prefixes):
            self.runs = [(length, 1) for length in self.lengths]
        else:
            self.runs = [(length, len(list(same))) for length, same in itertools.groupby(self.lengths)]


class _CannotPackError(Exception):
    """The model asks of attention what this file does not do."""


def can_pack(model: PreTrainedModel) -> bool:
    """Whether `packed_hidden` lays this model's sequences end to end; else it pads them."""
    return _can_pack(decoder(model))


def settle_packing(model: PreTrainedModel, packs: bool) -> None:
    """What `can_pack` has found of the same model with its values: of one without, or of slices, there is nothing to compare."""
    _packable[decoder(model)] = packs


def can_share_prefixes(model: PreTrainedModel) -> bool:
    """Whether `packed_hidden` takes ``prefixes`` for this model."""
    body = decoder(model)
    return _can_pack(body) and not _is_flash(body)


def packed_hidden(
    model: PreTrainedModel,
    input_ids_P: Tensor,
    position_ids_P: Tensor,
    boundaries_S1: Tensor,
    prefixes: Sequence[int | None] | None = None,
) -> Tensor:
    """Hidden states [P, D] after the final norm, differentiable, as if each sequence had been run alone.

    Parameters
    ----------
    input_ids_P, position_ids_P
        int64 on the model's device; positions start from 0 in every sequence.
    boundaries_S1
        Cumulative sequence lengths from 0 to P, integer, on any device.
    prefixes
        For each sequence the number of the one before it that it goes on from, or None: its tokens see all of that one, and its
        positions go on from there, so that what several sequences begin with is run once. A prefix has none itself. Only where
        `can_share_prefixes`.

    Models that go through transformers' attention interface are packed (with the variable-length kernel where they were loaded with
    flash_attention_2). Others (recurrent layers, chunked attention, sinks) are padded instead: the same values, more work. Which of
    the two is decided once per model, by comparing both on a few tokens.

    Raises
    ------
    ModelError
        Activation checkpointing outside `packed_attention`: the layers would run again without knowing of the packing.
    """
    body = decoder(model)
    lengths = [end - start for start, end in itertools.pairwise(boundaries_S1.tolist())]
    assert prefixes is None or can_share_prefixes(model), "ask can_share_prefixes first"
    if body.is_gradient_checkpointing and body.training and torch.is_grad_enabled() and body.config._attn_implementation != _IMPLEMENTATION:
        raise ModelError("activation checkpointing with packed sequences needs the backward pass inside packed_attention(model)")
    if not _can_pack(body):
        return _padded(body, input_ids_P, lengths)
    if _is_flash(body):
        return _flash(body, input_ids_P, position_ids_P, boundaries_S1, max(lengths))
    return _packed(body, input_ids_P, position_ids_P, _Packing(lengths, list(prefixes or [None] * len(lengths))))


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Hold a model in packed attention, over the backward pass too where activations are checkpointed.

    Outside, the model keeps the attention that it was loaded with, so ``generate`` works as ever. One thread per model.
    """
    body = decoder(model)
    if not _can_pack(body) or _is_flash(body):
        yield
        return
    with _attention(body, _IMPLEMENTATION):
        yield


@contextmanager
def _attention(body: PreTrainedModel, implementation: str) -> Iterator[None]:
    before = body.config._attn_implementation
    body.config._attn_implementation = implementation
    try:
        yield
    finally:
        body.config._attn_implementation = before


def _packed(body: PreTrainedModel, input_ids_P: Tensor, position_ids_P: Tensor, packing: _Packing) -> Tensor:
    with _attention(body, _IMPLEMENTATION):
        output = body(input_ids=input_ids_P[None], position_ids=position_ids_P[None], use_cache=False, packing=packing)
    return output.last_hidden_state[0]


def _flash(body: PreTrainedModel, input_ids_P: Tensor, position_ids_P: Tensor, boundaries_S1: Tensor, longest: int) -> Tensor:
    bounds = boundaries_S1.to(device=input_ids_P.device, dtype=torch.int32)
    output = body(
        input_ids=input_ids_P[None],
        position_ids=position_ids_P[None],
        use_cache=False,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
    )
    return output.last_hidden_state[0]


def _padded(body: PreTrainedModel, input_ids_P: Tensor, lengths: list[int]) -> Tensor:
    """Padding on the right: causality alone keeps it from the real tokens, in attention and in recurrent layers."""
    ids_SL = nn.utils.rnn.pad_sequence(list(input_ids_P.split(lengths)), batch_first=True)
    is_real_SL = torch.arange(ids_SL.shape[1], device=ids_SL.device) < torch.tensor(lengths, device=ids_SL.device)[:, None]
    hidden_SLD = body(input_ids=ids_SL, attention_mask=is_real_SL.long(), use_cache=False).last_hidden_state
    return hidden_SLD[is_real_SL]


def _is_flash(body: PreTrainedModel) -> bool:
    return "flash" in body.config._attn_implementation


# ---------------------------------------------------------------- may this model be packed?


def _can_pack(body: PreTrainedModel) -> bool:
    if body not in _packable:
        weight = body.get_input_embeddings().weight
        has_values = not (weight.is_meta or isinstance(weight, FakeTensor))  # of shapes alone there is nothing to compare
        _packable[body] = _declares_support(body) and (not has_values or _agrees_with_padding(body))
    return _packable[body]


def _declares_support(body: PreTrainedModel) -> bool:
    layer_types = getattr(body.config, "layer_types", None) or ()
    takes_extras = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(body).forward).parameters.values())
    return bool(getattr(body, "_supports_attention_backend", False)) and takes_extras and set(layer_types) <= _PACKABLE_LAYERS


@torch.no_grad()
def _agrees_with_padding(body: PreTrainedModel) -> bool:
    lengths = [5, 3]
    device = body.get_input_embeddings().weight.device
    ids = torch.linspace(0, body.get_input_embeddings().weight.shape[0] - 1, sum(lengths), device=device).long()
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    with undisturbed(body) as tolerance:
        expected = _padded(body, ids, lengths)
        if _is_flash(body):
            boundaries = torch.tensor([0, *lengths]).cumsum(0)
            found = _flash(body, ids, positions, boundaries, max(lengths))
        else:
            packing = _Packing(lengths, [None] * len(lengths))
            try:
                found = _packed(body, ids, positions, packing)
            except _CannotPackError:
                return False
            if not _asks_for_its_windows(body.config, packing.windows):
                return False
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _asks_for_its_windows(config: Any, asked: list[int | None]) -> bool:
    """Whether the sliding windows of the config reach attention as an argument; some models put them into the mask alone."""
    window = getattr(config, "sliding_window", None)
    if not window:
        return not any(asked)
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [bool(one) for one in asked] == [kind == "sliding_attention" for kind in layer_types]


# ---------------------------------------------------------------- the attention itself


def _packed_attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, H, P, D]
    key: Tensor,  # [1, H / groups, P, D]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packing: _Packing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name in ("s_aux", "position_bias", "head_mask") if others.get(name) is not None]
    if packing is None or unknown or attention_mask is not None or not getattr(module, "is_causal", True):
        raise _CannotPackError
    packing.windows.append(sliding_window)
    outputs = []
    # split, not slices: its backward is one concatenation, where each slice would fill a tensor of full size
    queries, keys, values = (x.split([length * count for length, count in packing.runs], dim=2) for x in (query, key, value))
    for run, (length, count) in enumerate(packing.runs):
        q, k, v = (x[run][0].unflatten(1, (count, length)).transpose(0, 1) for x in (queries, keys, values))
        if (prefix := packing.prefixes[run]) is not None:  # where there are prefixes, a run is one sequence
            k, v = torch.cat((keys[prefix], k), dim=2), torch.cat((values[prefix], v), dim=2)
        mask = _causal_mask(packing, q, k.shape[2], sliding_window)
        if softcap:
            out = _softcapped_attention(q, k, v, mask, scaling, softcap, dropout)
        else:
            grouped = q.shape[1] != k.shape[1]
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling, enable_gqa=grouped
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1)[None])
    return torch.cat(outputs, dim=1), None


def _causal_mask(packing: _Packing, q: Tensor, key_count: int, window: int | None) -> Tensor | None:
    """Mask [L, keys] of the pairs that may attend, the last query being at the last key; None where that is plain causality."""
    length = q.shape[2]
    if window and key_count <= window:
        window = None
    if not window and length == key_count:
        return None
    if (length, key_count, window) not in packing.masks:
        mask = torch.ones(length, key_count, dtype=torch.bool, device=q.device).tril(key_count - length)
        packing.masks[length, key_count, window] = mask.triu(key_count - length + 1 - window) if window else mask
    return packing.masks[length, key_count, window]


def _softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, softcap: float, dropout: float
) -> Tensor:
    """Gemma 2's attention, ``softmax(softcap * tanh(scaled scores / softcap))``, which SDPA has no argument for."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)
    if mask is None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return nn.functional.dropout(weights, p=dropout) @ v


AttentionInterface.register(_IMPLEMENTATION, _packed_attention_forward)
