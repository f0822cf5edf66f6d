"""The task of docs/addition.md: every scratchpad adds up, and no addition is in two files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.addition import SIZES, additions, byte_tokenizer, scratchpad, write_files


def test_scratchpads_by_hand() -> None:
    assert scratchpad(786, 593, 3) == "6+3+0=09;8+9+0=17;7+5+1=13;1379"
    assert scratchpad(1000, 9999, 4) == "0+9+0=09;0+9+0=09;0+9+0=09;1+9+0=10;10999"


def test_every_line_adds_up_and_is_there_once(tmp_path: Path) -> None:
    write_files(tmp_path, digits=3, seed=5)
    prompts = []
    for name, size in SIZES.items():
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == size
        for line in lines:
            first, second = map(int, line["prompt"].removesuffix("=").split("+"))
            *columns, total = line["response"].split(";")
            assert int(total) == int(line["answer"]) == first + second
            carry = 0
            for column, left, right in zip(columns, reversed(str(first)), reversed(str(second)), strict=True):
                terms, result = column.split("=")
                assert terms == f"{left}+{right}+{carry}"
                assert int(result) == sum(map(int, terms.split("+")))
                carry = int(result) // 10
            prompts.append(line["prompt"])
    assert len(set(prompts)) == sum(SIZES.values())


def test_same_seed_same_additions_and_too_few_are_refused() -> None:
    draws = additions(3, 1)
    again = additions(3, 1)
    assert [next(draws) for _ in range(5)] == [next(again) for _ in range(5)]
    with pytest.raises(ValueError, match="2 digits make 8,100 additions"):
        next(additions(2, 0))


def test_the_tokenizer_spells_any_text() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("7+5=é")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "7+5=é"
