"""What is measured: the sizes of real heads, the objectives, and two sweeps.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

TeacherKind = Literal["topk", "full", "full_hidden", "sampled", "none"]


@dataclass(frozen=True, slots=True)
class Case:
    """One set of contestants' common task; plain values, so that it travels to a fresh process as JSON."""

    model: str
    N: int
    D: int
    V: int
    objective: str = "topk"
    dtype: str = "bfloat16"
    teacher: TeacherKind = "topk"
    temperature: float = 2.0
    divergence: str = "forward_kl"
    ce_weight: float = 0.5
    kd_weight: float = 0.5
    K: int = 64
    teacher_noise: float = 1.0  # standard deviation of teacher logits minus student logits, in nats
    is_sweep: bool = False  # a point of a plot: no peer beyond PyTorch, no errors
    is_head_frozen: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.dtype}-{self.N}x{self.D}x{self.V}"

    def resized(self, N: int, V: int) -> Case:
        """The same task, smaller."""
        return replace(self, N=min(N, self.N), V=min(V, self.V), K=min(self.K, V // 2))


SMOLLM2 = Case("SmolLM2-135M", 2048, 576, 49152)
LLAMA3 = Case("Llama-3-1B", 1024, 2048, 128256)
QWEN3 = Case("Qwen3-0.6B", 1024, 1024, 151936)
GEMMA3 = Case("Gemma-3-270m", 1024, 640, 262144)
LLAMA2 = Case("32k vocabulary", 2048, 1024, 32000)

MODELS = (SMOLLM2, LLAMA2, LLAMA3, QWEN3, GEMMA3)
QUICK_MODELS = (SMOLLM2, LLAMA2)
SWEEP_V = (8192, 16384, 32768, 65536, 131072, 262144)
SWEEP_N = (256, 512, 1024, 2048, 4096)
QUICK_SWEEP_V, QUICK_SWEEP_N = SWEEP_V[:3], SWEEP_N[:3]


def _further(model: Case) -> list[Case]:
    return [
        replace(model, objective="ce", teacher="none", ce_weight=1.0, kd_weight=0.0, temperature=1.0),
        replace(model, objective="full_forward", teacher="full"),
        replace(model, objective="full_reverse", teacher="full", divergence="reverse_kl", temperature=1.0),
        replace(model, objective="topk_float32", dtype="float32"),
    ]


def distill_cases(is_quick: bool) -> list[Case]:
    """Top-64 + tail + CE on every model, the other objectives on some."""
    models, further = (QUICK_MODELS, (SMOLLM2,)) if is_quick else (MODELS, (SMOLLM2, LLAMA2, LLAMA3))
    return [*models, *(case for model in further for case in _further(model))]


def sweep_cases(is_quick: bool) -> list[Case]:
    """Points of the plots against V (1,024 tokens, SmolLM2's width) and against N (SmolLM2's head)."""
    sizes_V, sizes_N = (QUICK_SWEEP_V, QUICK_SWEEP_N) if is_quick else (SWEEP_V, SWEEP_N)
    against_V = [replace(SMOLLM2, model="sweep V", objective="sweep_V", N=1024, V=V, is_sweep=True) for V in sizes_V]
    return against_V + [replace(SMOLLM2, model="sweep N", objective="sweep_N", N=N, is_sweep=True) for N in sizes_N]


def logprobs_cases(is_quick: bool) -> list[Case]:
    """Scoring: the top 64, the tail and the sampled token at T = 1."""
    return [replace(model, objective="logprobs", teacher="none", temperature=1.0) for model in (QUICK_MODELS if is_quick else MODELS)]


def training_cases() -> list[Case]:
    """One step of a whole model, 2 sequences of 1,024 tokens."""
    return [replace(SMOLLM2, objective="training_step")]


# ---------------------------------------------------------------- on a GPU

ANCHOR = (8192, 128256, 4096)  # N, V, D
SIX_SHAPES = (ANCHOR, (1024, 128256, 4096), (8192, 151936, 2048), (8192, 262144, 2048), (32768, 32768, 2048), (1024, 32768, 4096))
ALL_SHAPES = tuple(product((1024, 8192, 32768), (32768, 128256, 151936, 262144), (2048, 4096)))

GPU_OBJECTIVES: dict[str, dict[str, Any]] = {
    "topk": {},
    "full_forward": {"teacher": "full"},
    "hidden_forward": {"teacher": "full_hidden"},
    "sampled": {"teacher": "sampled", "ce_weight": 0.0, "kd_weight": 1.0, "temperature": 1.0},
    "ce": {"teacher": "none", "ce_weight": 1.0, "kd_weight": 0.0, "temperature": 1.0},
    "topk_frozen": {"is_head_frozen": True},
    "full_reverse": {"teacher": "full", "divergence": "reverse_kl", "temperature": 1.0},
    "full_jsd": {"teacher": "full", "divergence": "jsd", "temperature": 1.0},
}


Shape = tuple[int, int, int]


def gpu_distill_cases(shape: Shape, device: str, dtype: str, *, every_divergence: bool) -> list[Case]:
    """Every kind of teacher on one shape (N, V, D)."""
    N, V, D = shape
    return [
        Case("head", N, D, V, objective, dtype=dtype, device=device, K=min(64, V // 2), **options)
        for objective, options in GPU_OBJECTIVES.items()
        if every_divergence or options.get("divergence") is None
    ]


def gpu_logprobs_case(shape: Shape, device: str, dtype: str) -> Case:
    N, V, D = shape
    return Case("head", N, D, V, "logprobs", dtype, "none", 1.0, K=min(64, V // 2), is_head_frozen=True, device=device)
