"""A configuration is right or refused, and a refusal names the key, the value and the way out."""

import subprocess
import sys
from pathlib import Path

import pytest

from bbopd.config import RunConfig, ServeConfig, resolve_steps
from bbopd.config_file import load_config, parse_config
from bbopd.errors import ConfigError

MINIMAL = {"student": {"model": "some/model"}, "teacher": {"target": "grpc://localhost:7070"}}


def parse(*overrides: str, **sections: dict) -> RunConfig:
    return parse_config({**MINIMAL, **sections}, overrides, RunConfig, "run.yaml")


def test_defaults_are_the_reference_recipe():
    config = parse()
    assert config.objective.weights == (0.5, 0.5)
    assert (config.objective.temperature, config.objective.t2_scaling, config.objective.ramp) == (2.0, True, 0.1)
    assert (config.train.lr, config.train.betas, config.train.weight_decay, config.train.clip) == (2e-5, (0.9, 0.999), 0.01, 1.0)
    assert (config.train.batch_tokens, config.train.max_seq_len, config.train.warmup) == (2048, 1024, 0.02)
    assert (config.rollouts.per_update, config.rollouts.on_policy_fraction) == (16, 0.5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1e-4", ["unknown key train.lrr", "0.0001", "did you mean train.lr?"]),
        ("objective.temprature=2", ["unknown key objective.temprature", "did you mean objective.temperature?"]),
        ("studnet.model=x", ["unknown key studnet", "did you mean student?"]),
        ("train.lr=-1", ["train.lr", "greater than 0", "-1"]),
        ("train.lr=fast", ["train.lr", "number", "fast"]),
        ("objective.name=kl", ["objective.name", "forward_kl", "kl"]),
        ("objective.ramp=10000", ["objective.ramp is 10000 steps", "about 735 steps", "train.on_policy_tokens"]),
        ("train.warmup=800", ["train.warmup is 800 steps", "735"]),
        ("teacher.topk=64", ["objective.temperature 2.0", "teacher.topk", "teacher.signal=full"]),
        ("teacher.target=http://x", ["http://x", "grpc://host:port"]),
        ("rollouts.max_new_tokens=1024", ["1024", "no room for a prompt", "train.max_seq_len"]),
        ("rollouts.on_policy_fraction=1.0", ["objective.ramp without labelled tokens", "objective.ramp=0"]),
        ("rollouts.on_policy_fraction=0", ["train.labelled_tokens"]),
        ("train.on_policy_tokens=0", ["train.on_policy_tokens is 0"]),
        ("student.init.keep_layers=0-3,x", ["student.init.keep_layers", "'x'", "0-11"]),
        ("student.init.keep_layers=[3, 1]", ["student.init.keep_layers", "rising order"]),
        ("objective.ce_weight=1", ["alpha, or ce_weight and kd_weight"]),
        ("data.prompts=[{jsonl: a, text: b}]", ["exactly one of demo, jsonl, parquet, text, dataset"]),
        ("data.prompts=[{json: a}]", ["unknown key data.prompts.json", "did you mean data.prompts.jsonl?"]),
        ("objective", ["section.key=value"]),
    ],
)
def test_a_bad_value_is_named_with_the_way_out(override, words):
    sections = {"objective": {"alpha": 0.5}} if "ce_weight" in override else {}
    with pytest.raises(ConfigError) as caught:
        parse(override, **sections)
    for word in words:
        assert word in str(caught.value)


def test_a_run_needs_a_teacher_unless_it_is_sft():
    without = {"student": MINIMAL["student"]}
    with pytest.raises(ConfigError, match="needs a teacher"):
        parse_config(without, [], RunConfig, "run.yaml")
    config = parse_config(without, ["objective.name=sft", "train.labelled_tokens=1000"], RunConfig, "run.yaml")
    assert config.objective.weights == (1.0, 0.0)
    assert config.rollouts_per_cycle == 0


def test_topk_is_a_one_line_change():
    config = parse("teacher.topk=64", "objective.temperature=1")
    assert (config.teacher.signal, config.teacher.topk) == ("topk", 64)


def test_layers_may_be_given_as_ranges():
    kept = parse("student.init.keep_layers='0-2,7,9-10'").student.init.keep_layers
    assert kept == (0, 1, 2, 7, 9, 10)


@pytest.mark.parametrize(("value", "steps"), [(0, 0), (7, 7), (0.0, 0), (0.1, 10), (1.0, 100)])
def test_an_int_is_steps_and_a_float_a_share(value, steps):
    assert resolve_steps(value, 100) == steps


def test_planned_steps_count_every_cycle():
    config = parse(
        "rollouts.per_update=16",
        "rollouts.max_new_tokens=64",
        "data.response_tokens=128",
        "train.batch_tokens=512",
        "train.cold_start_tokens=4096",
        "train.on_policy_tokens=5120",
    )
    # cold start: 2 cycles of 16 * 128 = 2,048 tokens, 4 steps each; then 10 cycles of 8 * 64 + 8 * 128 = 1,536 tokens, 3 steps each
    assert config.planned_steps == 2 * 4 + 10 * 3


def test_a_resolved_configuration_reads_back_as_itself():
    config = parse("objective.ramp=1.0", "train.warmup=3")
    assert parse_config(config.model_dump(mode="json"), [], RunConfig, "run.json") == config


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(tmp_path / "broken.yaml")


def test_serve_files_are_checked_alike():
    with pytest.raises(ConfigError, match=r"did you mean port\?"):
        parse_config({"model": "m", "prot": 1}, [], ServeConfig, "teacher.yaml")


def test_configuration_is_read_without_torch():
    code = "import sys, bbopd, bbopd.config_file; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=240).returncode == 0


@pytest.mark.parametrize(("name", "steps"), [("recipe", 1000), ("recipe_literal", 100_000)])
def test_the_recipes_are_valid_and_as_long_as_they_say(name, steps):
    config = load_config(Path(__file__).parents[1] / "configs" / f"{name}.yaml")
    assert (config.objective.temperature, config.objective.alpha, config.train.batch_tokens) == (2.0, 0.5, 2048)
    assert config.planned_steps == pytest.approx(steps, rel=0.05)
    assert config.objective.t2_scaling == (name == "recipe")


def test_a_teacher_may_have_several_addresses_each_once():
    several = parse_config({**MINIMAL, "teacher": {"target": ["grpc://localhost:1", "grpc://localhost:2"]}}, (), RunConfig, "run.yaml")
    assert several.teacher.targets == ("grpc://localhost:1", "grpc://localhost:2")
    assert parse_config(MINIMAL, (), RunConfig, "run.yaml").teacher.targets == ("grpc://localhost:7070",)
    assert (
        RunConfig.model_validate({"student": {"model": "m"}, "objective": {"name": "sft"}, "train": {"labelled_tokens": 1}}).teacher.targets
        == ()
    )
    for targets, message in (
        ([], "one or more addresses"),
        (["grpc://a:1", "grpc://a:1"], "each once"),
        (["grpc://a:1", "http://b:1"], "'http://b:1' is not an address"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({**MINIMAL, "teacher": {"target": targets}}, (), RunConfig, "run.yaml")
