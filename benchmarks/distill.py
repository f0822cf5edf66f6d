"""The contestants of `linear_distill`, and the strict floor under them.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` top-k.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bbopd import FullTeacher, SampledTeacher, TopKTeacher, linear_distill
from bbopd.types import OpTeacher
from benchmarks.cases import Case
from benchmarks.contest import Contestant, Step
from benchmarks.inputs import Inputs, draw

__all__ = ["CONTESTANTS", "FLOOR", "RESIZES", "draw", "eager_loss"]

RESIZES = True  # a smaller case is as good a warm-up
BETA_OF = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # as Liger and TRL name the two ends of their JSD
HEAD_TEACHER = "takes the teacher's hidden states and head, and so computes its logits as well"

# ---------------------------------------------------------------- the floor


def floor(inputs: Inputs) -> Step:
    """Logits, dH and dW as plain matrix products into memory that is there already; no loss at all."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits_NV = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden, weight.T, out=logits_NV)
        torch.mm(logits_NV, weight, out=grad_hidden)
        torch.mm(logits_NV.T, hidden, out=grad_weight)
        inputs.hidden.grad, inputs.weight.grad = grad_hidden, grad_weight

    return step


# ---------------------------------------------------------------- ours


def _loss_of(inputs: Inputs, impl: str) -> Tensor:
    case = inputs.case
    return linear_distill(
        inputs.hidden,
        inputs.weight,
        inputs.teacher,
        inputs.labels if case.ce_weight else None,
        temperature=case.temperature,
        ce_weight=case.ce_weight,
        kd_weight=case.kd_weight,
        divergence=case.divergence,
        impl=impl,
    ).loss


def ours(inputs: Inputs, impl: str) -> Step:
    return backward_of(partial(_loss_of, inputs, impl))


def ours_cpu(inputs: Inputs, keeps_logits: bool) -> Step:
    """Without a stash (logits computed twice), or with one that holds them all."""
    stash_limit: Callable[[float], Any] = importlib.import_module("bbopd.cpu_memory").stash_limit
    megabytes = math.ceil(4 * inputs.case.N * inputs.case.V / 2**20) if keeps_logits else 0
    inner = ours(inputs, "cpu")

    def step() -> Tensor | None:
        with stash_limit(megabytes):
            return inner()

    return step


def cpu_engine_missing(case: Case) -> str:
    """Why ``impl="cpu"`` cannot run, or an empty string."""
    try:
        linear_distill(torch.zeros(1, 1), torch.zeros(2, 1), None, torch.zeros(1, dtype=torch.long), impl="cpu")
    except ValueError as error:
        return str(error)
    return "" if importlib.util.find_spec("bbopd.cpu_memory") is not None else "bbopd.cpu_memory is not in this build"


# ---------------------------------------------------------------- PyTorch


def eager_loss(hidden: Tensor, weight: Tensor, teacher: OpTeacher | None, labels: Tensor, case: Case) -> Tensor:
    """The loss as one writes it in PyTorch: whole logits, autograd. In float64 it is the truth that errors are taken against."""
    z_NV = hidden @ weight.T
    z_NV = z_NV if z_NV.dtype == torch.float64 else z_NV.float()
    loss = case.ce_weight * F.cross_entropy(z_NV, labels) if case.ce_weight else z_NV.new_zeros(())
    if teacher is None:
        return loss
    log_q_NV = (z_NV / case.temperature).log_softmax(1)
    if isinstance(teacher, SampledTeacher):
        log_q_N = log_q_NV.gather(1, teacher.token_ids[:, None])[:, 0]
        assert teacher.logprobs is not None, "made by benchmarks.inputs"
        log_p_N, log_old_N = teacher.logprobs.to(z_NV.dtype), teacher.behavior_logprobs.to(z_NV.dtype)
        return loss - case.kd_weight * case.temperature**2 * ((log_q_N - log_old_N).exp() * (log_p_N - log_old_N)).mean()
    if isinstance(teacher, TopKTeacher):
        log_tail_N = log_q_NV.scatter(1, teacher.ids, -torch.inf).logsumexp(1)
        log_q_NC = torch.cat([log_q_NV.gather(1, teacher.ids), log_tail_N[:, None]], dim=1)
        log_p_NC = torch.cat([teacher.logprobs, teacher.log_tail[:, None]], dim=1).to(z_NV.dtype).log_softmax(1)
    else:
        log_q_NC, log_p_NC = log_q_NV, (_teacher_logits(teacher, z_NV.dtype) / case.temperature).log_softmax(1)
    if case.divergence == "jsd":  # with beta = 1/2
        log_m_NC = torch.logaddexp(log_p_NC, log_q_NC) - math.log(2)
        kd_N = 0.5 * (_kl(log_p_NC, log_m_NC) + _kl(log_q_NC, log_m_NC))
    else:
        kd_N = _kl(log_p_NC, log_q_NC) if case.divergence == "forward_kl" else _kl(log_q_NC, log_p_NC)
    return loss + case.kd_weight * case.temperature**2 * kd_N.mean()


def _kl(log_a_NC: Tensor, log_b_NC: Tensor) -> Tensor:
    return (log_a_NC.exp() * (log_a_NC - log_b_NC)).sum(1)


