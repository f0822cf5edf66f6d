"""A model with a third of its layers taken out, and what brings it back to what it was: data and curves of the experiment in
docs/experiments.md.

    python -m benchmarks.compression runs/compression

writes into that folder, once: ``teacher``, SmolLM2-135M-Instruct; ``train.jsonl``, ``development.jsonl`` and ``test.jsonl``, beginnings
of passages of Python's own help with their continuations, no document in two of them; ``test.yaml`` and ``development.yaml``, agreement
with the teacher on them. With ``--publish`` the table of the comparison, and its curves: bits per byte and KL against trained tokens.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bbopd.data.demo_text import demo_topics
from benchmarks.comparisons import publish, write_csv
from benchmarks.objective_models import prepare
from benchmarks.plots import plot_curves

PROMPT_CHARACTERS, RESPONSE_CHARACTERS = 200, 400  # about 48 and 96 tokens
TESTED, CHOSEN_BY = 60, 24  # passages of the test, and for choosing a learning rate
HELD_OUT = 9  # documents of each of the two
ROLLOUTS, NEW_TOKENS = 32, 64

RESULTS = Path(__file__).parent / "results"
SHOWN = {
    "kl_held_out": "KL, held-out text",
    "kl_rollouts": "KL, own text",
    "bits_per_byte": "bits per byte",
    "top1_held_out": "same first choice, held-out text",
    "top1_rollouts": "the same, own text",
}
"""Measures of the table, by what they are called there."""
CURVES = {name: SHOWN[name] for name in ("kl_held_out", "kl_rollouts", "bits_per_byte")}


def write_files(folder: Path, topics: Mapping[str, str], teacher: Mapping[str, Any], seed: int = 0) -> dict[str, int]:
    """All but the teacher; passages by file. ``teacher`` is how the tasks reach it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    parts = {"test": names[:HELD_OUT], "development": names[HELD_OUT : 2 * HELD_OUT], "train": names[2 * HELD_OUT :]}
    limits = {"test": TESTED, "development": CHOSEN_BY}
    written = {}
    for part, chosen in parts.items():
        lines = spread([passages(topics[name], name) for name in chosen], limits.get(part))
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        written[part] = len(lines)
    for part in limits:
        task = {"data": f"{part}.jsonl", "prompt": "prompt", "answer": "response", "cluster": "document", "rollouts": ROLLOUTS}
        task |= {"max_new_tokens": NEW_TOKENS, "teacher": {"signal": "full", **teacher}}
        (folder / f"{part}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return written


def passages(text: str, document: str) -> list[dict[str, str]]:
    """``text`` cut into beginnings and their continuations; what is left at its end is too short, and dropped."""
    length = PROMPT_CHARACTERS + RESPONSE_CHARACTERS
    cuts = [text[start : start + length] for start in range(0, len(text) - length + 1, length)]
    return [{"prompt": cut[:PROMPT_CHARACTERS], "response": cut[PROMPT_CHARACTERS:], "document": document} for cut in cuts]


def spread(documents: Sequence[Sequence[dict[str, str]]], limit: int | None) -> list[dict[str, str]]:
    """Passages, at most ``limit``: the first of each document, then the second of each, so that no document has most of them."""
    longest = max(map(len, documents))
    ordered = [document[place] for place in range(longest) for document in documents if place < len(document)]
    return ordered[:limit]


def curves_of(compared: Path, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Every evaluation of every run, with the tokens trained until then."""
    rows = []
    for arm in arms:
        for folder in sorted((compared / "runs").glob(f"{arm}-*/")):
            updates = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            tokens = {0: 0} | {line["step"]: line["trained_tokens"] for line in updates}
            for line in (folder / "evals.jsonl").read_text(encoding="utf-8").splitlines():
                found = json.loads(line)
                figures = {name: found[name] for name in SHOWN}
                rows.append({"run": folder.name, "arm": arm, "step": found["step"], "tokens": tokens[found["step"]], **figures})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--publish", action="store_true", help="only write the comparison's table and curves into benchmarks/results")
    args = parser.parse_args()
    if args.publish:
        page = publish("benchmarks.compression", args.folder / "compare", RESULTS, SHOWN)
        found = json.loads((args.folder / "compare" / "compare.json").read_text(encoding="utf-8"))
        curves = curves_of(args.folder / "compare", [row["name"] for row in found["rows"] if row["spent"].get("updates")])
        write_csv(page.with_name("compression_curves.csv"), curves)
        plot_curves(curves, CURVES, page.with_suffix(".svg"))
        print(page.read_text(encoding="utf-8"))
        return
    prepare(args.folder, "teacher")
    written = write_files(args.folder, demo_topics(), {"serve": {"model": str(args.folder / "teacher"), "levels": ["full"]}})
    print(f"{', '.join(f'{count:,} {part}' for part, count in written.items())} passages in {args.folder}")


if __name__ == "__main__":
    main()
