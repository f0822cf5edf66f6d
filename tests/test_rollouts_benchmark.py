"""The rollouts benchmark on a tiny model: both sides write what they are asked to, and only tokens up to an answer's end count."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.rollouts import Entry, Task, compete, contestants, ratio, write_with_generate, write_with_static_cache
from tests.tiny_models import tiny_llama

TASK = Task(model=tiny_llama(), prompts=((5, 6, 7), (8,), (9, 10)), new_tokens=6, eos_token_ids=(), pad_token_id=0)


def test_everybody_writes_as_many_tokens() -> None:
    entries = contestants()
    assert [entry.write(TASK, 1) for entry in entries] == [18, 18, 18]
    compete(TASK, entries, rounds=2)
    assert all(len(entry.rates) == 2 for entry in entries)
    assert entries[0].median > 0


def test_padding_after_an_end_does_not_count() -> None:
    every_token = tuple(range(TASK.model.config.vocab_size))
    task = replace(TASK, eos_token_ids=every_token)  # whatever is written first ends the answer
    assert [write(task, 1) for write in (write_with_generate, write_with_static_cache)] == [3, 3]
    some = replace(TASK, eos_token_ids=tuple(range(100)), new_tokens=40)
    assert 3 <= write_with_generate(some, 1) < 120


def test_the_ratio_is_paired_and_to_the_fastest() -> None:
    ours, slow, fast = (
        Entry(name, lambda task, seed: 0, rates) for name, rates in (("a", [9.0, 4.0, 1.0]), ("b", [1, 1, 1]), ("c", [10, 2, 2]))
    )
    assert ratio([ours, slow, fast]) == 0.9
    assert torch.is_grad_enabled()
