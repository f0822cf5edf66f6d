"""What each process of tests/test_tensor_parallel.py does: the same calls on its part of the vocabulary.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids of a support.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from bbopd import FullTeacher, TopKTeacher, chunked_distill, linear_distill, reference
from bbopd.cuda_rows import CudaRows
from bbopd.types import DIVERGENCES, DistillLoss, OpTeacher
from tests.cuda_build import load_emulation
from tests.devices import INTERPRETS
from tests.distill_oracle import cut_rows, draw, make_teacher

N, V = 5, 19
WORLD = 4
PARTS = {
    "two": ((12, 7), (1, 3)),
    "four": ((9, 1, 7, 2), range(WORLD)),
    "one is empty": ((6, 0, 9, 4), range(WORLD)),
}
"""Sizes of the shards, and the ranks of the world that hold them."""


@dataclass(frozen=True)
class Case:
    """One call, drawn alike in every process."""

    kind: str
    dtype: torch.dtype = torch.float64
    used: int | None = None
    labels: bool = True
    bias: bool = False
    valid: bool = False
    spread: float = 1.0
    trained: tuple[str, ...] = ("hidden", "weight", "bias")
    chunk_tokens: int = 0
    K: int = 4
    tokens: int = N
    options: dict[str, Any] = field(default_factory=dict)
    engine: str = "reference"

    def whole(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tensors and options of one process."""
        used, temperature = self.used or V, self.options.get("temperature", 1.0)
        hidden, weight, generator = draw(N, V, dtype=self.dtype, spread=self.spread, seed=len(self.kind) + 10 * round(10 * temperature))
        bias = torch.randn(V, generator=generator, dtype=torch.float64).to(self.dtype) if self.bias else None
        valid = torch.tensor([True, True, False, True, True]) if self.valid else None
        teacher: OpTeacher | None = None
        if self.kind != "none":
            teacher_width = V if self.kind.startswith("full") else used
            teacher = make_teacher(self.kind, N, teacher_width, temperature, generator, self.dtype, K=self.K, valid=valid)
        labels = torch.tensor([3, -100, 0, used - 1, 11]).clamp(max=used - 1) if self.labels else None
        if self.tokens < N:
            rows = slice(self.tokens)
            hidden, labels = hidden[rows], None if labels is None else labels[rows]
            teacher = None if teacher is None else cut_rows(teacher, rows)
        tensors = {"hidden": hidden.detach(), "weight": weight.detach(), "bias": bias, "teacher": teacher, "labels": labels}
        return tensors, {"vocab_size": self.used, **self.options}


EVERYTHING = {
    "t2_scaling": False,
    "ce_weight": 0.3,
    "kd_weight": 1.1,
    "beta": 0.3,
    "skew": 0.2,
    "logit_scale": 1.3,
    "logit_softcap": 5.0,
    "token_weight": torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5]),
    "normalizer": (4.0, 3.0),
}
CASES: dict[str, Case] = {}
for _kind in ("full", "full_hidden", "topk", "candidates"):
    for _divergence in DIVERGENCES:
        for _T in (1.0, 2.0, 0.7):
            _how = {"temperature": _T, "divergence": _divergence}
            CASES[f"{_kind} {_divergence} T={_T}"] = Case(_kind, bias=True, valid=True, used=17, options=_how | EVERYTHING)
            CASES[f"{_kind} {_divergence} T={_T} plain"] = Case(_kind, torch.float32, labels=_T != 1.0, options=_how)
for _T in (1.0, 2.0, 0.7):
    CASES[f"sampled T={_T}"] = Case("sampled", bias=True, valid=True, used=17, options={"temperature": _T} | EVERYTHING)
    CASES[f"sampled T={_T} plain"] = Case("sampled", torch.float32, labels=_T != 2.0, options={"temperature": _T})
