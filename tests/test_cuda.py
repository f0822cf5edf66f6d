"""The CUDA engine: its sources on the host (tests/cuda_emulation.cpp), behind the engine's own Python, against float64; on a GPU where
there is one; and compiled for three GPUs.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids of a support.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bbopd import FullTeacher, chunked_distill, chunked_logprobs, linear_distill, linear_logprobs
from bbopd.chunked_logits import check_tensors
from bbopd.cuda_rows import CudaRows
from bbopd.reference import linear_distill_with, register
from bbopd.reference_logprobs import linear_logprobs_with
from bbopd.reference_logprobs import register as register_logprobs
from bbopd.types import DIVERGENCES
from tests import distill_cases, in_place, logprobs_cases, resource_table
from tests.cuda_build import ARCHITECTURES, KERNELS, build_emulation, compile_kernels
from tests.distill_oracle import compare, draw, logits_of, make_teacher, oracle

Engine = tuple[Callable[..., Any], Callable[..., Any], str]
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> CudaRows:
    return CudaRows(build_emulation(tmp_path_factory.mktemp("cuda")), emulated=True)


@pytest.fixture(scope="module")
def ops(rows: CudaRows) -> tuple[Any, Any]:
    """Both ops over the emulation, registered as `bbopd.cuda_engine` does."""
    distill = register("bbopd_tests::linear_distill_cuda", partial(chunked_distill.run, rows), lambda dtype, _: gradient_dtype(dtype))
    return distill, register_logprobs("bbopd_tests::linear_logprobs_cuda", partial(chunked_logprobs.run, rows))


gradient_dtype = chunked_distill.gradient_dtype


@pytest.fixture(scope="module", params=["cpu", ON_GPU])
def engine(request: pytest.FixtureRequest, rows: CudaRows, ops: tuple[Any, Any]) -> Engine:
    """`linear_distill`, `linear_logprobs`, and the device that they run on."""
    if request.param == "cuda":
        pytest.importorskip("bbopd._cuda", reason="built without nvcc")
        return partial(linear_distill, impl="cuda"), partial(linear_logprobs, impl="cuda"), "cuda"

    def distill(hidden: Tensor, weight: Tensor, *arguments: Any, chunk_tokens: int = 0, **options: Any) -> Any:
        check_tensors(rows, hidden, weight)
        return linear_distill_with(ops[0], chunk_tokens, hidden, weight, *arguments, **options)

    def logprobs(hidden: Tensor, weight: Tensor, **options: Any) -> Any:
        check_tensors(rows, hidden, weight)
        return linear_logprobs_with(ops[1], hidden, weight, **options)

    return distill, logprobs, "cpu"


# ---------------------------------------------------------------- linear_distill


def answer(engine: Engine, asked: distill_cases.Case, again: bool = False) -> list[Tensor]:
    if engine[2] == "cuda" and "chunk_tokens" in asked[4]:
        pytest.skip("only the emulation takes chunk_tokens")
    return distill_cases.answer(engine[0], asked, engine[2], again)


@pytest.mark.parametrize("name", distill_cases.ANSWERED)
def test_loss_and_gradients_against_float64(name: str, engine: Engine) -> None:
    asked = distill_cases.ANSWERED[name]
    distill_cases.assert_exact(asked, answer(engine, asked))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["full", "full_hidden", "topk", "candidates", "sampled", "advantages", "none"])
def test_loss_and_gradients_from_the_formulas_alone(kind: str, divergence: str, engine: Engine) -> None:
    N, V, T = 6, 1033, 2.0
    hidden, weight, generator = draw(N, V, dtype=torch.float32, spread=2.0)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[2] = -100
    valid = torch.tensor([True, False, True, True, True, True])
    teacher = None if kind == "none" else make_teacher(kind, N, V, T, generator, torch.float32, valid=valid)
    options: dict[str, Any] = {"temperature": T, "divergence": divergence, "beta": 0.3}
    known = distill_cases.moved((teacher, labels), engine[2])
    ours = engine[0](hidden.to(engine[2]), weight.to(engine[2]), *known, **options).loss
    compare(ours.cpu(), oracle(logits_of(hidden, weight), teacher, labels, **options)[0], (hidden, weight), 2e-5)


@pytest.mark.parametrize("name", distill_cases.NEAR)
def test_gradients_stay_exact_as_the_student_nears_its_teacher(name: str, engine: Engine) -> None:
    distill_cases.assert_exact_near(distill_cases.NEAR[name], answer(engine, distill_cases.NEAR[name]))


@pytest.mark.parametrize("name", distill_cases.SAME)
def test_equal_logits_have_no_divergence_and_no_gradient(name: str, engine: Engine) -> None:
    assert all(not found.any() for found in answer(engine, distill_cases.SAME[name])[:3])


@pytest.mark.parametrize("name", distill_cases.AGAIN)
def test_repeats_and_a_second_backward_are_bitwise_equal(name: str, engine: Engine) -> None:
    once, again = answer(engine, distill_cases.AGAIN[name]), answer(engine, distill_cases.AGAIN[name], again=True)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("name", distill_cases.REFUSED | distill_cases.REFUSED_ON_CPU)
def test_what_is_refused(name: str, engine: Engine) -> None:
    if engine[2] == "cuda" and name in distill_cases.REFUSED_ON_CPU:
        pytest.skip("values are not looked at on a GPU")
    asked, message = (distill_cases.REFUSED | distill_cases.REFUSED_ON_CPU)[name]
    with pytest.raises(ValueError, match=message):
        answer(engine, asked)


@pytest.mark.parametrize("name", distill_cases.OPCHECK)
def test_torch_compile_sees_one_opaque_op(name: str, ops: tuple[Any, Any]) -> None:
    hidden, weight, teacher, labels, options = distill_cases.OPCHECK[name]
    arguments = recorded(ops[0], hidden, weight, teacher, labels, **options)
    # not test_aot_dispatch_dynamic: it differentiates ce and kd as well, which have no gradient
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    assert set(torch.library.opcheck(ops[0], arguments, test_utils=tests).values()) == {"SUCCESS"}


def recorded(op: Any, *arguments: Any, **options: Any) -> list[Any]:
    """What the registered op is called with."""
    found: list[Any] = []

    def record(*given: Any) -> Any:
        found.extend(given)
        return op(*given)

    linear_distill_with(record, 0, *arguments, **options)
    return found


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_that_nobody_looks_for_comes_out_as_nan(divergence: str, where: str, ops: tuple[Any, Any]) -> None:
    hidden, weight, teacher, _, _ = distill_cases.case("full", N=3, V=70, labelled=False)
    assert isinstance(teacher, FullTeacher)
    assert teacher.logits is not None
    (hidden.data if where == "student" else teacher.logits)[1, 3] = torch.nan
    names = [argument.name for argument in ops[0]._opoverload._schema.arguments]

    def unchecked(*given: Any) -> Any:
        return ops[0](*(False if name == "check" else value for name, value in zip(names, given, strict=True)))

    out = linear_distill_with(unchecked, 0, hidden, weight, teacher, divergence=divergence)
    gradient = torch.autograd.grad(out.loss, hidden)[0]
    assert out.loss.isnan()
    assert out.kd.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["aligned", "odd", "shifted", "short"])
def test_a_teacher_lies_in_memory_as_it_likes(kind: str, dtype: torch.dtype, engine: Engine) -> None:
    N, V = 3, 1030
    hidden, weight, generator = draw(N, V, dtype=torch.float32)
    wide = torch.randn(N, V + 10, generator=generator).to(dtype)
    logits = {"aligned": wide[:, :1032], "odd": torch.cat([wide, wide[:, :1]], 1), "shifted": wide[:, 1:], "short": wide[:, :V]}[kind]
    options: dict[str, Any] = {"divergence": "jsd", "vocab_size": V}
    asked: distill_cases.Case = (hidden, weight, FullTeacher(logits), None, options)
    plain = (hidden, weight, FullTeacher(logits[:, :V].contiguous()), None, options)
    assert all(torch.equal(a, b) for a, b in zip(answer(engine, asked), answer(engine, plain), strict=True))
    distill_cases.assert_exact(asked, answer(engine, asked))


@pytest.mark.parametrize("name", ["full jsd T=2.0 bfloat16", "topk reverse_kl T=0.7 bfloat16", "sampled forward_kl T=1.0 float32"])
def test_the_order_of_threads_does_not_matter(name: str, rows: CudaRows, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine[2] == "cuda":
        pytest.skip("the GPU chooses its own order")
    logits = logprobs_cases.tied()
    forwards = [*answer(engine, distill_cases.ANSWERED[name]), *(rows.top_k(logits, 9001, k) for k in (40, 300))]
    monkeypatch.setenv("BBOPD_EMULATION", "backwards")
    backwards = [*answer(engine, distill_cases.ANSWERED[name]), *(rows.top_k(logits, 9001, k) for k in (40, 300))]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


# ---------------------------------------------------------------- linear_logprobs


@pytest.mark.parametrize("name", logprobs_cases.ANSWERED)
def test_logprobs_as_exact_as_plain_pytorch_and_the_same_each_time(name: str, engine: Engine) -> None:
    tensors, options = logprobs_cases.ANSWERED[name]
    if engine[2] == "cuda" and "chunk_tokens" in options:
        pytest.skip("only the emulation takes chunk_tokens")
    arguments = {key: value.to(engine[2]) for key, value in tensors.items()} | options
    once, again = (asdict(engine[1](**arguments)) for _ in range(2))
    found = {key: value.cpu() for key, value in once.items() if value is not None}
    assert all(torch.equal(once[key], again[key]) for key in found)
    logprobs_cases.assert_exact((tensors, options), found)
    if name == "fewer logits than top-k":
        logprobs_cases.assert_filled_up(found["topk_ids"])


@pytest.mark.parametrize("name", logprobs_cases.REFUSED | logprobs_cases.REFUSED_ON_CPU)
def test_what_logprobs_refuse(name: str, engine: Engine) -> None:
    if engine[2] == "cuda" and name in logprobs_cases.REFUSED_ON_CPU:
        pytest.skip("values are not looked at on a GPU")
    (tensors, options), message = (logprobs_cases.REFUSED | logprobs_cases.REFUSED_ON_CPU)[name]
    with pytest.raises(ValueError, match=message):
        engine[1](**{key: value.to(engine[2]) for key, value in tensors.items()}, **options)


def test_an_id_beyond_the_vocabulary_gets_nan(ops: tuple[Any, Any]) -> None:
    hidden, weight = torch.zeros(3, 4), torch.randn(9, 4)
    ids = torch.tensor([-1, 6, 7])
    expected = torch.tensor([torch.nan, -math.log(7), torch.nan])
    arguments = (2.0, 1.0, None, 7, False, 0)
    torch.testing.assert_close(ops[1](hidden, weight, None, ids, None, 0, *arguments)[1], expected, equal_nan=True)
    found = ops[1](hidden, weight, None, ids, ids[:, None], 2, *arguments)
    torch.testing.assert_close(found[1], expected, equal_nan=True)
    torch.testing.assert_close(found[5][:, 0], torch.tensor([-torch.inf, -math.log(7), torch.nan]), equal_nan=True)
    for more in ((None, 0), (ids[:, None].clamp(min=0), 3)):
        results = torch.library.opcheck(ops[1], (hidden, weight, None, ids.clamp(min=0), *more, 2.0, 1.0, None, 9, True, 0))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("k", logprobs_cases.TIED_K)
def test_of_equal_logits_the_lower_id_comes_first(k: int, rows: CudaRows) -> None:
    logprobs_cases.assert_lower_first(rows.top_k(logprobs_cases.tied(), 9001, k))


@pytest.mark.parametrize(("V", "k"), [(1, 1), (5, 5), (255, 200), (2048, 300), (2049, 300), (3000, 256), (3000, 257), (9001, 9000)])
@pytest.mark.parametrize("few", [False, True])
def test_the_largest_are_those_of_a_stable_sort(V: int, k: int, few: bool, rows: CudaRows) -> None:
    generator = torch.Generator().manual_seed(V + k)
    z_NV = torch.randn(4, V, generator=generator) * torch.tensor([1e-3, 1.0, 30.0, 1e30])[:, None]
    z_NV = z_NV.round() if few else z_NV
    z_NV[1, ::3] = -torch.inf
    assert torch.equal(rows.top_k(z_NV, V, k), z_NV.sort(dim=1, descending=True, stable=True).indices[:, :k])


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_a_narrow_type_are_read_as_they_are(dtype: torch.dtype, rows: CudaRows) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, torch.finfo(dtype).max, torch.finfo(dtype).min])
    bits = torch.arange(-(2**15), 2**15, 11, dtype=torch.int32).to(torch.int16)
    z_n1 = torch.cat([bits.view(dtype), special.to(dtype)])[:, None]
    for logits in (z_n1, z_n1.expand(-1, 4).contiguous()):  # one by one, and four at a time
        top, total, _ = rows.statistics(logits, 1, 1.0)
        finite = z_n1[:, 0].isfinite()
        assert torch.equal(top[finite], z_n1[finite, 0].float())
        assert (total[finite] == 1.0).all()
        assert total[z_n1[:, 0].isnan()].isnan().all()


def test_gradients_are_rounded_to_nearest(rows: CudaRows) -> None:
    from bbopd.chunked_logits import Rows

    z_nS = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    statistics_3n, ones_n1 = torch.zeros(3, 3), torch.ones(3, 1)
    exact_nS, rounded_nS = torch.empty(3, 64), torch.empty(3, 64, dtype=torch.bfloat16)
    given = Rows(z_nS, 64, 1.0, statistics_3n, exact_nS, labels=None, ce_grad=None, kd_grad=ones_n1)
    rows.gradient(given)
    rows.gradient(replace(given, gradient=rounded_nS))
    torch.testing.assert_close(exact_nS, z_nS.exp())
    assert torch.equal(rounded_nS, exact_nS.bfloat16())


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", in_place.KINDS)
def test_gradients_go_where_the_logits_were(
    kind: str, dtype: torch.dtype, order: str, rows: CudaRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BBOPD_EMULATION", order)
    apart, over = in_place.gradients(rows, kind, dtype)
    assert apart.any(1).all()
    assert torch.equal(apart, over)


# ---------------------------------------------------------------- the build


def test_without_a_gpu_the_engine_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"impl is 'cuda': this build has auto, reference, cpu$"):
        linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), impl="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the launch would work")
def test_a_launch_that_fails_says_what_cuda_says() -> None:
    kernels = pytest.importorskip("bbopd._cuda", reason="built without nvcc")
    z = torch.zeros(1, 4)
    with pytest.raises(RuntimeError, match=r"CUDA, in statistics: .*(driver|device)"):
        CudaRows(kernels).statistics(z, 4, 1.0)


def test_the_engine_refuses_tensors_of_a_cpu() -> None:
    pytest.importorskip("bbopd._cuda", reason="built without nvcc")
    from bbopd import cuda_engine

    with pytest.raises(ValueError, match=r"impl='cuda' runs on a GPU, hidden is on cpu: move it to 'cuda', or use impl='reference'"):
        cuda_engine.linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_compile_without_warnings_or_spilling(architecture: str) -> None:
    usage = compile_kernels(architecture)
    assert sorted(usage) == sorted(KERNELS)
    for taken in usage.values():
        taken.assert_fits()
        assert taken.shared * 2 <= 100 * 1024, taken.variant


def test_the_table_names_every_kernel() -> None:
    lines = [(line.variant, line.kernel) for line in resource_table.read() if line.compiler.startswith("nvcc ")]
    assert sorted(lines) == sorted((name, name.split()[0]) for name in KERNELS for _ in ARCHITECTURES)
