"""The doctor on set-ups that are well and that are not, each with real teachers behind gRPC; and the page that shows it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import socket
import sys
from dataclasses import replace

import pytest
import yaml

from bbopd.cli.main import main
from bbopd.config import RunConfig
from bbopd.data.prompts import PromptSet
from bbopd.doctor.examine import CHECKS, examine_run
from bbopd.doctor.findings import Check, SetUp, examine, passed
from bbopd.doctor.trackers import check_trackers
from bbopd.errors import ConfigError, TeacherError
from bbopd.modeling import load_model, load_tokenizer
from bbopd.planning.tokens import Lengths, forecast
from bbopd.rpc.server import start_server
from bbopd.teachers.hf import HFBackend
from bbopd.types import Prompt, SignalSpec
from tests.doctor_page import (
    CASES,
    Case,
    Teacher,
    examine_all,
    examine_case,
    make_folders,
    page,
    run_config,
    serving,
    without_figures,
    written,
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    return asyncio.run(examine_all(tmp_path_factory.mktemp("doctor")))


@pytest.fixture
def here(tmp_path, monkeypatch):
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(lines, name):
    return next(line for line in lines if line.name == name)


@pytest.mark.parametrize("case", ["good", "padded"])
def test_a_good_run_passes_every_check(findings, case):
    assert {line.name: line.status for line in findings[case]} == {check.name: "pass" for check in CHECKS}
    assert ("padding is left out" in of(findings[case], "vocabulary").detail) == (case == "padded")


@pytest.mark.parametrize(
    ("case", "failing", "words"),
    [
        ("tokenizer", "vocabulary", ["not the same ones", "2 differ", "259 is 'ou' there and 'th' here"]),
        ("too_long", "room", ["takes 24", "lower rollouts.max_new_tokens", "151 of 151 prompts"]),
        ("not_offered", "signal", ["offers topk, sampled, text", "what fits: topk for forward_kl"]),
        ("temperature", "configuration", ["objective.temperature=1", "teacher.signal=full"]),
        ("nobody", "teacher", ["grpc://127.0.0.1:9", "bbopd serve"]),
        ("replicas", "determinism", ["replicas of teacher differ", "max_replica_difference is 0.05"]),
        ("no_end", "tokenizer", ["eos_token"]),
        ("task_field", "tasks", ["quiz.jsonl:1", "prompt needs a field 'text'", "this row has answer, question"]),
    ],
)
def test_a_broken_run_fails_one_check_and_says_the_way_out(findings, case, failing, words):
    lines = findings[case]
    assert [line.name for line in lines if line.status == "fail"] == [failing]
    for word in words:
        assert word in of(lines, failing).detail
    if failing != "configuration":
        assert [line.name for line in lines] == [check.name for check in CHECKS], "one failure hides no other line"


def test_a_task_whose_items_are_too_long_warns(findings):
    found = of(findings["task_room"], "tasks")
    assert {line.status for line in findings["task_room"] if line is not found} == {"pass"}
    assert found.status == "warn"
    assert "quiz (multiple choice, 6 items of up to" in found.detail
    assert "1 of 6 items of quiz, which has 257" in found.detail, "256 positions read, and one token more is predicted"


async def test_other_kinds_of_tasks(here):
    (here / "qa.jsonl").write_text(json.dumps({"prompt": "the", "answer": "thing"}) + "\n")
    (here / "prose.jsonl").write_text(json.dumps({"text": "thing " * 400}) + "\n")
    (here / "wordy.yaml").write_text("data: qa.jsonl\nprompt: prompt\nanswer: answer\nmax_new_tokens: 256\n")
    asked = {"tasks": ["qa.jsonl", "prose.jsonl"], "keep_best": "qa.f1"}

    async def said(evaluation):
        return of(await examine_case(Case("", "", (), CASES["nobody"].sections | {"eval": evaluation})), "tasks")

    assert "qa (generation, 1 items of up to 65 tokens), prose (text, 1 items of up to 1" in (await said(asked)).detail
    wrong = await said(asked | {"keep_best": "other.f1"})
    assert (wrong.status, "keep_best is other.f1" in wrong.detail) == ("fail", True)
    wordy = await said({"tasks": ["wordy.yaml"]})
    assert (wordy.status, "task wordy: max_new_tokens 256 leaves no room" in wordy.detail) == ("fail", True)


@pytest.fixture
def trackers(tmp_path, monkeypatch):
    """Modules of the trackers' names to be found, and none of their settings."""
    for name in ("wandb", "mlflow", "trackio"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "TRACKIO_SERVER_URL", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield tmp_path
    for name in ("wandb", "mlflow", "trackio"):
        sys.modules.pop(name, None)


def tracked(*names):
    """What is said of a run with these trackers, and whether it passes."""
    config = RunConfig.model_construct(track=names)
    verdict = asyncio.run(check_trackers(SetUp(config, contextlib.AsyncExitStack(), None)))
    return verdict.status, verdict.detail


def test_a_tracker_needs_a_key_where_it_is_online(trackers, monkeypatch):
    with pytest.raises(ConfigError, match=r"wandb has no key for https://api\.wandb\.ai: set WANDB_API_KEY"):
        tracked("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracked("wandb") == ("pass", "wandb: offline, in the run's folder until `wandb sync`")
    monkeypatch.setenv("WANDB_MODE", "online")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", address)
        with pytest.raises(ConfigError, match="no key for http://127"):
            tracked("wandb")
        (trackers / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
        assert tracked("wandb") == ("pass", f"wandb: to {address}, with a key")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert tracked("mlflow")[0] == "pass"
    status, said = tracked("wandb", "mlflow")
    assert status == "warn"
    assert said.count("is not reached at 127.0.0.1") == 2


def test_a_tracker_needs_a_place_for_its_files(trackers, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(trackers / "deep" / "below"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trackers}/mlflow.db")
    status, said = tracked("mlflow", "trackio")
    assert (status, str(trackers / "deep" / "below") in said) == ("pass", True)
    assert not (trackers / "deep").exists(), "looked at, not made"
    assert tracked() == ("pass", "TensorBoard's files in the run's folder alone")
    (trackers / "file").write_text("")
    monkeypatch.setenv("TRACKIO_DIR", str(trackers / "file" / "below"))
    with pytest.raises(ConfigError, match="file is no folder"):
        tracked("trackio")


def test_a_tracker_that_is_not_installed():
    if importlib.util.find_spec("trackio") is not None:
        pytest.skip("it is")
    with pytest.raises(ConfigError, match=r"pip install 'bbopd\[trackio\]'"):
        tracked("trackio")


def test_a_run_on_text_needs_no_token_in_common(findings):
    assert {line.status for line in findings["text"]} == {"pass", "skip"}
    assert "which text does without" in of(findings["text"], "vocabulary").detail


def test_the_page_shows_what_the_doctor_says(findings):
    assert without_figures(written()) == without_figures(page(findings)), "run `python -m tests.doctor_page` and look at what has changed"


async def test_a_teacher_under_the_students_name_must_be_the_same_model(here):
    run = {"student": {"model": "student"}}
    alike = await examine_case(Case("", "", (Teacher("student", name="student"),), run))
    assert of(alike, "agreement").status == "pass"
    assert "are one model" in of(alike, "agreement").detail
    other = await examine_case(Case("", "", (Teacher("changed", name="student"),), run))
    assert of(other, "agreement").status == "fail"
    assert "serves other weights" in of(other, "agreement").detail


class OtherWriter(HFBackend):
    """Scores with one model and writes with another."""

    def __init__(self, scorer: HFBackend, writer: HFBackend) -> None:
        self.info, self.score, self.generate = scorer.info, scorer.score, writer.generate  # type: ignore[method-assign]


async def examined(backend):
    """What is found of a good run whose teacher is ``backend``."""
    server = await start_server(backend)
    try:
        config = run_config(CASES["good"], [f"grpc://127.0.0.1:{server.port}"])
        return [finding async for finding in examine_run(config, time_limit=60.0)]
    finally:
        await server.stop(0)


async def test_a_teacher_that_does_not_stand_by_its_own_words(here):
    scorer, writer = (HFBackend(load_model(name), load_tokenizer(name), name="teacher") for name in ("teacher", "changed"))
    lines = await examined(OtherWriter(scorer, writer))
    assert [line.name for line in lines if line.status == "fail"] == ["own words"]
    assert "nats less likely than another by its own score" in of(lines, "own words").detail


class Boaster(HFBackend):
    """Reports each word of its own as likelier than it is."""

    def generate(self, prompts, sampling):
        return [replace(one, logprobs=tuple(value / 2 for value in one.logprobs)) for one in super().generate(prompts, sampling)]


async def test_a_teacher_whose_reported_logprobs_are_not_those_it_scores(here):
    lines = await examined(Boaster(load_model("teacher"), load_tokenizer("teacher"), name="teacher"))
    assert [line.name for line in lines if line.status == "fail"] == ["own words"]
    assert "nats from its score" in of(lines, "own words").detail


async def test_top_k_signals_pass_the_probes_too(here):
    sections = {"teacher": {"topk": 16}, "objective": {"temperature": 1.0, "name": "jsd"}}
    lines = await examine_case(Case("", "", (Teacher(),), sections))
    assert {line.status for line in lines} == {"pass"}
    assert "jsd at T = 1 is" in of(lines, "zero").detail


async def test_a_folder_with_a_finished_run_is_refused(here):
    (here / "run").mkdir()
    (here / "run" / "summary.json").write_text(json.dumps({"status": "finished"}))
    lines = await examine_case(CASES["nobody"])
    assert "holds a finished run" in of(lines, "disk").detail


async def test_prompts_that_are_too_long_are_counted(here):
    (here / "chat.jsonl").write_text(
        "".join(json.dumps({"prompt": "the " * count, "response": "thing"}) + "\n" for count in (1, 2, 90, 80))
    )
    lines = await examine_case(Case("", "", (), CASES["nobody"].sections | {"data": {"prompts": [{"jsonl": "chat.jsonl"}]}}))
    assert of(lines, "prompts").status == "fail"
    assert "2 of 4 prompts, 50%, have more than 48 tokens" in of(lines, "prompts").detail
    skipped = {"prompts": [{"jsonl": "chat.jsonl"}], "long_prompts": "skip"}
    lines = await examine_case(Case("", "", (), CASES["nobody"].sections | {"data": skipped}))
    assert of(lines, "prompts").detail.endswith("left out: long_prompt 2")
    lines = await examine_case(Case("", "", (), CASES["nobody"].sections | {"data": skipped | {"filters": {"hooks": ["json:nothing"]}}}))
    assert of(lines, "prompts").status == "fail"
    assert "data.filters.hooks: 'json:nothing' names no function" in of(lines, "prompts").detail


async def test_a_check_that_hangs_or_breaks_is_one_failing_line():
    async def hangs(setup):
        await asyncio.sleep(3600)

    async def breaks(setup):
        raise ZeroDivisionError("seven")

    async def refuses(setup):
        raise TeacherError("ask another")

    async def well(setup):
        return passed("all right")

    checks = [
        Check("hangs", hangs),
        Check("breaks", breaks),
        Check("refuses", refuses),
        Check("needs", well, ("teacher",)),
        Check("well", well),
    ]
    setup = SetUp(RunConfig.model_construct(), contextlib.AsyncExitStack(), None)  # type: ignore[arg-type]
    lines = [finding async for finding in examine(setup, checks, time_limit=0.2)]
    assert [(line.name, line.status) for line in lines] == [
        ("hangs", "fail"),
        ("breaks", "fail"),
        ("refuses", "fail"),
        ("needs", "skip"),
        ("well", "pass"),
    ]
    assert "ZeroDivisionError: seven" in lines[1].detail


async def test_the_command_line_prints_lines_or_json_and_exits_with_0_or_1(here, capsys):
    async with serving((Teacher(),)) as targets:
        config = run_config(CASES["good"], targets).model_dump(mode="json", exclude_none=True)
        (here / "run.yaml").write_text(yaml.safe_dump(config))
        assert await asyncio.to_thread(main, ["doctor", "run.yaml"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0].startswith("PASS  configuration: run.yaml")
        assert out[-1] == f"{len(CHECKS) + 1} passed, 0 warned, 0 failed, 0 skipped: run.yaml"
    assert await asyncio.to_thread(main, ["doctor", "run.yaml", "--json", "--set", "train.clip=-1"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["can_run"] is False
    assert found["checks"][0]["name"] == "configuration"
    assert "train.clip" in found["checks"][0]["detail"]


def test_the_forecast_counts_tokens_as_a_run_would():
    prompts = [Prompt(f"p{n}", (1,) * 10, (2,) * (20 if n % 2 else 40)) for n in range(8)]  # 10 and 30 tokens in the mean
    sections = {
        "student": {"model": "x"},
        "teacher": {"target": "grpc://localhost:1"},
        "rollouts": {"per_update": 8, "on_policy_fraction": 0.25, "max_new_tokens": 100},
        "train": {"on_policy_tokens": 5000, "cold_start_tokens": 600},
    }
    config = RunConfig.model_validate(sections)
    total = forecast(config, Lengths.of(config, PromptSet(prompts, prompts[:1]), 50.0))
    answers, references = 5000 / 50, 600 / 30 + 5000 / 50 * 6 / 2
    assert total.written_tokens == pytest.approx(5000)
    assert total.response_tokens == pytest.approx(5000 + 30 * references)
    assert total.sequence_tokens == pytest.approx(5000 + 40 * references + 10 * answers)
    assert total.asked(SignalSpec("full"), config) == total
    asked = total.asked(SignalSpec("sampled", rollouts_only=True), config)
    assert (asked.response_tokens, asked.sequence_tokens) == pytest.approx((5000, 5000 + 10 * answers))
    sections["train"] = {**sections["train"], "total_steps": 2, "batch_tokens": 1460, "on_policy_tokens": 5000}
    shorter = RunConfig.model_validate(sections)
    half = forecast(shorter, Lengths.of(shorter, PromptSet(prompts, prompts[:1]), 50.0))
    assert half.response_tokens == pytest.approx(2 * 1460)


def test_a_game_asks_for_one_answer_beside_each_group():
    sections = {
        "student": {"model": "x"},
        "teacher": {"target": "grpc://localhost:1", "signal": "text"},
        "objective": {"name": "gad"},
        "rollouts": {"per_update": 8, "samples_per_prompt": 8},
        "train": {"cold_start_tokens": 1000, "on_policy_tokens": 4000},
    }
    config = RunConfig.model_validate(sections)
    prompts = [Prompt(f"p{n}", (1, 2, 3, 4), (5, 6)) for n in range(4)]
    total = forecast(config, Lengths.of(config, PromptSet(prompts, prompts[:1]), 50.0))
    assert (total.answers, total.written_tokens, total.response_tokens) == (80, 4000, 5000)
    asked = total.asked(SignalSpec("text"), config)
    assert asked.response_tokens == pytest.approx(1000 + 4000 / 8)
    assert asked.sequence_tokens == pytest.approx(1000 + 20 * 4 + (4000 + 80 * 4) / 8)
