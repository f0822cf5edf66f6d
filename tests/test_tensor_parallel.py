"""`linear_distill` with the vocabulary split over a group of processes: against float64, one process, and itself on every rank.

Shape suffixes: ``N`` tokens, ``V`` vocabulary. Four processes answer all the cases at once (tests/vocabulary_ranks.py), in groups of two
and of four; some of them with the GPU engines, Triton in its interpreter and CUDA in its emulation.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bbopd import linear_distill
from tests.cuda_build import build_emulation
from tests.distill_oracle import logits_of, oracle
from tests.vocabulary_ranks import CASES, EVERYWHERE, MISTAKES, PARTS, WORLD, Case, call, is_asked, repeats

LIMIT_S = 480


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[1]
    build_emulation(folder)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(WORLD):
            log = stack.enter_context((folder / f"log-{rank}").open("w"))
            command = [sys.executable, "-W", "error", "-m", "tests.vocabulary_ranks", str(rank), str(folder)]
            processes.append(stack.enter_context(subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)))
            stack.callback(processes[-1].kill)
        for rank, process in enumerate(processes):
            assert process.wait(LIMIT_S) == 0, (folder / f"log-{rank}").read_text()[-3000:]
    return [torch.load(folder / f"answers-{rank}") for rank in range(WORLD)]


def expected(case: Case) -> dict[str, Tensor]:
    """The same from the formulas, in float64; metrics and all from one process."""
    tensors, options = case.whole()
    inputs = {name: tensors[name].double().requires_grad_() for name in case.trained if tensors[name] is not None}
    head = {name: tensors[name] if name not in inputs else inputs[name] for name in ("hidden", "weight", "bias")}
    how = dict(options)
    used = how.pop("vocab_size")
    z_NV = logits_of(*head.values(), how.pop("logit_scale", 1.0), how.pop("logit_softcap", None), used)
    loss, ce_N, kd_N = oracle(z_NV, tensors["teacher"], tensors["labels"], **how)
    gradients = (
        torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True) if case.tokens else map(torch.zeros_like, inputs.values())
    )
    found = {"loss": loss.detach(), "ce": ce_N.detach(), "kd": kd_N.detach()}
    return found | {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}


@pytest.mark.parametrize("question", CASES)
def test_ranks_together_make_what_one_process_makes(answers: list[dict[Any, Any]], question: str) -> None:
    case = CASES[question]
    tensors, options = case.whole()
    alone, truth = call(replace(case, engine="reference"), tensors, options), expected(case)
    tolerance = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 1e-2}[case.dtype]
    for name, (sizes, ranks) in PARTS.items():
        if not is_asked(name, question):
            continue
        once = [answers[rank][name, question][0] for rank in ranks]
        for key, value in alone.items():
            if key in ("gradient of weight", "gradient of bias"):
                assert [len(found[key]) for found in once] == list(sizes)
                ours = torch.cat([found[key] for found in once])
            else:
                ours = once[0][key]
                assert all(torch.equal(found[key], ours) for found in once[1:]), f"{key} differs between the ranks"
            torch.testing.assert_close(ours, value, rtol=tolerance, atol=tolerance, msg=lambda text, at=(name, key): f"{at}: {text}")
            if key in truth:
                torch.testing.assert_close(ours.double(), truth[key], rtol=tolerance, atol=tolerance)
        for rank in ranks:
            first, *others = answers[rank][name, question]
            assert len(others) == repeats(question)
            assert all(torch.equal(first[key], other[key]) for other in others for key in first), "a repetition has other bits"


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_one_rank_is_an_error_of_all(answers: list[dict[Any, Any]], mistake: str, bad: int) -> None:
    said, seconds = zip(*(answers[rank]["mistake", bad, mistake] for rank in PARTS["two"][1]), strict=True)
    for part in MISTAKES[mistake][2].format(bad=bad).split(" | "):
        assert part in said[0]
        assert part in said[1]
    # what shows in a sum over all of the vocabulary has no rank
    assert said[0] == said[1] or f"rank {bad} of the group" in said[1 - bad]
    assert max(seconds) < 60, "and not after the time limit of the group"


def test_what_is_wrong_on_every_rank_is_said_on_every_rank(answers: list[dict[Any, Any]]) -> None:
    for mistake, (_, _, message) in EVERYWHERE.items():
        said = [answers[rank]["mistake", None, mistake][0] for rank in PARTS["two"][1]]
        assert said[0] == said[1]
        assert message in said[0]
    assert [answers[rank]["after mistakes"] for rank in PARTS["two"][1]] == ["nothing", "nothing"]


def test_compile_and_autocast_change_nothing(answers: list[dict[Any, Any]]) -> None:
    for rank in PARTS["two"][1]:
        found = answers[rank]["compiled"]
        for how in ("compiled", "autocast"):
            for key, value in found[how].items():
                assert torch.equal(value, found["plain"][key]), (how, key)


def test_a_group_is_a_process_group() -> None:
    tensors, _ = Case("topk").whole()
    with pytest.raises(TypeError, match="group is a int"):
        linear_distill(**tensors, group=-100)  # type: ignore[arg-type]
