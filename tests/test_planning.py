"""Plans against what they plan: bytes of real tensors, seconds of a real run, published sizes of known models."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest

from bbopd.cli.main import main
from bbopd.config import RunConfig, StudentConfig
from bbopd.config_file import load_config
from bbopd.errors import ConfigError
from bbopd.planning.lines import plan_lines
from bbopd.planning.machine import GIB, Machine
from bbopd.planning.observed import rates_of_run
from bbopd.planning.plan import Planner
from bbopd.planning.rates import Rates, read_rates
from bbopd.planning.remedies import find_remedies
from bbopd.planning.scaling import Mishaps, break_of, scale, sizes_up_to
from tests.loop_rig import Rig, run_config
from tests.plans import CONFIGS, h100, shape, student_folder

# ------------------------------------------------------------ what fits


def test_what_does_not_fit_is_told_with_the_smallest_changes_that_make_it_fit(tmp_path):
    config = load_config(CONFIGS / "7b.yaml")
    planner = Planner(student=shape(tmp_path, "qwen2.5-7b", 4))
    plan = planner.plan(config, Machine(1, 40 * GIB, None))
    assert plan.problems
    remedies = find_remedies(planner, plan)
    assert remedies
    for remedy in remedies:
        assert not remedy.plan.problems
        assert remedy.plan.memory.peak <= 40 * GIB
    said = "\n".join(plan_lines(plan, remedies))
    assert all(remedy.words in said for remedy in remedies)
    counts = [remedy.gpus for remedy in remedies if remedy.gpus is not None]
    assert counts
    assert planner.changed(plan, {}, counts[0] // 2).problems, "fewer would not do"


def test_changes_that_do_not_do_alone_are_put_together_without_those_not_needed(tmp_path):
    config = load_config(CONFIGS / "fleet_topk.yaml", ["student.activation_checkpointing=false", "train.micro_batch_tokens=32768"])
    planner = Planner(student=shape(tmp_path, "qwen2.5-3b", 4))
    plan = planner.plan(config, Machine(1, 8 * GIB, None))
    remedies = find_remedies(planner, plan)
    assert len(remedies) == 1, "no single change does"
    for remedy in remedies:
        for left_out in remedy.sets:
            fewer = {key: value for key, value in remedy.sets.items() if key != left_out}
            changed = planner.changed(plan, fewer)
            assert changed is None or changed.problems, f"{left_out} is not needed"


def test_an_engine_without_room_for_a_sequence_is_a_problem(tmp_path):
    config = load_config(CONFIGS / "fleet_topk.yaml", ["rollouts.gpu_memory=0.05"])
    plan = Planner(student=shape(tmp_path, "qwen2.5-3b", 30)).plan(config, h100())
    assert plan.memory.engine_tokens < 0
    assert any("rollouts.gpu_memory 0.05" in problem for problem in plan.problems)


# ------------------------------------------------------------ time


async def test_the_planned_seconds_of_an_update_are_a_real_runs(tmp_path):
    config = run_config(
        tmp_path / "run",
        student={"model": str(student_folder(tmp_path, vocab_size=262)), "dtype": "float32"},
        rollouts={"per_update": 16, "max_new_tokens": 24, "max_staleness": 0},
        train={"batch_tokens": 128, "max_seq_len": 64, "cold_start_tokens": 100, "on_policy_tokens": 3000, "checkpoint_every": 1000},
    )
    rig = Rig(config)
    assert await rig.run() == "finished"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ends = {line["cycle"]: line["elapsed"] for line in lines if line["phase"] == "on_policy"}
    cycles = sorted(ends)
    seconds = sorted(ends[after] - ends[before] for before, after in pairwise(cycles))
    real = mean(seconds[len(seconds) // 4 : len(seconds) - len(seconds) // 4])

    rates = rates_of_run(tmp_path / "run")
    plan = Planner(rates=rates).plan(config, Machine(1, None, None))
    assert plan.pace is not None
    assert not plan.pace.unknown
    assert plan.pace.cycle == pytest.approx(real, rel=0.2)
    trained = sum(line["tokens"] for line in lines if line["phase"] == "on_policy") / len(cycles)
    assert plan.cycle.trained == pytest.approx(trained, rel=0.1)
    assert plan.pace.bottleneck == max(plan.pace.seconds, key=plan.pace.seconds.__getitem__)


def test_overlapping_cycles_take_as_long_as_the_slowest_stage_and_others_as_all_together(tmp_path):
    sets = ["rollouts.max_staleness=1"], ["rollouts.max_staleness=0"]
    rates = Rates(sampling=1000.0, scoring=500.0, training=4000.0, push=2.0)
    planner = Planner(student=shape(tmp_path, "qwen2.5-3b", 2), rates=rates)
    overlapping, in_turn = (planner.plan(load_config(CONFIGS / "fleet_topk.yaml", one), h100()) for one in sets)
    assert overlapping.pace is not None
    assert in_turn.pace is not None
    cycle = overlapping.cycle
    assert overlapping.pace.cycle == pytest.approx(cycle.scored / 500)
    assert in_turn.pace.cycle == pytest.approx(cycle.written / 1000 + 2 + cycle.scored / 500 + cycle.trained / 4000)
    assert overlapping.pace.bottleneck == "scoring"
    assert in_turn.seconds == pytest.approx(in_turn.pace.update * in_turn.updates)


def test_rates_that_cannot_be_read_are_refused_by_name(tmp_path):
    path = tmp_path / "rates.json"
    for text, message in (
        ("{", "is not JSON"),
        ('{"sampling": 0}', "sampling is 0"),
        ('{"speed": 3}', "speed"),
        ("[]", "list"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_rates(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_rates(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="no run"):
        rates_of_run(tmp_path)


# ------------------------------------------------------------ money, traffic, disk


def test_money_and_bytes_follow_from_the_tokens(tmp_path):
    folder = student_folder(tmp_path)
    priced = {"target": "openai://localhost:1/v1", "topk": 20, "prices": {"prompt": 2.0, "answer": 6.0, "currency": "EUR"}}
    config = run_config(tmp_path / "run", teacher=priced).model_copy(update={"student": StudentConfig(model=str(folder))})
    plan = Planner().plan(config, Machine(1, None, None))
    assert plan.cost == pytest.approx(plan.total.sequence_tokens * 2.0 / 1e6)
    assert plan.answers == plan.total.response_tokens * (20 * (2 + 2) + 8)
    assert plan.currency == "EUR"
    model_bytes = 4 * plan.shapes.student.parameters
    assert plan.checkpoint == pytest.approx(3 * model_bytes, abs=2**24 + 4096)
    assert plan.disk == pytest.approx(3 * plan.checkpoint + model_bytes, abs=4096)


# ------------------------------------------------------------ scaling


def timed(folder: Path, sets: list[str]) -> tuple[RunConfig, Planner]:
    small = ["rollouts.per_update=16", "train.batch_tokens=4096", *sets]
    rates = Rates(sampling=1500.0, training=6000.0)
    return load_config(CONFIGS / "fleet_topk.yaml", small), Planner(student=shape(folder, "qwen2.5-3b", 2), rates=rates)


QUIET = Mishaps(answer_spread=0.01, teacher_seconds=1e-4, teacher_failures=0.0, gpu_hours=1e12, step_spread=0.0, collective_seconds=0.0)


def test_without_mishaps_a_cycle_takes_what_the_plan_says_however_many_gpus_there_are(tmp_path):
    config, planner = timed(tmp_path, ["rollouts.max_staleness=0"])
    plan = planner.plan(config, h100())
    assert plan.pace is not None
    one, many = scale(plan, [1, 16], QUIET)
    assert one.update_seconds == pytest.approx(plan.pace.update, rel=0.1)
    assert many.efficiency == pytest.approx(1.0, abs=0.05)
    assert many.sequences == 16 * one.sequences
    assert break_of([one, many]) is None


def test_what_grows_with_the_gpus_breaks_the_line(tmp_path):
    config, planner = timed(tmp_path, [])
    plan = planner.plan(config, h100())
    stragglers = Mishaps(step_spread=0.3, teacher_failures=0.0)
    points = list(scale(plan, [1, 32], stragglers))
    assert break_of(points) is points[1]
    assert points[1].goodput < points[0].goodput
    assert points[1].driver > 0


def test_sizes_go_by_fours_to_the_end(tmp_path):
    assert sizes_up_to(1) == (1, 4, 16, 64, 256, 1024, 4096)
    assert sizes_up_to(8) == (8, 32, 128, 512, 2048, 4096)
    config, planner = timed(tmp_path, [])
    with pytest.raises(ConfigError, match="multiples"):
        list(scale(planner.plan(config, h100(8)), [12], QUIET))
    with pytest.raises(ConfigError, match="--gpu"):
        list(scale(planner.plan(config, Machine(1, None, None)), [1], QUIET))


# ------------------------------------------------------------ the command


def test_the_command_tells_a_person_and_a_program(tmp_path, capsys):
    given = ["plan", str(CONFIGS / "fleet_topk.yaml"), "--student-config", shape(tmp_path, "qwen2.5-3b", 4)]
    assert main([*given, "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    for word in ("optimizer", "activations", "KV cache", "logits not there", "slowest", "of questions", "disk", "fits      yes"):
        assert word in said
    assert main([*given, "--gpu-memory", "6", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False
    assert told["memory"]["peak"] > 6 * GIB
    assert told["remedies"]
    assert main([*given, "--gpu", "h100", "--simulate", "1,2", "--set", "rollouts.per_update=16", "--json"]) == 0
    assert [point["gpus"] for point in json.loads(capsys.readouterr().out)["scaling"]] == [1, 2]
    for wrong, message in ((["--gpu", "z9"], "z9"), (["--gpus", "0"], "--gpus is 0"), (["--simulate", "many"], "many")):
        assert main([*given, "--gpu", "h100", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_measured_rates_come_from_a_few_cycles_of_the_run_itself(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(
        "\n\n\n".join(f"{n} the thin thing in there, then {n * n} more of them and so on" for n in range(40))
    )
    run = tmp_path / "run.yaml"
    run.write_text(
        json.dumps(
            {
                "student": {"model": str(student_folder(tmp_path, vocab_size=262)), "dtype": "float32"},
                "objective": {"name": "sft"},
                "rollouts": {"per_update": 4, "max_new_tokens": 8},
                "train": {"batch_tokens": 40, "max_seq_len": 48, "labelled_tokens": 100_000},
                "data": {"prompts": [{"text": str(tmp_path / "text.txt")}], "prompt_tokens": 8, "response_tokens": 10},
                "output": str(tmp_path / "out" / "run"),
            }
        )
    )
    assert main(["plan", str(run), "--measure", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rates"]["training"] > 0
    assert told["seconds"] > 0
    assert told["bottleneck"] == "training"
    assert list((tmp_path / "out").iterdir()) == [], "nothing is left of it"
