"""One run's answers token by token, several runs on one page, and the card beside a model: all from the files of runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from bbopd.cli.main import main
from bbopd.errors import DataError
from bbopd.report.charts import overlaid_charts
from bbopd.report.comparison import render_comparison
from bbopd.report.html import render
from bbopd.report.load import find_runs, load_run, load_runs
from bbopd.report.model_card import write_model_cards
from tests.test_report import EVALS, HOSTILE, STEPS, SUMMARY, Page, step_line, write_run

CONFIG = {
    "student": {"model": "org/small", "init": {"keep_layers": [0, 1, 5]}},
    "teacher": {"signal": "topk", "topk": 64, "target": "grpc://secret-host:1"},
    "objective": {"name": "forward_kl", "alpha": 0.25, "temperature": 1.0},
    "rollouts": {"engine": "hf", "on_policy_fraction": 0.5, "temperature": 1.0, "max_new_tokens": 64, "max_staleness": 0},
    "train": {"lr": 3e-4, "schedule": "linear", "seed": 11, "batch_tokens": 512, "max_seq_len": 256},
    "data": {
        "prompts": [{"jsonl": "/home/someone/private/chats.jsonl"}, {"dataset": "org/data", "split": "train"}],
        "held_out": 0.1,
        "filters": {"min_tokens": 9},
    },
    "output": "/home/someone/runs/x",
}
PIECES = [["plain", 0.05, " a"], [" odd", 2.5, " even"], ["<i>", 7.0, HOSTILE], ["?", None, None]]
SAMPLE = {"prompt": "Why?", "before": "the", "after": "plain odd<i>?", "after_pieces": PIECES, "teacher": "Because.", "reference": "So."}


def a_run(folder: Path, *, scale: float = 1.0, config: Any = CONFIG, **summary: Any) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        step_line(step) | {"loss": scale * 2.0 / step, "trained_tokens": 2000 * step, "rejected": {"too_short": step}}
        for step in range(1, STEPS + 1)
    ]
    evals = [
        line | {"kl_held_out": scale * line["kl_held_out"], "tokens": {"held_out": 900}, "sequences": {"held_out": 12}} for line in EVALS
    ]
    about = SUMMARY | {"config": config, "samples": [SAMPLE], "error": "", "teacher": {"model": "org/large"}, "energy": None} | summary
    return write_run(folder, metrics=lines, evals=evals, summary=about)


def test_tokens_are_coloured_by_their_disagreement(tmp_path: Path) -> None:
    source = render(load_run(a_run(tmp_path / "run")))
    page = Page(source)
    assert re.findall(r'<span class="(k\d)" title="[^"]*">([^<]*)</span>', source) == [("k4", " odd"), ("k5", "&lt;i&gt;")]
    assert "2.50 nats; the teacher: &#x27; even&#x27;" in source
    assert "plain odd<i>?" in page.text
    assert "3.18 nats a token" in page.text, "the mean of 0.05, 2.5 and 7.0"
    assert {"Because.", "So.", "Student, before"} <= set(re.findall(r">([^<>]+)</(?:div|h3)>", source))
    assert page.open == []
    assert "unknown: neither RAPL nor NVML" in page.text
    counted = Page(render(load_run(a_run(tmp_path / "counted", energy={"joules": 7.2e6, "covers": ["package-0"]}))))
    assert "2 kWh (7,200,000 J) by package-0" in counted.text


def test_runs_on_one_page(tmp_path: Path) -> None:
    other = CONFIG | {"train": CONFIG["train"] | {"seed": 12}, "output": "elsewhere"}
    paths = [a_run(tmp_path / "a" / "run"), a_run(tmp_path / "b" / "run", scale=0.5, config=other, status="stopped")]
    runs = load_runs(paths)
    assert [run.name for run in runs] == ["a/run", "b/run"]
    source = render_comparison(runs)
    page = Page(source)
    assert page.open == []
    assert set(page.references) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "http" not in source
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", source)
    cells = [row.split("</td><td>") for row in rows]
    assert ["Forward KL, held-out text", "0.852 ± 0.062", "0.426 ± 0.062"] in cells
    assert ["Status", "finished", "stopped"] in cells
    assert ["Response tokens trained", "60,000", "60,000"] in cells
    differing = [row for row in cells if row[0].count(".") and not row[0].startswith("Forward")]
    assert differing == [["train.seed", "11", "12"]], "what is the same, or only a folder's name, is left out"
    assert source.count("plain") == 2
    assert source.count("Because.") == 1, "one teacher, one answer"


def test_curves_of_runs_have_a_colour_each(tmp_path: Path) -> None:
    runs = load_runs([a_run(tmp_path / "a"), a_run(tmp_path / "b", scale=0.5)])
    drawings = dict(overlaid_charts(runs))
    assert {"Loss over training", "KL to the teacher", "Rejected so far"} <= set(drawings)
    svg = drawings["Loss over training"]
    paths = {
        colour: max((path for path, found in re.findall(r'<path d="([^"]*)"[^>]*var\(--series-(\d)\)', svg) if found == colour), key=len)
        for colour in ("1", "2")
    }
    ends = {colour: [float(y) for _, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)] for colour, path in paths.items()}
    falls = {colour: ys[-1] - ys[0] for colour, ys in ends.items()}
    assert falls["2"] == pytest.approx(falls["1"] / 2, rel=1e-3), "half the loss falls half as far on the same axes"
    with pytest.raises(DataError, match="9 runs have no colours"):
        render_comparison(runs[:1] * 9)


def test_command_finds_runs_and_writes_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = a_run(tmp_path / "runs" / "a"), a_run(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "notes").mkdir()
    assert find_runs([tmp_path / "runs"]) == [first, second]
    assert main(["report", str(first)]) == 0
    assert capsys.readouterr().out.strip() == str(first / "report.html")
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "both.html")]) == 0
    assert "2 distillation runs" in (tmp_path / "both.html").read_text()
    assert main(["report", str(tmp_path)]) == DataError.exit_code
    assert "holds no run" in capsys.readouterr().err
    assert main(["report", str(first), "--output", str(tmp_path / "nowhere" / "page.html")]) == 1
    assert "cannot write" in capsys.readouterr().err


def a_card(run: Path, name: str, **files: Any) -> ModelCard:
    (run / name).mkdir(exist_ok=True)
    for file, content in files.items():
        (run / name / f"{file}.json").write_text(json.dumps(content))
    assert run / name / "README.md" in write_model_cards(run)
    return ModelCard.load(run / name / "README.md")


def test_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    card = a_card(a_run(tmp_path / "run-7"), "model")
    assert card.data.base_model == "org/small"
    assert card.data.datasets == ["org/data"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"bbopd", "distillation", "forward-kl"} <= set(card.data.tags)
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["kl_held_out"] == 0.852
    assert card.data.model_name == "run-7"
    for said in (
        "org/large",
        "its 64 most likely tokens and the mass of the rest",
        "of which 3 layers were kept",
        "| Forward KL, held-out text | 2.512 (2.389 to 2.635) | 1.400 (1.277 to 1.522) | 0.852 (0.730 to 0.974) | nats/token |",
        "| learning rate | 0.0003, linear |",
        "| seed | 11 |",
        "the usual ones, and min_tokens 9",
        "too short 3",
        "torch 9.9.9",
        "bbopd distill run.yaml",
        "keep_layers",
        'from_pretrained("run-7/model")',
        "12 held out",
    ):
        assert said in card.content, said


def test_card_tells_no_folder_of_the_machine(tmp_path: Path) -> None:
    private = CONFIG | {"student": {"model": "/home/someone/models/mine"}}
    card = a_card(a_run(tmp_path / "run", config=private, command="/home/someone/bin/bbopd distill /home/someone/x.yaml"), "model")
    assert "someone" not in card.content
    assert "bbopd distill x.yaml" in card.content
    assert "chats.jsonl" in card.content
    assert card.data.base_model is None, "what is on no hub is no base model for one"


def test_card_of_adapters_and_of_the_best_student(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", status="stopped")
    adapter = a_card(run, "adapter", adapter_config={})
    assert adapter.data.library_name == "peft"
    assert "AutoPeftModelForCausalLM" in adapter.content
    best = a_card(run, "best", evaluation={"measure": "kl_held_out", "value": 1.1, "stage": "step", "step": 20})
    assert "the weights of step 20, the best by `kl_held_out` (1.1)" in best.content
    assert "| measure | start | step 20 | unit |" in best.content
    assert next(result.metric_value for result in best.data.eval_results if result.metric_type == "kl_held_out") == 1.1
    assert "did not finish (stopped)" in best.content
    assert not (run / "model").exists()


def test_card_of_a_run_that_says_little(tmp_path: Path) -> None:
    sparse = write_run(tmp_path / "run", summary={"status": "failed"})
    card = a_card(sparse, "model")
    assert card.data.eval_results is None
    assert "No evaluation was finished." in card.content
    assert "None: the student learned from labelled text alone." in card.content


TASKS = {
    "quiz.v2.acc": 0.75,
    "quiz.v2.acc_norm": 0.5,
    "prose.bits_per_byte": 1.25,
    "lower_is_better": ["prose.bits_per_byte"],
    "speeds": {"quiz.v2": {"tokens_per_second": 1234.0, "latency_seconds": 0.045, "peak_memory_bytes": 2_000_000_000}},
}


def a_run_with_tasks(folder: Path, *, gain: float = 0.0, parameters: int = 135_000_000) -> Path:
    run = a_run(folder, parameters=parameters)
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    for place, line in enumerate(lines):
        line |= TASKS | {"quiz.v2.acc": 0.75 + gain * place}
        line["standard_errors"] |= {"quiz.v2.acc": 0.05}
    (run / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_tasks_are_wherever_measures_are(tmp_path: Path) -> None:
    """In the run's page, its curves, its card with metadata, and in the page of several runs, where they stand over what they cost."""
    first, second, third = (
        a_run_with_tasks(tmp_path / "a", gain=0.05),
        a_run_with_tasks(tmp_path / "b"),
        a_run_with_tasks(tmp_path / "c", parameters=90_000_000),
    )
    for run in (first, second, third):
        (run / "metrics.jsonl").unlink()  # their curves are another test's
    page = render(load_run(first))
    assert "quiz.v2: acc" in page
    assert "0.750 ± 0.050" in page
    drawings = dict(overlaid_charts(load_runs([first, second])))
    assert {"quiz.v2, share", "prose: bits_per_byte"} <= set(drawings)
    card = a_card(first, "model")
    assert "| quiz.v2: acc | 0.750 (0.652 to 0.848) | 0.800 (0.702 to 0.898) | 0.900 (0.802 to 0.998) |" in card.content
    assert "| prose: bits_per_byte | 1.250 | 1.250 | 1.250 | lower is better |" in card.content
    assert "how it does on quiz.v2 and prose" in card.content
    known = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert known["quiz.v2", "acc"] == pytest.approx(0.9)
    assert known["prose", "bits_per_byte"] == 1.25
    both = render_comparison(load_runs([first, third]))
    shown = Page(both)
    assert shown.open == []
    assert len(shown.ids) == len(set(shown.ids))
    cells = [row.split("</td><td>") for row in re.findall(r"<tr><td>(.*?)</td></tr>", both)]
    assert ["quiz.v2: acc", "0.900 ± 0.050", "0.750 ± 0.050"] in cells
    assert ["A  a", "0.9 (0.802 to 0.998)", "0.5", "135.0 M", "1,234", "45 ms", "2.00 GB"] in cells
    assert "quiz.v2: acc over parameters" in both
    assert "quiz.v2: acc over tokens a second" not in both, "both have the same there"
