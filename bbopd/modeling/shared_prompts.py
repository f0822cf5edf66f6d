"""Hidden states of responses from one packed pass, in which a prompt that several of them answer is run once.

Shape suffixes: ``N`` response tokens of a batch, ``D`` hidden, ``P`` packed tokens, ``S`` sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bbopd.modeling.packed import can_share_prefixes, packed_hidden
from bbopd.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class _Packing:
    """Sequences laid end to end, and the rows that are wanted of them."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    boundaries: list[int] = field(default_factory=lambda: [0])
    prefixes: list[int | None] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], prefix: int | None = None) -> int:
        """Append one sequence, or what goes on from sequence ``prefix``. Returns its first row."""
        start = len(self.ids)
        first = 0 if prefix is None else self.boundaries[prefix + 1] - self.boundaries[prefix]
        self.ids.extend(ids)
        self.positions.extend(range(first, first + len(ids)))
        self.boundaries.append(len(self.ids))
        self.prefixes.append(prefix)
        return start


def response_hidden(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> Tensor:
    """Hidden states [N, D] of the rows that predict a response token; the last token of a sequence predicts none of them.

    A prompt that several rollouts answer is run once, and their responses go on from it.
    """
    packing = _Packing()
    times = Counter(rollout.prompt.token_ids for rollout in rollouts) if can_share_prefixes(model) else Counter[tuple[int, ...]]()
    shared: dict[tuple[int, ...], int] = {}
    for rollout in rollouts:
        prompt = rollout.prompt.token_ids
        if times[prompt] < 2:
            start = packing.add(rollout.all_ids[:-1])
            packing.wanted.extend(range(start + len(prompt) - 1, start + len(rollout.all_ids) - 1))
            continue
        if prompt not in shared:
            shared[prompt] = len(packing.prefixes)
            packing.add(prompt)
        packing.wanted.append(packing.boundaries[shared[prompt] + 1] - 1)
        if len(rollout) > 1:
            start = packing.add(rollout.token_ids[:-1], prefix=shared[prompt])
            packing.wanted.extend(range(start, start + len(rollout) - 1))
    device = model.device
    hidden_PD = packed_hidden(
        model,
        torch.tensor(packing.ids, device=device),
        torch.tensor(packing.positions, device=device),
        torch.tensor(packing.boundaries, dtype=torch.int32),
        packing.prefixes if shared else None,
    )
    return hidden_PD[torch.tensor(packing.wanted, device=device)]
