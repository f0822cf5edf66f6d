"""``python -m benchmarks.adoption``: does adversarial distillation take on a style from text alone, with a frozen discriminator too?

The teacher is SmolLM2-135M-Instruct behind a system prompt with three examples (a pirate, in one short sentence); the student the same
weights without it. All that passes between them is text. Three arms with the same tokens: ``gad``, ``gad, frozen`` (its discriminator
learns in the warm-up alone), ``seqkd``. Again and again the student answers held-out questions. A run whose figures lie in ``--work`` is
not run again.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bbopd.cli.display import PlainDisplay, make_display
from bbopd.config import RunConfig
from bbopd.data.assemble import assemble
from bbopd.data.streams import each
from bbopd.evaluate.student import StudentView, in_batches
from bbopd.modeling import load_model
from bbopd.pipeline.loop import Loop
from bbopd.pipeline.metrics import RunMetrics
from bbopd.pipeline.session import Session, open_session
from bbopd.pipeline.timing import Timeline
from bbopd.types import FullTeacher, Rollout, Sampling
from benchmarks.machine import describe
from benchmarks.objective_measures import question_data
from benchmarks.objective_models import prepare
from benchmarks.objectives import RESULTS, teaching
from benchmarks.plots import plot_games

SEQUENCES = 16  # of an update: 2 prompts with 8 answers each
NEW_TOKENS = 24
TEMPERATURE = 0.8
QUESTIONS = 30
WARM_UP_TOKENS, GAME_TOKENS = 600, 2_900
LEARNING_RATE, DISCRIMINATOR_RATE = 5e-5, 1e-4
EVERY = 2  # updates between two looks
LAST = 3  # updates that a figure of the game is the mean of
ARMS: dict[str, dict[str, Any]] = {
    "gad": {"name": "gad", "gad": {"discriminator_lr": DISCRIMINATOR_RATE}},
    "gad, frozen": {"name": "gad", "gad": {"discriminator_lr": DISCRIMINATOR_RATE, "frozen": True}},
    "seqkd": {"name": "seqkd"},
}
STAGES = {"start": "start", "cold_start": "after the warm-up", "end": "end"}
_SEED = 20_180
_FIGURES = ("discriminator_accuracy", "discriminator_margin", "student_length_mean", "teacher_length_mean", "reward_mean", "reference_kl")


def has_style(text: str) -> bool:
    return text.lstrip().startswith("Arrr")


def config_of(arm: str, seed: int, folder: Path, target: str, output: Path) -> RunConfig:
    """The same tokens for all; a cycle of the game is one update of either side."""
    plays = ARMS[arm]["name"] == "gad"
    budget = (
        {"cold_start_tokens": WARM_UP_TOKENS, "on_policy_tokens": GAME_TOKENS}
        if plays
        else {"labelled_tokens": WARM_UP_TOKENS + GAME_TOKENS}
    )
    return RunConfig.model_validate(
        {
            "student": {"model": str(folder / "teacher")},
            "teacher": {
                "target": target,
                "signal": "text",
                "answers": {"max_new_tokens": NEW_TOKENS, "temperature": TEMPERATURE},
                "cache": {"path": str(folder / "answers.db")},
                "timeout": 3600,
            },
            "objective": ARMS[arm],
            "rollouts": {"per_update": SEQUENCES, "max_new_tokens": NEW_TOKENS, "max_staleness": 0},
            "train": {
                "batch_tokens": SEQUENCES * NEW_TOKENS,
                "micro_batch_tokens": 2048,
                "max_seq_len": 192,
                "lr": LEARNING_RATE,
                "warmup": 0,
                "checkpoint_every": 1000,
                "seed": seed,
                **budget,
            },
            "data": {**question_data(folder), "filters": {"min_tokens": 1, "max_repetition": 1.0, "reject_duplicates": False}},
            "eval": {"every": EVERY, "rollouts": QUESTIONS},
            "output": str(output),
        }
    )


class Watch:
    """Looks at a run's student: its answers to held-out questions, and how the game stands on them."""

    def __init__(self, session: Session) -> None:
        start = load_model(session.config.student.model)
        self._session, self._start = session, StudentView(start, compute_dtype=session.compute_dtype)
        self._start_weight = start.get_output_embeddings().weight
        self._questions = session.prompts.held_out[:QUESTIONS]
        self.looks: list[dict[str, Any]] = []

    async def look(self, stage: str, step: int) -> Mapping[str, Any]:
        sampling = Sampling(NEW_TOKENS, temperature=TEMPERATURE, seed=_SEED)
        answers = [one async for one in self._session.parts.engine.generate(each(self._questions), sampling)]
        texts = [self._decode(answer.token_ids) for answer in sorted(answers, key=lambda answer: answer.draw)]
        state = self._session.state
        found = {
            "stage": stage,
            "step": step,
            "tokens": state.trained_tokens,
            "style_share": statistics.fmean(map(has_style, texts)),
            "length": statistics.fmean(map(len, answers)),
            "kl_from_start": self._far_from_start([answer for answer in answers if len(answer)]),
            "samples": texts[:3],
        }
        self.looks.append(found)
        print({name: value for name, value in found.items() if name != "samples"}, texts[:2], flush=True)
        return {**found, "standard_errors": {}}

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._session.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _far_from_start(self, answers: Sequence[Rollout]) -> float:
        """KL(student‖start) in nats a token of the student's answers, at temperature 1."""
        student = StudentView(self._session.model, compute_dtype=self._session.compute_dtype)
        total, count = 0.0, 0
        for items in in_batches(answers):
            batch = assemble(items, None)
            teacher = FullTeacher(hidden=self._start.hidden(batch), weight=self._start_weight)
            values_N = student.divergence(student.hidden(batch), teacher, "reverse_kl")
            total, count = total + float(values_N.sum()), count + len(values_N)
        return total / count


