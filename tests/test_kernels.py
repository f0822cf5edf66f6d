"""`linear_logprobs` in Triton: against float64 beside plain PyTorch, in the interpreter, and on a GPU where there is one.

Whether Triton interprets is settled as it is
imported, so that a process of its own answers all the cases at once.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from bbopd import linear_logprobs
from tests.devices import ON_CPU, ON_GPU
from tests.logprobs_cases import (
    ANSWERED,
    REFUSED,
    REFUSED_ON_CPU,
    TIED_K,
    assert_exact,
    assert_filled_up,
    assert_lower_first,
    draw,
    exact,
    nearly_certain,
    tied,
)

triton = pytest.importorskip("triton")

CHILD = """
import sys, torch
from dataclasses import asdict
from bbopd import linear_logprobs
from bbopd.kernels import logprobs
from bbopd.kernels.rows import TritonRows

device, questions, answers = sys.argv[1:]
answered = {}
asked, z = torch.load(questions)
for name, (tensors, options) in asked.items():
    arguments = {key: value.to(device) for key, value in tensors.items()} | options
    try:
        op = logprobs.linear_logprobs if "chunk_tokens" in options else linear_logprobs
        once, again = asdict(op(**arguments)), asdict(op(**arguments))
    except ValueError as error:
        answered[name] = str(error)
    else:
        answered[name] = {key: (value.cpu(), again[key].cpu()) for key, value in once.items() if value is not None}
tensors, _ = asked["bias"]
hidden, weight, bias, token_ids = (tensors[key].to(device) for key in ("hidden", "weight", "bias", "token_ids"))
score = torch.ops.bbopd.linear_logprobs_triton.default
head, how = (hidden[:3] * 0, weight), (2.0, 1.0, None, 7)
ids = torch.tensor([-1, 6, 7], device=device)  # an id that does not fit reads nothing
answered["ids beyond"] = [score(*head, None, ids, None, 0, *how, False, 0)[1].cpu()]
found = score(*head, None, ids, ids[:, None], 2, *how, False, 0)
answered["ids beyond"] += [found[1].cpu(), found[5][:, 0].cpu()]
for name, more in {"registered": (None, 0), "registered with top-k": (token_ids[:, None] % 9, 3)}.items():
    arguments = (hidden, weight, bias, token_ids % 9, *more, 2.0, 1.0, None, 9, device == "cpu", 0)
    answered[name] = torch.library.opcheck(score, arguments)
z, V = z.to(device), z.shape[1] - 16
for k in (1, 300, 5000, V):
    answered["tied", k] = TritonRows().top_k(z, V, k).cpu()
torch.save(answered, answers)
"""


@pytest.fixture(scope="module", params=[ON_CPU, ON_GPU])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernel makes of every case: two answers of each op, or the error; interpreted where the device is a CPU."""
    folder = tmp_path_factory.mktemp("kernels")
    cases = ANSWERED | {name: case for name, (case, _) in (REFUSED | REFUSED_ON_CPU).items()}
    questions = {
        name: (tensors, options if "chunk_tokens" in options else {**options, "impl": "triton"})
        for name, (tensors, options) in cases.items()
    }
    questions["auto"] = draw(2, 9, dtype=torch.float64)
    if request.param == "cuda":  # an id that does not fit is not looked for there
        questions = {name: question for name, question in questions.items() if name not in REFUSED_ON_CPU}
    torch.save((questions, tied()), folder / "questions.pt")
    environment = os.environ | {"TRITON_INTERPRET": str(int(request.param == "cpu"))}
    # numpy warns of the infinities that the interpreter meets
    command = [sys.executable, "-W", "ignore", "-c", CHILD, request.param, str(folder / "questions.pt"), str(folder / "answers.pt")]
    subprocess.run(command, env=environment, check=True)
    answered: dict[str, Any] = torch.load(folder / "answers.pt")
    return answered


@pytest.mark.parametrize("name", ANSWERED)
def test_as_exact_as_plain_pytorch_and_the_same_each_time(name: str, answers: dict[str, Any]) -> None:
    once, again = ({key: pair[i] for key, pair in answers[name].items()} for i in range(2))
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert_exact(ANSWERED[name], once)


def test_fewer_logits_than_top_k_are_filled_up_with_the_lowest_other_ids(answers: dict[str, Any]) -> None:
    assert_filled_up(answers["fewer logits than top-k"]["topk_ids"][0])


@pytest.mark.parametrize("k", TIED_K)
def test_of_equal_logits_the_lower_id_comes_first(k: int, answers: dict[str, Any]) -> None:
    assert_lower_first(answers["tied", k])


def test_a_tail_of_nearly_nothing_is_a_sum() -> None:
    assert all(exact(nearly_certain(offset))["log_tail"].max() < -60 for offset in (0.0, 100.0, -3000.0))


@pytest.mark.parametrize("name", REFUSED | REFUSED_ON_CPU)
def test_what_is_refused(name: str, answers: dict[str, Any]) -> None:
    if name not in answers:
        pytest.skip("not checked on a GPU")
    assert re.search((REFUSED | REFUSED_ON_CPU)[name][1], answers[name])


def test_an_id_beyond_the_vocabulary_gets_nan(answers: dict[str, Any]) -> None:
    sampled, sampled_beside_top_k, candidates = answers["ids beyond"]
    expected = torch.tensor([torch.nan, -math.log(7), torch.nan])
    torch.testing.assert_close(sampled, expected, equal_nan=True)
    torch.testing.assert_close(sampled_beside_top_k, expected, equal_nan=True)
    torch.testing.assert_close(candidates, torch.tensor([-torch.inf, -math.log(7), torch.nan]), equal_nan=True)  # -1 is an empty slot


@pytest.mark.parametrize("name", ["registered", "registered with top-k"])
def test_torch_compile_sees_one_opaque_op(name: str, answers: dict[str, Any]) -> None:
    assert set(answers[name].values()) == {"SUCCESS"}


def test_auto_leaves_the_kernel_alone(answers: dict[str, Any]) -> None:
    assert isinstance(answers["auto"], dict)  # of float64, which the kernel refuses


@pytest.mark.skipif(torch.cuda.is_available() or triton.knobs.runtime.interpret, reason="the kernel runs here")
def test_without_a_gpu_the_engine_is_not_there() -> None:
    tensors, _ = draw(2, 9)
    with pytest.raises(ValueError, match=r"impl is 'triton': this build has auto, reference, cpu$"):
        linear_logprobs(**tensors, impl="triton")
