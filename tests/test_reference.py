"""The reference engine of `linear_distill`: formulas and gradients, numerics, means and masks, memory.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids of a support.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bbopd import FullTeacher, SampledTeacher, TopKTeacher, linear_distill, reference
from bbopd.types import DIVERGENCES
from tests.distill_oracle import compare, cut_rows, draw, logits_of, make_teacher, oracle, oracle_kd

KINDS = ("full", "full_hidden", "topk", "candidates")


# ---------------------------------------------------------------- formulas and gradients


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_teacher_and_divergence_matches_the_oracle(kind: str, divergence: str, temperature: float) -> None:
    N, V, used = 5, 19, 17
    for dtype, tolerance, plain in ((torch.float64, 1e-10, False), (torch.float64, 1e-10, True), (torch.float32, 2e-5, False)):
        hidden, weight, generator = draw(N, V, dtype=dtype, seed=100 * len(kind) + 10 * len(divergence) + round(temperature))
        bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        valid = None if plain else torch.tensor([True, True, False, True, True])
        teacher = make_teacher(kind, N, used, temperature, generator, dtype, valid=valid)
        labels = torch.tensor([3, -100, 0, 16, -100])
        how = {"temperature": temperature, "divergence": divergence, "beta": 0.3, "skew": 0.2}
        if not plain:
            how |= {"ce_weight": 0.3, "kd_weight": 1.1, "t2_scaling": False, "token_weight": torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5])}
        ours = linear_distill(hidden, weight, teacher, labels, bias=bias, logit_scale=1.3, logit_softcap=5.0, vocab_size=used, **how)
        theirs, ce_N, kd_N = oracle(logits_of(hidden, weight, bias, 1.3, 5.0, used), teacher, labels, **how)
        compare(ours.loss, theirs, (hidden, weight, bias), tolerance)
        torch.testing.assert_close(ours.ce.double(), ce_N.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.kd.double(), kd_N.detach(), rtol=tolerance, atol=tolerance)
        assert not ours.ce.requires_grad
        assert not ours.kd.requires_grad


@pytest.mark.parametrize("kind", ["sampled", "advantages"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_sampled_teacher_is_policy_gradient(temperature: float, kind: str) -> None:
    hidden, weight, generator = draw(6, 13)
    teacher = make_teacher(kind, 6, 13, temperature, generator, valid=torch.tensor([True] * 5 + [False]))
    teacher.token_ids[5] = -1  # whatever a token without a signal holds is not looked at
    labels = torch.tensor([1, -100, 2, 3, -100, 12])
    ours = linear_distill(hidden, weight, teacher, labels, temperature=temperature)
    compare(ours.loss, oracle(logits_of(hidden, weight), teacher, labels, temperature=temperature)[0], (hidden, weight), 1e-10)
    ratios = (logits_of(hidden, weight) / temperature).log_softmax(1)[range(5), teacher.token_ids[:5]] - teacher.behavior_logprobs[:5]
    assert ours.metrics["importance_ratio"].item() == pytest.approx(ratios.exp().mean().item(), rel=1e-9)
    assert ours.metrics["ratio_capped"].item() == 0


def test_sampled_gradient_is_unbiased_for_the_reverse_kl() -> None:
    """Summed over every token with its probability under q_old = q, the policy gradient is the exact one."""
    V = 7
    hidden, weight, generator = draw(1, V)
    log_p_V = torch.randn(V, generator=generator, dtype=torch.float64).log_softmax(0)
    log_q_V = logits_of(hidden, weight).log_softmax(1)[0].detach()
    teacher = SampledTeacher(token_ids=torch.arange(V), behavior_logprobs=log_q_V, logprobs=log_p_V)
    loss = linear_distill(hidden.expand(V, -1), weight, teacher, kd_weight=1.0, token_weight=log_q_V.exp(), normalizer=1.0).loss
    exact = linear_distill(hidden, weight, FullTeacher(log_p_V[None]), kd_weight=1.0, divergence="reverse_kl").loss
    compare(loss, exact, (hidden, weight), 1e-10)


def test_importance_ratio_is_capped_and_counted() -> None:
    hidden, weight, _ = draw(1, 5)
    teacher = SampledTeacher(token_ids=torch.tensor([2]), behavior_logprobs=torch.tensor([-60.0]), logprobs=torch.tensor([-1.0]))
    out = linear_distill(hidden, weight, teacher, kd_weight=1.0)
    assert out.loss.item() == pytest.approx(-1e4 * 59.0)
    assert out.metrics["ratio_capped"].item() == 1


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", [*KINDS, "sampled", "advantages"])
def test_gradcheck(kind: str, divergence: str) -> None:
    hidden, weight, generator = draw(3, 7, D=3)
    bias = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = make_teacher(kind, 3, 7, 2.0, generator, K=3)
    labels = torch.tensor([0, -100, 6])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_distill(hidden, weight, teacher, labels, temperature=2.0, divergence=divergence, bias=bias, logit_softcap=4.0).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_at_its_ends_is_defined_as_the_kl(beta: float, name: str) -> None:
    hidden, weight, generator = draw(4, 9)
    teacher = make_teacher("full", 4, 9, 1.0, generator)
    a = linear_distill(hidden, weight, teacher, divergence="jsd", beta=beta).loss
    assert torch.equal(a, linear_distill(hidden, weight, teacher, divergence=name).loss)


# ---------------------------------------------------------------- numerics


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_support_of_the_whole_vocabulary_equals_dense(divergence: str, temperature: float) -> None:
    N, V = 4, 11
    hidden, weight, generator = draw(N, V, dtype=torch.float32)
    full = make_teacher("full", N, V, temperature, generator, torch.float32)
    ids = torch.stack([torch.randperm(V, generator=generator) for _ in range(N)])
    logprobs = (full.logits / temperature).log_softmax(1).gather(1, ids)
    labels = torch.randint(0, V, (N,), generator=generator)
    how = {"temperature": temperature, "divergence": divergence}
    for log_tail in (-torch.inf, -12.0):  # a tail with no tokens in it cannot hold mass
        bucketed = linear_distill(hidden, weight, TopKTeacher(ids, logprobs, torch.full((N,), log_tail), temperature), labels, **how)
        compare(bucketed.loss, linear_distill(hidden, weight, full, labels, **how).loss, (hidden, weight), 2e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("case", ["ordinary", "sharp", "near", "bf16"])
def test_error_is_no_larger_than_pytorch_in_the_same_dtype(case: str, divergence: str) -> None:
    """Three ways: ours and eager float32 PyTorch, both against float64. Near-identical distributions are where eager loses everything."""
    N, V, D, T = 6, 501, 8, 2.0
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    hidden, weight, generator = draw(N, V, D, dtype, spread=30.0 if case == "sharp" else 2.0)
    noise = torch.randn(N, V, generator=generator) * {"near": 1e-3, "sharp": 30.0}.get(case, 2.0)
    t_NV = (logits_of(hidden, weight).float() if case == "near" else 0.0) + noise
    if case == "sharp":  # stay above the floor, which the eager formula does not have
        t_NV = t_NV.clamp(min=-20.0, max=20.0)

    def eager(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
        log_q, log_p = (h @ w.T / T).log_softmax(1), (t_NV.to(dtype) / T).log_softmax(1)
        kd = torch.stack([oracle_kd(log_p[i], log_q[i], divergence, 0.5, 0.1) for i in range(N)]).mean() * T * T
        return kd.detach(), *torch.autograd.grad(kd, (h, w))

    truth, peer = eager(torch.float64), eager(torch.float32)
    loss = linear_distill(hidden, weight, FullTeacher(t_NV), temperature=T, divergence=divergence, kd_weight=1.0).loss
    ours = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    rounding = 3e-3 if case == "bf16" else 3e-5  # of gradients made and handed back in bfloat16; of differences of sharp softmaxes
    for a, b, c in zip(ours, peer, truth, strict=True):
        error, peers = (a.double() - c).norm(), (b.double() - c).norm()
        assert error <= 2 * peers + rounding * c.norm(), f"{error:.3g} against {peers:.3g} of {c.norm():.3g}"
    if case == "near":
        assert all((a.double() - c).norm() < 0.02 * c.norm() for a, c in zip(ours, truth, strict=True))
        assert ours[0] >= 0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_student_and_teacher_cost_nothing(divergence: str, temperature: float) -> None:
    hidden, weight, _ = draw(5, 33, dtype=torch.float32, spread=3.0)
    teacher = FullTeacher(hidden=hidden.detach(), weight=weight.detach())
    out = linear_distill(hidden, weight, teacher, divergence=divergence, temperature=temperature)
    assert out.kd.abs().max() < 1e-9
    assert max(g.abs().max() for g in torch.autograd.grad(out.loss, (hidden, weight))) < 1e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_and_infinite_teacher_logits(divergence: str) -> None:
    """-inf is a masked token; +inf takes all the mass of its row. Both stay finite in loss and gradient."""
    hidden, weight, generator = draw(3, 8)
    t_NV = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    t_NV[0, 5:] = -torch.inf
    t_NV[1, 2] = torch.inf
    finite = t_NV.clone()
    finite[1] = -torch.inf
    finite[1, 2] = 0.0
    out = linear_distill(hidden, weight, FullTeacher(t_NV), divergence=divergence)
    theirs, _, kd_N = oracle(logits_of(hidden, weight), FullTeacher(finite), divergence=divergence)
    compare(out.loss, theirs, (hidden, weight), 1e-9)
    torch.testing.assert_close(out.kd, kd_N.detach())
    assert out.metrics["floored"].item() == (3 + 7 if divergence == "reverse_kl" else 0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_empty_tail_of_the_teacher(divergence: str) -> None:
    hidden, weight, generator = draw(4, 9)
    ids = torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(4)])
    logprobs = torch.randn(4, 3, generator=generator, dtype=torch.float64).log_softmax(1)
    teacher = TopKTeacher(ids, logprobs, torch.full((4,), -torch.inf, dtype=torch.float64))
    out = linear_distill(hidden, weight, teacher, divergence=divergence)
    compare(out.loss, oracle(logits_of(hidden, weight), teacher, divergence=divergence)[0], (hidden, weight), 1e-9)
    assert out.metrics["teacher_tail_mass"].item() == 0
    assert out.metrics["floored"].item() == (4 if divergence == "reverse_kl" else 0)


def test_support_without_any_id_says_nothing() -> None:
    hidden, weight, _ = draw(2, 6)
    teacher = TopKTeacher(torch.full((2, 3), -1), torch.zeros(2, 3), torch.zeros(2))
    labels = torch.tensor([0, 5])
    out = linear_distill(hidden, weight, teacher, labels)
    assert out.kd.tolist() == [0.0, 0.0]
    compare(out.loss, oracle(logits_of(hidden, weight), None, labels)[0], (hidden, weight), 1e-10)


# ---------------------------------------------------------------- means, masks, engines' duties


@pytest.mark.parametrize("kind", [*KINDS, "sampled", "advantages", "none"])
def test_no_valid_token_is_zero_and_never_nan(kind: str) -> None:
    hidden, weight, generator = draw(3, 9, dtype=torch.float32)
    teacher = None
    if kind != "none":
        teacher = make_teacher(kind, 3, 9, 1.0, generator, torch.float32, valid=torch.zeros(3, dtype=torch.bool))
        spoiled = {"logits": "full", "hidden": "full_hidden", "logprobs": "topk candidates sampled", "advantages": "advantages"}
        teacher = replace(teacher, **{f: getattr(teacher, f) * torch.nan for f, kinds in spoiled.items() if kind in kinds.split()})
    out = linear_distill(hidden, weight, teacher, torch.full((3,), -100))
    assert out.loss.item() == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(out.loss, (hidden, weight)))


@pytest.mark.parametrize("kind", [*KINDS, "sampled", "advantages"])
def test_no_tokens_at_all_and_one(kind: str) -> None:
    hidden, weight, generator = draw(1, 9, dtype=torch.float32)
    teacher = make_teacher(kind, 1, 9, 1.0, generator, torch.float32)
    one = linear_distill(hidden, weight, teacher, torch.tensor([2]))
    compare(one.loss, oracle(logits_of(hidden, weight), teacher, torch.tensor([2]))[0], (hidden, weight), 1e-5)
    none = linear_distill(hidden[:0], weight, cut_rows(teacher, slice(0)), torch.tensor([], dtype=torch.int64))
    assert none.loss.item() == 0
    assert none.ce.shape == (0,)
    assert torch.autograd.grad(none.loss, weight)[0].eq(0).all()


@pytest.mark.parametrize("kind", [*KINDS, "sampled", "advantages"])
def test_micro_batches_with_a_normalizer_add_up(kind: str) -> None:
    hidden, weight, generator = draw(6, 9)
    teacher = make_teacher(kind, 6, 9, 1.0, generator, valid=torch.tensor([True, False, True, True, True, True]))
    labels = torch.tensor([1, -100, -100, 4, 5, 8])
    whole = linear_distill(hidden, weight, teacher, labels).loss
    parts = []
    for rows in (slice(0, 1), slice(1, 2), slice(2, 6)):
        parts.append(linear_distill(hidden[rows], weight, cut_rows(teacher, rows), labels[rows], normalizer=(4, torch.tensor(5))).loss)
    compare(sum(parts), whole, (hidden, weight), 1e-10)
    assert linear_distill(hidden, weight, teacher, labels, normalizer=2.0).loss.item() == pytest.approx(
        oracle(logits_of(hidden, weight), teacher, labels, normalizer=(2, 2))[0].item()
    )


@pytest.mark.parametrize("kind", [*KINDS, "sampled", "advantages"])
def test_chunks_do_not_matter_and_repeats_are_bitwise_equal(kind: str) -> None:
    hidden, weight, generator = draw(11, 23, dtype=torch.float32)
    teacher = make_teacher(kind, 11, 23, 2.0, generator, torch.float32)
    labels = torch.randint(0, 23, (11,), generator=generator)
    results = []
    for chunk in (0, 0, 1, 4, 11):
        out = reference.linear_distill(hidden, weight, teacher, labels, temperature=2.0, chunk_tokens=chunk)
        results.append((out.loss, *torch.autograd.grad(out.loss, (hidden, weight)), out.ce, out.kd))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for other in results[2:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_frozen_sides_get_no_gradient_and_the_other_is_unchanged() -> None:
    hidden, weight, generator = draw(4, 9)
    teacher = make_teacher("topk", 4, 9, 1.0, generator)
    both = torch.autograd.grad(linear_distill(hidden, weight, teacher).loss, (hidden, weight))
    assert torch.equal(torch.autograd.grad(linear_distill(hidden, weight.detach(), teacher).loss, hidden)[0], both[0])
    assert torch.equal(torch.autograd.grad(linear_distill(hidden.detach(), weight, teacher).loss, weight)[0], both[1])
    assert not linear_distill(hidden.detach(), weight.detach(), teacher).loss.requires_grad
    with torch.no_grad():
        assert not linear_distill(hidden, weight, teacher).loss.requires_grad


def test_backward_twice_and_no_second_derivative() -> None:
    hidden, weight, generator = draw(4, 9)
    loss = linear_distill(hidden, weight, make_teacher("full", 4, 9, 1.0, generator)).loss
    (loss * 3).backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, once * 4 / 3)
    (first,) = torch.autograd.grad(linear_distill(hidden, weight, FullTeacher(torch.zeros(4, 9))).loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """4,096 tokens over 8,192 entries: one [N, V] float32 tensor would add 128 MB to a chunk of 64 MB."""
    script = """
        import resource, torch
        from bbopd import TopKTeacher, linear_distill, linear_logprobs
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        N, V, D = 4096, 8192, 8
        hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        found = linear_logprobs(hidden[:64], weight, top_k=4)
        ids, logprobs, tail = (t.repeat(N // 64, *[1] * (t.dim() - 1)) for t in (found.topk_ids, found.topk_logprobs, found.log_tail))
        before = peak()
        zeros = torch.zeros(N, dtype=torch.int64)
        linear_distill(hidden, weight, TopKTeacher(ids, logprobs, tail), zeros, impl="reference").loss.backward()
        linear_logprobs(hidden, weight, top_k=4, token_ids=zeros, impl="reference")
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=400, check=True)
    assert float(done.stdout) < 120, f"peak memory grew by {done.stdout.strip()} MB"
