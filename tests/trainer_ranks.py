"""What the processes of tests/test_ranks.py do: one imports everything, and forks for the ranks of each world.

Every rank makes the same model; rank 0 trains it as the loop would, the others follow, and each writes down what it has found.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bbopd.config import LoRAConfig, ObjectiveConfig, ParallelConfig, RunConfig, TrainConfig
from bbopd.errors import BbopdError, CheckpointError, TrainingError
from bbopd.modeling import adapter_parameters, add_lora, is_adapted
from bbopd.objectives import make_objective
from bbopd.trainer.checkpoint_files import verify_checkpoint
from bbopd.trainer.ranked import RankedTrainer
from bbopd.trainer.ranks import Ranks
from bbopd.trainer.step import Trainer
from bbopd.types import DistillBatch
from tests.batches import pack, random_sequences, random_teacher
from tests.tiny_models import tiny_llama, tiny_qwen2, tiny_tokenizer

STEPS = 2
TIMEOUT_S = 60
STOPPED_S = 8  # where it shall run out


@dataclass(frozen=True)
class Case:
    """A model and how it is trained, the same in every world."""

    make: Callable[[], Any]
    batches: int = 3
    checkpointing: bool = False
    parallel: dict[str, Any] = field(default_factory=dict)
    worlds: tuple[int, ...] = (1, 2, 4)
    dtype: torch.dtype = torch.float32
    same: float = 2e-5  # of losses and norms, relative; sums are only taken in another order
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(alpha=0.3, temperature=2.0, ramp=0))

    def micro_batches(self, step: int) -> list[DistillBatch]:
        """Random sequences, every second one labelled, in micro-batches of different sizes."""
        sequences = random_sequences(2 * self.batches, seed=10 * step + self.batches)
        teacher = random_teacher(sequences, seed=10 * step + self.batches + 1000)
        top_k = 8 if self.objective.temperature == 1.0 else 0
        return [pack(sequences[i : i + 2], teacher[i : i + 2], top_k=top_k) for i in range(0, len(sequences), 2)]

    def options(self) -> dict[str, Any]:
        parallel = ParallelConfig(timeout=TIMEOUT_S, **self.parallel)
        return {
            "train": TrainConfig(lr=1e-2, warmup=4, schedule="cosine", clip=0.5, parallel=parallel),
            "objective_config": self.objective,
            "planned_steps": 20,
            "compute_dtype": self.dtype,
            "activation_checkpointing": self.checkpointing,
        }

    def alone(self) -> Trainer:
        return Trainer(self.make(), make_objective(self.objective), **self.options())


LORA = LoRAConfig(rank=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))


def adapted() -> Any:
    """B is not 0, as it is at first, so that A has a gradient too."""
    model, generator = tiny_qwen2(), torch.Generator().manual_seed(3)
    add_lora(model, LORA, base="tiny")
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


CASES = {
    "tied": Case(tiny_llama, batches=5),
    "untied": Case(lambda: tiny_llama(tied=False), objective=ObjectiveConfig(temperature=1.0, ramp=0), worlds=(1, 2)),
    "biases, layers run again": Case(tiny_qwen2, checkpointing=True, worlds=(2,)),
    "replicated": Case(tiny_llama, parallel={"replicas": 2}, worlds=(4,)),
    "split head": Case(lambda: tiny_llama(tied=False), parallel={"head": "split"}, worlds=(1, 2)),
    "split head, top-k": Case(
        tiny_qwen2, parallel={"head": "split"}, worlds=(4,), objective=ObjectiveConfig(name="jsd", temperature=1.0, ramp=0)
    ),
    "fewer batches than ranks": Case(lambda: tiny_llama(tied=False), batches=1, worlds=(2,)),
    "in bfloat16": Case(tiny_llama, parallel={"gather": "bfloat16"}, worlds=(2,), dtype=torch.bfloat16, checkpointing=True, same=2e-2),
    "adapters, layers run again": Case(adapted, checkpointing=True, worlds=(2,)),
    "offloaded": Case(tiny_llama, parallel={"cpu_offload": True}, worlds=(2,)),
}
RESUMED = CASES["biases, layers run again"]
ADAPTED = CASES["adapters, layers run again"]


def ranked(case: Case, ranks: Ranks, checkpoint: Path | None = None, objective: Any = None) -> RankedTrainer:
    whole = case.make()
    with torch.device("meta"):
        empty = type(whole)(whole.config)
        if is_adapted(whole):
            add_lora(empty, LORA, base="tiny")
    return RankedTrainer(
        empty,
        objective or make_objective(case.objective),
        ranks=ranks,
        whole=whole if ranks.rank == 0 else None,
        checkpoint=checkpoint,
        **case.options(),
    )


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.weights()}


# ------------------------------------------------------------ what is done in a world


class Staying(Ranks):
    """One rank's place in a world that has more to do."""

    def _leave(self) -> None:
        pass


