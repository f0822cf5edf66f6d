"""`linear_distill` in Triton: in the interpreter (and on a GPU where there is one) against float64, and compiled for three GPUs.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids of a support. Whether Triton interprets is settled as it is
imported, so that a process of its own answers all the cases at once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bbopd import FullTeacher, TopKTeacher, linear_distill
from bbopd.types import DIVERGENCES, OpTeacher
from tests.distill_oracle import draw, make_teacher

triton = pytest.importorskip("triton", minversion="3.7")  # the interpreter of 3.6 stumbles over numpy 2.4

CHILD = """
import sys, torch
from dataclasses import fields, replace
from bbopd import linear_distill, reference
from bbopd.kernels import distill

device, questions, answers = sys.argv[1:]

def moved(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if hasattr(value, "valid"):
        return replace(value, **{field.name: moved(getattr(value, field.name)) for field in fields(value)})
    return value

def answer(hidden, weight, teacher, labels, options, again=False):
    hidden, weight, teacher, labels, options = *map(moved, (hidden, weight, teacher, labels)), {k: moved(v) for k, v in options.items()}
    op = distill.linear_distill if "chunk_tokens" in options else linear_distill
    out = op(hidden, weight, teacher, labels, **options)
    inputs = [tensor for tensor in (hidden, weight, options.get("bias")) if tensor is not None and tensor.requires_grad]
    if again:
        torch.autograd.grad(out.loss, inputs, retain_graph=True)
    gradients = torch.autograd.grad(out.loss, inputs) if inputs else ()
    return [value.detach().cpu() for value in (out.loss, *gradients, out.ce, out.kd, *out.metrics.values())]

answered = {}
for name, question in torch.load(questions, weights_only=False).items():
    try:
        answered[name] = answer(*question)
        if name.startswith("again"):
            answered[name] = [answered[name], answer(*question, again=True)]
    except ValueError as error:
        answered[name] = str(error)
    if name.startswith("opcheck"):
        recorded = []
        def record(*arguments):
            recorded.append(arguments)
            return torch.ops.bbopd.linear_distill_triton.default(*arguments)
        hidden, weight, teacher, labels, options = question
        options = {key: moved(value) for key, value in options.items() if key != "impl"}
        reference.linear_distill_with(record, 0, *map(moved, (hidden, weight, teacher, labels)), **options)
        # not test_aot_dispatch_dynamic: it differentiates ce and kd as well, which have no gradient
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        answered[name] = torch.library.opcheck(torch.ops.bbopd.linear_distill_triton.default, recorded[0], test_utils=tests)
torch.save(answered, answers)
"""

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
        for kind, divergence in (*FULL, ("none", "forward_kl"), ("sampled", "forward_kl"))
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
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.fixture(scope="module", params=["cpu", ON_GPU])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the engine makes of every case, or its error; interpreted where the device is a CPU."""
    folder = tmp_path_factory.mktemp("kernels_distill")
    refused = REFUSED | (REFUSED_ON_CPU if request.param == "cpu" else {})  # on a GPU values are not looked at
    cases = ANSWERED | NEAR | AGAIN | SAME | OPCHECK | {name: asked for name, (asked, _) in refused.items()}
    questions = {
        name: (*asked[:4], asked[4] if "chunk_tokens" in asked[4] else asked[4] | {"impl": "triton"}) for name, asked in cases.items()
    }
    torch.save(questions, folder / "questions.pt")
    environment = os.environ | {"TRITON_INTERPRET": str(int(request.param == "cpu"))}
    # numpy warns of the infinities that the interpreter meets
    command = [sys.executable, "-W", "ignore", "-c", CHILD, request.param, str(folder / "questions.pt"), str(folder / "answers.pt")]
    subprocess.run(command, env=environment, check=True)
    answered: dict[str, Any] = torch.load(folder / "answers.pt")
    return answered


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


@pytest.mark.parametrize("name", ANSWERED)
def test_against_float64(name: str, answers: dict[str, Any]) -> None:
    asked, truth = ANSWERED[name], exact(ANSWERED[name])
    rounded = torch.float32 not in (asked[0].dtype, asked[1].dtype)
    assert_near(answers[name], truth, 4e-3 if rounded or name == "mixed dtypes" else 5e-6)
    count = len(dtypes(asked))
    assert [gradient.dtype for gradient in answers[name][1 : 1 + count]] == dtypes(asked)
    assert_near([answers[name][0], *answers[name][1 + count :]], [truth[0], *truth[1 + count :]], 5e-6)


@pytest.mark.parametrize("name", NEAR)
def test_gradients_stay_exact_as_the_student_nears_its_teacher(name: str, answers: dict[str, Any]) -> None:
    truth = exact(NEAR[name])
    assert 1e-6 < truth[0] < 1e-3
    assert_near(answers[name][:3], truth[:3], 3e-3, floor=0.0)


@pytest.mark.parametrize("name", SAME)
def test_equal_logits_have_no_divergence_and_no_gradient(name: str, answers: dict[str, Any]) -> None:
    assert all(not answer.any() for answer in answers[name][:3])


@pytest.mark.parametrize("name", AGAIN)
def test_repeats_and_a_second_backward_are_bitwise_equal(name: str, answers: dict[str, Any]) -> None:
    once, again = answers[name]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("name", OPCHECK)
def test_torch_compile_sees_one_opaque_op(name: str, answers: dict[str, Any]) -> None:
    assert set(answers[name].values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", REFUSED | REFUSED_ON_CPU)
def test_what_is_refused(name: str, answers: dict[str, Any]) -> None:
    if name not in answers:
        pytest.skip("not checked on a GPU")
    assert re.search((REFUSED | REFUSED_ON_CPU)[name][1], answers[name])


# ---------------------------------------------------------------- compiled

TYPES = {"gradient": "*bf16", "teacher": "*bf16", "signal": "*i1", "labels": "*i64", "ids": "*i64"}
TYPES |= dict.fromkeys(("V", "stride", "width", "teacher_stride", "teacher_width"), "i32")
TYPES |= dict.fromkeys(("inner", "outer", "inverse_temperature", "inverse_cap", "mix"), "fp32")
ALIGNED = ("logits", "bias", "teacher", "gradient", "stride", "width", "teacher_stride", "teacher_width")
WITHOUT_TEACHER = dict.fromkeys(("teacher", "signal", "teacher_statistics", "mean"))
COMPILED: dict[str, tuple[str, dict[str, Any]]] = {
    "finish": ("finish_logits", {}),
    "statistics": ("row_statistics", {"AT_ONE": True, "IS_TEACHER": False, "signal": None}),
    "statistics of a teacher": ("row_statistics", {"AT_ONE": False, "IS_TEACHER": True}),
    **{f"divergence {divergence}": ("row_divergence", {"DIVERGENCE": divergence}) for divergence in DIVERGENCES},
    **{f"gradient {divergence}": ("row_gradient", {"DIVERGENCE": divergence, "ids": None}) for divergence in DIVERGENCES},
    "gradient of a sampled token": ("row_gradient", {"DIVERGENCE": "forward_kl"} | WITHOUT_TEACHER),
    "gradient of cross-entropy": (
        "row_gradient",
        {"DIVERGENCE": "forward_kl", "kd_grad": None, "ids": None, "inverse_temperature": None, "inverse_cap": None} | WITHOUT_TEACHER,
    ),
}


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_without_spilling(capability: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bbopd.kernels import distill_rows, logits

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(distill_rows, COMPILED[name][0], None) or getattr(logits, COMPILED[name][0])
    constants = COMPILED[name][1] | {"BLOCK": logits.BLOCK}
    signature = {argument: "constexpr" if argument in constants else TYPES.get(argument, "*fp32") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(signature) if argument in ALIGNED}
    aligned = {(i,): divisor for (i,), divisor in aligned.items() if kernel.arg_names[i] not in constants}
    options = {"num_warps": logits.WARPS, "enable_fp_fusion": False}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", capability, 32), options=options)
    assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", compiled.asm["ptx"])  # 16 bytes at a time
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", report.split(f"Function {kernel.__name__}", 1)[1])}
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), report
    assert usage["REG"] * 32 * logits.WARPS * 2 <= 65536, report  # at least two rows at a time on a multiprocessor
