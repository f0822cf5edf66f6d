"""Memory of one GPU by part, from shapes: what a run holds while it trains, and while its student writes.

What is sharded is cut evenly over all GPUs, as FSDP does. Only what the library itself allocates is counted part by part; `LIBRARIES`
stands for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bbopd.chunked_distill import tokens_of_chunk
from bbopd.config import RunConfig
from bbopd.modeling.shapes import Activations, ModelShape
from bbopd.planning.machine import GIB, Machine
from bbopd.trainer.optimizer import MOMENT_BYTES

__all__ = ["LIBRARIES", "Memory", "Part", "Shapes", "memory_of"]

LIBRARIES = 1.5 * GIB
"""The context of CUDA, its libraries' workspaces, and NCCL: about as much."""

_ENGINE_BESIDE = 1.5 * GIB  # vLLM's own context, graphs and workspaces
_FLOAT32 = 4
_ROWS = 64  # answers that an engine writes side by side on one GPU, where nothing else says how many
_CACHED_TOKENS = 65_536  # rows times columns of its cache, at most
_ID_BYTES = 12  # of one id of a signal: int64 and float32

Phase = Literal["always", "training", "sampling"]


@dataclass(frozen=True, slots=True)
class Shapes:
    """``activations`` None: they could not be followed. ``teacher``: one that is started beside the run, where its shape is known."""

    student: ModelShape
    activations: Activations | None
    compute_bytes: int
    """Of one number in the compute dtype."""
    teacher: ModelShape | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """``size`` in bytes, held in that ``phase`` of a cycle; ``why`` says what it is made of."""

    name: str
    size: float
    phase: Phase
    why: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one GPU. ``absent`` is what one float32 tensor of tokens x vocabulary would take, which there never is."""

    parts: tuple[Part, ...]
    absent: float
    engine_tokens: float
    """Tokens whose keys and values the engine has room for; negative where not even its weights fit."""

    def of(self, phase: Phase) -> float:
        return sum(part.size for part in self.parts if part.phase in ("always", phase))

    @property
    def peak(self) -> float:
        return max(self.of("training"), self.of("sampling"))


def memory_of(config: RunConfig, shapes: Shapes, machine: Machine) -> Memory:
    """Bytes on each of ``machine``'s GPUs for ``config``."""
    student, ranks, item = shapes.student, machine.gpus, shapes.compute_bytes
    tokens = max(config.train.micro_batch_tokens, config.train.max_seq_len)
    sampling: Phase = "sampling" if config.rollouts.sleep or config.rollouts.engine == "hf" else "always"
    engine, engine_tokens = _engine(config, shapes, machine, sampling)
    parts = [
        *_weights(config, shapes, ranks),
        *_activations(config, shapes, tokens),
        *_head(student, tokens, item),
        *_signal(config, student.vocabulary, tokens),
        *_beside(config, student, ranks),
        *engine,
        *_teacher(config, shapes, machine),
        Part("libraries", LIBRARIES, "always", "context of CUDA, workspaces, NCCL (assumed)"),
    ]
    return Memory(tuple(part for part in parts if part.size), _FLOAT32 * tokens * student.vocabulary, engine_tokens)


def _weights(config: RunConfig, shapes: Shapes, ranks: int) -> Iterable[Part]:
    student, item, shared = shapes.student, shapes.compute_bytes, "" if ranks == 1 else f" over {ranks} GPUs"
    yield Part("weights", student.trained_bytes / ranks, "always", f"{student.trained:,} float32 masters{shared}")
    held = config.student.quantize or "float32"
    yield Part("frozen weights", student.frozen_bytes / ranks, "always", f"{student.parameters:,} in {held}{shared}")
    gathered = item * (2 * student.largest_layer + student.outside_layers)
    if ranks > 1:
        yield Part("gathered weights", gathered, "training", "two layers, embeddings and head in the compute dtype")
    elif shapes.activations is not None and config.student.quantize is None:
        yield Part("cast weights", shapes.activations.cast_weights, "training", "copies in the compute dtype, kept until the backward pass")
    gradients = student.trained_bytes / ranks + (0 if ranks == 1 else (_FLOAT32 + item) * student.largest_layer)
    yield Part("gradients", gradients, "training", f"float32{shared}" + ("" if ranks == 1 else ", and one layer's before it is shared out"))
    moments = MOMENT_BYTES[config.train.optimizer] * student.trained / ranks
    yield Part("optimizer", moments, "always", f"two moments of {config.train.optimizer}{shared}")