def one_after_another(ranks: Ranks, folder: Path, *tasks: str) -> Any:
    """All of `CASES` that are for a world of this size, and ``tasks``; what was found, by their names."""
    found = {name: same_as_alone(ranks, folder, case) for name, case in CASES.items() if ranks.size in case.worlds}
    for task in tasks:
        work, *arguments = TASKS[task]
        found[task] = work(again(ranks, RESUMED), folder, *arguments)
    return found


def again(ranks: Ranks, case: Case) -> Ranks:
    return Staying(ranks.rank, ranks.size, ranks.device, ranks._store, case.options()["train"].parallel, ranks.life)


def same_as_alone(ranks: Ranks, folder: Path, case: Case) -> Any:
    """Figures of some steps, and the weights after them."""
    ranks = again(ranks, case)
    trainer = ranked(case, ranks)
    if ranks.rank:
        trainer.follow()
        return None
    begun = weights_of(trainer)
    steps = [trainer.train_step(case.micro_batches(step)) for step in range(STEPS)]
    weights = weights_of(trainer)
    ranks.dismiss(None)
    return {"begun": begun, "steps": steps, "weights": weights, "tensors": [name for name, _ in trainer.model.named_parameters()]}


def bad_batch(ranks: Ranks, folder: Path) -> Any:
    """A batch whose loss only one rank finds impossible; then a good step."""
    case = CASES["tied"]
    trainer = ranked(case, ranks, objective=Spoilt(case.objective, TrainingError("the batch is spoilt"), at=ranks.rank == 1))
    if ranks.rank:
        trainer.follow()
        return None
    try:
        trainer.train_step(case.micro_batches(0))
    except TrainingError as error:
        said = str(error)
    step = trainer.train_step(case.micro_batches(0))
    ranks.dismiss(None)
    return {"said": said, "step": step}


def at_once(ranks: Ranks, folder: Path) -> Any:
    """Steps in one thread, while another pulls weights and saves, as where cycles overlap."""
    case = CASES["tied"]
    trainer = ranked(case, ranks)
    if ranks.rank:
        trainer.follow()
        return None
    pulled = 0
    with ThreadPoolExecutor(1) as executor:
        training = executor.submit(lambda: [trainer.train_step(case.micro_batches(step)) for step in range(STEPS)])
        while not training.done():
            pulled += len(dict(trainer.weights()))
            trainer.save(folder / "at-once", pulled, tiny_tokenizer(), {}, keep=1)
    ranks.dismiss(None)
    return {"steps": training.result(), "pulled": pulled}


def begin(ranks: Ranks, folder: Path) -> Any:
    """Two steps, a checkpoint, and training that goes on while it is written."""
    trainer = ranked(RESUMED, ranks)
    if ranks.rank:
        torch.manual_seed(100 + ranks.rank)
        trainer.follow()
        return None
    for step in range(2):
        trainer.train_step(RESUMED.micro_batches(step))
    before = weights_of(trainer)
    trainer.save(folder / "checkpoints", 2, tiny_tokenizer(), {"step": 2}, keep=2)
    trainer.train_step(RESUMED.micro_batches(2))
    trainer.end()
    ranks.dismiss(None)
    return {"weights": before}


def goes_back(ranks: Ranks, folder: Path) -> Any:
    """A step, a checkpoint, an update that is dropped and one that is not; then the checkpoint again, and a step."""
    trainer = ranked(RESUMED, ranks)
    if ranks.rank:
        trainer.follow()
        return None
    trainer.train_step(RESUMED.micro_batches(0))
    saved = weights_of(trainer)
    trainer.save(folder / "back", 1, tiny_tokenizer(), {"step": 1}, keep=1)
    trainer.accumulate(RESUMED.micro_batches(3))
    trainer.drop()
    dropped = weights_of(trainer)
    trainer.train_step(RESUMED.micro_batches(4))
    trainer.end()
    trainer.load(folder / "back/step-00000001")
    back = weights_of(trainer)
    trainer.steps_done = trainer.loaded["step"]
    step = trainer.train_step(RESUMED.micro_batches(1))
    ranks.dismiss(None)
    return {"saved": saved, "dropped": dropped, "back": back, "step": step}


