"""The public ops: what they refuse, `linear_logprobs` against float64, compile, autocast, strides.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` top-k, ``M`` candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from bbopd import CandidateTeacher, FullTeacher, SampledTeacher, TopKTeacher, linear_distill, linear_logprobs
from tests.distill_oracle import bucket, draw, logits_of, make_teacher


def some(N: int = 4, V: int = 9, D: int = 6) -> tuple[Tensor, Tensor]:
    hidden, weight, _ = draw(N, V, D, torch.float32)
    return hidden.detach(), weight.detach()


def topk(N: int = 4, K: int = 2) -> TopKTeacher:
    return TopKTeacher(torch.arange(K).expand(N, K).contiguous(), torch.full((N, K), math.log(0.5 / K)), torch.full((N,), math.log(0.5)))


def sampled(**known: Tensor) -> SampledTeacher:
    return SampledTeacher(token_ids=torch.zeros(4, dtype=torch.int64), behavior_logprobs=torch.zeros(4), **known)


def spoil(teacher: TopKTeacher, name: str, where: tuple[int, ...], value: float) -> TopKTeacher:
    getattr(teacher, name)[where] = value
    return teacher


# ---------------------------------------------------------------- linear_logprobs


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_logprobs_match_float64(dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    N, V, used, K = 6, 33, 31, 5
    hidden, weight, generator = draw(N, V, dtype=dtype, spread=3.0)
    bias = torch.randn(V, generator=generator).to(dtype)
    token_ids = torch.randint(0, used, (N,), generator=generator)
    candidate_ids = torch.stack([torch.randperm(used, generator=generator)[:4] for _ in range(N)]).int()
    candidate_ids[1, 2] = -1
    found = linear_logprobs(hidden, weight, token_ids=token_ids, top_k=K, candidate_ids=candidate_ids, temperature=temperature, bias=bias,
                            logit_scale=1.4, logit_softcap=8.0, vocab_size=used)  # fmt: skip
    u_NV = logits_of(hidden, weight, bias, 1.4, 8.0, used).detach() / temperature
    log_q_NV = u_NV.log_softmax(1)
    best = log_q_NV.topk(K)
    assert torch.equal(found.topk_ids, best.indices)
    expected = {
        "logsumexp": u_NV.logsumexp(1),
        "sampled": log_q_NV[range(N), token_ids],
        "topk_logprobs": best.values,
        "log_tail": torch.stack([bucket(log_q_NV[i], best.indices[i])[-1] for i in range(N)]),
        "candidates": log_q_NV.gather(1, candidate_ids.long().clamp(min=0)).masked_fill(candidate_ids < 0, -torch.inf),
        "candidates_log_tail": torch.stack([bucket(log_q_NV[i], candidate_ids[i])[-1] for i in range(N)]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name).double(), value, rtol=tolerance, atol=tolerance)


def test_only_what_is_asked_for_comes_back() -> None:
    found = linear_logprobs(*some())
    assert found.logsumexp.dtype == torch.float32
    assert all(
        getattr(found, name) is None for name in ("sampled", "topk_ids", "topk_logprobs", "log_tail", "candidates", "candidates_log_tail")
    )


def test_a_tiny_tail_keeps_its_digits() -> None:
    """With logits of standard deviation 30, 1 minus the top mass is 0 in float32; the tail is not."""
    hidden, weight, _ = draw(8, 301, 16, torch.float32, spread=30.0)
    found = linear_logprobs(hidden, weight, top_k=20)
    log_q_NV = logits_of(hidden, weight).detach().log_softmax(1)
    tail_N = torch.stack([bucket(log_q_NV[i], found.topk_ids[i])[-1] for i in range(8)])
    assert (tail_N < -20).any()
    torch.testing.assert_close(found.log_tail.double(), tail_N, rtol=1e-5, atol=1e-5)


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    hidden, weight = some(V=7)
    assert linear_logprobs(hidden, weight, top_k=7).log_tail.eq(-torch.inf).all()
    assert linear_logprobs(hidden, weight, top_k=7).topk_logprobs.exp().sum(1).allclose(torch.ones(4))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_token_without_candidates_has_all_its_mass_outside(impl: str) -> None:
    found = linear_logprobs(*some(), candidate_ids=torch.tensor([[-1, -1], [-1, 3], [0, -1], [5, 4]]), impl=impl)
    assert found.candidates is not None
    assert found.candidates_log_tail is not None
    assert found.candidates[0].tolist() == [-torch.inf, -torch.inf]
    assert found.candidates_log_tail[0] == 0.0
    assert found.candidates.isfinite().sum(1).tolist() == [0, 1, 1, 2]


def test_of_equal_logits_the_lower_id_comes_first() -> None:
    N, V = 40, 300
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-2, 3, (V, 1), generator=generator).float()  # five distinct logits: ties everywhere, at the cut as well
    found = linear_logprobs(torch.ones(N, 1), weight, top_k=100)
    expected = sorted(range(V), key=lambda v: (-weight[v, 0].item(), v))[:100]
    assert found.topk_ids.tolist() == [expected] * N


def test_logprobs_of_no_tokens() -> None:
    hidden, weight = some(N=0)
    found = linear_logprobs(hidden, weight, top_k=3, token_ids=torch.zeros(0, dtype=torch.int64))
    assert found.topk_ids.shape == (0, 3)
    assert found.sampled.shape == (0,)


def test_logprobs_score_a_teacher_that_costs_its_own_student_nothing() -> None:
    hidden, weight = some()
    found = linear_logprobs(hidden, weight, top_k=3, temperature=2.0)
    teacher = TopKTeacher(found.topk_ids, found.topk_logprobs, found.log_tail, 2.0)
    assert linear_distill(hidden, weight, teacher, temperature=2.0).kd.abs().max() < 1e-9


# ---------------------------------------------------------------- compile, autocast, strides


@pytest.mark.parametrize("kind", ["full", "full_hidden", "topk", "sampled"])
def test_compiles_into_one_graph(kind: str) -> None:
    hidden, weight, generator = draw(4, 9, dtype=torch.float32)
    teacher = make_teacher(kind, 4, 9, 1.0, generator, torch.float32)
    labels = torch.tensor([1, -100, 3, 0])

    def loss(hidden: Tensor, weight: Tensor, kd_weight: float) -> Tensor:
        return linear_distill(hidden * 2, weight, teacher, labels, kd_weight=kd_weight).loss

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for kd_weight in (0.5, 0.25, 0.75, 0.8):
        ours, plain = compiled(hidden, weight, kd_weight), loss(hidden, weight, kd_weight)
        for a, b in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours, plain)
    assert counter.frame_count <= 2  # a ramp does not recompile at every step


def test_logprobs_compile_into_one_graph() -> None:
    hidden, weight = some()
    token_ids = torch.tensor([0, 8, 2, 3])

    def score(hidden: Tensor) -> tuple[Tensor, Tensor]:
        found = linear_logprobs(hidden, weight, token_ids=token_ids, top_k=2)
        return found.sampled, found.topk_logprobs

    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(hidden), score(hidden), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_does_not_round_the_logits() -> None:
    hidden, weight, generator = draw(4, 9, dtype=torch.float32)
    teacher = make_teacher("topk", 4, 9, 1.0, generator, torch.float32)
    plain = linear_distill(hidden, weight, teacher).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_distill(hidden, weight, teacher).loss, plain)
        mixed = linear_distill(hidden.bfloat16(), weight, teacher).loss
    assert mixed.dtype == torch.float32
    mixed.backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=0.02, atol=0.02)


def test_non_contiguous_inputs() -> None:
    hidden, weight, generator = draw(5, 8, dtype=torch.float32)
    teacher = make_teacher("topk", 5, 8, 1.0, generator, torch.float32)
    strided = TopKTeacher(*(t.t().contiguous().t() if t.dim() == 2 else t for t in (teacher.ids, teacher.logprobs, teacher.log_tail)))
    turned = hidden.detach().t().contiguous().t(), weight.detach().t().contiguous().t()
    labels = torch.tensor([1, 9, 2, 9, 3, 9, 4, 9, 5, 9])[::2]
    assert linear_distill(*turned, strided, labels).loss.item() == pytest.approx(
        linear_distill(hidden, weight, teacher, labels).loss.item(), rel=1e-6
    )
    full = FullTeacher(torch.randn(8, 5, generator=generator).t())
    again = FullTeacher(full.logits.contiguous())
    assert linear_distill(*turned, full).loss.item() == pytest.approx(linear_distill(hidden, weight, again).loss.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_teacher_logits_of_any_float_dtype(dtype: torch.dtype) -> None:
    hidden, weight, generator = draw(3, 9, dtype=torch.float32)
    t_NV = torch.randn(3, 9, generator=generator).to(dtype)
    kept = t_NV.clone()
    loss = linear_distill(hidden, weight, FullTeacher(t_NV), temperature=2.0).loss
    torch.testing.assert_close(loss, linear_distill(hidden, weight, FullTeacher(t_NV.float()), temperature=2.0).loss)
    assert torch.equal(t_NV, kept)  # the caller's tensor is not worked on in place


def test_a_wider_teacher_fits_with_vocab_size() -> None:
    hidden, weight = some(V=9)
    wide = torch.randn(4, 12)
    loss = linear_distill(hidden, weight, FullTeacher(wide), vocab_size=8).loss
    torch.testing.assert_close(loss, linear_distill(hidden, weight[:8], FullTeacher(wide[:, :8])).loss)


# ---------------------------------------------------------------- what is refused

NAN = float("nan")
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], object], str]] = {
    "unknown engine": (lambda h, w: linear_distill(h, w, topk(), impl="triton"), r"impl is 'triton': this build has auto, reference"),
    "float64 in C++": (lambda h, w: linear_distill(h.double(), w, topk(), impl="cpu"), r"not torch.float32 on cpu, torch.float64 on cpu"),
    "unknown engine to score": (lambda h, w: linear_logprobs(h, w, impl="cuda"), r"impl is 'cuda'"),
    "batched hidden": (lambda h, w: linear_distill(h[None], w, topk()), r"hidden has shape \(1, 4, 6\).*flatten"),
    "weight turned": (lambda h, w: linear_distill(h, w.T, topk()), r"hidden has 6 features a token and weight 9"),
    "integer hidden": (lambda h, w: linear_distill(h.long(), w, topk()), r"dtype torch.int64"),
    "temperature 0": (lambda h, w: linear_distill(h, w, topk(), temperature=0.0), r"temperature is 0.0"),
    "another temperature": (lambda h, w: linear_distill(h, w, topk(), temperature=2.0), r"taken at temperature 1.0, the call asks for 2.0"),
    "negative weight": (lambda h, w: linear_distill(h, w, topk(), ce_weight=-1.0), r"ce_weight is -1.0"),
    "unknown divergence": (lambda h, w: linear_distill(h, w, topk(), divergence="kl"), r"divergence is 'kl': choose one of forward_kl"),
    "beta": (lambda h, w: linear_distill(h, w, topk(), divergence="jsd", beta=1.5), r"beta is 1.5"),
    "skew": (lambda h, w: linear_distill(h, w, topk(), divergence="skew_reverse_kl", skew=1.0), r"skew is 1.0"),
    "softcap": (lambda h, w: linear_distill(h, w, topk(), logit_softcap=0.0), r"logit_softcap is 0.0"),
    "scale": (lambda h, w: linear_distill(h, w, topk(), logit_scale=NAN), r"logit_scale is nan"),
    "vocab_size": (lambda h, w: linear_distill(h, w, topk(), vocab_size=10), r"vocab_size is 10, but weight has 9 rows"),
    "bias length": (lambda h, w: linear_distill(h, w, topk(), bias=torch.zeros(8)), r"bias has 8 rows, the vocabulary 9"),
    "nothing to learn": (lambda h, w: linear_distill(h, w, None), r"neither a teacher nor labels"),
    "both kinds of full": (lambda h, w: linear_distill(h, w, FullTeacher(logits=h @ w.T, hidden=h, weight=w)), r"exactly one of the two"),
    "hidden without weight": (lambda h, w: linear_distill(h, w, FullTeacher(hidden=h)), r"exactly one of the two"),
    "scaled logits": (lambda h, w: linear_distill(h, w, FullTeacher(logits=h @ w.T, logit_scale=2.0)), r"logits are taken as they are"),
    "other vocabulary": (
        lambda h, w: linear_distill(h, w, FullTeacher(torch.zeros(4, 12))),
        r"12 entries, the student's 9.*set vocab_size=9",
    ),
    "rows of the teacher": (lambda h, w: linear_distill(h, w, topk(5)), r"teacher.ids has shape \(5, 2\)"),
    "labels length": (lambda h, w: linear_distill(h, w, None, torch.zeros(3, dtype=torch.int64)), r"labels has shape \(3,\)"),
    "float labels": (lambda h, w: linear_distill(h, w, None, torch.zeros(4)), r"labels has dtype torch.float32"),
    "label beyond": (
        lambda h, w: linear_distill(h, w, None, torch.tensor([0, 9, 1, 2])),
        r"labels\[1\] is 9: ids must be from 0 to 8, or -100",
    ),
    "id beyond": (lambda h, w: linear_distill(h, w, spoil(topk(), "ids", (2, 1), 9)), r"teacher.ids\[2, 1\] is 9"),
    "id twice": (lambda h, w: linear_distill(h, w, spoil(topk(), "ids", (3, 1), 0)), r"teacher.ids\[3\] holds the id 0 twice"),
    "NaN logprob": (lambda h, w: linear_distill(h, w, spoil(topk(), "logprobs", (1, 0), NAN)), r"teacher.logprobs\[1, 0\] is nan"),
    "positive logprob": (lambda h, w: linear_distill(h, w, spoil(topk(), "logprobs", (1, 0), 0.5)), r"teacher.logprobs\[1, 0\] is 0.5"),
    "mass": (lambda h, w: linear_distill(h, w, spoil(topk(), "log_tail", (2,), -9.0)), r"probabilities of token 2 add up to 0.50"),
    "NaN logits": (
        lambda h, w: linear_distill(h, w, FullTeacher((h @ w.T).index_fill(0, torch.tensor([2]), NAN))),
        r"logits of token 2 hold NaN",
    ),
    "all masked": (
        lambda h, w: linear_distill(h, w, FullTeacher(torch.full((4, 9), -torch.inf))),
        r"token 0 hold NaN, or nothing but -inf",
    ),
    "NaN hidden": (lambda h, w: linear_distill(h.index_fill(0, torch.tensor([3]), NAN), w, topk()), r"logits of token 3 are not finite"),
    "NaN token_weight": (lambda h, w: linear_distill(h, w, topk(), token_weight=torch.tensor([1, 1, NAN, 1])), r"token_weight\[2\] is nan"),
    "negative normalizer": (lambda h, w: linear_distill(h, w, topk(), normalizer=-1.0), r"normalizer is \[-1.0, -1.0\]"),
    "NaN sampled": (
        lambda h, w: linear_distill(h, w, sampled(logprobs=torch.full((4,), NAN))),
        r"teacher.logprobs or advantages\[0\] is nan",
    ),
    "infinite advantage": (
        lambda h, w: linear_distill(h, w, sampled(advantages=torch.tensor([1.0, 2.0, -math.inf, NAN]))),
        r"teacher.logprobs or advantages\[2\] is -inf",
    ),
    "both kinds of sampled": (
        lambda h, w: linear_distill(h, w, sampled(logprobs=torch.zeros(4), advantages=torch.zeros(4))),
        r"takes logprobs \(the teacher's\) or advantages: give exactly one",
    ),
    "neither kind of sampled": (lambda h, w: linear_distill(h, w, sampled()), r"give exactly one of the two"),
    "integer advantages": (
        lambda h, w: linear_distill(h, w, sampled(advantages=torch.ones(4, dtype=torch.int64))),
        r"teacher.advantages has dtype torch.int64",
    ),
    "rows of advantages": (lambda h, w: linear_distill(h, w, sampled(advantages=torch.ones(3))), r"teacher.advantages has 3 rows"),
    "valid of another dtype": (lambda h, w: linear_distill(h, w, CandidateTeacher(*_parts(topk()), valid=torch.ones(4))), r"torch.bool"),
    "top_k beyond": (lambda h, w: linear_logprobs(h, w, top_k=10), r"top_k is 10: it must be from 0 to the vocabulary's 9"),
    "token id beyond": (lambda h, w: linear_logprobs(h, w, token_ids=torch.tensor([0, 1, 2, -1])), r"token_ids\[3\] is -1"),
    "candidate twice": (
        lambda h, w: linear_logprobs(h, w, candidate_ids=torch.tensor([[1, 1]] * 4)),
        r"candidate_ids\[0\] holds the id 1 twice",
    ),
    "NaN weight to score": (lambda h, w: linear_logprobs(h, w * NAN), r"token 0 are not finite"),
}


def _parts(teacher: TopKTeacher) -> tuple[Tensor, Tensor, Tensor]:
    return teacher.ids, teacher.logprobs, teacher.log_tail


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_value_and_the_way_out(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(*some())


def test_other_types_and_groups_are_refused() -> None:
    hidden, weight = some()
    with pytest.raises(TypeError, match="give a FullTeacher"):
        linear_distill(hidden, weight, hidden)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="group is a object"):
        linear_distill(hidden, weight, topk(), group=object())  # type: ignore[arg-type]
