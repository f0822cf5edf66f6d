"""Registers and shared memory of every Triton kernel, compiled for three GPUs.

``python -m tests.kernel_resources`` writes the table, and those of the CUDA kernels; it needs nvcc.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bbopd.kernels import logits
from bbopd.types import DIVERGENCES
from tests import resource_table
from tests.cuda_build import ARCHITECTURES, KERNELS, compile_kernels
from tests.resource_table import Usage

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = (80, 90, 100)  # A100, H100, B200

TYPES = {"gradient": "*bf16", "teacher": "*bf16", "signal": "*i1", "labels": "*i64", "ids": "*i64", "token_ids": "*i64", "keys": "*i64"}
TYPES |= dict.fromkeys(("V", "stride", "gradient_stride", "width", "teacher_stride", "teacher_width", "kept"), "i32")
TYPES |= dict.fromkeys(("inner", "outer", "inverse_temperature", "inverse_cap", "mix"), "fp32")
ALIGNED = ("logits", "bias", "teacher", "gradient", "stride", "gradient_stride", "width", "teacher_stride", "teacher_width")


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel as some call of the ops launches it: which arguments are constants (None: not given), and what the others point to."""

    kernel: str
    constants: dict[str, Any] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    fuses: bool = False  # multiplies and adds at once


_NO_TEACHER: dict[str, Any] = dict.fromkeys(("teacher", "signal", "teacher_statistics", "mean"))
_AT_ONE: dict[str, Any] = {"inverse_temperature": None, "inverse_cap": None}
_FLOAT_TEACHER, _HALF_TEACHER, _FLOAT_GRADIENT = {"teacher": "*fp32"}, {"teacher": "*fp16"}, {"gradient": "*fp32"}

VARIANTS: dict[str, Variant] = {
    "finish, bias and cap": Variant("finish_logits"),
    "finish, scale": Variant("finish_logits", {"bias": None, "inner": None}),
    "statistics at T and 1": Variant("row_statistics", {"AT_ONE": True, "IS_TEACHER": False, "signal": None}),
    "statistics at 1": Variant("row_statistics", {"AT_ONE": False, "IS_TEACHER": False, "signal": None, "inverse_temperature": None}),
    **{
        f"statistics of a teacher in {name}": Variant("row_statistics", {"AT_ONE": False, "IS_TEACHER": True}, {"logits": f"*{name}"})
        for name in ("bf16", "fp16", "fp32")
    },
    **{f"divergence {name}": Variant("row_divergence", {"DIVERGENCE": name}) for name in DIVERGENCES},
    "divergence jsd, teacher in fp32": Variant("row_divergence", {"DIVERGENCE": "jsd"}, _FLOAT_TEACHER),
    "divergence forward_kl at T = 1, every row": Variant(
        "row_divergence", {"DIVERGENCE": "forward_kl", "inverse_temperature": None, "signal": None}, _HALF_TEACHER
    ),
    **{f"gradient {name}": Variant("row_gradient", {"DIVERGENCE": name, "ids": None}) for name in DIVERGENCES},
    "gradient jsd in fp32, teacher in fp32": Variant("row_gradient", {"DIVERGENCE": "jsd", "ids": None}, _FLOAT_GRADIENT | _FLOAT_TEACHER),
    "gradient forward_kl without labels": Variant(
        "row_gradient",
        {"DIVERGENCE": "forward_kl", "ids": None, "ce_grad": None, "labels": None, "mean": None, "signal": None} | _AT_ONE,
        _HALF_TEACHER,
    ),
    "gradient of a sampled token": Variant("row_gradient", {"DIVERGENCE": "forward_kl"} | _NO_TEACHER),
    "gradient of a sampled token, without labels": Variant(
        "row_gradient", {"DIVERGENCE": "forward_kl", "ce_grad": None, "labels": None} | _NO_TEACHER | _AT_ONE
    ),
    "gradient outside a support": Variant("row_gradient", {"DIVERGENCE": "forward_kl", "ids": None} | _NO_TEACHER),
    "gradient of cross-entropy": Variant(
        "row_gradient", {"DIVERGENCE": "forward_kl", "kd_grad": None, "ids": None} | _NO_TEACHER | _AT_ONE
    ),
    "log-probabilities, bias and cap": Variant("row_logprobs", fuses=True),
    "log-probabilities, bare": Variant("row_logprobs", dict.fromkeys(("bias", "token_ids", "inner")), fuses=True),
    "top-k": Variant("tile_top_k", fuses=True),
}


def kernels() -> dict[str, Any]:
    """Every Triton kernel of ``bbopd.kernels``, by name: the functions that ask which program they are."""
    found = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for name, value in vars(importlib.import_module(f"bbopd.kernels.{path.stem}")).items():
            if isinstance(value, triton.JITFunction) and "program_id(" in value.src:
                found[name] = value
    return found


def compile_variant(name: str, capability: int) -> tuple[Usage, str]:
    """What ``ptxas`` says of one variant on one GPU, and its PTX."""
    variant = VARIANTS[name]
    kernel = kernels()[variant.kernel]
    home = sys.modules[kernel.__module__]
    warps = getattr(home, "WARPS", logits.WARPS)
    constants = variant.constants | {"BLOCK": getattr(home, "BLOCK", logits.BLOCK)}
    types = TYPES | variant.types
    signature = {argument: "constexpr" if argument in constants else types.get(argument, "*fp32") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in ALIGNED and a not in constants}
    options = {"num_warps": warps, "enable_fp_fusion": variant.fuses}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    told = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", report.split(f"Function {kernel.__name__}", 1)[1])}
    usage = Usage(
        variant.kernel,
        name,
        capability,
        told["REG"],
        compiled.metadata.shared,
        told["STACK"],
        told["LOCAL"],
        32 * warps,
        f"triton {triton.__version__}",
    )
    return usage, compiled.asm["ptx"]


def compile_all() -> list[tuple[Usage, str]]:
    """Every variant on every GPU, in the table's order."""
    # one after another: Triton parses source, which Python 3.11 cannot do in two threads at once
    return [compile_variant(name, capability) for name, capability in product(VARIANTS, CAPABILITIES)]


def main() -> None:
    cuda = [compile_kernels(architecture) for architecture in ARCHITECTURES]
    resource_table.write([*(usage for usage, _ in compile_all()), *(lines[name] for name in KERNELS for lines in cuda)])
    print(resource_table.TABLE)


if __name__ == "__main__":
    main()
