"""One run's loop over a tiny real student, a fake engine and a fake teacher, with all that it needs, in a folder of a test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from bbopd.config import FiltersConfig, RunConfig
from bbopd.data.draws import PromptStream
from bbopd.data.filters import RolloutFilter
from bbopd.data.rejected import RejectedLog
from bbopd.objectives import make_objective
from bbopd.pipeline.checkpoints import RunCheckpoints
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.gate import RolloutGate
from bbopd.pipeline.loop import Loop
from bbopd.pipeline.metrics import RunMetrics
from bbopd.pipeline.parts import Parts, at_once, in_executor
from bbopd.pipeline.timing import Timeline
from bbopd.rollouts.hf import HFEngine
from bbopd.teachers.fake import FakeBackend, FakeTeacher
from bbopd.trainer.checkpoint import latest_checkpoint
from bbopd.trainer.step import Trainer
from bbopd.types import Prompt
from tests.tiny_models import tiny_llama, tiny_tokenizer

VOCAB = 262


def run_config(output, **sections) -> RunConfig:
    base = {
        "student": {"model": "unused"},
        "teacher": {"target": "grpc://localhost:1"},
        "rollouts": {"per_update": 8, "samples_per_prompt": 2, "max_new_tokens": 12, "on_policy_fraction": 0.5},
        "objective": {"temperature": 1.0, "ramp": 0.2},
        "train": {
            "batch_tokens": 48,
            "micro_batch_tokens": 64,
            "max_seq_len": 64,
            "lr": 1e-3,
            "cold_start_tokens": 100,
            "on_policy_tokens": 200,
            "checkpoint_every": 2,
        },
        "data": {"prompt_tokens": 6, "response_tokens": 10},
        "output": str(output),
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return RunConfig.model_validate(base)


def prompts(count: int = 24) -> list[Prompt]:
    return [
        Prompt(f"p{i}", tuple((7 * i + j) % 250 + 3 for j in range(6)), tuple((5 * i + 3 * j) % 250 + 3 for j in range(10)))
        for i in range(count)
    ]


class Watcher:
    """Does something at one step, and keeps what it was told."""

    def __init__(self, rig, step, action) -> None:
        self.rig, self.step, self.action = rig, step, action
        self.notes: list[str] = []

    def activity(self, name, detail="") -> None:
        pass

    def evaluated(self, result) -> None:
        pass

    def note(self, text) -> None:
        self.notes.append(text)

    def advance(self, metrics, budget) -> None:
        if metrics["step"] == self.step:
            self.action(self.rig)


class Rig:
    """One loop with everything it needs, over a run folder; a second one on the same folder goes on from its checkpoint."""

    def __init__(
        self, config: RunConfig, *, engine=None, teacher=None, at_step=None, executor=None, min_tokens=1, stream=None, store=None
    ) -> None:
        self.config = config
        self.folder, self.changes = RunFolder.open(config, command="test")
        self.stop = asyncio.Event()
        self.evaluated: list[tuple[str, int]] = []
        model = tiny_llama(vocab_size=VOCAB)
        objective = make_objective(config.objective)
        trainer = Trainer(model, objective, train=config.train, objective_config=config.objective, planned_steps=config.planned_steps)
        self.checkpoints = RunCheckpoints(
            self.folder,
            trainer=trainer,
            ranked=None,
            model=model,
            tokenizer=tiny_tokenizer(),
            adversary=None,
            average=None,
            keep=2,
            retries=lambda: 0,
            store=store,
        )
        checkpoint = latest_checkpoint(self.folder.checkpoints)
        state = self.checkpoints.begin(checkpoint)
        self.resumed_from = state.step
        self.engine = engine or HFEngine(model, eos_token_ids=(2,), pad_token_id=0)
        self.log = RejectedLog(self.folder.rejected)

        self.parts = Parts(
            trainer=trainer,
            engine=self.engine,
            prompts=stream or PromptStream(prompts(), config.train.seed),
            gate=RolloutGate(RolloutFilter(FiltersConfig(min_tokens=min_tokens, reject_duplicates=False), (2,)), self.log, state.rejected),
            teacher=teacher or FakeTeacher(FakeBackend(VOCAB)),
            want=objective.signal(config.teacher),
            save=self.checkpoints.save,
            roll_back=self.checkpoints.roll_back,
            is_saved=self.checkpoints.can_roll_back_to(checkpoint),
            sleep=getattr(self.engine, "sleep", None),
            overlaps=executor is not None,
            run_blocking=at_once if executor is None else in_executor(executor),
        )
        self.metrics = RunMetrics(self.folder, from_step=state.step)
        self.watcher = Watcher(self, *(at_step or (0, None)))

        async def record(stage: str, step: int) -> Mapping[str, object]:
            self.evaluated.append((stage, step))
            return {"stage": stage, "step": step, "bits_per_byte": 1.0}

        self.loop = Loop(
            config,
            self.parts,
            state,
            metrics=self.metrics,
            timeline=Timeline(),
            progress=self.watcher,
            evaluate=record,
            stop=self.stop,
        )

    async def run(self) -> str:
        try:
            return await self.loop.run()
        finally:
            self.close()

    def close(self) -> None:
        self.metrics.close()
        self.log.close()

    def losses(self) -> list[tuple[int, float, float, float]]:
        return [(line["step"], line["loss"], line["ce"], line["kd"]) for line in self.folder.read_lines("metrics.jsonl")]


def poison(rig: Rig) -> None:
    """The next gradient will hold a NaN."""
    parameter = next(rig.parts.trainer.model.parameters())

    def spoil(gradient):
        handle.remove()
        return gradient * float("nan")

    handle = parameter.register_hook(spoil)
