"""Rates from a GPU's data sheet, for a plan before anything has run: a guess, and called one. A run's own rates are worth more."""

from __future__ import annotations

from collections.abc import Mapping

from bbopd.config import RunConfig
from bbopd.modeling.shapes import ModelShape
from bbopd.planning.machine import GIB, Gpu, Machine
from bbopd.planning.memory import Shapes
from bbopd.planning.rates import Rates
from bbopd.planning.tokens import Cycle

__all__ = ["ASSUMPTIONS", "assumed_rates", "push_seconds", "training_flops"]

ASSUMPTIONS: Mapping[str, float] = {
    "share of the peak in training": 0.4,
    "share of the peak in scoring": 0.5,
    "share of the memory's bandwidth in sampling": 0.6,
    "sequences written side by side on a GPU, at most": 256.0,
}


def assumed_rates(
    config: RunConfig, shapes: Shapes, cycle: Cycle, machine: Machine, *, engine_tokens: float, teacher_gpus: int = 0
) -> Rates:
    """What ``machine``'s GPU lets be, of all of them together.

    Parameters
    ----------
    engine_tokens
        Tokens that one GPU's engine has room for.
    teacher_gpus
        How many GPUs of the same kind a teacher of known shape has; of one behind an API its limit of tokens a minute is taken.
    """
    gpu = machine.gpu
    assert gpu is not None, "rates are assumed of a GPU that is known"
    if engine_tokens <= 0:  # an engine elsewhere, on a GPU of the same kind: what its weights leave of nine tenths
        engine_tokens = (0.9 * gpu.memory * GIB - shapes.compute_bytes * shapes.student.parameters) / _cached_bytes(shapes)
    training = ASSUMPTIONS["share of the peak in training"] * gpu.peak * 1e12 / training_flops(config, shapes.student)
    return Rates(
        sampling=machine.engines * _sampling(config, shapes, cycle, gpu, max(1.0, engine_tokens), machine.engines),
        scoring=_scoring(config, shapes.teacher, gpu, teacher_gpus, cycle),
        training=machine.gpus * training * cycle.trained / max(1.0, cycle.packed),
        push=push_seconds(shapes, machine) if config.rollouts.engine == "vllm" else 0.0,
        gpus=machine.gpus,
        engines=machine.engines,
        source=f"assumed of {gpu.name}",
    )


def training_flops(config: RunConfig, student: ModelShape) -> float:
    """Of one packed token: 2 a weight forward and 4 backward, of which a frozen weight has 2; 2 more where layers run twice."""
    of_weight = 6.0 if student.trained >= student.parameters else 4.0
    return (of_weight + 2.0 * config.student.activation_checkpointing) * student.parameters


def push_seconds(shapes: Shapes, machine: Machine) -> float:
    """New weights to every GPU's engine: within a node over its links, between nodes each one once, all its adapters at work."""
    gpu = machine.gpu
    assert gpu is not None, "links are those of a GPU that is known"
    whole = shapes.compute_bytes * shapes.student.parameters
    nodes = -(-(machine.gpus + machine.engines) // machine.gpus_of_node)
    between = whole / (gpu.network * 1e9 * machine.gpus_of_node) if nodes > 1 else 0.0
    return whole / (gpu.link * 1e9) + between


def _cached_bytes(shapes: Shapes) -> int:
    return shapes.student.kv_entries * shapes.compute_bytes


def _sampling(config: RunConfig, shapes: Shapes, cycle: Cycle, gpu: Gpu, engine_tokens: float, engines: int) -> float:
    """Tokens a second of one GPU: a step reads all weights and the keys and values of every sequence under way."""
    length = max(1.0, cycle.written / max(1, cycle.rollouts)) + config.data.prompt_tokens
    most = ASSUMPTIONS["sequences written side by side on a GPU, at most"]
    rows = max(1.0, min(most, engine_tokens / length, cycle.rollouts / engines))
    read = shapes.compute_bytes * shapes.student.parameters + rows * _cached_bytes(shapes) * length / 2
    bandwidth = ASSUMPTIONS["share of the memory's bandwidth in sampling"] * gpu.bandwidth * 1e9
    peak = ASSUMPTIONS["share of the peak in scoring"] * gpu.peak * 1e12
    return rows / max(read / bandwidth, 2.0 * shapes.student.parameters * rows / peak)


def _scoring(config: RunConfig, teacher: ModelShape | None, gpu: Gpu, gpus: int, cycle: Cycle) -> float | None:
    """Response tokens a second; prompts are read along, and what a teacher writes is limited by its own reading of weights."""
    if config.teacher.api is not None and config.teacher.api.tokens_per_minute is not None:
        return config.teacher.api.tokens_per_minute / 60
    if teacher is None or not gpus or config.teacher.signal == "text":
        return None
    products = ASSUMPTIONS["share of the peak in scoring"] * gpu.peak * 1e12 / (2.0 * teacher.parameters)
    return gpus * products * cycle.trained / max(1.0, cycle.packed)
