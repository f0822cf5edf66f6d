"""``bbopd compare`` end to end on tiny models: trained, measured, chosen, resumed, told; and what happens to a process that fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from bbopd.cli.execute import execute
from bbopd.cli.main import main
from bbopd.compare import processes
from bbopd.compare.estimate import work_left
from bbopd.compare.measure import MeasureRequest, measure
from bbopd.compare.plan import PlannedRun
from bbopd.compare.run import Comparison, Outcome
from bbopd.compare.table import markdown, sentences
from bbopd.config_compare import CompareConfig
from bbopd.config_file import parse_config
from bbopd.errors import ConfigError, DataError
from bbopd.evaluate.exact_match import exact_match, read_answers
from bbopd.types import Prompt, Rollout, Sampling
from tests.tiny_models import save_folder, tiny_llama
from tests.waiting import PATIENCE, wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and questions that all have one answer."""
    root = tmp_path_factory.mktemp("compare")
    save_folder(root / "student", tiny_llama(vocab_size=262, seed=3))
    for name, words in (("train", 60), ("development", 12), ("test", 20)):
        lines = [{"prompt": f"{name} {number}: ", "response": "y", "answer": "y"} for number in range(words)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def configuration(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "student": {"model": str(folder / "student"), "dtype": "float32"},
        "objective": {"name": "sft"},
        "rollouts": {"per_update": 16, "max_new_tokens": 8, "on_policy_fraction": 0.0},
        "train": {"batch_tokens": 32, "max_seq_len": 64, "lr": 3e-3},
        "data": {"prompts": [{"jsonl": str(folder / "train.jsonl")}], "prompt_tokens": 16, "response_tokens": 8},
        "eval": {"sequences": 4, "rollouts": 2, "max_new_tokens": 8},
    }
    return {
        "base": base,
        "arms": ["none", "sft"],
        "references": {"untouched": str(folder / "student")},
        "learning_rates": [1e-5, 1e-2],
        "seeds": [0, 1],
        "budget": {"updates": 40},
        "measures": {
            "test": str(folder / "test.jsonl"),
            "development": str(folder / "development.jsonl"),
            "max_new_tokens": 4,
        },
        "output": str(output),
        **changes,
    }


Done = tuple["InProcess", "InProcess", Outcome, dict[str, Any]]


class InProcess:
    """Trains and measures as the processes do, in this one, and counts; ``interrupt_at`` is the training that Ctrl-C meets."""

    def __init__(self, data: dict[str, Any], *, interrupt_at: int | None = None, fail: str = "") -> None:
        self.trained: list[str] = []
        self.measured: list[str] = []
        self.targets: list[object] = []
        self._interrupt_at, self._fail = interrupt_at, fail
        self.comparison = Comparison(parse_config(data, (), CompareConfig, "compare.yaml"), distill=self._distill, measure=self._measure)
        self.said: list[str] = []

    def run(self) -> Outcome:
        return self.comparison.run(self.said.append)

    def _distill(self, run: PlannedRun) -> None:
        self.trained.append(run.name)
        self.targets.append(run.config.teacher.target)
        if len(self.trained) - 1 == self._interrupt_at:
            raise KeyboardInterrupt
        if run.name == self._fail:
            raise processes.FailedError(f"run {run.name} ended with status 4")
        assert execute(run.config, plain=True) == 0

    def _measure(self, request: MeasureRequest, log: Path) -> dict[str, Any]:
        self.measured.append(request.model)
        return asyncio.run(measure(request))


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A comparison that was interrupted in its third training, and the same one taken up again."""
    data = configuration(folder, tmp_path_factory.mktemp("runs") / "out")
    first = InProcess(data, interrupt_at=2)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = InProcess(data)
    return first, second, second.run(), data


def test_goes_on_where_it_was(done: Done) -> None:
    first, second, _, data = done
    assert first.trained == ["none-seed0", "sft-lr1e-05-seed0", "sft-lr0.01-seed0"]
    assert second.trained == ["sft-lr0.01-seed0", "sft-lr0.01-seed1"]
    third = InProcess(data)
    third.run()
    assert third.trained == third.measured == []
    assert all(work.runs == work.measurements == 0 and work.seconds == 0 for work in work_left(third.comparison))
    assert not (Path(data["output"]) / "runs" / "sft-lr0.01-seed1" / "checkpoints").exists()


def test_the_better_learning_rate_is_chosen_on_development_questions(
    done: Done,
) -> None:
    rows = {row.name: row for row in done[2].rows}
    assert rows["sft"].learning_rate == 1e-2
    assert rows["sft"].tried["0.01"] > rows["sft"].tried["1e-05"]
    assert rows["sft"].seeds == (0, 1)
    trial = done[1].comparison.results.read("sft-lr1e-05-seed0")
    assert trial is not None
    assert list(trial.measured) == ["development"]  # the test was seen by the chosen runs alone


def test_the_table_says_what_differs(done: Done) -> None:
    outcome = done[2]
    rows = {row.name: row for row in outcome.rows}
    assert rows["sft"].tested["exact_match"].value > 0.9  # the answer is always the same one
    assert rows["none"].tested["exact_match"].value == 0.0
    assert rows["none"].tested["bits_per_byte"] == rows["untouched"].tested["bits_per_byte"]
    assert rows["sft"].spent["updates"] == 40
    assert rows["none"].spent["student_tokens"] == 0
    better = {(pair.first, pair.second): pair.better for pair in outcome.pairs}
    assert better == {("none", "sft"): "sft", ("none", "untouched"): None, ("sft", "untouched"): "sft"}
    said = sentences(outcome.pairs, "exact_match", 0.95)
    assert any(line.startswith("sft is better than none: +") for line in said)
    assert any(line.startswith("no difference between none and untouched: +0.0 points") for line in said)
    kept = json.loads((Path(done[3]["output"]) / "compare.json").read_text())
    assert [row["name"] for row in kept["rows"]] == ["none", "sft", "untouched"]
    text = markdown(outcome.rows, outcome.pairs, "exact_match", 0.95)
    assert (Path(done[3]["output"]) / "compare.md").read_text() == text
    assert "| untouched (reference) |" in text


def test_another_configuration_is_not_mixed_in(done: Done) -> None:
    train = {**done[3]["base"]["train"], "batch_tokens": 48}
    changed = {**done[3], "base": {**done[3]["base"], "train": train}}
    with pytest.raises(ConfigError, match=r"none-seed0 was run with train\.batch_tokens = 32 and is now planned with 48"):
        InProcess(changed)


def test_other_questions_are_measured_anew(done: Done, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = {**done[3], "measures": {**done[3]["measures"], "test_limit": 5}}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(data))
    assert main(["compare", str(path), "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "0 runs to train, 3 models to measure" in shown  # of none, and of sft with two seeds
    assert main(["compare", str(path), "--table"]) == 0
    assert "untouched" not in capsys.readouterr().out  # what was measured on other questions is not in this table


def test_any_metric_of_a_task_decides(folder: Path, tmp_path: Path) -> None:
    """A task file of `bbopd eval`; of a metric that is no sum over questions nothing can be told."""
    (tmp_path / "questions.jsonl").write_text((folder / "test.jsonl").read_text())
    task = {"data": "questions.jsonl", "prompt": "prompt", "choices": ["y", "n"], "answer": "answer"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    data = configuration(folder, tmp_path / "out", arms=["none"], learning_rates=[], references={"itself": str(folder / "student")})
    data["measures"] = {"test": str(tmp_path / "task.yaml"), "decide_by": "acc"}
    asked = InProcess(data)
    outcome = asked.run()
    values = {row.name: row.tested["acc"].value for row in outcome.rows}
    assert values["none"] == values["itself"]
    assert outcome.pairs[0].better is None
    with pytest.raises(ConfigError, match=r"decide_by is perplexity, which .*task.yaml does not tell .*\(acc, acc_bytes, acc_norm\)"):
        InProcess({**data, "measures": {**data["measures"], "decide_by": "perplexity", "test_limit": 3}}).run()
    with pytest.raises(ConfigError, match="pattern is for lines of questions"):
        InProcess({**data, "measures": {**data["measures"], "pattern": "x"}})
    with (tmp_path / "questions.jsonl").open("a") as file:
        file.write('{"prompt": "one more", "answer": "n"}\n')
    assert [work.measurements for work in work_left(InProcess(data).comparison)] == [1]  # the task's data is not what it was


def test_a_failed_run_costs_no_other(folder: Path, tmp_path: Path) -> None:
    data = configuration(folder, tmp_path / "out", arms=["sft", "none"], learning_rates=[], references={}, budget={"updates": 2})
    failing = InProcess(data, fail="sft-seed0")
    outcome = failing.run()
    assert outcome.failures == ("run sft-seed0 ended with status 4",)
    assert {row.name: row.seeds for row in outcome.rows} == {"sft": (1,), "none": (0,)}
    again = InProcess(data)
    assert again.run().failures == ()
    assert again.trained == ["sft-seed0"]


# ------------------------------------------------------------ exact match


class Scripted:
    """An engine that has an answer to every prompt, as bytes, and gives the last one first."""

    def __init__(self, texts: dict[str, str]) -> None:
        self._texts = texts

    async def generate(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Rollout]:
        assert sampling.top_k == 1
        asked = [prompt async for prompt in prompts]
        for draw, prompt in reversed(list(enumerate(asked))):
            yield Rollout(prompt.prompt_id, prompt, tuple(self._texts[prompt.prompt_id].encode()), finish_reason="stop", draw=draw)

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        raise NotImplementedError("it has none")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (None, ["so 3+4=07; 12", "none", "12;13", "12"]),
        (r"(\d+)\s*$", ["12", "", "13", "12"]),
        (r"\d+", ["12", "", "13", "12"]),
        (r"^(\d+)|x", ["", "", "12", "12"]),
    ],
)
async def test_what_counts_as_an_answer(pattern: str | None, found: list[str]) -> None:
    """The last match, of its first group where it has one; all of the text without a pattern."""
    texts = dict(zip("abcd", ["so 3+4=07; 12 ", "none", "12;13", "12"], strict=True))
    prompts = [Prompt(name, (1,)) for name in texts]
    answers = dict.fromkeys(texts, "12")
    answered = await exact_match(
        Scripted(texts), prompts, answers, pattern=pattern, max_new_tokens=4, decode=lambda ids: bytes(ids).decode()
    )
    assert [item.found for item in answered] == found
    assert [item.is_right for item in answered] == [text == "12" for text in found]


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"prompt": "a"}', "no 'answer'"), ("{", "1: not JSON"), ('["a"]', "no 'answer'"), ('{"answer": " "}', "got ' '")],
)
def test_bad_questions_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_answers(path)


# ------------------------------------------------------------ processes


def test_a_process_that_ends_badly_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert processes._finish(["-c", "print('fine')"], log, "it").strip() == "fine"
    with pytest.raises(processes.FailedError, match=r"it ended with status 3; .*log ends with:\nwhat went wrong"):
        processes._finish(["-c", "print('what went wrong'); raise SystemExit(3)"], log, "it")
    with pytest.raises(processes.FailedError, match="was killed by signal 9"):
        processes._finish(["-c", "import os; os.kill(os.getpid(), 9)"], log, "it")
    with pytest.raises(KeyboardInterrupt):
        processes._finish(["-c", "raise SystemExit(130)"], log, "it")


def test_an_interrupt_reaches_the_process_once(tmp_path: Path) -> None:
    """The process gets a SIGTERM of its own and ends in good order; then the comparison ends as interrupted."""
    child = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(130)))\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    code = (
        "import pathlib, sys\n"
        "from bbopd.compare import processes\n"
        f"processes._finish(['-c', {child!r}], pathlib.Path({str(tmp_path / 'log')!r}), 'it')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "log"
    wait_until(lambda: log.exists() and "up" in log.read_text(), 2 * PATIENCE)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=2 * PATIENCE)
    assert "KeyboardInterrupt" in said
    assert (tmp_path / "log").read_text().split() == ["up", "saved"]


@pytest.mark.slow
def test_as_a_command(folder: Path, tmp_path: Path) -> None:
    """One arm, trained and measured in real processes."""
    data = configuration(folder, tmp_path / "out", arms=["none"], learning_rates=[], references={}, budget={"updates": 2})
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(data))
    done = subprocess.run(
        [sys.executable, "-m", "bbopd", "compare", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none-seed0: exact_match 0 on test" in done.stdout
    assert (tmp_path / "out" / "results" / "none-seed0.json").exists()


# ------------------------------------------------------------ teachers, and tasks beside the test


def test_runs_share_one_teacher_and_are_told_what_else_they_gained(folder: Path, tmp_path: Path) -> None:
    """Two runs that would each start the same teacher get one; it ends with the comparison. A second task is in the table."""
    (tmp_path / "words.jsonl").write_text(json.dumps({"prompt": "a", "choices": ["y", "n"], "answer": "y"}) + "\n")
    data = configuration(folder, tmp_path / "out", arms=["off_policy"], learning_rates=[], references={}, budget={"updates": 1})
    data["measures"] = {"test": str(folder / "test.jsonl"), "max_new_tokens": 4, "also": [str(tmp_path / "words.jsonl")]}
    teacher = {"serve": {"model": str(folder / "student"), "levels": ["full"]}, "signal": "full"}
    data["base"] = {**data["base"], "teacher": teacher, "objective": {"name": "forward_kl", "temperature": 1.0, "ramp": 0}}
    asked = InProcess(data)
    (row,) = asked.run().rows
    assert asked.targets[0] == asked.targets[1]
    assert str(asked.targets[0]).startswith("grpc://127.0.0.1:")
    assert [path.name for path in (tmp_path / "out").glob("teacher-*.log")] == ["teacher-0.log"]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(str(asked.targets[0]).rpartition(":")[2]))) != 0, "it has ended"
    assert set(row.tested) == {"exact_match", "bits_per_byte", "words.acc", "words.acc_norm", "words.acc_bytes"}
    assert row.cost["parameters"] == sum(parameter.numel() for parameter in tiny_llama(vocab_size=262).parameters())
    assert row.cost["tokens_per_second"] > 0
    assert row.cost["latency_seconds"] > 0
    kept = asked.comparison.results.read("off_policy-seed0")
    assert kept is not None
    assert kept.config is not None
    assert kept.config["teacher"]["serve"]["model"] == str(folder / "student"), "which teacher it was, and not only where"
    again = InProcess(data)
    again.run()
    assert again.trained == []
    data["base"]["teacher"] = {**teacher, "serve": {"model": "another", "levels": ["full"]}}
    with pytest.raises(ConfigError, match=r"run with teacher\.serve\.model = .*student' and is now planned with 'another'"):
        InProcess(data)
