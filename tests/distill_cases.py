"""What the engines of `linear_distill` are asked, and what they must answer.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids of a support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from bbopd import FullTeacher, TopKTeacher, linear_distill
from bbopd.types import DIVERGENCES, OpTeacher
from tests.distill_oracle import draw, make_teacher

Case = tuple[Tensor, Tensor, OpTeacher | None, Tensor | None, dict[str, Any]]  # hidden, weight, teacher, labels, the rest


def case(
    kind: str = "none", N: int = 4, V: int = 300, D: int = 24, dtype: torch.dtype = torch.float32, *, labelled: bool = True, K: int = 4,
    spread: float = 2.0, teacher_dtype: torch.dtype = torch.float32, valid: Tensor | None = None, **options: Any,
) -> Case:  # fmt: skip
    hidden, weight, generator = draw(N, V, D, dtype, spread=spread, seed=V + N)
    used = options.get("vocab_size", V)
    labels = torch.randint(0, used, (N,), generator=generator) if labelled else None
    teacher = None
    if kind != "none":
        teacher = make_teacher(kind, N, used, options.get("temperature", 1.0), generator, teacher_dtype, min(K, used), valid=valid)
    return hidden, weight, teacher, labels, options


def everything(kind: str, divergence: str, temperature: float, dtype: torch.dtype) -> Case:
    """More than a block of logits, and all options at once."""
    N, V, used = 5, 2101, 2093
    found = case(
        kind, N, V, dtype=dtype, valid=torch.tensor([True, True, False, True, True]), K=9, vocab_size=used, temperature=temperature
    )
    hidden, weight, teacher, labels, options = found
    generator = torch.Generator().manual_seed(1)
    assert labels is not None
    labels[1] = -100
    if isinstance(teacher, TopKTeacher):
        labels[3] = teacher.ids[3, 0]
    options |= {"divergence": divergence, "beta": 0.3, "skew": 0.2, "logit_scale": 1.3, "logit_softcap": 8.0}
    options |= {"bias": torch.randn(V, generator=generator).to(dtype).requires_grad_(), "token_weight": torch.rand(N, generator=generator)}
    return hidden, weight, teacher, labels, options


def near(kind: str, divergence: str) -> Case:
    """A student and a teacher whose KL is about 5e-5, where logits rounded to bfloat16 leave nothing of the gradient."""
    N, V, D, T = 24, 2100, 64, 2.0
    hidden, weight, generator = draw(N, V, D, torch.bfloat16, spread=3.0)
    z_NV = hidden.double().detach() @ weight.double().detach().T + 0.02 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    teacher: OpTeacher = FullTeacher(z_NV.float())
    if kind == "topk":
        best = (z_NV / T).log_softmax(1).topk(500)
        teacher = TopKTeacher(best.indices, best.values.float(), torch.log1p(-best.values.exp().sum(1)).float(), T)
    return hidden, weight, teacher, None, {"temperature": T, "divergence": divergence, "kd_weight": 1.0}


def same(**options: Any) -> Case:
    """A teacher that is the student."""
    hidden, weight, _, _, options = case(N=3, V=2100, **options)
    return hidden, weight, FullTeacher(hidden=hidden.detach(), weight=weight.detach()), None, options


def masked(divergence: str, **options: Any) -> Case:
    """Tokens out of the vocabulary on one side, on both, and one that is certain."""
    hidden, weight, teacher, labels, options = case("full", N=4, V=97, divergence=divergence, bias=torch.zeros(97), **options)
    assert isinstance(teacher, FullTeacher)
    assert teacher.logits is not None
    assert labels is not None
    labels[:] = 50
    options["bias"][:2] = -torch.inf
    teacher.logits[:, 1:4] = -torch.inf
    teacher.logits[2, 9] = torch.inf
    return hidden, weight, teacher, labels, options


def without_ids() -> Case:
    hidden, weight, teacher, labels, options = case("topk", N=3, V=60)
    assert isinstance(teacher, TopKTeacher)
    teacher.ids[1], teacher.log_tail[1] = -1, 0.0
    return hidden, weight, teacher, labels, options


def strided() -> Case:
    """No input is contiguous."""
    hidden, weight, teacher, labels, options = case("full", N=4, V=61)
    assert isinstance(teacher, FullTeacher)
    assert teacher.logits is not None
    assert labels is not None
    turned = [tensor.detach().T.contiguous().T.requires_grad_() for tensor in (hidden, weight)]
    valid, token_weight = torch.tensor([True, True, False, True, True, False, True, False])[::2], torch.arange(8.0)[::2]
    teacher = FullTeacher(teacher.logits.T.contiguous().T, valid=valid)
    return *turned, teacher, labels.repeat_interleave(2)[::2], options | {"token_weight": token_weight}


def frozen(hidden: bool, weight: bool) -> Case:
    found = case("topk", N=4, V=61)
    return found[0].detach().requires_grad_(not hidden), found[1].detach().requires_grad_(not weight), *found[2:]


FULL = [(kind, divergence) for kind in ("full", "full_hidden", "topk", "candidates") for divergence in DIVERGENCES]
ANSWERED: dict[str, Case] = {
    **{
        f"{kind} {divergence} T={T} {str(dtype)[6:]}": everything(kind, divergence, T, dtype)
        for kind, divergence in (*FULL, ("none", "forward_kl"), ("sampled", "forward_kl"), ("advantages", "forward_kl"))
        for T in (1.0, 2.0, 0.7)
        for dtype in (torch.float32, torch.bfloat16)
    },
    "one token, one logit": case("full", N=1, V=1),
    **{f"{kind} bare V={V} N={N}": case(kind, N, V, temperature=2.0) for kind in ("full", "topk") for N, V in ((1, 2), (3, 7), (2, 2048))},
    **{f"{kind} unlabelled": case(kind, N=3, V=61, labelled=False, temperature=0.7) for kind in ("full", "topk", "sampled")},
    **{f"{divergence} masked": masked(divergence) for divergence in DIVERGENCES},
    "masked at T=2": masked("reverse_kl", temperature=2.0),
    **{f"K = V {divergence}": case("topk", N=3, V=29, K=29, divergence=divergence) for divergence in DIVERGENCES},
    "a token without ids": without_ids(),
    "sharp": case("full", N=4, V=300, spread=40.0, divergence="jsd"),
    "float16": case("topk", N=4, V=300, dtype=torch.float16, temperature=2.0),
    "mixed dtypes": (case()[0].detach().bfloat16().requires_grad_(), *case()[1:]),
    "half a teacher": case("full", N=4, V=301, teacher_dtype=torch.float16),
    "rounded teacher": case("full_hidden", N=4, V=301, teacher_dtype=torch.bfloat16),
    "normalizer": case("full", N=3, V=50, normalizer=(7.0, 11.0), t2_scaling=False, temperature=2.0),
    "strided": strided(),
    "no tokens": case("full", N=0, V=50),
    "frozen hidden": frozen(True, False),
    "frozen weight": frozen(False, True),
    "frozen": frozen(True, True),
    "in chunks": (*case("full_hidden", N=7, V=90)[:4], {"chunk_tokens": 3}),
    "support in chunks": (*case("topk", N=7, V=90, dtype=torch.bfloat16)[:4], {"chunk_tokens": 3}),
}
NEAR = {f"near {kind} {divergence}": near(kind, divergence) for kind in ("full", "topk") for divergence in DIVERGENCES}
AGAIN = {"again full": case("full", N=4, V=300, divergence="jsd"), "again topk": case("topk", N=4, V=300, dtype=torch.bfloat16)}
SAME = {f"same {divergence} T={T}": same(divergence=divergence, temperature=T) for divergence in DIVERGENCES for T in (1.0, 0.7)}
OPCHECK = {
    "opcheck full": case("full", N=2, V=9),
    "opcheck topk": case("topk", N=2, V=9, dtype=torch.bfloat16, bias=torch.zeros(9, dtype=torch.bfloat16, requires_grad=True)),
    "opcheck frozen": (*frozen(True, False)[:2], *case("sampled", N=4, V=61)[2:]),
}
REFUSED: dict[str, tuple[Case, str]] = {
    "float64": (case(dtype=torch.float64), r"computes in float32, hidden is torch.float64.*use impl='reference'"),
}


def spoiled(kind: str, where: str) -> Case:
    found = case(kind, N=2, V=9)
    teacher, hidden = found[2], found[0].detach().clone()
    if where == "student":
        hidden[1] = torch.nan
    elif isinstance(teacher, FullTeacher) and teacher.logits is not None:
        teacher.logits[1, 3] = torch.nan
    elif isinstance(teacher, TopKTeacher):
        teacher.ids[1, 0] = 9
    return hidden.requires_grad_(), *found[1:]


REFUSED_ON_CPU: dict[str, tuple[Case, str]] = {
    "NaN in the student": (spoiled("full", "student"), r"logits of token 1 are not finite"),
    "NaN beside a support": (spoiled("topk", "student"), r"logits of token 1 are not finite"),
    "NaN in the teacher": (spoiled("full", "teacher"), r"the teacher's logits of token 1 hold NaN"),
    "id beyond": (spoiled("topk", "teacher"), r"teacher.ids\[1, 0\] is 9: ids must be from 0 to 8"),
}


# ---------------------------------------------------------------- answers


def moved(value: Any, device: str) -> Any:
    """The same on a device, as leaves of a new graph."""
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if hasattr(value, "valid"):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    return tuple(moved(part, device) for part in value) if isinstance(value, tuple) else value


def answer(op: Callable[..., Any], asked: Case, device: str, again: bool = False) -> list[Tensor]:
    """What `exact` returns, of an engine's op; ``again`` asks for its gradients a second time."""
    hidden, weight, teacher, labels, options = moved(asked, device)
    out = op(hidden, weight, teacher, labels, **options)
    inputs = [tensor for tensor in (hidden, weight, options.get("bias")) if tensor is not None and tensor.requires_grad]
    if again:
        torch.autograd.grad(out.loss, inputs, retain_graph=True)
    gradients = torch.autograd.grad(out.loss, inputs) if inputs else ()
    return [value.detach().cpu() for value in (out.loss, *gradients, out.ce, out.kd, *out.metrics.values())]


