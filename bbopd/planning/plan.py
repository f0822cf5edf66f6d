"""The plan of a run: what it holds, moves, costs and takes on the machine it is given, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from bbopd.config import InitConfig, RunConfig
from bbopd.config_file import parse_config
from bbopd.errors import ConfigError
from bbopd.modeling import empty_model
from bbopd.modeling.shapes import Activations, ModelShape, measure_activations, shape_of
from bbopd.objectives import make_objective, signal_for
from bbopd.pipeline.ranked import check_ranked
from bbopd.pipeline.student import bytes_beside, empty_student
from bbopd.planning.assumed import assumed_rates
from bbopd.planning.machine import Machine
from bbopd.planning.memory import Memory, Shapes, engine_is_on_cpu, memory_of
from bbopd.planning.pace import Pace, pace_of
from bbopd.planning.rates import Rates
from bbopd.planning.tokens import Cycle, Forecast, Lengths, Prices, cycle_of, forecast, price
from bbopd.rpc.answers import token_bytes
from bbopd.trainer.checkpoint import checkpoint_bytes
from bbopd.trainer.stored import model_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Plan", "Planner"]

_USABLE = 0.96  # of a GPU's memory: the rest goes in pieces too small to be used
_QUESTION_BYTES = 4  # of a token that the teacher reads


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes are bytes, of one GPU in ``memory``, of the whole run in the others; ``cost`` None: no price is known."""

    config: RunConfig
    machine: Machine
    shapes: Shapes
    memory: Memory
    cycle: Cycle
    total: Forecast
    cycles: float
    rates: Rates | None
    pace: Pace | None
    questions: float
    answers: float
    cost: float | None
    currency: str
    checkpoint: float
    disk: float
    cache: float

    @property
    def updates(self) -> float:
        """Optimizer steps of the run, about."""
        updates = self.cycles * self.cycle.steps
        return min(updates, self.config.train.total_steps or updates)

    @property
    def seconds(self) -> float | None:
        """Of the whole run, without loading, evaluation and saving; None where no rate is known."""
        return None if self.pace is None or not self.pace.seconds else self.updates * self.pace.update

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it does not fit; none where it does, or where nobody said how much memory a GPU has."""
        limit = self.machine.gpu_bytes
        if limit is None:
            return ()
        found = []
        if self.memory.peak > _USABLE * limit:
            found.append(
                f"a GPU would hold {self.memory.peak / 2**30:,.1f} GiB of its {limit / 2**30:,.0f} ({_USABLE:.0%} of which can be used)"
            )
        rollouts = self.config.rollouts
        beside = self.config.writes_rollouts and rollouts.engine == "vllm" and not rollouts.is_elsewhere
        if self.config.writes_rollouts and engine_is_on_cpu(self.config, self.machine):
            found.append("train.parallel.whole_on cpu leaves the student to write on a processor: set rollouts.target")
        elif beside and self.memory.engine_tokens < self.config.train.max_seq_len:
            found.append(
                f"rollouts.gpu_memory {rollouts.gpu_memory:g} leaves vLLM, beside its weights, room for "
                f"{max(0.0, self.memory.engine_tokens):,.0f} tokens, and one sequence may have {self.config.train.max_seq_len:,}"
            )
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        seconds = self.seconds
        return {
            "student": asdict(self.shapes.student),
            "teacher": None if self.shapes.teacher is None else asdict(self.shapes.teacher),
            "gpus": self.machine.gpus,
            "gpu_bytes": self.machine.gpu_bytes,
            "memory": {
                "parts": [asdict(part) for part in self.memory.parts],
                "training": self.memory.of("training"),
                "sampling": self.memory.of("sampling"),
                "peak": self.memory.peak,
                "logits_that_are_not_there": self.memory.absent,
                "engine_tokens": self.memory.engine_tokens,
                "host_of_a_node": self.memory.host,
            },
            "fits": None if self.machine.gpu_bytes is None else not self.problems,
            "problems": list(self.problems),
            "cycle": asdict(self.cycle),
            "updates": self.updates,
            "tokens": asdict(self.total),
            "rates": None if self.rates is None else self.rates.to_json(),
            "seconds_of_cycle": None if self.pace is None else dict(self.pace.seconds),
            "seconds_of_update": None if self.pace is None or not self.pace.seconds else self.pace.update,
            "bottleneck": None if self.pace is None else self.pace.bottleneck,
            "seconds": seconds,
            "teacher_bytes": {"questions": self.questions, "answers": self.answers},
            "cost": self.cost,
            "currency": self.currency,
            "disk_bytes": {"checkpoint": self.checkpoint, "run": self.disk, "cache": self.cache},
        }


class Planner:
    """Plans one run and variations of it; shapes that do not change are looked at once.

    Parameters
    ----------
    student, teacher
        A ``config.json``, or a model's id or folder, to read shapes from in place of the run's own; None: the run's own, of a teacher
        the one that is started beside the run.
    rates
        None: those assumed of the machine's GPU, where it is known.
    teacher_gpus
        Of a teacher whose rate is assumed.
    """

    def __init__(
        self, *, student: str | None = None, teacher: str | None = None, rates: Rates | None = None, teacher_gpus: int = 0
    ) -> None:
        self._student, self._teacher, self._rates, self._teacher_gpus = student, teacher, rates, teacher_gpus
        self._models: dict[str, PreTrainedModel] = {}
        self._activations: dict[str, Activations | None] = {}
        self._teachers: dict[str, ModelShape] = {}

    def plan(self, config: RunConfig, machine: Machine) -> Plan:
        """Raises `BbopdError` for a model whose configuration cannot be read, or what the run itself would be refused for."""
        if machine.gpus > 1:
            check_ranked(config)
        want = signal_for(make_objective(config.objective), config.teacher)
        rates = self._rates
        known = rates or Rates()
        lengths = Lengths.given(config, answer=known.answer_tokens, prompt=known.prompt_tokens, reference=known.reference_tokens)
        model, shapes = self._model(config), self._shapes(config, machine)
        cycle, total = cycle_of(config, want, lengths), forecast(config, lengths)
        memory = memory_of(config, shapes, machine)
        if rates is not None:
            rates = rates.on(machine.gpus, machine.engines)
        elif machine.gpu is not None:
            rates = assumed_rates(config, shapes, cycle, machine, engine_tokens=memory.engine_tokens, teacher_gpus=self._teacher_gpus)
        asked = Forecast(0.0, 0.0, 0.0, 0.0, 0.0) if want is None else total.asked(want, config)
        of_token = 0 if want is None else token_bytes(want, shapes.student.vocabulary, config.candidates)
        prices = config.teacher.prices
        given = None if prices is None else Prices(prices.prompt, prices.answer, prices.currency)
        checkpoint = checkpoint_bytes(model, bytes_beside(config, model))
        return Plan(
            config=config,
            machine=machine,
            shapes=shapes,
            memory=memory,
            cycle=cycle,
            total=total,
            cycles=total.response_tokens / max(1.0, cycle.trained),
            rates=rates,
            pace=None if rates is None else pace_of(config, cycle, rates),
            questions=_QUESTION_BYTES * asked.sequence_tokens,
            answers=of_token * asked.response_tokens,
            cost=None if given is None else price(config, asked, given),
            currency="" if given is None else given.currency,
            checkpoint=checkpoint,
            disk=checkpoint * (config.train.keep_checkpoints + 1) + model_bytes(model),
            cache=of_token * asked.response_tokens if config.teacher.cache is not None else 0.0,
        )

    def changed(self, plan: Plan, sets: Mapping[str, Any], gpus: int | None = None) -> Plan | None:
        """``plan`` with some keys set otherwise, or on another number of GPUs; None where no run could be so."""
        machine = plan.machine if gpus is None else plan.machine.with_gpus(gpus)
        try:
            words = [f"{key}={_word(value)}" for key, value in sets.items()]
            config = parse_config(plan.config.model_dump(mode="json"), words, RunConfig, "the plan")
            return self.plan(config, machine)
        except ConfigError:
            return None

    def _shapes(self, config: RunConfig, machine: Machine) -> Shapes:
        student, key = config.student, _key(config)
        shape = shape_of(self._model(config), student.model, student.quantize)
        dtype = torch.float32 if student.dtype == "float32" else torch.bfloat16
        checkpointing = student.activation_checkpointing
        length, total = config.train.max_seq_len, shape.layers
        if (name := f"{key} {dtype} {checkpointing} {length}") not in self._activations:
            kept = student.init.keep_layers or tuple(range(total))

            def build(layers: int) -> PreTrainedModel:
                first = student.model_copy(update={"init": InitConfig(keep_layers=kept[:layers])})
                return empty_student(first, self._student)

            self._activations[name] = measure_activations(build, total, dtype, sequence_tokens=length, checkpointing=checkpointing)
        return Shapes(shape, self._activations[name], dtype.itemsize, self._teacher_shape(config))

    def _model(self, config: RunConfig) -> PreTrainedModel:
        key = _key(config)
        if key not in self._models:
            with torch.device("meta"):
                self._models[key] = empty_student(config.student, self._student)
        return self._models[key]

    def _teacher_shape(self, config: RunConfig) -> ModelShape | None:
        serve = config.teacher.serve
        source = self._teacher or (serve.model if serve is not None else None)
        if source is None:
            return None
        if source not in self._teachers:
            with torch.device("meta"):
                self._teachers[source] = shape_of(empty_model(source), source)
        return self._teachers[source]


def _key(config: RunConfig) -> str:
    """What of a student decides its shapes."""
    student = config.student
    return f"{student.model} {student.init.keep_layers} {student.lora}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
