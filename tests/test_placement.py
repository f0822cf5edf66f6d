"""Moving a batch to a device moves every tensor in it, the teacher's too, and nothing else."""

from __future__ import annotations

import torch

from bbopd.modeling import to_device
from tests.batches import pack, random_sequences, random_teacher


def test_a_batch_moves_with_its_teacher() -> None:
    sequences = random_sequences(3, seed=1)
    batch = pack(sequences, random_teacher(sequences, seed=2))
    moved = to_device(batch, torch.device("meta"))
    for name in ("input_ids", "position_ids", "boundaries", "target_rows", "target_ids", "labels", "token_weight"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(batch, name).device.type == "cpu"
    assert moved.teacher is not None
    assert type(moved.teacher) is type(batch.teacher)
    assert moved.teacher.logits.device.type == "meta"
    assert (moved.response_tokens, moved.rollout_tokens) == (batch.response_tokens, batch.rollout_tokens)
    again = to_device(batch, torch.device("cpu"))
    assert torch.equal(again.teacher.logits, batch.teacher.logits)
    assert to_device(None, torch.device("meta")) is None
