"""In Triton's interpreter: what inside the two ops would make the host wait for a GPU, or give a tensor a shape that depends on values.

``python -m tests.graph_safety``, with ``TRITON_INTERPRET=1``, runs both ops below their registration, where each operation of PyTorch can
be seen, and prints what it found in every case as JSON. A tensor made without a device lands on "meta" here, and fails where it meets
another.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bbopd.types import DIVERGENCES, OpTeacher
from tests.distill_oracle import draw, make_teacher

N, V, D, USED = 5, 43, 6, 41
KINDS = ("none", "full", "full_hidden", "topk", "candidates", "sampled", "advantages")

WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "lift_fresh", "lift_fresh_copy")
DEPENDS_ON_VALUES = ("nonzero", "masked_select", "bincount", "repeat_interleave", "_unique", "_unique2", "unique_dim", "unique_consecutive")
TAKES_INDICES = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
TO_HOST = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__)
FROM_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy)


def is_interpreting() -> bool:
    """Whether the interpreter itself is at work, which copies a kernel's arguments to and fro."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("triton/runtime/interpreter.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found, self.count = found, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_interpreting():
            self.count += 1
            self.found += [f"{func}: {why}" for why in _objections(func.overloadpacket.__name__, args, kwargs)]
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (*TO_HOST, *FROM_HOST) and not is_interpreting():
            self.found.append(f"{func.__name__}: {'reads' if func in TO_HOST else 'writes'} the host's memory")
        return func(*args, **(kwargs or {}))


def _objections(name: str, args: Any, kwargs: Any) -> Iterator[str]:
    if name in WAITS:
        yield "waits for the device"
    if name in DEPENDS_ON_VALUES:
        yield "has a shape that depends on values"
    if name in TAKES_INDICES and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
        yield "is indexed by a mask, whose count is asked for"
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
    devices = {str(tensor.device) for tensor in tensors} | {str(kwargs[key]) for key in ("device",) if kwargs.get(key) is not None}
    if len(devices) > 1:
        yield f"goes between {' and '.join(sorted(devices))}"


@contextmanager
def watch() -> Iterator[tuple[list[str], _Operations]]:
    """What is objectionable in the operations inside the block."""
    found: list[str] = []
    operations = _Operations(found)
    with torch.device("meta"), _Calls(found), operations:
        yield found, operations


# ---------------------------------------------------------------- cases


def watched(op: Any, check: bool) -> tuple[Callable[..., Any], list[str]]:
    """A registered op's own function, watched, with its argument ``check`` as given here; and where its objections go."""
    found: list[str] = []
    place = [*inspect.signature(op._init_fn).parameters].index("check")

    def run(*arguments: Any) -> Any:
        given = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
        given[place] = check
        with torch.no_grad(), watch() as (objections, operations):
            results = op._init_fn(*given)
        assert operations.count > 10
        found.extend(objections)
        return results

    return run, found


def distill(kind: str, divergence: str = "forward_kl", *, bare: bool = False, check: bool = False) -> list[str]:
    from bbopd.kernels import distill as engine
    from bbopd.reference import linear_distill_with

    run, found = watched(engine._linear_distill, check)
    hidden, weight, generator = draw(N, V, D, torch.float32)
    temperature = 1.0 if bare else 2.0
    valid = None if bare else torch.tensor([True, False, True, True, True])
    teacher: OpTeacher | None = None
    if kind != "none":
        teacher = make_teacher(kind, N, USED, temperature, generator, torch.float32, valid=valid)
    labels = None if bare and kind != "none" else torch.tensor([3, -100, 0, 40, 7])
    options: dict[str, Any] = {"vocab_size": USED, "temperature": temperature, "divergence": divergence}
    if not bare:
        options |= {"bias": torch.randn(V, generator=generator).requires_grad_(), "logit_softcap": 9.0, "logit_scale": 0.7}
        options |= {"token_weight": torch.rand(N, generator=generator), "normalizer": (torch.tensor(4.0), 5.0)}
    linear_distill_with(run, 2, hidden, weight, teacher, labels, **options)
    return found


def logprobs(*, check: bool = False, **options: Any) -> list[str]:
    from bbopd.kernels import logprobs as engine
    from bbopd.reference_logprobs import linear_logprobs_with

    run, found = watched(engine._linear_logprobs, check)
    hidden, weight, _ = draw(N, V, D, torch.float32)
    linear_logprobs_with(run, hidden, weight, chunk_tokens=2, vocab_size=USED, **options)
    return found


def cases() -> dict[str, Callable[[], list[str]]]:
    ids = torch.tensor([1, 0, 40, 3, 2])
    found: dict[str, Callable[[], list[str]]] = {}
    for kind in KINDS:
        found[f"{kind} bare"] = lambda kind=kind: distill(kind, bare=True)  # type: ignore[misc]
        for divergence in DIVERGENCES if kind not in ("none", "sampled", "advantages") else ("forward_kl",):
            found[f"{kind} {divergence}"] = lambda kind=kind, divergence=divergence: distill(kind, divergence)  # type: ignore[misc]
    scored = {"logsumexp": {}, "sampled": {"token_ids": ids}, "top-k": {"token_ids": ids, "top_k": 3, "temperature": 2.0}}
    scored["candidates"] = {"candidate_ids": torch.tensor([[1, 4], [-1, 3], [-1, -1], [0, 40], [7, 8]])}
    scored["all of it"] = {**scored["top-k"], **scored["candidates"], "bias": torch.ones(V), "logit_softcap": 9.0, "logit_scale": 0.5}
    return found | {f"logprobs {name}": lambda options=options: logprobs(**options) for name, options in scored.items()}  # type: ignore[misc]


def known_offences() -> dict[str, Callable[[], list[str]]]:
    """What must be found, or else finding nothing would prove nothing; the checks of values among them."""
    x = torch.arange(4.0)
    offences: dict[str, Callable[[], Any]] = {
        "item": x[0].item,
        "if": lambda: bool(x[0]),
        "mask": lambda: x[x > 1],
        "write through a mask": lambda: x.clone().__setitem__(x > 1, 0.0),
        "nonzero": x.nonzero,
        "tolist": x.tolist,
        "numpy": x.numpy,
        "tensor": lambda: torch.tensor([1.0, 2.0]),
        "equal": lambda: torch.equal(x, x),
        "unique": x.unique,
        "repeat_interleave": lambda: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device="cpu")),
        "to another device": lambda: x.to("meta"),
    }

    def found_in(offence: Callable[[], Any]) -> list[str]:
        with watch() as (found, _):
            offence()
        return found

    checks = {"values checked in distill": lambda: distill("topk", check=True), "values checked in logprobs": lambda: logprobs(check=True)}
    return {name: lambda offence=offence: found_in(offence) for name, offence in offences.items()} | checks  # type: ignore[misc]


def main() -> None:
    print(json.dumps([{name: case() for name, case in table.items()} for table in (cases(), known_offences())]))


if __name__ == "__main__":
    main()
