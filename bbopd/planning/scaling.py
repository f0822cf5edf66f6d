"""How a run would scale: the real loop over stages that take the time that so many GPUs would, from one shard of the model to thousands.

A cycle grows with the GPUs: each has as many sequences, and as many tokens of a step, as in the plan. Where cycles overlap, the GPUs are
shared out between sampling and training so that both take as long; where they take turns, all do both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from bbopd.config import RunConfig
from bbopd.errors import ConfigError
from bbopd.pipeline.state import RunState
from bbopd.planning.assumed import ASSUMPTIONS, push_seconds
from bbopd.planning.machine import Machine
from bbopd.planning.plan import Plan
from bbopd.planning.simulation import Simulation
from bbopd.planning.stages import Durations, Stream, TimedEngine, TimedTeacher, TimedTrainer
from bbopd.planning.virtual_clock import run_virtually
from bbopd.types import SignalSpec

__all__ = ["Mishaps", "ScalePoint", "break_of", "scale", "sizes_up_to"]

_LONGEST = 32  # simulated tokens of the longest answer: each stands for many
_FLOAT32 = 4
_ANY_NUMBER = 10**9
_SLOWEST = 100  # times the quickest answer of the teacher
_LINEAR = 0.9  # of the first point's tokens a second and GPU
_HOUR = 3600.0
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Mishaps:
    """What is assumed beyond rates and links."""

    answer_spread: float = 0.6
    """Of the lengths of answers: sigma of a log-normal distribution, cut off at the longest."""
    teacher_seconds: float = 0.05
    """Of the quickest answer of the teacher; others follow Pareto's law with exponent 1, up to a hundred times it."""
    teacher_failures: float = 1e-3
    """Share of the teacher's answers that never come and are asked for again after ``teacher_retry`` seconds."""
    teacher_retry: float = 2.0
    gpu_hours: float = 50_000.0
    """Between two failures of a GPU. One that samples loses what it was writing, one that trains stops the run for
    ``restart_seconds``, which then begins again from its last checkpoint."""
    restart_seconds: float = 600.0
    step_spread: float = 0.02
    """Of the seconds that a GPU takes for its part of a step, of which the slowest counts: sigma of a log-normal distribution."""
    collective_seconds: float = 20e-6
    """Latency of one collective between two nodes; of more, times the logarithm (base 2) of their number."""
    hidden: float = 0.8
    """Share of the trainer's traffic that its products can hide."""


@dataclass(frozen=True, slots=True)
class ScalePoint:
    """Shares of the time; ``efficiency`` is the tokens a second and GPU beside those of the first point."""

    gpus: int
    sampling_gpus: float
    sequences: int
    update_seconds: float
    tokens_per_second: float
    efficiency: float
    training_busy: float
    slots_busy: float
    exposed_traffic: float
    """Of a step that is waited for."""
    push_share: float
    goodput: float
    """What failures of GPUs that train leave."""
    driver: float
    """Processor seconds of the driving process on this machine, a second of the run: from 1 on it would set the pace."""
    waits: Mapping[str, float]
    """Of the trainer, by what it waits for."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sizes_up_to(first: int, most: int = 4096) -> tuple[int, ...]:
    """``first`` and then four times as many each, up to ``most``, which ends them where it is no such number."""
    sizes = [first]
    while sizes[-1] * 4 <= most:
        sizes.append(sizes[-1] * 4)
    return tuple(sizes if sizes[-1] == most else [*sizes, most] if most > first else sizes)


def scale(plan: Plan, sizes: Sequence[int], mishaps: Mishaps, *, cycles: int = 6) -> Iterator[ScalePoint]:
    """A point for each of ``sizes``, which are multiples of the plan's own GPUs, in its time; the first ``cycles // 3`` are not counted.

    Raises `ConfigError` where the plan lacks a rate, or a size is no multiple.
    """
    rates, machine = plan.rates, plan.machine
    if rates is None or rates.sampling is None or rates.training is None or machine.gpu is None:
        raise ConfigError("a simulation needs --gpu, for its links, and rates of sampling and training: give --gpu, or --rates with them")
    odd = [size for size in sizes if size % machine.gpus]
    if odd:
        raise ConfigError(f"--simulate {odd[0]}: the plan's {machine.gpus} GPUs hold one copy of the trainer: give multiples of that")
    first: float | None = None
    for size in sizes:
        point = _point(plan, machine.with_gpus(size), mishaps, cycles)
        each = point.tokens_per_second / size
        first = first or each
        yield replace(point, efficiency=each / first)


def break_of(points: Sequence[ScalePoint]) -> ScalePoint | None:
    """The first point that has less than nine tenths of the first one's tokens a second and GPU; None where all have more."""
    return next((point for point in points if point.efficiency < _LINEAR), None)


