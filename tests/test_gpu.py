"""What only a GPU can show: CUDA graphs, equal bits, memory, real vocabularies, ``torch.compile``, and which engine ``auto`` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bbopd import linear_distill, linear_logprobs
from bbopd.types import DIVERGENCES
from benchmarks import accuracy, distill
from benchmarks.cases import ANCHOR, Case
from benchmarks.contest import Contestant
from benchmarks.gpu_contestants import IMPLS, engine_missing
from benchmarks.gpu_measures import peak_mebibytes
from benchmarks.inputs import Inputs, draw
from tests.devices import NEEDS_GPU

pytestmark = [pytest.mark.gpu, NEEDS_GPU]

KINDS = ("none", "full", "full_hidden", "topk", "sampled")
SMALL = Case("small", 300, 64, 5003, teacher="topk", device="cuda")


def of_kind(kind: str, divergence: str = "forward_kl", case: Case = SMALL) -> Case:
    if kind in ("none", "sampled"):
        case = replace(case, temperature=1.0)
    return replace(case, teacher=kind, divergence=divergence)  # type: ignore[arg-type]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = engine_missing(request.param, SMALL)
    if reason:
        pytest.skip(reason)
    yield request.param
    torch.cuda.empty_cache()


def loss_of(inputs: Inputs, impl: str) -> Tensor:
    case = inputs.case
    options = {"temperature": case.temperature, "divergence": case.divergence, "impl": impl}
    return linear_distill(inputs.hidden, inputs.weight, inputs.teacher, inputs.labels, **options).loss  # type: ignore[arg-type]


def step_of(inputs: Inputs, impl: str) -> Callable[[], list[Tensor]]:
    """Loss and both gradients."""

    def step() -> list[Tensor]:
        loss = loss_of(inputs, impl)
        return [loss.detach(), *torch.autograd.grad(loss, inputs.leaves)]

    return step


def scores_of(inputs: Inputs, impl: str) -> Callable[[], list[Tensor]]:
    """Everything that `linear_logprobs` can give."""
    candidates = torch.stack([inputs.labels, (inputs.labels + 1) % inputs.case.V, torch.full_like(inputs.labels, -1)], dim=1)

    def step() -> list[Tensor]:
        options: dict[str, Any] = {"temperature": 2.0, "impl": impl}
        both = linear_logprobs(inputs.hidden, inputs.weight, token_ids=inputs.labels, top_k=9, candidate_ids=candidates, **options)
        alone = linear_logprobs(inputs.hidden, inputs.weight, token_ids=inputs.labels, **options)
        parts = (both.logsumexp, both.sampled, both.topk_ids, both.topk_logprobs, both.log_tail, both.candidates, both.candidates_log_tail)
        return [part for part in (*parts, alone.logsumexp, alone.sampled) if part is not None]

    return step


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def assert_replays(step: Callable[[], list[Tensor]], change: Callable[[], None]) -> None:
    """Captured in a CUDA graph, a step gives the bits of the eager one, also of inputs that came after the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    first = [tensor.clone() for tensor in captured]
    assert_same(first, step())
    change()
    graph.replay()
    assert not torch.equal(captured[0], first[0])
    assert_same(captured, step())


def double(inputs: Inputs) -> Callable[[], None]:
    def change() -> None:
        with torch.no_grad():
            inputs.hidden.mul_(2.0)

    return change


@pytest.mark.parametrize("kind", KINDS)
def test_linear_distill_in_a_cuda_graph(kind: str, impl: str) -> None:
    inputs = draw(of_kind(kind, "jsd" if kind.startswith("full") else "forward_kl"))
    assert_replays(step_of(inputs, impl), double(inputs))


def test_linear_logprobs_in_a_cuda_graph(impl: str) -> None:
    inputs = draw(SMALL)
    assert_replays(scores_of(inputs, impl), double(inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_ten_runs_are_equal_to_the_bit(kind: str, impl: str) -> None:
    step = step_of(draw(replace(of_kind(kind), N=3000, D=256, V=50257)), impl)
    first = step()
    for _ in range(9):
        assert_same(step(), first)


def test_ten_scorings_are_equal_to_the_bit(impl: str) -> None:
    step = scores_of(draw(replace(SMALL, V=50257)), impl)
    first = step()
    for _ in range(9):
        assert_same(step(), first)


@pytest.mark.parametrize("V", [50257, 151936])
@pytest.mark.parametrize(("kind", "divergence"), [*((kind, "forward_kl") for kind in KINDS), ("full", "reverse_kl"), ("full", "jsd")])
def test_gradients_of_real_vocabularies_against_float64(kind: str, divergence: str, V: int, impl: str) -> None:
    case = of_kind(kind, divergence, replace(SMALL, N=256, D=512, V=V))
    ours = Contestant(impl, lambda inputs: distill.ours(inputs, impl))
    assert accuracy.gradient_errors([ours], case)[impl] < 3.5e-3
    if kind not in ("none", "sampled"):
        assert accuracy.gradient_errors([ours], accuracy.near_case(case))[impl] < 3.5e-3
    inputs = draw(case)
    exact, *_ = accuracy.exact_gradients(inputs)
    assert distill.ours(inputs, impl)().item() == pytest.approx(exact.item(), rel=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["none", "topk", "sampled", "full"])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
def test_memory_beyond_inputs_and_gradients(kind: str, is_frozen: bool, impl: str) -> None:
    """At most 1.2 GB at N = 8192, V = 128256, D = 4096, and float32 dW where the head is trained."""
    N, V, D = ANCHOR
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of the GPU's memory, {free / 2**30:.1f} are free")
    inputs = draw(of_kind(kind, case=replace(SMALL, N=N, V=V, D=D, is_head_frozen=is_frozen)))
    step = distill.ours(inputs, impl)
    step()
    inputs.drop_gradients()
    peak = peak_mebibytes(step, inputs)
    assert peak is not None
    assert peak * 2**20 <= 1.2e9 + (0 if is_frozen else 4 * V * D)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_gives_the_same_bits(kind: str, impl: str) -> None:
    inputs = draw(of_kind(kind))
    expected = step_of(inputs, impl)()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=False)
    loss = compiled(inputs, impl)
    assert_same([loss.detach(), *torch.autograd.grad(loss, inputs.leaves)], expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_have_no_divergence(divergence: str, impl: str) -> None:
    inputs = draw(replace(of_kind("full_hidden", divergence), ce_weight=0.0, kd_weight=1.0, teacher_noise=0.0))
    assert all(not tensor.any() for tensor in step_of(replace_labels(inputs), impl)())


def replace_labels(inputs: Inputs) -> Inputs:
    return replace(inputs, labels=torch.full_like(inputs.labels, -100))


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_auto_takes_an_engine_for_the_gpu() -> None:
    inputs = draw(SMALL)
    able = [impl for impl in IMPLS if not engine_missing(impl, SMALL)]
    assert able, "neither Triton nor the CUDA extension is there"
    with _Names() as names, torch.no_grad():
        linear_distill(inputs.hidden, inputs.weight, inputs.teacher, inputs.labels, temperature=SMALL.temperature)
        linear_logprobs(inputs.hidden, inputs.weight, top_k=3)
    for op in ("linear_distill", "linear_logprobs"):
        assert any(name.startswith(f"bbopd::{op}_{impl}") for name in names.seen for impl in able), names.seen
