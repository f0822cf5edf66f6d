"""What to change in a run that does not fit: the smallest change first, each one tried by planning the run with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bbopd.planning.plan import Plan, Planner

__all__ = ["Remedy", "find_remedies"]

_MOST_GPUS = 4096
_BESIDE_THE_TRAINER = {"rollouts.gpu_memory", "rollouts.sleep"}  # no use where the engine is elsewhere
_SERVER = "grpc://localhost:7071"  # as `bbopd sample-server` has it, where nothing else is said
_SHARES = tuple(round(0.05 * step, 2) for step in range(2, 19))  # of a GPU, for vLLM


@dataclass(frozen=True, slots=True)
class Remedy:
    """Keys to set, or a number of GPUs, with the plan that comes of it."""

    sets: Mapping[str, Any]
    costs: str
    plan: Plan
    gpus: int | None = None

    @property
    def words(self) -> str:
        """As they are typed."""
        typed = [f"--set {key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in self.sets.items()]
        return " ".join([*typed, *([] if self.gpus is None else [f"--gpus {self.gpus}"])])


@dataclass(frozen=True, slots=True)
class _Option:
    """The same change in several sizes, the smallest first."""

    costs: str
    choices: tuple[Mapping[str, Any], ...] = ()
    gpus: tuple[int, ...] = field(default=())


def find_remedies(planner: Planner, plan: Plan, limit: int = 4) -> list[Remedy]:
    """Up to ``limit`` single changes that make ``plan`` fit, the smallest first; where none does alone, several together."""
    found = [remedy for option in _options(plan) if (remedy := _smallest(planner, plan, option)) is not None]
    if found:
        return found[:limit]
    together = _together(planner, plan)
    return [] if together is None else [together]


def _options(plan: Plan) -> Iterator[_Option]:
    config = plan.config
    student, rollouts, train = config.student, config.rollouts, config.train
    if not student.activation_checkpointing:
        yield _Option("each layer runs forward twice", ({"student.activation_checkpointing": True},))
    halves = [train.micro_batch_tokens >> times for times in range(1, 8) if train.micro_batch_tokens >> times >= train.max_seq_len]
    yield _Option("more and smaller passes", tuple({"train.micro_batch_tokens": tokens} for tokens in halves))
    beside = config.writes_rollouts and rollouts.engine == "vllm" and not rollouts.is_elsewhere
    if beside:
        nearest = sorted(_SHARES, key=lambda share: abs(share - rollouts.gpu_memory))
        yield _Option("more or fewer answers side by side", tuple({"rollouts.gpu_memory": share} for share in nearest))
    if plan.machine.gpus > 1 and train.parallel.gather == "float32":
        yield _Option("the residual stream in bfloat16", ({"train.parallel.gather": "bfloat16"},))
    if plan.machine.gpus > 1 and train.parallel.whole_on == "device":
        elsewhere = {"rollouts.target": _SERVER} if beside else {}
        yield _Option("rank 0 evaluates on its processor", ({"train.parallel.whole_on": "cpu", **elsewhere},))
    if plan.machine.gpus > 1 and train.parallel.head == "gathered":
        yield _Option("all ranks meet in the loss", ({"train.parallel.head": "split"},))
    if train.optimizer == "adamw":
        yield _Option("moments are rounded at every step", ({"train.optimizer": "adamw_8bit"},))
    if beside and not rollouts.sleep:
        yield _Option("cycles take turns", ({"rollouts.sleep": True, "rollouts.max_staleness": 0},))
    if beside:
        yield _Option("a `bbopd sample-server` on GPUs of its own", ({"rollouts.target": _SERVER},))
    if plan.machine.gpus > 1 and not train.parallel.cpu_offload:
        yield _Option("updates in the host's memory", ({"train.parallel.cpu_offload": True},))
    more = [plan.machine.gpus << times for times in range(1, 13) if plan.machine.gpus << times <= _MOST_GPUS]
    yield _Option("more GPUs", gpus=tuple(more))
    if student.lora is None:
        yield _Option("adapters move less than all weights can", ({"student.lora": "{}"},))
    if student.quantize is None:
        quantized = {"student.quantize": "nf4"} | ({} if student.lora is not None else {"student.lora": "{}"})
        yield _Option("adapters beside weights that are rounded once", (quantized,))


def _smallest(planner: Planner, plan: Plan, option: _Option) -> Remedy | None:
    for sets in option.choices:
        if (changed := planner.changed(plan, sets)) is not None and not changed.problems:
            return Remedy(sets, option.costs, changed)
    for gpus in option.gpus:
        if (changed := planner.changed(plan, {}, gpus)) is not None and not changed.problems:
            return Remedy({}, option.costs, changed, gpus)
    return None


def _together(planner: Planner, plan: Plan) -> Remedy | None:
    """One change after the other, the strongest of each kind, until it fits; then without those that were not needed."""
    options = [option for option in _options(plan) if option.choices and not option.choices[0].keys() & _BESIDE_THE_TRAINER]
    needed: dict[str, Any] = {}
    for count, option in enumerate(options, 1):
        needed |= option.choices[-1]
        changed = planner.changed(plan, needed)
        if changed is None or changed.problems:
            continue
        for earlier in options[:count]:
            fewer = {key: value for key, value in needed.items() if key not in earlier.choices[-1]}
            if (less := planner.changed(plan, fewer)) is not None and not less.problems:
                needed, changed = fewer, less
        costs = "; ".join(earlier.costs for earlier in options[:count] if earlier.choices[-1].keys() <= needed.keys())
        return Remedy(needed, costs, changed)
    return None