def _activations(config: RunConfig, shapes: Shapes, tokens: int) -> Iterable[Part]:
    kept = shapes.activations
    if kept is None:
        return
    how = "layer inputs, checkpointed" if config.student.activation_checkpointing else "all layers"
    yield Part("activations", kept.of_token * tokens, "training", f"{how}, of {tokens:,} packed tokens")
    yield Part("backward pass", kept.of_layer * tokens, "training", "one layer at a time")


def _head(student: ModelShape, tokens: int, item: int) -> Iterable[Part]:
    chunk = min(tokens, tokens_of_chunk(student.vocabulary))
    entries = student.vocabulary * student.hidden
    buffers = _FLOAT32 * chunk * student.vocabulary + item * entries + 2 * item * tokens * student.hidden
    if student.head_is_trained:
        buffers += (_FLOAT32 + item) * entries
    yield Part("loss head", buffers, "training", f"logits of {chunk:,} tokens at a time, the head and its gradient")


def _signal(config: RunConfig, vocabulary: int, tokens: int) -> Iterable[Part]:
    signal = config.teacher.signal
    if signal == "full":
        yield Part("teacher's logits", 2 * vocabulary * tokens, "training", f"float16, of up to {tokens:,} response tokens")
    elif signal in ("topk", "candidates"):
        yield Part("teacher's ids", _ID_BYTES * config.teacher.topk * tokens, "training", f"{config.teacher.topk} a token")


def _beside(config: RunConfig, student: ModelShape, ranks: int) -> Iterable[Part]:
    one, own = student.trained_bytes / ranks, config.teacher.self
    if config.objective.name == "gad":
        yield Part("discriminator", 4 * one, "always", "weights, gradients and two moments")
        yield Part("reference policy", one, "always", "the student at the end of the warm-up")
    elif config.objective.kl_weight:
        yield Part("reference policy", one, "always", "the student that the run began with")
    if own is not None and own.weights == "ema":
        yield Part("average", one, "always", "of the weights, in float32")


def _engine(config: RunConfig, shapes: Shapes, machine: Machine, phase: Phase) -> tuple[list[Part], float]:
    """What the student's engine takes of each GPU, and the tokens that it has room for."""
    student, rollouts = shapes.student, config.rollouts
    of_token = student.kv_entries * shapes.compute_bytes
    rows = min(_ROWS, config.rollouts_per_cycle)
    if not config.writes_rollouts or rollouts.target is not None:
        return [], 0.0
    if rollouts.engine == "hf":
        cached = min(_CACHED_TOKENS, rows * config.train.max_seq_len)
        return [Part("KV cache", of_token * cached, phase, f"{cached:,} tokens of the hf engine")], float(cached)
    weights = shapes.compute_bytes * student.parameters
    share = None if machine.gpu_bytes is None else rollouts.gpu_memory * machine.gpu_bytes
    if share is None:
        share = weights + _ENGINE_BESIDE + of_token * config.train.max_seq_len * rows
    room = share - weights - _ENGINE_BESIDE
    tokens = room / of_token
    why = f"rollouts.gpu_memory {rollouts.gpu_memory:g}" if machine.gpu_bytes is not None else "as many as write at a time"
    parts = [
        Part("engine's weights", weights, phase, "of vLLM, in the compute dtype"),
        Part("KV cache", max(0.0, room), phase, f"{max(0.0, tokens):,.0f} tokens; {why}"),
        Part("engine", _ENGINE_BESIDE, phase, "context and graphs of vLLM (assumed)"),
    ]
    return parts, tokens


def _teacher(config: RunConfig, shapes: Shapes, machine: Machine) -> Iterable[Part]:
    serve, teacher = config.teacher.serve, shapes.teacher
    if serve is None:
        return
    if serve.engine == "vllm" and machine.gpu_bytes is not None:
        yield Part("teacher", serve.gpu_memory * machine.gpu_bytes, "always", f"teacher.serve.gpu_memory {serve.gpu_memory:g}")
    elif teacher is not None:
        item = _FLOAT32 if serve.dtype == "float32" else shapes.compute_bytes
        held = item * teacher.parameters + _FLOAT32 * serve.batch_tokens * teacher.vocabulary
        yield Part("teacher", held, "always", f"{teacher.parameters:,} weights beside the run, logits of {serve.batch_tokens:,} tokens")
