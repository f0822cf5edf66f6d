"""`linear_distill` in Triton against float64, in the interpreter, and on a GPU where there is one.

Whether Triton interprets is settled as it is imported, so that a process of its own answers all the cases at once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import in_place
from tests.devices import ON_CPU, ON_GPU
from tests.distill_cases import AGAIN, ANSWERED, NEAR, OPCHECK, REFUSED, REFUSED_ON_CPU, SAME, assert_exact, assert_exact_near

pytest.importorskip("triton")

CHILD = """
import sys, torch
from bbopd import linear_distill, reference
from bbopd.kernels import distill
from bbopd.kernels.rows import TritonRows
from tests import in_place
from tests.devices import ON_CPU, ON_GPU
from tests.distill_cases import answer, moved

device, questions, answers = sys.argv[1:]
answered = {}
for name, question in torch.load(questions, weights_only=False).items():
    op = distill.linear_distill if "chunk_tokens" in question[4] else linear_distill
    try:
        answered[name] = answer(op, question, device)
        if name.startswith("again"):
            answered[name] = [answered[name], answer(op, question, device, again=True)]
    except ValueError as error:
        answered[name] = str(error)
    if name.startswith("opcheck"):
        recorded = []
        def record(*arguments):
            recorded.append(arguments)
            return torch.ops.bbopd.linear_distill_triton.default(*arguments)
        *arguments, options = moved(question, device)
        del options["impl"]
        reference.linear_distill_with(record, 0, *arguments, **options)
        # not test_aot_dispatch_dynamic: it differentiates ce and kd as well, which have no gradient
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        answered[name] = torch.library.opcheck(torch.ops.bbopd.linear_distill_triton.default, recorded[0], test_utils=tests)
for kind in in_place.KINDS:
    answered["in place " + kind] = in_place.gradients(TritonRows(), kind, torch.bfloat16, device)
torch.save(answered, answers)
"""


@pytest.fixture(scope="module", params=[ON_CPU, ON_GPU])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the engine makes of every case, or its error; interpreted where the device is a CPU."""
    folder = tmp_path_factory.mktemp("kernels_distill")
    refused = REFUSED | (REFUSED_ON_CPU if request.param == "cpu" else {})  # on a GPU values are not looked at
    cases = ANSWERED | NEAR | AGAIN | SAME | OPCHECK | {name: asked for name, (asked, _) in refused.items()}
    questions = {
        name: (*asked[:4], asked[4] if "chunk_tokens" in asked[4] else asked[4] | {"impl": "triton"}) for name, asked in cases.items()
    }
    torch.save(questions, folder / "questions.pt")
    environment = os.environ | {"TRITON_INTERPRET": str(int(request.param == "cpu")), "PYTHONPATH": str(Path(__file__).parents[1])}
    # numpy warns of the infinities that the interpreter meets
    command = [sys.executable, "-W", "ignore", "-c", CHILD, request.param, str(folder / "questions.pt"), str(folder / "answers.pt")]
    subprocess.run(command, env=environment, check=True)
    answered: dict[str, Any] = torch.load(folder / "answers.pt")
    return answered


@pytest.mark.parametrize("name", ANSWERED)
def test_against_float64(name: str, answers: dict[str, Any]) -> None:
    assert_exact(ANSWERED[name], answers[name])


@pytest.mark.parametrize("name", NEAR)
def test_gradients_stay_exact_as_the_student_nears_its_teacher(name: str, answers: dict[str, Any]) -> None:
    assert_exact_near(NEAR[name], answers[name])


@pytest.mark.parametrize("name", SAME)
def test_equal_logits_have_no_divergence_and_no_gradient(name: str, answers: dict[str, Any]) -> None:
    assert all(not answer.any() for answer in answers[name][:3])


@pytest.mark.parametrize("name", AGAIN)
def test_repeats_and_a_second_backward_are_bitwise_equal(name: str, answers: dict[str, Any]) -> None:
    once, again = answers[name]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("kind", in_place.KINDS)
def test_gradients_go_where_the_logits_were(kind: str, answers: dict[str, Any]) -> None:
    apart, over = answers[f"in place {kind}"]
    assert apart.any(1).all()
    assert torch.equal(apart, over)


@pytest.mark.parametrize("name", OPCHECK)
def test_torch_compile_sees_one_opaque_op(name: str, answers: dict[str, Any]) -> None:
    assert set(answers[name].values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", REFUSED | REFUSED_ON_CPU)
def test_what_is_refused(name: str, answers: dict[str, Any]) -> None:
    if name not in answers:
        pytest.skip("not checked on a GPU")
    assert re.search((REFUSED | REFUSED_ON_CPU)[name][1], answers[name])