CASES["advantages"] = Case("advantages", bias=True, valid=True, used=17, options={"temperature": 2.0} | EVERYTHING)
for _kind in ("full", "topk"):
    CASES[f"{_kind} chunks"] = Case(_kind, torch.float32, chunk_tokens=2, options={"divergence": "jsd"})
    CASES[f"{_kind} of two ids"] = Case(_kind, used=2, K=2, options={"divergence": "reverse_kl"})
    CASES[f"{_kind} sharp"] = Case(_kind, torch.float32, spread=30.0, options={"divergence": "skew_reverse_kl"})
    CASES[f"{_kind} bfloat16"] = Case(_kind, torch.bfloat16, bias=True, options={"temperature": 2.0})
    for _trained in ("hidden", "weight", "bias"):
        CASES[f"{_kind} {_trained} only"] = Case(_kind, bias=True, trained=(_trained,), options=EVERYTHING)
    CASES[f"{_kind} without tokens"] = Case(_kind, tokens=0)
    CASES[f"{_kind} of one token"] = Case(_kind, tokens=1, options={"temperature": 2.0})
CASES["labels alone"] = Case("none")
CASES["labels alone, of float32"] = Case("none", torch.float32, used=18, bias=True, options={"logit_softcap": 3.0})
CASES["all ids"] = Case("topk", K=V, labels=False, options={"divergence": "jsd"})

ENGINES = ("cuda", "triton") if INTERPRETS else ("cuda",)
"""Beside the reference: the CUDA sources in their emulation, and Triton in its interpreter."""
_OF_ENGINES = (
    *(f"full {_divergence} T={_T}" for _divergence, _T in zip(DIVERGENCES, (2.0, 0.7, 2.0, 1.0, 0.7), strict=True)),
    *(f"topk {_divergence} T={_T}" for _divergence, _T in zip(DIVERGENCES, (0.7, 2.0, 1.0, 0.7, 2.0), strict=True)),
    *("full_hidden jsd T=0.7", "full jsd T=2.0 plain", "full reverse_kl T=1.0 plain", "full_hidden forward_kl T=1.0 plain"),
    *("candidates jsd T=2.0", "topk skew_forward_kl T=2.0 plain", "sampled T=2.0", "sampled T=1.0 plain"),
    *("full chunks", "full of two ids", "topk of two ids", "full sharp", "full bfloat16", "full weight only", "topk chunks", "topk sharp"),
    *("topk hidden only", "full without tokens", "labels alone, of float32", "all ids"),
)
_WITH_AN_EMPTY_ONE = (
    "full jsd T=2.0 plain",
    "full bfloat16",
    "topk skew_forward_kl T=2.0 plain",
    "sampled T=2.0",
    "labels alone, of float32",
)
for _engine in ENGINES:
    for _question in _OF_ENGINES:
        _case = CASES[_question]
        _dtype = torch.float32 if _case.dtype == torch.float64 else _case.dtype
        CASES[f"{_engine}: {_question}"] = replace(_case, dtype=_dtype, engine=_engine)


def is_asked(part: str, question: str) -> bool:
    """All of two and of four ranks; with an empty one each divergence once. Of another engine two ranks, and a few with an empty one."""
    if ":" in question:
        return part == "two" or (part == "one is empty" and question.split(": ")[1] in _WITH_AN_EMPTY_ONE)
    return part != "one is empty" or ("T=1.0" not in question and "T=0.7" not in question)


def repeats(question: str) -> bool:
    return question.endswith("T=2.0 plain")


def call(case: Case, tensors: dict[str, Any], options: dict[str, Any], group: Any = None, cuda: Any = None) -> dict[str, Any]:
    """The results and gradients of a call; ``cuda`` is the op of that engine."""
    inputs = {name: tensors[name].clone().requires_grad_() for name in case.trained if tensors[name] is not None}
    arguments = tensors | inputs | options
    with warnings.catch_warnings():
        if case.engine == "cuda":
            out = reference.linear_distill_with(cuda, case.chunk_tokens, **arguments, group=group)
        elif not case.chunk_tokens:
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the infinities that Triton's interpreter meets
            out = linear_distill(**arguments, group=group, impl=case.engine)
        elif case.engine == "triton":
            from bbopd.kernels import distill

            out = distill.linear_distill(**arguments, group=group, chunk_tokens=case.chunk_tokens)
        else:
            out = reference.linear_distill(**arguments, group=group, chunk_tokens=case.chunk_tokens)
    return results(out, inputs)


def emulated_cuda(folder: Path) -> Any:
    """The op over the emulation, registered as `bbopd.cuda_engine` does."""
    rows = CudaRows(load_emulation(folder), emulated=True)
    return reference.register(
        "bbopd_tests::linear_distill_ranks", partial(chunked_distill.run, rows), lambda dtype, _: chunked_distill.gradient_dtype(dtype)
    )