async def play(config: RunConfig, display: PlainDisplay) -> dict[str, Any]:
    """A whole run; what was seen of its student, the lines of its updates, and its seconds."""
    began = time.process_time()
    async with open_session(config, command="python -m benchmarks.adoption", progress=display) as session:
        watch = Watch(session)
        metrics = RunMetrics(session.folder, from_step=0)
        loop = Loop(
            config,
            session.parts,
            session.state,
            metrics=metrics,
            timeline=Timeline(),
            progress=display,
            evaluate=watch.look,
            stop=asyncio.Event(),
        )
        try:
            await loop.run()
        finally:
            metrics.close()
        lines = session.folder.read_lines("metrics.jsonl")
        return {
            "looks": watch.looks,
            "updates": [{name: line[name] for name in ("step", "phase", *_FIGURES) if name in line} for line in lines],
            "tokens": session.state.trained_tokens,
            "seconds": round(time.process_time() - began, 1),
        }


def run_arm(arm: str, seed: int, folder: Path, target: str) -> dict[str, Any]:
    """What `publish` needs of one run; kept in ``folder``."""
    output = folder / "adoption" / f"{arm.replace(', ', '_')}-seed{seed}"
    kept = output.with_suffix(".json")
    if not kept.exists():
        shutil.rmtree(output, ignore_errors=True)
        with make_display(Console(), plain=True) as display:
            found = asyncio.run(play(config_of(arm, seed, folder, target, output), display))
        kept.write_text(json.dumps({"arm": arm, "seed": seed, **found, **describe(module="benchmarks.adoption")}))
        shutil.rmtree(output)
    return json.loads(kept.read_text())


# ---------------------------------------------------------------- what comes of it


def publish(found: Sequence[Mapping[str, Any]], results: Path) -> Path:
    """``adoption.csv`` with every look and update, ``adoption.md``, and ``adoption.svg`` with the first seed's curves."""
    folder = results / found[0]["machine"]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"arm": one["arm"], "seed": one["seed"], "kind": kind, **{name: value for name, value in line.items() if name != "samples"}}
        for one in found
        for kind, lines in (("look", one["looks"]), ("update", one["updates"]))
        for line in lines
    ]
    with (folder / "adoption.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot_games([one for one in found if one["seed"] == found[0]["seed"]], folder / "adoption.svg")
    page = folder / "adoption.md"
    page.write_text(table(found))
    return page


def table(found: Sequence[Mapping[str, Any]]) -> str:
    first = found[0]
    lines = [
        "# A style, from text alone",
        "",
        f"{first['processor']}, torch {first['torch']}, {first['date']}. `python -m benchmarks.adoption`",
        "",
        f"{QUESTIONS} held-out questions. Style: the share of answers that begin as a pirate's. Length in tokens, {NEW_TOKENS} at most. "
        "KL(student‖start) in nats a token, on the student's answers. The discriminator's accuracy and margin: means of the last "
        f"{LAST} updates until then, on answers that it had not learned from. Processor seconds of the run.",
        "",
        "| arm | seed | | tokens | style | length | KL from the start | accuracy | margin | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        looks = one["looks"]
        for look in (looks[0], *(look for look in looks if look["stage"] == "cold_start"), looks[-1]):
            cells = [
                one["arm"],
                str(one["seed"]),
                STAGES.get(look["stage"], f"after {look['step']} updates"),
                f"{look['tokens']:,}",
                f"{look['style_share']:.0%}",
                f"{look['length']:.1f}",
                f"{look['kl_from_start']:.2f}",
                *_game_until(one["updates"], look["step"]),
                f"{one['seconds']:.0f}" if look is looks[-1] else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    theirs = [line["teacher_length_mean"] for one in found for line in one["updates"] if "teacher_length_mean" in line]
    lines += ["", f"The teacher's own answers have {statistics.fmean(theirs):.1f} tokens."] if theirs else []
    return "\n".join(lines) + "\n"


def _game_until(updates: Sequence[Mapping[str, Any]], step: int) -> list[str]:
    played = [line for line in updates if line["step"] <= step and "discriminator_accuracy" in line][-LAST:]
    names = ("discriminator_accuracy", "discriminator_margin")
    return [f"{statistics.fmean(line[name] for line in played):.2f}" if played else "–" for name in names]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adoption", description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="models and runs (default runs/objectives)")
    parser.add_argument("--only", nargs="+", metavar="ARM", choices=list(ARMS), default=list(ARMS), help=f"of {'; '.join(ARMS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default 0")
    parser.add_argument("--results", type=Path, default=RESULTS, help="keep <machine>/adoption.csv, .md and .svg there")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    folder = options.work.resolve()
    prepare(folder, "teacher", "pirate", "questions.jsonl")
    with teaching("pirate", folder, levels=("text",)) as target:
        for seed in options.seeds:
            for arm in options.only:
                run_arm(arm, seed, folder, target)
    found = [json.loads(path.read_text()) for path in sorted((folder / "adoption").glob("*.json"))]
    found.sort(key=lambda one: (list(ARMS).index(one["arm"]), one["seed"]))
    print(publish(found, options.results).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
