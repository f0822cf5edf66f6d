"""The C++ engine of `linear_distill`: every instruction set, both memory modes, against float64.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids of a support.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bbopd import FullTeacher, TopKTeacher, linear_distill, linear_logprobs
from bbopd.cpu_memory import stash_limit, stash_megabytes
from bbopd.cpu_tensors import LEVELS, cpu_level
from bbopd.types import DIVERGENCES, OpTeacher
from tests.distill_oracle import draw, make_teacher

AVAILABLE = LEVELS[: LEVELS.index(cpu_level()) + 1]
KINDS = ("none", "full", "full_hidden", "topk", "candidates", "sampled", "advantages")


def gradients(hidden: Tensor, weight: Tensor, teacher: OpTeacher | None, labels: Tensor | None, **how) -> tuple[Tensor, ...]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = linear_distill(hidden, weight, teacher, labels, **how)
    return out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight)), out.ce, out.kd


def assert_near(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-7, (a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", AVAILABLE)
def test_every_level_and_teacher_matches_float64(level: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged sizes of more than one tile in each direction; bias, scale, softcap, padding, weights, a mask; kept logits and none."""
    monkeypatch.setenv("BBOPD_CPU_LEVEL", level)
    N, V, used, D = 301, 531, 521, 37
    hidden, weight, generator = draw(N, V, D, dtype, spread=2.0)
    bias = torch.randn(V, generator=generator).to(dtype)
    valid = torch.rand(N, generator=generator) > 0.1
    labels = torch.randint(0, used, (N,), generator=generator).masked_fill(torch.rand(N, generator=generator) < 0.3, -100)
    token_weight = torch.rand(N, generator=generator)
    for temperature, divergence in zip((1.0, 2.0, 0.7, 2.0, 1.0), DIVERGENCES, strict=True):
        teacher = None if kind == "none" else make_teacher(kind, N, used, temperature, generator, torch.float32, K=9, valid=valid)
        how = {
            "temperature": temperature,
            "divergence": divergence,
            "vocab_size": used,
            "token_weight": token_weight,
            "skew": 0.2,
            "beta": 0.3,
        }
        how |= {"bias": bias, "logit_scale": 1.3, "logit_softcap": 8.0}
        truth = gradients(hidden.double(), weight.double(), teacher, labels, impl="reference", **how | {"bias": bias.double()})
        for megabytes in (0, 0.2, 64):
            with stash_limit(megabytes):
                assert_near(
                    gradients(hidden, weight, teacher, labels, impl="cpu", **how), truth, 3e-5 if dtype == torch.float32 else 3.5e-3
                )


@pytest.mark.parametrize(("N", "V", "D", "K"), [(1, 1, 1, 1), (1, 50257, 8, 64), (3, 1025, 3, 1024), (65, 257, 64, 5), (257, 4099, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes(N: int, V: int, D: int, K: int, dtype: torch.dtype) -> None:
    hidden, weight, generator = draw(N, V, D, dtype, spread=4.0)
    found = linear_logprobs(torch.randn(N, 5, generator=generator), torch.randn(V, 5, generator=generator), top_k=K, temperature=2.0)
    teacher = TopKTeacher(found.topk_ids, found.topk_logprobs, found.log_tail, 2.0)
    labels = torch.randint(0, V, (N,), generator=generator)
    truth = gradients(hidden.double(), weight.double(), teacher, labels, temperature=2.0)
    assert_near(gradients(hidden, weight, teacher, labels, temperature=2.0, impl="cpu"), truth, 3e-5 if dtype == torch.float32 else 3.5e-3)


@pytest.mark.parametrize("kind", ["full", "topk"])
@pytest.mark.parametrize("megabytes", [0, 64])
def test_gradients_stay_exact_as_the_student_nears_its_teacher(kind: str, megabytes: int) -> None:
    """At a KL of about 5e-5, where logits rounded to bfloat16 leave nothing of the gradient."""
    N, V, D, T = 64, 3001, 64, 2.0
    hidden, weight, generator = draw(N, V, D, torch.bfloat16, spread=3.0)
    z_NV = hidden.double().detach() @ weight.double().detach().T + 0.02 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    teacher: OpTeacher = FullTeacher(z_NV.float())
    if kind == "topk":
        best = (z_NV / T).log_softmax(1).topk(500)
        teacher = TopKTeacher(best.indices, best.values.float(), torch.log1p(-best.values.exp().sum(1)).float(), T)
    truth = gradients(hidden.double(), weight.double(), teacher, None, temperature=T, kd_weight=1.0)
    assert 1e-6 < truth[0] < 1e-3
    with stash_limit(megabytes):
        assert_near(gradients(hidden, weight, teacher, None, temperature=T, kd_weight=1.0, impl="cpu")[:3], truth[:3], 3.5e-3)


def test_repeats_are_bitwise_equal_and_thread_counts_nearly() -> None:
    hidden, weight, generator = draw(300, 2001, 48, torch.float32)
    teacher = make_teacher("full", 300, 2001, 2.0, generator, torch.float32)
    labels = torch.randint(0, 2001, (300,), generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(hidden, weight, teacher, labels, temperature=2.0, divergence="jsd", impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
    for other in results[1:]:
        assert_near(other, results[0], 2e-6)


def test_a_gradient_outlives_the_next_call() -> None:
    """Memory of gradients is used again only when nobody holds it."""
    hidden, weight, generator = draw(8, 300, 40, torch.float32)
    teacher = make_teacher("topk", 8, 300, 1.0, generator, torch.float32)
    linear_distill(hidden, weight, teacher, impl="cpu").loss.backward()
    held, copy = weight.grad, weight.grad.clone()
    weight.grad = hidden.grad = None
    loss = linear_distill(hidden * 2, weight, teacher, impl="cpu").loss
    loss.backward(retain_graph=True)
    assert torch.equal(held, copy)
    once = weight.grad.clone()
    (loss * 3).backward()
    torch.testing.assert_close(weight.grad, once * 4)


def test_frozen_sides() -> None:
    hidden, weight, generator = draw(70, 300, 40, torch.float32)
    teacher = make_teacher("topk", 70, 300, 1.0, generator, torch.float32)
    _, dH_ND, dW_VD, *_ = gradients(hidden, weight, teacher, None, impl="cpu")
    assert torch.equal(torch.autograd.grad(linear_distill(hidden, weight.detach(), teacher, impl="cpu").loss, hidden)[0], dH_ND)
    assert torch.equal(torch.autograd.grad(linear_distill(hidden.detach(), weight, teacher, impl="cpu").loss, weight)[0], dW_VD)


def test_settings_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = draw(2, 9, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"stash limit is -1"), stash_limit(-1):
        pass
    monkeypatch.setenv("BBOPD_CPU_STASH_MB", "much")
    with pytest.raises(ValueError, match="BBOPD_CPU_STASH_MB is 'much'"):
        stash_megabytes()
    monkeypatch.delenv("BBOPD_CPU_STASH_MB")
    monkeypatch.setenv("BBOPD_CPU_LEVEL", "sse9")
    with pytest.raises(ValueError, match="BBOPD_CPU_LEVEL is 'sse9': choose one of portable"):
        linear_distill(hidden, weight, None, torch.tensor([1, 2]), impl="cpu")


def test_row_mathematics_against_long_double(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "the extension was built, so there is a compiler"
    folder = Path(__file__).parent
    program = tmp_path / "row_math_test"
    source = [str(folder / "row_math_test.cpp"), f"-I{folder.parent / 'csrc'}", "-o", str(program)]
    subprocess.run([compiler, "-std=c++20", "-O1", *source], check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