def results(out: DistillLoss, inputs: dict[str, Tensor]) -> dict[str, Any]:
    gradients = torch.autograd.grad(out.loss, list(inputs.values()), retain_graph=True)
    again = torch.autograd.grad(2 * out.loss, list(inputs.values()))  # a second backward
    assert all(torch.equal(2 * a, b) for a, b in zip(gradients, again, strict=True))
    found = {"loss": out.loss.detach(), "ce": out.ce, "kd": out.kd, **out.metrics}
    return found | {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}


def own_part(tensors: dict[str, Any], sizes: tuple[int, ...], rank: int) -> dict[str, Any]:
    """The tensors that a rank passes."""
    start = sum(sizes[:rank])
    rows = slice(start, start + sizes[rank])
    part = tensors | {name: None if tensors[name] is None else tensors[name][rows] for name in ("weight", "bias")}
    teacher = tensors["teacher"]
    if isinstance(teacher, FullTeacher):
        cut = {name: None if getattr(teacher, name) is None else getattr(teacher, name)[rows] for name in ("weight", "bias")}
        cut["logits"] = None if teacher.logits is None else teacher.logits[:, rows]
        part["teacher"] = replace(teacher, **cut)
    return part


# ---------------------------------------------------------------- what is wrong on one rank, and raises on all of them

Spoil = Callable[[dict[str, Any]], None]


def _put(name: str, value: Any) -> Spoil:
    return lambda arguments: arguments.update({name: value})


def _change(name: str, change: Callable[[Any], Any]) -> Spoil:
    return lambda arguments: arguments.update({name: change(arguments[name])})


