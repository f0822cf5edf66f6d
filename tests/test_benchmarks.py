"""The benchmark suite's own parts on tiny sizes: every contestant does what it claims to, and tables and plots are made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import accuracy, cases, distill, logprobs, training_step
from benchmarks.cases import Case
from benchmarks.contest import Contestant, Entry, enter, peak_megabytes, run_round
from benchmarks.inputs import draw
from benchmarks.records import Record, make_record, read
from benchmarks.report import markdown, publish
from tests.distill_oracle import oracle

TINY = Case("tiny", 6, 8, 40, dtype="float32", K=4)
TASKS = [replace(case, N=6, D=8, V=40, K=4, dtype="float32") for case in cases.distill_cases(is_quick=True)[2:]] + [TINY]
MACHINE = dict.fromkeys(("processor", "instruction_sets", "cores", "threads", "torch", "python", "date", "command", "machine"), "here")


@pytest.mark.parametrize("case", TASKS, ids=lambda case: case.objective)
def test_float64_truth_is_the_formula(case: Case) -> None:
    inputs = draw(case)
    found, _, _ = accuracy.exact_gradients(inputs)
    z_NV = inputs.hidden.double() @ inputs.weight.double().T
    settings = {name: getattr(case, name) for name in ("temperature", "ce_weight", "kd_weight", "divergence")}
    expected, _, _ = oracle(z_NV, inputs.teacher, inputs.labels, **settings)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("contestant", [one for one in distill.CONTESTANTS if not one.is_compiled], ids=lambda one: one.name)
@pytest.mark.parametrize("case", TASKS, ids=lambda case: case.objective)
def test_contestants_compute_the_loss_they_claim(case: Case, contestant: Contestant) -> None:
    if contestant not in distill.contestants_of(case):
        pytest.skip("takes no part in this case")
    reason = contestant.missing(case)
    if reason:
        pytest.skip(reason)
    inputs = draw(case)
    loss = contestant.prepare(inputs)()
    exact_loss, *exact = accuracy.exact_gradients(inputs, contestant.takes_head)
    if not distill.claims_loss(contestant, case):
        assert contestant.note
        return
    assert loss is not None
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-4)
    for leaf, truth in zip(inputs.leaves, exact, strict=True):
        assert leaf.grad is not None
        assert accuracy.relative_error(leaf.grad, truth) < 1e-4
    inputs.drop_gradients()
    assert inputs.hidden.grad is None


def test_the_floor_is_the_three_products() -> None:
    inputs = draw(TINY)
    assert distill.FLOOR.prepare(inputs)() is None
    hidden, weight = (leaf.detach() for leaf in inputs.leaves)
    logits = hidden @ weight.T
    for leaf, product in zip(inputs.leaves, (logits @ weight, logits.T @ hidden), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, product)
    assert not distill.claims_loss(distill.FLOOR, TINY)


def test_near_case_has_a_tiny_kl() -> None:
    case = accuracy.near_case(replace(TINY, N=64, D=32, V=512, dtype="bfloat16", teacher="full"))
    loss, _, _ = accuracy.exact_gradients(draw(case))
    assert 2e-5 < loss.item() / case.temperature**2 < 2e-4


def test_scores_match_float64() -> None:
    able = [one for one in logprobs.CONTESTANTS if not one.is_compiled and not one.missing(TINY)]
    errors = accuracy.logprobs_errors(able, replace(TINY, teacher="none"))
    assert set(errors) >= {"bbopd reference", "PyTorch eager"}
    assert max(errors.values()) < 1e-5


def test_training_contestants_agree_on_a_tiny_model() -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    inputs = training_step.prepare_inputs(AutoModelForCausalLM.from_config(config).train(), TINY)
    able = [one for one in training_step.CONTESTANTS if not one.is_compiled and not one.missing(TINY)]
    losses = {}
    for one in able:
        losses[one.name] = one.prepare(inputs)()
        assert all(leaf.grad is not None for leaf in inputs.leaves)
        inputs.drop_gradients()
    assert losses.pop("body alone") is None
    values = [loss.item() for loss in losses.values() if loss is not None]
    assert len(values) == len(losses) >= 2
    assert max(values) == pytest.approx(min(values), rel=1e-5)


def test_rounds_are_interleaved_and_skips_are_told() -> None:
    order: list[str] = []

    def log(name: str) -> Contestant:
        return Contestant(name, lambda inputs: lambda: order.append(name))

    absent = Contestant("absent", lambda inputs: lambda: None, lambda case: "it is not installed")
    huge = Contestant("huge", lambda inputs: lambda: None, bytes_per_logit=1e18)
    entries = enter([log("a"), log("b"), absent, huge], draw(TINY), TINY)
    order.clear()
    for number in range(3):
        run_round(entries, draw(TINY), number)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert entries[2].skipped == "it is not installed"
    assert "GiB" in entries[3].skipped
    assert [len(entry.seconds) for entry in entries] == [3, 3, 0, 0]


def test_memory_of_whole_logits_is_seen_in_a_fresh_process() -> None:
    case = replace(TINY, N=512, D=8, V=8192)
    found = peak_megabytes("benchmarks.distill", case, "PyTorch eager")
    if found is None:
        pytest.skip("this system does not tell peak memory")
    assert found > 2 * 4 * case.N * case.V / 2**20


def test_tables_and_plots_are_made(tmp_path: Path) -> None:
    ran = Entry(Contestant("ran", lambda inputs: lambda: None, note="a | b"), seconds=[0.001, 0.003, 0.002])
    left = Entry(Contestant("left", lambda inputs: lambda: None), skipped="it is not installed")
    records: list[Record] = []
    for case in (TINY, *(replace(case, N=8, V=8 * (index + 1)) for index, case in enumerate(cases.sweep_cases(is_quick=True)))):
        records += [make_record(case, entry, 0.001, 2.0 if entry is ran else None, 0.0024 if entry is ran else None, None, MACHINE)
                    for entry in (ran, left)]  # fmt: skip
    for first in range(0, len(records), 2):
        publish("distill", records[first : first + 2], tmp_path)
    publish("distill", records[2:4], tmp_path)  # measured again, a case stays where it was
    folder = tmp_path / "here"
    assert read(folder / "distill.csv") == records
    text = (folder / "distill.md").read_text()
    assert text == markdown("distill", records)
    assert r"| ran | 2.0 | 2.00 | 2 | 0.24% | – | a \| b |" in text
    assert "| left | – | – | – | – | – | skipped: it is not installed |" in text
    assert {path.name for path in folder.glob("*.svg")} == {"linear_distill-V.svg", "linear_distill-N.svg"}