def _point(plan: Plan, machine: Machine, mishaps: Mishaps, cycles: int) -> ScalePoint:
    cluster = _Cluster(plan, machine, mishaps)
    simulation = cluster.simulation(cycles)
    before = time.process_time()
    run_virtually(simulation.run())
    spent = time.process_time() - before
    lines = simulation.lines.steps
    skipped = (cycles // 3) * plan.cycle.steps
    whole = lines[-1]["elapsed"] - lines[skipped - 1]["elapsed"]
    seconds = whole / (len(lines) - skipped)
    goodput = cluster.goodput(seconds)
    waits: dict[str, float] = {}
    for (stage, reason), waited in simulation.timeline.wait_seconds().items():
        if stage == "training":
            waits[reason] = waited / simulation.seconds
    return ScalePoint(
        gpus=machine.gpus,
        sampling_gpus=cluster.sampling_gpus,
        sequences=simulation.config.rollouts.per_update,
        update_seconds=seconds / goodput,
        tokens_per_second=cluster.grain * sum(simulation.trainer.tokens[skipped:]) / whole * goodput,
        efficiency=1.0,
        training_busy=simulation.timeline.busy_seconds().get("training", 0.0) / simulation.seconds,
        slots_busy=simulation.engine.busy_slot_seconds / (cluster.durations.slots * simulation.seconds),
        exposed_traffic=cluster.durations.step / (cluster.durations.step + cluster.step_seconds),
        push_share=cluster.durations.push / (seconds * plan.cycle.steps),
        goodput=goodput,
        driver=spent / simulation.seconds,
        waits=waits,
    )


class _Cluster:
    """Durations of the stages on ``machine``, and the run over them. One simulated token stands for ``grain`` of the run's."""

    def __init__(self, plan: Plan, machine: Machine, mishaps: Mishaps) -> None:
        assert plan.rates is not None
        assert plan.pace is not None
        self._plan, self._machine, self._mishaps = plan, machine, mishaps
        self._factor = machine.gpus // plan.machine.gpus
        cycle, per_gpu = plan.cycle, plan.rates.on(1, 1)
        assert per_gpu.sampling is not None
        assert per_gpu.training is not None
        sampling, training = cycle.written / per_gpu.sampling, cycle.trained / per_gpu.training
        share = sampling / (sampling + training) if plan.pace.overlaps else 1.0
        self.sampling_gpus = machine.gpus * share
        self._training_gpus = machine.gpus * (1.0 - share) if plan.pace.overlaps else machine.gpus
        self.grain = plan.config.rollouts.max_new_tokens / _LONGEST
        self.batch_tokens = self._factor * cycle.trained / cycle.steps
        rollouts = self._factor * cycle.rollouts
        beside = min(ASSUMPTIONS["sequences written side by side on a GPU, at most"], cycle.rollouts / plan.machine.gpus / share)
        slots = max(1, min(rollouts, round(self.sampling_gpus * beside)))
        self.step_seconds = self.batch_tokens / (per_gpu.training * self._training_gpus)
        self.durations = Durations(
            token=self.grain * slots / (per_gpu.sampling * self.sampling_gpus),
            slots=slots,
            trained_token=self.grain / (per_gpu.training * self._training_gpus),
            step=self._exposed_traffic(),
            push=push_seconds(plan.shapes, machine),
            teacher=self._answer_seconds,
            teacher_places=self._teacher_places(),
            lost=self._lost_seconds,
            jitter=self._slowest_of_all,
        )

    def simulation(self, cycles: int) -> Simulation:
        plan, cycle = self._plan, self._plan.cycle
        assert plan.pace is not None
        config = _simulated(
            plan.config,
            self._factor * cycle.sequences,
            round(self.batch_tokens / self.grain),
            cycles * cycle.steps,
            overlaps=plan.pace.overlaps,
        )
        return Simulation(
            config,
            engine=TimedEngine(self.durations, self._lengths),
            teacher=TimedTeacher(self.durations),
            trainer=TimedTrainer(self.durations),
            want=SignalSpec("sampled"),
            state=RunState(),
            prompts=Stream(reference_tokens=max(1, round(self._reference_tokens / self.grain))),
        )

    def goodput(self, update_seconds: float) -> float:
        """Share of the time that is left where every failure costs a restart and half of what lies between two checkpoints."""
        between = self._mishaps.gpu_hours * _HOUR / self._training_gpus
        lost = self._mishaps.restart_seconds + update_seconds * self._plan.config.train.checkpoint_every / 2
        return between / (between + lost)

    @property
    def _reference_tokens(self) -> float:
        labelled = self._plan.cycle.sequences - self._plan.cycle.rollouts
        return (self._plan.cycle.trained - self._plan.cycle.written) / labelled if labelled else self.grain

    def _lengths(self, random: np.random.Generator, longest: int) -> int:
        """Simulated tokens, with the plan's mean before the longest are cut off."""
        spread = self._mishaps.answer_spread
        mean = self._plan.cycle.written / max(1, self._plan.cycle.rollouts) / self.grain
        drawn = random.lognormal(math.log(mean) - spread**2 / 2, spread)
        return int(np.clip(round(drawn), 1, longest))

    def _answer_seconds(self, random: np.random.Generator) -> float:
        mishaps = self._mishaps
        seconds = 0.0
        while random.random() < mishaps.teacher_failures:
            seconds += mishaps.teacher_retry
        return seconds + float(min(_SLOWEST * mishaps.teacher_seconds, mishaps.teacher_seconds * (1.0 + random.pareto(1.0))))

    def _teacher_places(self) -> int:
        """Answers side by side that make the plan's rate of scoring, which grows with the GPUs as the teacher's fleet must."""
        rates, cycle = self._plan.rates, self._plan.cycle
        if rates is None or rates.scoring is None or not cycle.scored:
            return _ANY_NUMBER
        mean = self._mishaps.teacher_seconds * (1.0 + math.log(_SLOWEST))
        return max(1, round(self._factor * rates.scoring * cycle.sequences / cycle.scored * mean))

    def _lost_seconds(self, random: np.random.Generator, seconds: float) -> float:
        """A sequence whose GPU fails is written again, from its beginning."""
        chance = seconds / (self._mishaps.gpu_hours * _HOUR)
        return float(random.random() * seconds) if random.random() < chance else 0.0

    def _slowest_of_all(self, random: np.random.Generator) -> float:
        """The largest of as many log-normal draws as there are GPUs: one uniform number, through the distribution's own inverse."""
        normal = _NORMAL.inv_cdf(float(np.clip(random.random() ** (1.0 / max(1.0, self._training_gpus)), 1e-12, 1 - 1e-12)))
        return math.exp(self._mishaps.step_spread * normal)

    def _exposed_traffic(self) -> float:
        """Seconds of a step in which the trainer waits for the wires.

        Layers are gathered for both passes of every micro-batch, and gradients shared out, within a copy of the model, which has the
        plan's GPUs; between copies gradients are added up once.
        """
        plan, machine, gpu = self._plan, self._machine, self._machine.gpu
        assert gpu is not None
        student, copy = plan.shapes.student, min(plan.machine.gpus, max(1, round(self._training_gpus)))
        link = (gpu.link if copy <= machine.gpus_of_node else gpu.network) * 1e9
        packed = self._factor * plan.cycle.packed / plan.cycle.steps / self._training_gpus
        passes = max(1, math.ceil(packed / plan.config.train.micro_batch_tokens))
        whole = plan.shapes.compute_bytes * student.parameters
        inside = passes * 3 * whole * (copy - 1) / copy / link
        copies = self._training_gpus / copy
        between = 2 * student.trained_bytes / copy * (1 - 1 / copies) / (gpu.network * 1e9) if copies > 1 else 0.0
        latency = 2 * student.layers * self._mishaps.collective_seconds * math.log2(max(1.0, copies))
        return max((inside + between) * (1 - self._mishaps.hidden), inside + between - self.step_seconds) + latency


def _simulated(config: RunConfig, sequences: int, batch_tokens: int, steps: int, *, overlaps: bool) -> RunConfig:
    """The run's own course of cycles over timed stages."""
    rollouts = {
        "engine": "vllm",
        "per_update": sequences,
        "samples_per_prompt": 1,
        "max_new_tokens": _LONGEST,
        "on_policy_fraction": config.rollouts_per_cycle / config.rollouts.per_update,
        "max_staleness": int(overlaps),
    }
    return RunConfig.model_validate(
        {
            "student": {"model": config.student.model},
            "teacher": {"target": "grpc://localhost:1"},
            "rollouts": rollouts,
            "objective": {"ramp": 0, "temperature": 1.0},
            "train": {
                "batch_tokens": max(1, batch_tokens),
                "micro_batch_tokens": 10**9,
                "on_policy_tokens": 10**12,
                "total_steps": steps,
                "checkpoint_every": 10**9,
                "warmup": 0,
            },
            "output": "simulated",
        }
    )