def _poisoned(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[1] = torch.nan
    return tensor


MISTAKES: dict[str, tuple[str, Spoil, str]] = {
    "hidden of three dimensions": ("topk", _change("hidden", lambda h: h[None]), "hidden has shape"),
    "weight of other features": ("topk", _change("weight", lambda w: w[:, :-1]), "hidden has 6 features a token and weight 5"),
    "fewer tokens": ("none", lambda a: a.update(hidden=a["hidden"][:4], labels=a["labels"][:4]), "hidden is | [4, 6] on rank {bad}"),
    "other dtype": ("topk", _change("hidden", Tensor.double), "hidden is | torch.float64 [5, 6] on rank {bad}"),
    "weight of another dtype": ("topk", _change("weight", Tensor.bfloat16), "weight is | torch.bfloat16 on rank {bad}"),
    "a bias": ("topk", lambda a: a.update(bias=torch.zeros(len(a["weight"]))), "bias is | torch.float32 on rank {bad}"),
    "bias of another length": ("topk", _put("bias", torch.zeros(3)), "bias has 3 rows"),
    "another teacher": ("topk", _put("teacher", None), "the kind of teacher is | none on rank {bad}"),
    "no labels": ("topk", _put("labels", None), "labels is | None on rank {bad}"),
    "other labels": ("topk", _change("labels", lambda labels: labels.flip(0)), "labels of rank 1 | differs | pass group=None"),
    "other hidden": ("topk", _change("hidden", lambda h: h.flip(0)), "hidden of rank 1 | differs | pass group=None"),
    "a normalizer": ("topk", _put("normalizer", 7.0), "normalizer is | torch.float64 [2] on rank {bad}"),
    "divergence": ("topk", _put("divergence", "jsd"), "divergence is | jsd on rank {bad}"),
    "unknown divergence": ("topk", _put("divergence", "kl"), "divergence is 'kl'"),
    "temperature": ("none", _put("temperature", 2.0), "temperature is | 2.0 on rank {bad}"),
    "ce_weight": ("topk", _put("ce_weight", 0.51), "(ce_weight, kd_weight) of rank 1 | differs"),
    "vocab_size": ("topk", _put("vocab_size", 18), "vocab_size is | 18 on rank {bad}"),
    "vocab_size 0": ("topk", _put("vocab_size", 0), "vocab_size is 0"),
    "hidden without a gradient": ("topk", _change("hidden", Tensor.detach), "hidden.requires_grad is | False on rank {bad}"),
    "label beyond": ("topk", _put("labels", torch.tensor([0, 1, V, 2, 3])), f"labels[2] is {V}: ids must be from 0 to {V - 1}"),
    "NaN of a teacher": ("full", _change("teacher", lambda t: replace(t, logits=_poisoned(t.logits))), "logits of token 1 hold NaN"),
    "NaN weight": ("topk", _change("weight", _poisoned), "logits of token 0 are not finite"),
    "teacher cut elsewhere": ("full", _change("teacher", lambda t: replace(t, logits=t.logits[:, 1:])), "on rank {bad} | split both at"),
    "engine": ("topk", _put("impl", "cpu"), "impl is 'cpu': a vocabulary that is split over a group has impl='reference'"),
}
"""The teacher's kind, the mistake, and parts of what every rank then says."""
if INTERPRETS:
    MISTAKES["another engine"] = ("topk", _put("impl", "triton"), "the engine is | on rank {bad}")
    MISTAKES["an engine without float64"] = (
        "topk",
        lambda a: a.update(impl="triton", hidden=a["hidden"].double()),
        "impl='triton' computes in float32, hidden is torch.float64",
    )
EVERYWHERE: dict[str, tuple[str, Spoil, str]] = {
    "vocab_size beyond": (
        "topk",
        _put("vocab_size", V + 1),
        f"vocab_size is {V + 1}, but the ranks' weights have {V} rows together, [12, 7]",
    ),
    "no rows at all": ("topk", _change("weight", lambda w: w[:0]), "have 0 rows together"),
    "id beyond": (
        "topk",
        _put("teacher", TopKTeacher(torch.full((N, 1), V), torch.full((N, 1), -0.1), torch.full((N,), -2.3522))),
        f"teacher.ids[0, 0] is {V}",
    ),
}


def mistaken(group: Any, spoil: Spoil | None, kind: str) -> tuple[str, float]:
    """What a call of this rank raises, and after how many seconds."""
    tensors, options = Case(kind, torch.float32).whole()
    arguments = own_part(tensors, PARTS["two"][0], group.rank()) | options
    arguments["hidden"] = arguments["hidden"].requires_grad_()
    if spoil is not None:
        spoil(arguments)
    start = time.monotonic()
    try:
        linear_distill(**arguments, group=group)
    except (TypeError, ValueError) as error:
        return str(error), time.monotonic() - start
    return "nothing", time.monotonic() - start


# ---------------------------------------------------------------- compile, autocast


def compiled(group: Any, sizes: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The same call under torch.compile, and under autocast."""
    case = Case("topk", torch.float32)
    tensors, options = case.whole()
    part = own_part(tensors, sizes, group.rank())
    answers = {"plain": call(case, part, options, group)}

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_distill(hidden, weight, part["teacher"], part["labels"], group=group).loss

    inputs = {name: part[name].clone().requires_grad_() for name in ("hidden", "weight")}
    value = torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs.values())
    gradients = torch.autograd.grad(value, list(inputs.values()))
    answers["compiled"] = {"loss": value.detach()} | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers["autocast"] = call(case, part, options, group)
    return answers


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=240))
    cuda = emulated_cuda(folder)
    groups = {name: torch.distributed.new_group(list(ranks)) for name, (_, ranks) in PARTS.items()}
    answers: dict[Any, Any] = {}
    for name, (sizes, ranks) in PARTS.items():
        if rank not in ranks:
            continue
        group = groups[name]
        for question, case in CASES.items():
            if not is_asked(name, question):
                continue
            tensors, options = case.whole()
            part = own_part(tensors, sizes, group.rank())
            answers[name, question] = [call(case, part, options, group, cuda) for _ in range(2 if repeats(question) else 1)]
        if name == "two":
            for bad in range(2):
                for mistake, (kind, spoil, _) in MISTAKES.items():
                    answers["mistake", bad, mistake] = mistaken(group, spoil if group.rank() == bad else None, kind)
            for mistake, (kind, spoil, _) in EVERYWHERE.items():
                answers["mistake", None, mistake] = mistaken(group, spoil, kind)
            answers["after mistakes"] = mistaken(group, None, "topk")[0]
            answers["compiled"] = compiled(group, sizes)
    torch.save(answers, folder / f"answers-{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