def exact(asked: Case) -> list[Tensor]:
    """Loss, gradients, CE, KD and metrics in float64."""
    hidden, weight, teacher, labels, options = asked
    options = {key: value for key, value in options.items() if key != "chunk_tokens"}
    doubled = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight, options.get("bias"))]
    if teacher is not None:
        widened = {f.name: getattr(teacher, f.name) for f in fields(teacher)}
        teacher = replace(teacher, **{k: v.double() for k, v in widened.items() if isinstance(v, Tensor) and v.is_floating_point()})
    out = linear_distill(doubled[0], doubled[1], teacher, labels, **options | {"bias": doubled[2]}, impl="reference")
    inputs = [tensor for tensor in doubled if tensor is not None and tensor.requires_grad]
    gradients = torch.autograd.grad(out.loss, inputs) if inputs else ()
    return [value.detach() for value in (out.loss, *gradients, out.ce, out.kd, *out.metrics.values())]


def dtypes(asked: Case) -> list[torch.dtype]:
    inputs = [t for t in (*asked[:2], asked[4].get("bias")) if t is not None and t.requires_grad]
    return [tensor.dtype for tensor in inputs]


def assert_near(found: list[Tensor], truth: list[Tensor], tolerance: float, floor: float = 1e-6) -> None:
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm() + floor, (ours, theirs)


def assert_exact(asked: Case, answer: list[Tensor]) -> None:
    """Within the rounding of the inputs' dtype, and the losses within that of float32."""
    truth, count = exact(asked), len(dtypes(asked))
    inputs = {asked[0].dtype, asked[1].dtype}
    assert_near(answer, truth, 4e-3 if inputs != {torch.float32} else 5e-6)
    assert [gradient.dtype for gradient in answer[1 : 1 + count]] == dtypes(asked)
    assert_near([answer[0], *answer[1 + count :]], [truth[0], *truth[1 + count :]], 5e-6)


def assert_exact_near(asked: Case, answer: list[Tensor]) -> None:
    """Of `NEAR`: gradients keep their digits where the KL is about 5e-5."""
    truth = exact(asked)
    assert 1e-6 < truth[0] < 1e-3
    assert_near(answer[:3], truth[:3], 3e-3, floor=0.0)
