"""The command line as a user has it: real processes, a real teacher behind gRPC, Ctrl-C, SIGKILL, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from bbopd.cli.demo import token_budgets
from bbopd.cli.main import main
from tests.cli_runs import bbopd, environment, losses, measures, serving, steps, write_config
from tests.tiny_models import SPECIAL_TOKENS, save_folder, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"), tiny_llama(vocab_size=262, layers=4), tiny_tokenizer())


@pytest.fixture(scope="module")
def served(model, tmp_path_factory) -> Iterator[dict[str, object]]:
    with serving(model, tmp_path_factory.mktemp("served")) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One uninterrupted run, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    result = bbopd("distill", str(write_config(folder, model, text)))
    assert result.returncode == 0, result.stderr
    return folder / "run", result


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; from bbopd.cli.main import build_parser; build_parser().format_help(); "
        "sys.exit(bool({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=240).returncode == 0
    took = [_seconds_of_help()]
    while min(took) >= 0.3 and len(took) < 20:  # a crowded processor does less in a second of its time
        took.append(_seconds_of_help())
    assert min(took) < 0.3, f"bbopd --help took {min(took):.2f} s of processor time"


def _seconds_of_help() -> float:
    before = os.times()
    result = bbopd("--help")
    after = os.times()
    assert "distill" in result.stdout
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_a_run_trains_evaluates_and_leaves_everything(finished):
    run, result = finished
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert {"sampling", "scoring", "training"} <= set(summary["tokens_per_second"])
    assert [stage for stage, *_ in measures(run)] == ["start", "cold_start", "end"]
    first, *_, last = steps(run)
    assert last["loss"] < first["loss"]
    student = AutoModelForCausalLM.from_pretrained(run / "model")
    assert student.config.num_hidden_layers == 2
    report = (run / "report.html").read_text()
    assert "<svg" in report
    assert f"{measures(run)[-1][1]:.3f}" in report
    assert "bits/byte" in result.stdout
    assert str(run / "model") in result.stdout
    assert json.loads((run / "run.json").read_text())["config"]["student"]["model"]
    assert any((run / "tensorboard").iterdir())


def test_a_run_leaves_a_card_and_answers_token_by_token(finished):
    run, _ = finished
    card = (run / "model" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert f"{measures(run)[-1][1]:.3f} (" in card
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["samples"]) == 3
    for sample in summary["samples"]:
        assert sample["teacher"]
        for when in ("before", "after"):
            pieces = sample[f"{when}_pieces"]
            assert sum(kl for _, kl, _ in pieces) > 0
            spelled = "".join(text for text, *_ in pieces)
            for special in SPECIAL_TOKENS:  # among the pieces alone
                spelled = spelled.replace(special, "")
            assert spelled == sample[when]
    assert (run / "report.html").read_text().count("nats a token</h3>") == 6
    assert summary["teacher"]["vocab_size"] == 262
    assert all(line["rollout_length_mean"] <= 16 for line in steps(run) if line["rollout_tokens"])


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_losses(finished, model, text, served, tmp_path):
    whole, _ = finished
    config = write_config(tmp_path, model, text, teacher=served)
    run = tmp_path / "run"
    for lines in (1, 5, 9):  # in the cold start, after it, in the middle
        process = subprocess.Popen(
            [sys.executable, "-m", "bbopd", "distill", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
        )
        deadline = time.monotonic() + 120
        while len(steps(run)) < lines and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    result = bbopd("distill", str(config))
    assert result.returncode == 0, result.stderr
    assert losses(run) == losses(whole)
    assert measures(run) == measures(whole)


@pytest.mark.slow
def test_ctrl_c_ends_with_a_checkpoint_and_the_same_command_goes_on(finished, model, text, served, tmp_path):
    whole, _ = finished
    config = write_config(tmp_path, model, text, teacher=served, train={"checkpoint_every": 1000})
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "bbopd", "distill", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 120
    while len(steps(run)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "goes on from there" in output
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
    assert (run / "report.html").exists()
    assert (run / "checkpoints" / "latest").exists()
    assert bbopd("distill", str(config)).returncode == 0
    assert losses(run) == losses(whole)


def test_a_finished_run_is_not_overwritten(finished, capsys):
    run, _ = finished
    assert main(["distill", str(run.parent / "run.yaml")]) == 2
    assert "finished run" in capsys.readouterr().err


@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_top_k_at_temperature_1_is_one_line(model, text, served, tmp_path):
    config = write_config(tmp_path, model, text, teacher=served, train={"on_policy_tokens": 100, "cold_start_tokens": 0})
    assert main(["distill", str(config), "--set", "teacher.topk=32", "--set", "objective.temperature=1"]) == 0
    assert all(line["kd"] >= 0 for line in steps(tmp_path / "run"))


@pytest.mark.usefixtures("as_in_a_process_of_its_own")
@pytest.mark.parametrize("staleness", [0, 1])
def test_reverse_kl_on_the_students_own_ids(model, text, served, tmp_path, staleness, capsys):
    config = write_config(
        tmp_path,
        model,
        text,
        teacher={**served, "signal": "candidates", "topk": 16},
        objective={"name": "reverse_kl", "temperature": 1.0},
        rollouts={"max_staleness": staleness},
        train={"on_policy_tokens": 150, "cold_start_tokens": 60},
    )
    assert main(["distill", str(config)]) == 0
    lines = steps(tmp_path / "run")
    assert all(line["kd"] > 0 and line["signal_tokens"] == line["tokens"] for line in lines)
    assert {line["phase"] for line in lines} == {"cold_start", "on_policy"}
    capsys.readouterr()
    main(["doctor", str(config), "--set", f"output={tmp_path / 'other'}"])
    looked = " ".join(capsys.readouterr().out.split())
    assert "reverse_kl at T = 1 asks for candidates 16" in looked
    assert "FAIL" not in looked, looked


def test_candidates_are_refused_by_a_teacher_that_does_not_offer_them(model, text, tmp_path, capsys):
    own = ["--set", "teacher.signal=candidates", "--set", "objective.temperature=1", "--set", "objective.name=reverse_kl"]
    config = str(write_config(tmp_path, model, text))
    for number, (words, expected) in enumerate(
        [
            (["--set", "teacher.serve.levels=[topk, text]"], ["asks for the candidates signal", "offers topk, text", "forward_kl"]),
            (["--set", "teacher.serve.max_top_k=8"], ["teacher.topk is 64", "no more than 8", "teacher.topk=8"]),
        ]
    ):
        assert main(["distill", config, "--set", f"output={tmp_path / f'refused{number}'}", *own, *words]) == 3
        errors = capsys.readouterr().err
        for word in expected:
            assert word in errors, errors
        assert not steps(tmp_path / f"refused{number}")


@pytest.mark.usefixtures("as_in_a_process_of_its_own")
@pytest.mark.parametrize(("signal", "baseline"), [("sampled", "none"), ("full", "kl")])
def test_policy_gradient_learns_from_what_the_student_sampled(signal, baseline, model, text, served, tmp_path):
    objective = {"name": "policy_gradient", "temperature": 1.0, "ramp": 0, "discount": 0.5, "baseline": baseline}
    student = {"dtype": "float32"}  # in bfloat16 the ratio is 1 to rounding, which differs by processor
    config = write_config(tmp_path, model, text, student=student, objective=objective, teacher={**served, "signal": signal})
    assert main(["distill", str(config)]) == 0
    lines = steps(tmp_path / "run")
    assert all(line["signal_tokens"] == line["rollout_tokens"] for line in lines)  # labelled text is not scored
    sampled = [line for line in lines if line["signal_tokens"]]
    assert sampled[0]["importance_ratio"] == pytest.approx(1.0, abs=1e-3)  # engine and trainer agree on what was sampled from
    assert all(0.5 < line["importance_ratio"] < 2.0 for line in sampled)
    assert sum(line["sampled_kl"] for line in sampled) > 0
    assert all(("baseline_kl" in line) == (baseline == "kl") for line in sampled)
    on_policy = sum(line["rollout_tokens"] for line in lines)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["tokens"]["scored"] == on_policy


@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_sft_runs_without_a_teacher(model, text, tmp_path):
    config = write_config(tmp_path, model, text, objective={"name": "sft"}, train={"labelled_tokens": 200, "cold_start_tokens": 0})
    data = yaml.safe_load(config.read_text())
    del data["teacher"]
    config.write_text(yaml.safe_dump(data))
    assert main(["distill", str(config)]) == 0
    assert all(line["kd"] == 0 and line["rollout_tokens"] == 0 for line in steps(tmp_path / "run"))
    assert measures(tmp_path / "run")[-1][1] < measures(tmp_path / "run")[0][1]


@pytest.mark.slow
@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_bad_input_is_named_before_anything_is_spent(model, text, served, tmp_path, capsys):
    config = str(write_config(tmp_path, model, text, teacher=served))
    other = save_folder(tmp_path / "other", tiny_llama(vocab_size=300), tiny_tokenizer((("o", "u"),)))
    (tmp_path / "no_model").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    cases = [
        (["--set", "train.lrr=1"], 2, ["did you mean train.lr?"]),
        (["--set", f"student.model={tmp_path / 'no_model'}"], 2, ["no_model"]),
        (["--set", f"data.prompts=[{{jsonl: {tmp_path / 'empty.jsonl'}}}]"], 2, ["empty.jsonl"]),
        (["--set", "teacher.target=grpc://127.0.0.1:9", "--set", "teacher.timeout=5"], 3, ["127.0.0.1:9"]),
        (
            ["--set", "teacher.target=null", "--set", f"teacher.serve={{model: {other}}}"],
            3,
            ["260", "262", "259 is 'ou' there and 'th' here"],
        ),
        (["--set", "train.max_seq_len=100000"], 2, ["100000", "256"]),
        (["--set", "student.init.keep_layers=[0, 9]"], 2, ["9", "4"]),
    ]
    for number, (words, status, expected) in enumerate(cases):
        found = main(["distill", config, "--set", f"output={tmp_path / f'bad{number}'}", *words])
        errors = capsys.readouterr().err
        assert found == status, (words, errors)
        for word in expected:
            assert word in errors, (words, errors)
        assert not steps(tmp_path / f"bad{number}")


def test_the_demo_sizes_itself_between_its_bounds():
    slow, fast = token_budgets(480, 1e9), token_budgets(480, 1e15)
    assert slow == token_budgets(0, 1e15)
    assert all(small < large for small, large in zip(slow, fast, strict=True))
    middle = token_budgets(480, 1e11)
    assert all(small <= between <= large for small, between, large in zip(slow, middle, fast, strict=True))
