"""What ``bbopd compare`` plans: every arm as a run, equal budgets, what a sweep multiplies; and what it refuses before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bbopd.cli.main import main
from bbopd.compare.plan import Entrant, make_plan
from bbopd.config_compare import CompareConfig
from bbopd.config_file import parse_config, read_yaml
from bbopd.errors import ConfigError

KNOWN = ["none", "sft", "seqkd", "off_policy", "on_policy", "mixed"]
BASE: dict[str, Any] = {
    "student": {"model": "student"},
    "teacher": {"target": "grpc://localhost:7070"},
    "objective": {"name": "reverse_kl", "temperature": 1.0, "alpha": 0.2},
    "train": {"batch_tokens": 256, "max_seq_len": 128, "on_policy_tokens": 5},
    "rollouts": {"max_new_tokens": 32},
    "data": {"prompt_tokens": 16, "response_tokens": 32},
}


def compare(**changes: Any) -> CompareConfig:
    data = {"base": BASE, "arms": KNOWN, "budget": {"tokens": 4000}, "measures": {"test": "test.jsonl"}, "seeds": [0, 1], **changes}
    return parse_config(data, (), CompareConfig, "compare.yaml")


def by_name(config: CompareConfig) -> dict[str, Entrant]:
    return {entrant.name: entrant for entrant in make_plan(config)}


def test_known_arms_differ_as_their_names_say() -> None:
    entrants = by_name(compare())
    assert list(entrants) == KNOWN
    runs = {name: entrant.finals(entrant.learning_rates[0])[0].config for name, entrant in entrants.items()}
    objectives = {name: config.objective.name for name, config in runs.items()}
    assert objectives == {
        "none": "sft",
        "sft": "sft",
        "seqkd": "seqkd",
        "off_policy": "reverse_kl",
        "on_policy": "reverse_kl",
        "mixed": "reverse_kl",
    }
    assert {name: config.rollouts.on_policy_fraction for name, config in runs.items()} == {
        "none": 0.0,
        "sft": 0.0,
        "seqkd": 0.0,
        "off_policy": 0.0,
        "on_policy": 1.0,
        "mixed": 0.5,
    }
    assert runs["seqkd"].teacher.signal == "text"
    assert runs["mixed"].objective.alpha == 0.2
    assert [len(entrant.seeds) for entrant in entrants.values()] == [1, 2, 2, 2, 2, 2]  # untrained, all seeds are one
    assert {run.config.output for entrant in entrants.values() for run in entrant.runs.values()} == {
        f"runs/compare/runs/{run.name}" for entrant in entrants.values() for run in entrant.runs.values()
    }


def test_tokens_are_the_same_for_all() -> None:
    trains = {name: next(iter(entrant.runs.values())).config.train for name, entrant in by_name(compare()).items()}
    assert trains["none"].labelled_tokens == 0
    assert {trains[name].labelled_tokens for name in ("sft", "seqkd", "off_policy")} == {4000}
    assert trains["on_policy"].on_policy_tokens == 4000
    assert trains["mixed"].on_policy_tokens == 2000  # of 4000, labelled text has the other half


def test_updates_are_the_same_for_all() -> None:
    arms = {"sft": {}, "on_policy": {}, "long": {"like": "sft", "budget": {"updates": 90}}}
    entrants = by_name(compare(arms=arms, budget={"updates": 30}))
    steps = {name: next(iter(entrant.runs.values())).config.planned_steps for name, entrant in entrants.items()}
    assert steps == {"sft": 30, "on_policy": 30, "long": 90}


def test_a_sweep_multiplies_the_arms_that_it_matters_to() -> None:
    arms = {"sft": {}, "on_policy": {}, "cold": {"like": "on_policy", "set": {"objective.temperature": 0.5}}}
    found = by_name(compare(arms=arms, sweep={"objective.temperature": [1.0, 2.0], "objective.name": ["forward_kl", "reverse_kl"]}))
    assert list(found) == [
        "sft",
        *(f"on_policy temperature={t} objective={name}" for t in ("1.0", "2.0") for name in ("forward_kl", "reverse_kl")),
        "cold objective=forward_kl",
        "cold objective=reverse_kl",
    ]
    run = next(iter(found["on_policy temperature=2.0 objective=forward_kl"].runs.values()))
    assert (run.config.objective.temperature, run.config.objective.name) == (2.0, "forward_kl")
    assert run.name == "on_policy-temperature2.0-objectiveforward_kl-seed0"
    assert next(iter(found["cold objective=reverse_kl"].runs.values())).config.objective.temperature == 0.5


def test_learning_rates_are_tried_with_one_seed() -> None:
    rates = [1e-4, 3e-4]
    arms = {"none": {}, "sft": {}, "fixed": {"like": "sft", "set": {"train.lr": 1e-5}}}
    found = by_name(compare(arms=arms, learning_rates=rates, measures={"test": "test.jsonl", "development": "dev.jsonl"}))
    assert [(run.learning_rate, run.seed) for run in found["sft"].trials()] == [(1e-4, 0), (3e-4, 0)]
    assert [(run.learning_rate, run.seed) for run in found["sft"].finals(3e-4)] == [(3e-4, 0), (3e-4, 1)]
    assert found["none"].trials() == found["fixed"].trials() == []
    assert found["fixed"].learning_rates == (1e-5,)


def test_a_base_of_mixed_divergences_lends_itself_to_all_arms() -> None:
    base = {**BASE, "objective": {"name": "mixed", "temperature": 1.0, "labelled": {"name": "forward_kl"}}}
    runs = {name: next(iter(entrant.runs.values())).config for name, entrant in by_name(compare(base=base)).items()}
    assert runs["off_policy"].objective.labelled.name == "forward_kl"
    assert runs["sft"].objective.name == "sft"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["sft", "on-policy"]}, "arm 'on-policy' is not known"),
        ({"arms": []}, "arms is empty"),
        ({"budget": {"tokens": 5, "updates": 5}}, "exactly one of tokens and updates"),
        ({"learning_rates": [1e-4, 3e-4]}, "give measures.development"),
        ({"measures": {"test": "a", "development": "a"}}, "the test itself"),
        ({"measures": {"test": "a", "pattern": "("}}, "not a regular expression"),
        ({"seeds": [1, 1]}, "names one of them twice"),
        ({"references": {"sft": "model"}}, "both an arm and a reference"),
        ({"sweep": {"objective.alpha": []}}, "sweep.objective.alpha is empty"),
        ({"pairs": [["sft", "gkd"]]}, "pairs names 'gkd'"),
        ({"sweep": {"objective.alhpa": [0.1]}}, "did you mean objective.alpha"),
        ({"sweep": {"objective.alpha": [1.0]}}, r"arm on_policy alpha=1.0 cannot run(.|\n)*rollouts would teach nothing"),
        ({"base": {**BASE, "objective": {"name": "sft"}}}, "arm off_policy learns from a divergence"),
        ({"base": "nowhere.yaml"}, "cannot read nowhere.yaml"),
    ],
)
def test_refused_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(compare(**changes))


def test_a_missing_file_of_questions_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "compare.yaml"
    data = {"base": BASE, "arms": ["none"], "budget": {"tokens": 9}, "measures": {"test": "no.jsonl"}, "output": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump(data))
    assert main(["compare", str(path), "--plan"]) == 2
    assert "cannot read no.jsonl" in capsys.readouterr().err


def test_budgets_and_ramps_of_the_base_do_not_get_in_the_way() -> None:
    """What a base may spend, and ramps that are longer than its budget allows, are read with the comparison's own budget."""
    base = {**BASE, "train": {**BASE["train"], "on_policy_tokens": 0, "warmup": 40, "total_steps": 3}}
    runs = {name: next(iter(entrant.runs.values())).config for name, entrant in by_name(compare(base=base, budget={"updates": 50})).items()}
    assert {name: config.planned_steps for name, config in runs.items()} == {"none": 1, **dict.fromkeys(KNOWN[1:], 50)}
    with pytest.raises(ConfigError, match=r"arm sft cannot run(.|\n)*train\.warmup is 40 steps, but the budgets allow about 20"):
        make_plan(compare(base=base, budget={"updates": 20}))


@pytest.mark.parametrize(("name", "more"), [("compare", ()), ("compare_addition", ("sft_unlimited", "off_policy_unlimited"))])
def test_the_comparisons_that_are_kept_can_be_planned(name: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    path = f"configs/{name}.yaml"
    entrants = make_plan(parse_config(read_yaml(path), (), CompareConfig, path))
    assert {entrant.name.partition(" ")[0] for entrant in entrants} == {*KNOWN, *more}
