"""``python -m benchmarks.objectives``: does each objective lower what it minimises, on a real model, in minutes, whatever the seed?

One student, 20 of SmolLM2-135M's 30 layers after a short cold start, is trained as by ``bbopd distill`` once for each objective and seed,
with the same budget. A teacher process (``bbopd serve``) answers all runs. Before and after, `objective_measures` measures it on held-out
prompts. A run whose measures lie in ``--work`` is not run again; the table is of all that lie there.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbopd.config import ServeConfig
from bbopd.errors import BbopdError
from bbopd.teachers.process import TeacherProcess
from bbopd.types import LEVELS, Level
from benchmarks.grader import CRITERION, grading
from benchmarks.machine import describe
from benchmarks.objective_measures import NEW_TOKENS, TOP_K, Kind, Values, Yardstick, compare, question_data, remembered, text_data
from benchmarks.objective_models import ANSWER_TOKENS, distill, prepare

SEQUENCES = 16  # of an update
UPDATES = 12
LEARNING_RATE = 1e-4
RESULTS = Path(__file__).parent / "results"
SHOWN = {
    "text_forward_kl": "KL(p‖q), text",
    "own_forward_kl": "KL(p‖q), own",
    "own_reverse_kl": "KL(q‖p), own",
    "own_candidates": "KL(q‖p) on candidates, own",
    "own_jsd": "JSD, own",
    "own_aligned": "KL, common tokens, own",
    "bits_per_byte": "bits per byte, text",
    "answer_bits_per_byte": "bits per byte, answers",
    "grade": "grade",
}
"""Measures of the second table."""


@dataclass(frozen=True, slots=True)
class Arm:
    """An objective, what its teacher tells, and the measure that it is to improve."""

    target: str
    settings: dict[str, dict[str, Any]]
    says: str
    """The measure in words, for the table."""
    teacher: str = "teacher"
    asks: bool = False
    """Trains on questions and not on running text."""
    lower_is_better: bool = True


def _on(level: str, name: str, share: float = 1.0, **more: Any) -> dict[str, dict[str, Any]]:
    teacher = {"signal": level} | ({"topk": TOP_K} if level in ("topk", "candidates") else {})
    return {"objective": {"name": name, **more}, "teacher": teacher, "rollouts": {"on_policy_fraction": share}}


ARMS: dict[str, Arm] = {
    "forward_kl": Arm("text_forward_kl", _on("full", "forward_kl", 0.5), "KL(p‖q), held-out text"),
    "forward_kl, top 64": Arm("text_forward_kl", _on("topk", "forward_kl", 0.5), "KL(p‖q), held-out text"),
    "reverse_kl": Arm("own_reverse_kl", _on("full", "reverse_kl"), "KL(q‖p), own text"),
    "reverse_kl, 64 candidates": Arm("own_candidates", _on("candidates", "reverse_kl"), "KL(q‖p) on 64 candidates and the rest, own text"),
    "jsd": Arm("own_jsd", _on("full", "jsd"), "JSD, own text"),
    "skew_forward_kl": Arm("own_skew_forward_kl", _on("full", "skew_forward_kl"), "KL(p‖0.1 p + 0.9 q), own text"),
    "skew_reverse_kl": Arm("own_skew_reverse_kl", _on("full", "skew_reverse_kl"), "KL(q‖0.1 q + 0.9 p), own text"),
    "mixed, top 64": Arm("mixed", _on("topk", "mixed", 0.5), "mean of its two divergences, held-out and own text"),
    "policy_gradient, 1 logprob": Arm("own_reverse_kl", _on("sampled", "policy_gradient"), "KL(q‖p), own text"),
    "policy_gradient, baseline": Arm("own_reverse_kl", _on("candidates", "policy_gradient", baseline="kl"), "KL(q‖p), own text"),
    "aligned, other tokens": Arm("own_aligned", _on("topk", "aligned"), "KL(p‖q) on common tokens, own text", teacher="other_tokens"),
    "sft": Arm("bits_per_byte", _on("none", "sft"), "bits per byte, held-out text"),
    "seqkd": Arm("answer_bits_per_byte", _on("text", "seqkd"), "bits per byte, held-out answers of the teacher", asks=True),
    "verbal": Arm("grade", _on("text", "verbal"), "mean grade, 1 to 10", teacher="grader", asks=True, lower_is_better=False),
    "verbal, KL to the start": Arm(
        "grade", _on("text", "verbal", kl_weight=0.5), "mean grade, 1 to 10", teacher="grader", asks=True, lower_is_better=False
    ),
}


def config_of(name: str, seed: int, folder: Path, target: str, learning_rate: float) -> dict[str, Any]:
    """A run's configuration: the same budget of trained tokens for all, all of it the objective's own."""
    arm = ARMS[name]
    objective, teacher = dict(arm.settings["objective"]), dict(arm.settings["teacher"])
    is_cross_entropy = objective["name"] in ("sft", "seqkd")
    if not is_cross_entropy:
        objective |= {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": 1.0, "ramp": 0}
    if teacher["signal"] != "none":
        teacher |= {"target": target, "timeout": 3600}
    if arm.teacher == "other_tokens":
        teacher["tokenizer"] = str(folder / "other_tokens")
    if objective["name"] == "seqkd":
        teacher["answers"] = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0.7}
    if objective["name"] == "verbal":
        teacher |= {"api": {"scoring": "none", "writing": "chat"}, "answers": {"max_new_tokens": 16, "top_k": 1}}
        teacher["grading"] = {"criteria": [{"text": CRITERION}], "scale": [1, 10]}
    batch = SEQUENCES * NEW_TOKENS
    return {
        "student": {"model": str(folder / "student")},
        "teacher": teacher,
        "rollouts": {
            "per_update": SEQUENCES,
            "samples_per_prompt": 8 if objective["name"] == "verbal" else 1,
            "max_new_tokens": NEW_TOKENS,
            "max_staleness": 0,
            **arm.settings["rollouts"],
        },
        "objective": objective,
        "train": {
            "batch_tokens": batch,
            "micro_batch_tokens": 2048,
            "max_seq_len": 256,
            "lr": learning_rate,
            "warmup": 1,
            "on_policy_tokens": 10 * batch * UPDATES,
            "labelled_tokens": batch * UPDATES if is_cross_entropy else None,
            "total_steps": UPDATES,
            "checkpoint_every": 1000,
            "seed": seed,
        },
        "data": {
            **(question_data(folder) if arm.asks else text_data(folder)),
            "filters": {"min_tokens": 1, "max_repetition": 1.0, "reject_duplicates": False},
        },
        "eval": {"sequences": 1, "rollouts": 1, "max_new_tokens": 1},
    }


@contextmanager
def teaching(name: str, folder: Path, levels: tuple[Level, ...] = LEVELS) -> Iterator[str]:
    """The address of a teacher: the grader in this process, or a `bbopd serve` of the model of that name."""
    if name == "grader":
        with grading() as target:
            yield target
        return
    serve = ServeConfig(model=str(folder / name), levels=levels)
    process = asyncio.run(TeacherProcess.start(serve, log_path=folder / f"serve_{name}.log", timeout=600))
    try:
        yield process.target
    finally:
        process.stop()


def kinds_of(name: str) -> tuple[Kind, ...]:
    """What is measured of a run: what it trains on."""
    if ARMS[name].asks:
        return ("questions",)
    return ("text", "aligned") if ARMS[name].teacher == "other_tokens" else ("text",)


def run_arm(name: str, seed: int, folder: Path, target: str, learning_rate: float, yardstick: Yardstick) -> dict[str, Any]:
    """What `describe_run` needs of one run; kept in its folder."""
    output = folder / "runs" / f"{re.sub('[^a-z0-9]+', '_', name)}-seed{seed}"
    kept = output.with_suffix(".json")
    if kept.exists():
        return json.loads(kept.read_text())
    began = time.process_time()
    distill(config_of(name, seed, folder, target, learning_rate), output)
    seconds = time.process_time() - began
    summary = json.loads((output / "summary.json").read_text())
    found = {
        "arm": name,
        "seed": seed,
        "learning_rate": learning_rate,
        "tokens": summary["tokens"]["trained"],
        "seconds": round(seconds, 1),
        "values": yardstick.measure(output / "model", kinds_of(name)),
        **describe(module="benchmarks.objectives"),
    }
    kept.write_text(json.dumps(found))
    shutil.rmtree(output)
    return found


# ---------------------------------------------------------------- the table


def rows_of(found: list[dict[str, Any]], start: Values) -> list[dict[str, Any]]:
    """A row for every run and measure; ``is_target`` says which is the one that its objective is to improve."""
    rows = []
    for one in found:
        arm = ARMS[one["arm"]]
        for measure, after in one["values"].items():
            change = compare(start[measure], after)
            rows.append(
                {
                    "arm": one["arm"],
                    "seed": one["seed"],
                    "measure": measure,
                    "is_target": measure == arm.target,
                    "before": round(change.before, 4),
                    "after": round(change.after, 4),
                    "change": round(change.change, 4),
                    "standard_error": round(change.standard_error, 4),
                    "documents": change.documents,
                    "verdict": change.verdict(lower_is_better=measure != "grade"),
                    **{name: one[name] for name in ("tokens", "seconds", "learning_rate", "processor", "torch", "date", "command")},
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The page, from rows alone."""
    targets = [row for row in rows if row["is_target"]]
    names = [name for name in ARMS if any(row["arm"] == name for row in targets)]
    first = targets[0]
    lines = [
        "# What each objective does to its own measure",
        "",
        f"{first['processor']}, torch {first['torch']}, {max(row['date'] for row in targets)}; "
        f"{UPDATES} updates of {SEQUENCES} sequences, learning rate {first['learning_rate']:g}.",
        "Means of documents and the standard error of the difference, paired by document; processor seconds, without the teacher's.",
        "",
        "| objective | its measure | seed | before | after | change | tokens | seconds | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        for row in sorted((row for row in targets if row["arm"] == name), key=lambda row: row["seed"]):
            lines.append(
                f"| {name} | {ARMS[name].says} | {row['seed']} | {row['before']:.3f} | {row['after']:.3f} | "
                f"{row['change']:+.3f} ± {row['standard_error']:.3f} | {row['tokens']:,} | {row['seconds']:.0f} | {row['verdict']} |"
            )
    shown = [name for name in SHOWN if any(row["measure"] == name for row in rows)]
    lines += ["", "Every run by every measure, the mean of its seeds after training:", ""]
    lines += ["| | " + " | ".join(SHOWN[name] for name in shown) + " |", "|---|" + "---|" * len(shown)]
    starts = {name: next(row["before"] for row in rows if row["measure"] == name) for name in shown}
    lines.append("| before | " + " | ".join(f"{value:.3f}" for value in starts.values()) + " |")
    for arm in names:
        mine = [row for row in rows if row["arm"] == arm]
        cells = [f"{_mean_after(mine, name):.3f}" if any(row["measure"] == name for row in mine) else "–" for name in shown]
        lines.append(
            f"| {arm} | "
            + " | ".join(f"**{cell}**" if name == ARMS[arm].target else cell for name, cell in zip(shown, cells, strict=True))
            + " |"
        )
    return "\n".join(lines) + "\n"


def _mean_after(rows: list[dict[str, Any]], measure: str) -> float:
    return statistics.fmean(row["after"] for row in rows if row["measure"] == measure)


def publish(rows: list[dict[str, Any]], results: Path, machine: str) -> Path:
    folder = results / machine
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "objectives.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    page = folder / "objectives.md"
    page.write_text(table(rows))
    return page


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objectives", description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="models and runs (default runs/objectives)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help=f"of all runs (default {LEARNING_RATE:g})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="keep <machine>/objectives.csv and .md there")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    folder = options.work.resolve()
    prepare(folder, "teacher", "other_tokens", "questions.jsonl", "student")
    yardstick = Yardstick(folder)
    start = remembered(folder / "start.json", lambda: yardstick.measure(folder / "student"))
    names = options.only or list(ARMS)
    failed = 0
    for teacher in dict.fromkeys(ARMS[name].teacher for name in names):
        with teaching(teacher, folder) as target:
            for seed in options.seeds:
                for name in (name for name in names if ARMS[name].teacher == teacher):
                    try:
                        one = run_arm(name, seed, folder, target, options.lr, yardstick)
                    except BbopdError as error:
                        failed += 1
                        print(f"{name}, seed {seed}: {error}", flush=True)
                        continue
                    change = compare(start[ARMS[name].target], one["values"][ARMS[name].target])
                    went = f"{change.before:.3f} to {change.after:.3f} (± {change.standard_error:.3f})"
                    print(f"{name}, seed {seed}: {went}, {one['seconds']:.0f} s", flush=True)
    found = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    if found:
        print(publish(rows_of(found, start), options.results, found[0]["machine"]).read_text())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
