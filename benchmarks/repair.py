"""A model that learned one narrow thing and forgot others, and what wins these back: data of the experiment in docs/experiments.md.

    python -m benchmarks.repair runs/repair

writes into that folder, once: ``teacher``, SmolLM2-135M-Instruct as it was; ``narrow.jsonl``, additions with their carries written out
(`benchmarks.addition`), to train on nothing else; ``general.jsonl``, short questions with the teacher's answers, to win back the rest;
and three tasks of ``bbopd eval``: ``forgotten.yaml``, agreement with the teacher on questions about subjects that no line of
``general.jsonl`` has, ``skill.yaml``, additions that no line of ``narrow.jsonl`` has, ``prose.yaml``, running text of another kind.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from bbopd.data.demo_text import demo_topics
from benchmarks.addition import additions, scratchpad
from benchmarks.comparisons import publish
from benchmarks.objective_models import ANSWER_TOKENS, prepare

DIGITS = 3
SIZES = {"narrow": 6000, "skill": 60, "prose": 12}  # lines
PROSE_CHARACTERS = 1500
HELD_OUT = ("bridge", "candle", "desert", "dolphin", "feather", "harbour", "island", "museum", "piano", "rainbow", "storm", "village")
"""Subjects of questions that are asked in the test alone."""

RESULTS = Path(__file__).parent / "results"
SHOWN = {
    "kl_held_out": "KL from what it was, its text",
    "kl_rollouts": "the same, own text",
    "bits_per_byte": "bits per byte of its answers",
    "prose.bits_per_byte": "of running text",
    "skill.exact_match": "additions right",
}
"""Measures of the table, by what they are called there."""

Questions = Sequence[tuple[str, str]]


def write_files(folder: Path, questions: Questions, teacher: Mapping[str, Any], sizes: Mapping[str, int] = SIZES, seed: int = 0) -> None:
    """All but the teacher. ``questions`` come with its answers; ``teacher`` is how ``forgotten.yaml`` reaches it."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = additions(DIGITS, seed)
    for name in ("narrow", "skill"):
        taken = islice(pairs, sizes[name])
        _write(folder / f"{name}.jsonl", ({"prompt": f"{a}+{b}=", "response": scratchpad(a, b, DIGITS)} for a, b in taken))
    tested = [is_held_out(question) for question, _ in questions]
    general = [pair for pair, is_tested in zip(questions, tested, strict=True) if not is_tested]
    forgotten = [pair for pair, is_tested in zip(questions, tested, strict=True) if is_tested]
    _write(
        folder / "general.jsonl",
        ({"messages": [{"role": "user", "content": question}], "response": answer} for question, answer in general),
    )
    _write(folder / "forgotten.jsonl", ({"prompt": question, "response": answer} for question, answer in forgotten))
    _write(folder / "prose.jsonl", ({"text": text[:PROSE_CHARACTERS]} for text in islice(demo_topics().values(), sizes["prose"])))
    asked = {"prompt": "prompt", "answer": "response"}
    sizes = {"max_new_tokens": ANSWER_TOKENS, "rollouts": 16}
    _task(folder / "forgotten.yaml", {**asked, "chat": True, **sizes, "teacher": {"signal": "full", **teacher}})
    _task(folder / "skill.yaml", {**asked, "metrics": ["exact_match"], "max_new_tokens": 40})
    _task(folder / "prose.yaml", {"text": "text", "window": 512})


def is_held_out(question: str) -> bool:
    return re.search(rf"\b({'|'.join(HELD_OUT)})\b", question) is not None


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _task(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump({"data": f"{path.stem}.jsonl", **fields}, sort_keys=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--publish", action="store_true", help="only write the comparison's table into benchmarks/results")
    args = parser.parse_args()
    if args.publish:
        print(publish("benchmarks.repair", args.folder / "compare", RESULTS, SHOWN).read_text(encoding="utf-8"))
        return
    prepare(args.folder, "teacher", "questions.jsonl")
    lines = [json.loads(line) for line in (args.folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = [(line["messages"][0]["content"], line["response"]) for line in lines]
    write_files(args.folder, questions, {"serve": {"model": str(args.folder / "teacher"), "levels": ["full"]}})
    print(f"{SIZES['narrow']:,} additions, {len(questions)} questions and three tasks in {args.folder}")


if __name__ == "__main__":
    main()
