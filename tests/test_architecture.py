"""The page on the architecture says what is so: the way of a rollout as a real run takes it, and modules that are there."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

from bbopd.rollouts.hf import HFEngine
from bbopd.teachers.hf import HFBackend
from tests.faults import served
from tests.loop_rig import VOCAB, Rig, run_config
from tests.tiny_models import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def way_of_a_rollout() -> dict[str, CodeType]:
    """The functions of the page's table, in its order, with their code."""
    section = PAGE.partition("## One rollout, from prompt to gradient")[2].partition("\n## ")[0]
    found = {}
    for name in re.findall(r"\| `([\w.]+)` \|$", section, re.MULTILINE):
        parts = name.split(".")
        owner = next(index for index, part in enumerate(parts) if index and (part[0].isupper() or index == len(parts) - 1))
        value = importlib.import_module(f"bbopd.{'.'.join(parts[:owner])}")
        for part in parts[owner:]:
            value = getattr(value, part)
        found[name] = inspect.unwrap(value).__code__
    return found


@contextmanager
def recorded(codes: dict[str, CodeType]) -> Iterator[list[str]]:
    """Every call of these, in any thread that starts within, in order."""
    names, calls = {code: name for name, code in codes.items()}, []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in names:
            calls.append(names[frame.f_code])

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)
        threading.setprofile(None)  # type: ignore[arg-type]


async def test_a_rollout_goes_the_way_of_the_page(tmp_path):
    way = way_of_a_rollout()
    assert len(way) > 15
    sections = {"teacher": {"topk": 8}, "rollouts": {"per_update": 4}, "train": {"cold_start_tokens": 0, "on_policy_tokens": 40}}
    backend = HFBackend(tiny_llama(vocab_size=VOCAB, seed=1), tiny_tokenizer(), name="tiny")
    with recorded(way) as calls:
        async with served(backend) as teacher:
            rig = Rig(run_config(tmp_path / "run", **sections), teacher=teacher)
            assert isinstance(rig.engine, HFEngine)
            assert await rig.run() == "finished"
    later = iter(calls)
    for name in way:
        assert name in later, f"{name} is not called after those above it; calls: {list(dict.fromkeys(calls))}"


def test_every_module_that_the_floors_name_is_there():
    rows = PAGE.partition("## Floors")[2].partition("\n## ")[0]
    there = {path.stem for folder in ("bbopd", "website") for path in (ROOT / folder).rglob("*") if path.suffix in ("", ".py")}
    named = set(re.findall(r"`([a-z_]+)`", rows)) - {"linear_distill", "linear_logprobs"}
    assert len(named) > 150
    assert sorted(named - there) == []