def go_on(ranks: Ranks, folder: Path, checkpoint: str, steps: int = 2) -> Any:
    """What a checkpoint holds, and some steps more."""
    verify_checkpoint(folder / checkpoint)
    trainer = ranked(RESUMED, ranks, folder / checkpoint)
    state = torch.get_rng_state()
    if ranks.rank:
        trainer.follow()
        return {"generator": state}
    first = trainer.steps_done = trainer.loaded["step"]
    weights = weights_of(trainer)
    found = [trainer.train_step(RESUMED.micro_batches(first + step)) for step in range(steps)]
    trainer.save((folder / checkpoint).parent, first + steps, tiny_tokenizer(), {"step": first + steps}, keep=3)
    trainer.end()
    ranks.dismiss(None)
    return {"generator": state, "weights": weights, "steps": found}


def adapters_alone(ranks: Ranks, folder: Path) -> Any:
    """A step, a checkpoint, another step, and back to the checkpoint."""
    trainer = ranked(ADAPTED, ranks)
    if ranks.rank:
        trainer.follow()
        return None
    trainer.train_step(ADAPTED.micro_batches(0))
    saved = weights_of(trainer)
    trainer.save(folder / "adapters", 1, tiny_tokenizer(), {"step": 1}, keep=1)
    trainer.train_step(ADAPTED.micro_batches(1))
    changed = {name: weight.clone() for name, weight in trainer.weights(changed_only=True)}
    trainer.load(folder / "adapters/step-00000001")
    back = weights_of(trainer)
    ranks.dismiss(None)
    return {"saved": saved, "changed": changed, "back": back}


def another_model(ranks: Ranks, folder: Path) -> Any:
    try:
        ranked(CASES["tied"], ranks, folder / "checkpoints/step-00000002")
    except CheckpointError as error:
        return {"said": str(error)}
    return None


class Spoilt:
    """An objective that fails once, where it shall."""

    def __init__(self, config: ObjectiveConfig, error: BaseException, *, at: bool) -> None:
        self._inner, self._error, self._is_due = make_objective(config), error, at

    def loss(self, *arguments: Any, **options: Any) -> Any:
        if self._is_due:
            self._is_due = False
            raise self._error
        return self._inner.loss(*arguments, **options)


def failing(ranks: Ranks, folder: Path, error: BaseException | None, at: int) -> Any:
    """One rank fails in a pass, or, without an error, is killed in it; what the others then raise, and how soon."""
    case = CASES["tied"]
    objective = make_objective(case.objective)
    if ranks.rank == at:
        objective = Spoilt(case.objective, error, at=True) if error is not None else Killed()
    trainer = ranked(case, ranks, objective=objective)
    begun = time.monotonic()
    try:
        if ranks.rank:
            trainer.follow()
        else:
            trainer.train_step(case.micro_batches(0))
    except BbopdError as caught:
        return {"said": str(caught), "kind": type(caught).__name__, "seconds": time.monotonic() - begun}
    except RuntimeError as caught:
        return {"said": str(caught)}
    return None


