"""The benchmark suite's own parts on tiny sizes: every contestant does what it claims to, and tables and plots are made."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import accuracy, cases, distill, gpu, gpu_contestants, logprobs, on_gpu, training_step
from benchmarks.cases import Case
from benchmarks.contest import Contestant, Entry, enter, peak_megabytes, run_round
from benchmarks.inputs import draw
from benchmarks.records import Record, make_record, read
from benchmarks.report import markdown, publish
from tests.distill_oracle import oracle

TINY = Case("tiny", 6, 8, 40, dtype="float32", K=4)
TASKS = [replace(case, N=6, D=8, V=40, K=4, dtype="float32") for case in cases.distill_cases(is_quick=True)[2:]] + [TINY]
GPU_TASKS = cases.gpu_distill_cases((6, 40, 8), "cpu", "float32", every_divergence=True)
MACHINE = dict.fromkeys(("processor", "instruction_sets", "cores", "threads", "torch", "python", "date", "command", "machine"), "here")


@pytest.mark.parametrize("case", [*TASKS, *GPU_TASKS], ids=lambda case: case.objective)
def test_float64_truth_is_the_formula(case: Case) -> None:
    inputs = draw(case)
    found, *_ = accuracy.exact_gradients(inputs)
    z_NV = inputs.hidden.double() @ inputs.weight.double().T
    settings = {name: getattr(case, name) for name in ("temperature", "ce_weight", "kd_weight", "divergence")}
    expected, _, _ = oracle(z_NV, inputs.teacher, inputs.labels, **settings)
    assert found.item() == pytest.approx(expected.item(), rel=1e-7)


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


def test_an_error_becomes_a_row_that_says_so() -> None:
    def raising(error: Exception) -> Contestant:
        def step() -> None:
            raise error

        return Contestant("raising", lambda inputs: step)

    errors = (torch.OutOfMemoryError("too large"), ZeroDivisionError("by zero\nand more"))
    able = Contestant("able", lambda inputs: lambda: None)
    entries = enter([*map(raising, errors), able], draw(TINY), TINY, any_may_fail=True)
    assert [entry.skipped for entry in entries] == ["OutOfMemoryError: too large", "ZeroDivisionError: by zero", ""]
    assert [entry.has_failed for entry in entries] == [False, True, False]
    with pytest.raises(ZeroDivisionError):
        enter([raising(errors[1])], draw(TINY), TINY)


@pytest.mark.parametrize("case", GPU_TASKS, ids=lambda case: case.objective)
def test_contestants_on_a_gpu_compute_the_loss_they_claim(case: Case) -> None:
    taking_part = gpu_contestants.distill_contestants(case, compiles=False)
    able = [one for one in taking_part if not one.missing(case) and not one.name.startswith("Liger")]  # which needs a GPU
    errors = accuracy.gradient_errors(able, case)
    assert "PyTorch eager" in errors
    assert max(errors.values()) < 1e-4


def test_the_floor_on_a_gpu_has_the_products_that_are_needed() -> None:
    products = {}
    for case in GPU_TASKS:
        with FlopCounterMode(display=False) as counter:
            step = gpu_contestants.DISTILL_FLOOR.prepare(draw(case))
            before = counter.get_total_flops()
            step()
        products[case.objective] = (counter.get_total_flops() - before) / (2 * case.N * case.D * case.V)
    assert products.pop("topk_frozen") == 2
    assert products.pop("hidden_forward") == 4
    assert set(products.values()) == {3}


def test_the_gpu_suite_measures_every_kind_of_teacher_on_every_shape() -> None:
    quick, full = (gpu.jobs_of(gpu.parse(arguments)) for arguments in ([], ["--full"]))
    assert {(job.case.N, job.case.V, job.case.D) for job in quick} == set(cases.SIX_SHAPES)
    assert {(job.case.N, job.case.V, job.case.D) for job in full} == set(cases.ALL_SHAPES)
    assert len(full) == len(cases.ALL_SHAPES) * (len(cases.GPU_OBJECTIVES) + 1)
    for shape in cases.SIX_SHAPES:
        kinds = {job.case.teacher for job in quick if shape == (job.case.N, job.case.V, job.case.D)}
        assert kinds == {"none", "full", "full_hidden", "topk", "sampled"}


@pytest.mark.slow
def test_the_gpu_suite_runs_dry_and_outlives_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, where it is there; else a row says why not."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    asked = ["--device=cpu", "--dtype=float32", "--shapes=4x40x8", "--rounds=1", f"--results={tmp_path}"]
    options = gpu.parse([*asked, "--objectives", "hidden_forward", "logprobs"])
    first, last = gpu.jobs_of(options)
    last.left_out["PyTorch eager"] = "the process ended with 1"
    dying = gpu.Job(first.script, replace(first.case, dtype="no dtype"), compiles=False)
    done, failures = gpu.run_jobs([dying, replace(first, compiles=False), replace(last, compiles=False)], options, asked)
    assert done == 3
    assert len(failures) == 1
    assert "inputs: the process ended with 1" in failures[0]
    (folder,) = tmp_path.iterdir()
    records = {record.contestant: record for record in read(folder / "gpu_distill.csv")}
    ours = records["bbopd triton"]
    assert ours.skipped or (ours.median_ms is not None and ours.ratio is not None and ours.error is not None and ours.error < 1e-4)
    assert records["PyTorch eager"].near_error is not None
    assert ours.command == "python -m benchmarks.gpu " + " ".join(asked)
    assert "GB/s" in (folder / "gpu_distill.md").read_text()
    assert "skipped: the process ended with 1" in (folder / "gpu_logprobs.md").read_text()


def test_the_tree_for_a_gpu_needs_no_build(tmp_path: Path) -> None:
    on_gpu.lay_out(tmp_path / "tree")
    packages = str(Path(torch.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "tree"), packages]), "TRITON_INTERPRET": "1"}
    # -S: an editable installation would come first
    program = (
        "import bbopd.ops, benchmarks.gpu_worker, tests.devices; print(bbopd.__file__, bbopd.ops.importlib.import_module('{}').__file__)"
    )
    command = [
        sys.executable,
        "-S",
        "-W",
        "ignore",
        "-c",
        program.format("bbopd.kernels.distill" if find_spec("triton") else "bbopd.types"),
    ]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(tmp_path)) for path in done.stdout.split())


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