def _teacher_logits(teacher: OpTeacher, dtype: torch.dtype) -> Tensor:
    """As they were sent, or made of hidden states and head: in float64 exactly, else as PyTorch multiplies them."""
    assert isinstance(teacher, FullTeacher)
    if teacher.logits is not None:
        return teacher.logits.to(dtype)
    assert teacher.hidden is not None
    assert teacher.weight is not None
    if dtype == torch.float64:
        return teacher.hidden.double() @ teacher.weight.double().T
    return (teacher.hidden @ teacher.weight.T).to(dtype)


def eager(inputs: Inputs) -> Step:
    return backward_of(lambda: eager_loss(inputs.hidden, inputs.weight, inputs.teacher, inputs.labels, inputs.case))


def compiled(inputs: Inputs) -> Step:
    """Tensors as arguments, so that the teacher's dataclass is rebuilt inside the graph."""
    case, teacher = inputs.case, inputs.teacher
    names = [] if teacher is None else [one.name for one in fields(teacher) if isinstance(getattr(teacher, one.name), Tensor)]
    signals = [getattr(teacher, name) for name in names]
    kind: Any = type(teacher)

    def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor, *signals: Tensor) -> Tensor:
        known = kind(**dict(zip(names, signals, strict=True))) if signals else None
        return eager_loss(hidden, weight, known, labels, case)

    function = torch.compile(loss_of, dynamic=False)
    return backward_of(lambda: function(inputs.hidden, inputs.weight, inputs.labels, *signals))


def torch_linear_cross_entropy(inputs: Inputs) -> Step:
    options = torch.nn.LinearCrossEntropyOptions()
    return backward_of(lambda: F.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, options=options))


def torch_too_old(case: Case) -> str:
    return "" if hasattr(F, "linear_cross_entropy") else f"F.linear_cross_entropy is not in PyTorch {torch.__version__}"


# ---------------------------------------------------------------- other libraries


def liger(inputs: Inputs) -> Step:
    """Its soft loss has no factor T^2, so it goes into the weight; of a top-k case it does its JSD with beta = 0.5."""
    case = inputs.case
    module: Any = importlib.import_module("liger_kernel.chunked_loss")
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=case.ce_weight,
        weight_soft_loss=case.kd_weight * case.temperature**2,
        beta=BETA_OF[case.divergence] if case.teacher.startswith("full") else 0.5,
        temperature=case.temperature,
    )
    teacher_hidden = inputs.hidden.detach()
    return backward_of(lambda: loss(inputs.hidden, inputs.weight, teacher_hidden, inputs.teacher_weight, inputs.labels))


def trl(inputs: Inputs) -> Step:
    case = inputs.case
    module: Any = importlib.import_module("trl.kernels.chunked_divergence")
    beta = BETA_OF[case.divergence] if case.teacher.startswith("full") else 0.5
    teacher_hidden, factor = inputs.hidden.detach(), case.kd_weight * case.temperature**2

    def loss_of() -> Tensor:
        divergence_N, _ = module.ChunkedDivergenceFunction.apply(
            inputs.hidden, inputs.weight, None, teacher_hidden, inputs.teacher_weight, None, beta, case.temperature
        )
        return factor * divergence_N.mean()

    return backward_of(loss_of)


def not_installed(package: str, distribution: str, case: Case) -> str:
    return "" if importlib.util.find_spec(package) is not None else f"{distribution} is not installed"


def backward_of(loss_of: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        return loss.detach()

    return step


FLOOR = Contestant("floor: three torch.mm(out=)", floor, bytes_per_logit=4, has_loss=False, note="no loss: logits, dH and dW alone")
_PYTORCH = (
    Contestant("bbopd cpu, recompute", partial(ours_cpu, keeps_logits=False), cpu_engine_missing),
    Contestant("bbopd cpu, stash", partial(ours_cpu, keeps_logits=True), cpu_engine_missing, bytes_per_logit=4),
    Contestant("bbopd reference", partial(ours, impl="reference")),
    Contestant("PyTorch eager", eager, bytes_per_logit=32),
    Contestant("torch.compile", compiled, bytes_per_logit=20, is_compiled=True, is_peer=True),
)
_CROSS_ENTROPY = Contestant("F.linear_cross_entropy", torch_linear_cross_entropy, torch_too_old, is_peer=True)
_HEADS = (
    Contestant(
        "Liger chunked JSD",
        liger,
        partial(not_installed, "liger_kernel", "liger-kernel"),
        is_compiled=True,
        is_peer=True,
        takes_head=True,
        note=HEAD_TEACHER + "; CE and KD",
    ),
    Contestant(
        "TRL chunked divergence",
        trl,
        partial(not_installed, "trl", "trl"),
        has_loss=False,
        is_peer=True,
        takes_head=True,
        note=HEAD_TEACHER + "; KD without CE; PyTorch tiles",
    ),
)
CONTESTANTS = (FLOOR, *_PYTORCH, _CROSS_ENTROPY, *_HEADS)


def contestants_of(case: Case) -> tuple[Contestant, ...]:
    """Who takes part: `F.linear_cross_entropy` in cross-entropy alone, teachers' heads where there is a teacher."""
    if case.is_sweep:
        return (FLOOR, *_PYTORCH)
    return (FLOOR, *_PYTORCH, *((_CROSS_ENTROPY,) if case.teacher == "none" else _HEADS))


def claims_loss(contestant: Contestant, case: Case) -> bool:
    """Whether the contestant's loss is that of the case, rather than that of its own nearest objective."""
    if contestant.takes_head and not case.teacher.startswith("full"):
        return False
    return contestant.has_loss or (contestant.takes_head and case.ce_weight == 0)