class Killed:
    """An objective that ends its process."""

    def loss(self, *arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def stopping(ranks: Ranks, folder: Path, at: int) -> Any:
    """One rank stops in its second step without ending; what the other then raises, and how soon."""
    case = CASES["tied"]
    trainer = ranked(case, ranks)
    stopped = folder / f"stopped.{at}"
    if ranks.rank == at:
        accumulate = trainer._accumulate

        def stop_at_second(*arguments: Any) -> Any:
            if trainer.steps_done:
                time.sleep(1.0)  # for a sign of life
                stopped.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            return accumulate(*arguments)

        trainer._accumulate = stop_at_second  # type: ignore[method-assign]
    try:
        if ranks.rank:
            trainer.follow()
        else:
            for step in range(2):
                trainer.train_step(case.micro_batches(step))
    except BbopdError as caught:
        seconds = time.time() - stopped.stat().st_mtime
        os.kill(int(stopped.read_text()), signal.SIGKILL)
        return {"said": str(caught), "kind": type(caught).__name__, "seconds": seconds}
    return None


def whole_run(folder: Path, name: str, sections: Mapping[str, Mapping[str, Any]] | None = None, stop_after: int = 0) -> Any:
    """``bbopd distill``, once it has read its file, with other ``sections``; rank 0 is told to stop after so many updates."""
    from bbopd.cli.execute import execute
    from bbopd.cli.ranked import execute_ranked

    sys.path.insert(0, str(folder))  # where the plug-in is
    config = json.loads((folder / "run.json").read_text()) | {"output": str(folder / name)}
    for section, values in (sections or {}).items():
        config[section] = config[section] | {
            key: str(value).format(folder=folder) if key in PLACES else value for key, value in values.items()
        }
    run = RunConfig.model_validate(config)
    if stop_after and os.environ["RANK"] == "0":
        threading.Thread(target=_stop_at, args=(folder / name / "metrics.jsonl", stop_after), daemon=True).start()
    return (execute if os.environ["WORLD_SIZE"] == "1" else execute_ranked)(run, plain=True)


def _stop_at(metrics: Path, lines: int) -> None:
    """As a scheduler would."""
    while not metrics.exists() or metrics.read_text().count("\n") < lines:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class World:
    """``size`` ranks that do ``work``; its first argument is the `Ranks`, where the work does not meet the others by itself."""

    size: int
    work: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    meets: bool = False
    timeout: int = TIMEOUT_S

    def rank(self, rank: int, port: int, folder: Path) -> Any:
        """What rank number ``rank`` finds."""
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as torchrun, the tests hold the store
        torch.set_num_threads(1)
        if self.meets:
            return self.work(folder, *self.arguments)
        return self.work(Ranks.join("cpu", ParallelConfig(timeout=self.timeout)), folder, *self.arguments)


TASKS = {
    "bad batch": (bad_batch,),
    "at once": (at_once,),
    "begin": (begin,),
    "goes back": (goes_back,),
    "from one": (go_on, "alone/step-00000002", 1),
    "another model": (another_model,),
    "adapters": (adapters_alone,),
    "go on": (go_on, "checkpoints/step-00000002"),
}
PLACES = ("checkpoint_store",)
STORED = {"train": {"checkpoint_store": "file://{folder}/store"}}
SPOILT = {
    "student": {"lora": {"rank": 4}},
    "objective": {"name": "spoilt", "options": {"update": 6}, "ramp": 0},
    "train": {"on_nonfinite": "roll_back", "checkpoint_every": 100},
}
WORLDS = {
    "1": World(1, one_after_another),
    "2": World(2, one_after_another, ("bad batch", "at once", "begin", "goes back", "from one", "another model", "adapters")),
    "4": World(4, one_after_another, ("go on",)),
    "first fails": World(2, failing, (ZeroDivisionError("broken"), 0)),
    "second fails": World(2, failing, (ZeroDivisionError("broken"), 1)),
    "second is killed": World(2, failing, (None, 1)),
    "first is stopped": World(2, stopping, (0,), timeout=STOPPED_S),
    "second is stopped": World(2, stopping, (1,), timeout=STOPPED_S),
    "run, 1": World(1, whole_run, ("run-1",), meets=True),
    "run, 2": World(2, whole_run, ("run-2",), meets=True),
    "spoilt, 2": World(2, whole_run, ("spoilt-2", SPOILT), meets=True),
    "stored, 2": World(2, whole_run, ("stored-2", STORED, 3), meets=True),
    "brought, 1": World(1, whole_run, ("brought-1", STORED), meets=True),
}
"""What tests/test_ranks.py asks of ranks, in this order."""


def run_worlds(folder: Path, worlds: dict[str, World]) -> None:
    """Run one world after another, by the stores at ``ports.json``.

    Each rank leaves ``<world>.<rank>.pt`` with what it has found, and what it has printed beside it.
    """
    ports = json.loads((folder / "ports.json").read_text())
    for name, world in worlds.items():
        children = []
        for rank in range(world.size):
            child = os.fork()
            if child == 0:
                _end_with(world, rank, ports[name], folder, folder / f"{name}.{rank}")
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


def _end_with(world: World, rank: int, port: int, folder: Path, place: Path) -> None:
    log = os.open(f"{place}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        torch.save(world.rank(rank, port, folder), f"{place}.pt")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*fork.*")  # this process has no thread but one
    import bbopd.cli.ranked  # noqa: F401  (once, for all whole runs)

    run_worlds(Path(sys.argv[1]), WORLDS)
