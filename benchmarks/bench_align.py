"""Claim: two tokenisations of one text are laid side by side, byte for byte, at more than a million tokens a second."""

from __future__ import annotations

import pydoc_data.topics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from bbopd.alignment import SpelledVocabulary, align_tokens, align_tokens_reference
from bbopd.modeling.spelling import Speller
from benchmarks import rates
from benchmarks.conftest import QUICK_ROUNDS, ROUNDS
from tests.test_spelling import large_tokenizer, smollm2

AIM = 1e6
TASK = "SmolLM2's tokens beside those of a vocabulary of 100,500, answers of 1,200 characters: the student's tokens a second"
Pair = tuple[list[int], list[int]]
Align = Callable[[Pair], object]


def answers() -> tuple[list[Pair], SpelledVocabulary, SpelledVocabulary]:
    """Both tokenisations of Python's own documentation, in pieces, and what their ids spell."""
    ours, theirs = (Speller(one, len(one), named=name) for name, one in (("SmolLM2", smollm2()), ("large", large_tokenizer())))
    text = "\n".join(pydoc_data.topics.topics.values())
    pieces = [text[start : start + 1200] for start in range(0, len(text), 1200)]
    return [(ours.encode(piece), theirs.encode(piece)) for piece in pieces], ours.vocabulary, theirs.vocabulary


def gold(ours: SpelledVocabulary, theirs: SpelledVocabulary) -> Align | None:
    """TRL's GOLD, which compares no bytes: from the lengths of what tokens spell; None where TRL is not installed."""
    try:
        from trl.experimental.gold.gold_trainer import ULDLoss
    except ImportError:
        return None
    lengths = [np.diff(vocabulary.offsets).tolist() for vocabulary in (ours, theirs)]

    def offsets(ids: Sequence[int], lengths: list[int]) -> list[tuple[int, int]]:
        ends, total = [0], 0
        for index in ids:
            total += lengths[index]
            ends.append(total)
        return list(pairwise(ends))

    return lambda pair: ULDLoss._align_by_byte_offsets(*(offsets(ids, one) for ids, one in zip(pair, lengths, strict=True)))


def test_alignment(request: pytest.FixtureRequest) -> None:
    quick = request.config.getoption("quick")
    rounds = request.config.getoption("rounds") or (QUICK_ROUNDS if quick else ROUNDS)
    pairs, ours, theirs = answers()
    tokens = sum(len(first) for first, _ in pairs)
    contestants: dict[str, tuple[Align | None, str]] = {
        "bbopd": (lambda pair: align_tokens(pair[0], ours, pair[1], theirs), "C++, bytes compared"),
        "bbopd in Python": (lambda pair: align_tokens_reference(pair[0], ours, pair[1], theirs), "the reference, bytes compared"),
        "TRL GOLD": (gold(ours, theirs), "lengths of tokens alone, in Python"),
    }
    runners = {
        name: rates.Runner(name, note, "" if align is not None else "TRL is not installed") for name, (align, note) in contestants.items()
    }
    for number in range(-1, rounds):  # the first warms up
        for name, (align, _) in contestants.items():
            if align is None:
                continue
            started = time.perf_counter()
            for pair in pairs:
                align(pair)
            if number >= 0:
                runners[name].rates.append(tokens / (time.perf_counter() - started))
    print(rates.publish("align", TASK, list(runners.values()), "1").read_text())
    assert sorted(runners["bbopd"].rates)[rounds // 2] >= AIM
