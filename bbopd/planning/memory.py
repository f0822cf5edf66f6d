"""Memory of one GPU by part, from shapes: what a run holds while it trains, and while its student writes.

It is that of the fullest one, rank 0's, where there are several. Only what the library itself allocates is counted part by part;
`LIBRARIES` stands for the rest.
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

__all__ = ["LIBRARIES", "Memory", "Part", "Shapes", "engine_is_on_cpu", "host_bytes", "memory_of"]

LIBRARIES = 1.5 * GIB
"""The context of CUDA, its libraries' workspaces, and NCCL: about as much."""

_ENGINE_BESIDE = 1.5 * GIB  # vLLM's own context, graphs and workspaces
_FLOAT32, _BFLOAT16 = 4, 2
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
    """Of one GPU; ``host`` of a node's own memory. ``absent`` is what one float32 tensor of tokens x vocabulary would take, which there
    never is."""

    parts: tuple[Part, ...]
    absent: float
    engine_tokens: float
    """Tokens whose keys and values the engine has room for; negative where not even its weights fit."""
    host: float = 0.0

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
        *_head(student, tokens, item, ranks if ranks > 1 and config.train.parallel.head == "split" else 1),
        *_signal(config, student.vocabulary, tokens),
        *_beside(config, student, ranks),
        *engine,
        *_teacher(config, shapes, machine),
        Part("libraries", LIBRARIES, "always", "context of CUDA, workspaces, NCCL (assumed)"),
    ]
    return Memory(
        tuple(part for part in parts if part.size),
        _FLOAT32 * tokens * student.vocabulary,
        engine_tokens,
        host_bytes(config, shapes, machine),
    )


def _weights(config: RunConfig, shapes: Shapes, ranks: int) -> Iterable[Part]:
    if ranks > 1:
        yield from _split_weights(config, shapes, ranks)
        return
    student, kept = shapes.student, shapes.activations
    yield Part("weights", student.trained_bytes, "always", f"{student.trained:,} float32 masters")
    held = config.student.quantize or "float32"
    yield Part("frozen weights", student.frozen_bytes, "always", f"{student.parameters:,} in {held}")
    if kept is not None and config.student.quantize is None:
        yield Part("cast weights", kept.cast_weights, "training", "copies in the compute dtype, kept until the backward pass")
    yield Part("gradients", student.trained_bytes, "training", "float32")
    yield Part("optimizer", MOMENT_BYTES[config.train.optimizer] * student.trained, "always", f"two moments of {config.train.optimizer}")


def _split_weights(config: RunConfig, shapes: Shapes, ranks: int) -> Iterable[Part]:
    """Of a rank: a slice of everything, and for the time of its use a layer as it is gathered; of rank 0 the whole student too."""
    student, parallel, kept = shapes.student, config.train.parallel, shapes.activations
    item = _FLOAT32 if parallel.gather == "float32" else _BFLOAT16
    slices = max(1, ranks // parallel.replicas)
    where = f"over {slices} GPUs"
    if not parallel.cpu_offload:
        yield Part("weights", student.trained_bytes / slices, "always", f"{student.trained:,} float32 masters {where}")
        yield Part("optimizer", MOMENT_BYTES[config.train.optimizer] * student.trained / slices, "always", f"two moments {where}")
        if frozen := student.parameters - student.trained:
            yield Part("frozen weights", _FLOAT32 * frozen / slices, "always", f"{frozen:,} in float32 {where}")
    outside = student.outside_layers - (student.vocabulary * student.hidden if parallel.head == "split" else 0)
    gathered = item * (2 * student.largest_layer + outside)
    yield Part("gathered weights", gathered, "training", f"two layers, and what is of no layer, in {parallel.gather}")
    if kept is not None and parallel.gather == "float32":
        yield Part("cast weights", kept.cast_weights, "training", "copies in the compute dtype, kept until the backward pass")
    gradients: float = _FLOAT32 * (student.largest_layer + outside)
    gradients += 0 if parallel.cpu_offload else student.trained_bytes / slices
    yield Part("gradients", gradients, "training", f"float32 {where}, and of what was gathered before it is shared out")
    if parallel.whole_on == "device":
        yield Part("whole student", _FLOAT32 * student.parameters, "always", "rank 0's copy, in float32 (train.parallel.whole_on)")


def host_bytes(config: RunConfig, shapes: Shapes, machine: Machine) -> float:
    """Of the first node's own memory: rank 0 reads the whole student, and each rank is given a group of its weights after the other."""
    if machine.gpus == 1:
        return 0.0
    student, ranks = shapes.student, min(machine.gpus, machine.gpus_of_node)
    held = _FLOAT32 * (student.parameters + ranks * max(student.largest_layer, student.outside_layers))
    if not config.train.parallel.cpu_offload:
        return held
    slices = max(1, machine.gpus // config.train.parallel.replicas)
    return held + ranks * (2 * _FLOAT32 + MOMENT_BYTES[config.train.optimizer]) * student.trained / slices


def _activations(config: RunConfig, shapes: Shapes, tokens: int) -> Iterable[Part]:
    kept = shapes.activations
    if kept is None:
        return
    how = "layer inputs, checkpointed" if config.student.activation_checkpointing else "all layers"
    yield Part("activations", kept.of_token * tokens, "training", f"{how}, of {tokens:,} packed tokens")
    yield Part("backward pass", kept.of_layer * tokens, "training", "one layer at a time")


def _head(student: ModelShape, tokens: int, item: int, shards: int) -> Iterable[Part]:
    """Of a head whose rows lie on so many ``shards``, each of which then meets the tokens of all."""
    rows, tokens = student.vocabulary // shards, tokens * shards
    chunk = min(tokens, tokens_of_chunk(rows))
    buffers = _FLOAT32 * chunk * rows + item * rows * student.hidden + 2 * item * tokens * student.hidden
    if student.head_is_trained:
        buffers += (_FLOAT32 + item) * rows * student.hidden
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


def engine_is_on_cpu(config: RunConfig, machine: Machine) -> bool:
    """Whether an engine beside the run goes where rank 0's whole student is, and that is in the host's memory."""
    return machine.gpus > 1 and config.train.parallel.whole_on == "cpu" and not config.rollouts.is_elsewhere


def _engine(config: RunConfig, shapes: Shapes, machine: Machine, phase: Phase) -> tuple[list[Part], float]:
    """What the student's engine takes of each GPU, and the tokens that it has room for."""
    student, rollouts = shapes.student, config.rollouts
    of_token = student.kv_entries * shapes.compute_bytes
    rows = min(_ROWS, config.rollouts_per_cycle)
    is_elsewhere = rollouts.is_elsewhere or engine_is_on_cpu(config, machine)
    if not config.writes_rollouts or is_elsewhere:
        return [], 0.0
    if rollouts.engine == "hf":
        cached = min(_CACHED_TOKENS, rows * config.train.max_seq_len)
        return [Part("KV cache", of_token * cached, phase, f"{cached:,} tokens of the hf engine")], float(cached)
    weights = shapes.compute_bytes * student.parameters
    if rollouts.plugin_use is not None:
        return [Part("engine's weights", weights, phase, f"of {rollouts.engine}, in the compute dtype (its cache: not known)")], 0.0
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
