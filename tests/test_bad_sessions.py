"""Bad updates in whole runs with more than a student in them: an averaged one that teaches it, a discriminator that plays against it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bbopd.config import RunConfig
from bbopd.errors import DivergedError
from bbopd.pipeline.loop import Loop
from bbopd.pipeline.metrics import RunMetrics
from bbopd.pipeline.session import Session, open_session
from bbopd.pipeline.timing import Timeline
from bbopd.trainer.checkpoint import latest_checkpoint, load_beside
from tests.loop_rig import Watcher, poison
from tests.openai_runs import run_config, served
from tests.test_bad_updates import check_lines, saved_state, spoil_at
from tests.test_gad_run import GAD, TextServer
from tests.test_self_run import write_config

pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")


class Turned:
    """A session and the loop over it, as ``bbopd distill`` opens and turns them, without evaluation."""

    def __init__(self, session: Session, watcher: Watcher) -> None:
        self.session, self.folder, self.parts, self.watcher = session, session.folder, session.parts, watcher
        self.metrics = RunMetrics(session.folder, from_step=session.state.step)
        self.back: list[bool] = []
        """Of each time that the run went back: whether all was then as in the checkpoint."""
        load = self.parts.roll_back
        assert load is not None

        def look() -> Any:
            saved = load()
            self.back.append(self._is_as_saved())
            return saved

        object.__setattr__(self.parts, "roll_back", look)

        async def nothing(stage: str, step: int) -> Mapping[str, Any]:
            return {"stage": stage, "step": step}

        about: dict[str, Any] = {"metrics": self.metrics, "timeline": Timeline(), "progress": watcher, "evaluate": nothing}
        self.loop = Loop(session.config, self.parts, session.state, stop=asyncio.Event(), **about)

    def beside(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """What is trained or kept beside the student."""
        average = self.parts.trainer.average
        return self.session.adversary.tensors() if average is None else {"average": average.tensors()}

    def _is_as_saved(self) -> bool:
        stored, now = load_beside(latest_checkpoint(self.folder.checkpoints)), self.beside()
        assert stored.keys() == now.keys()
        return all(torch.equal(now[file][name], tensor) for file, tensors in stored.items() for name, tensor in tensors.items())


async def turn(config: RunConfig, spoil: Callable[[Turned], None]) -> Turned:
    """A whole run, which ``spoil`` is given before its first update. What it raises is in ``error``."""
    watcher = Watcher(None, 0, None)
    async with open_session(config, command="test", progress=watcher) as session:
        turned = Turned(session, watcher)
        spoil(turned)
        try:
            assert await turned.loop.run() == "finished"
        finally:
            turned.metrics.close()
    return turned


async def test_an_averaged_student_goes_back_with_the_student(tmp_path) -> None:
    own = {"context": "{reference}. {prompt}", "weights": "ema", "ema_decay": 0.9}
    path = write_config(tmp_path, teacher={"self": own})
    known = yaml.safe_load(path.read_text())
    known["train"] |= {"on_nonfinite": "roll_back", "on_policy_tokens": 200, "checkpoint_every": 3}
    turned = await turn(RunConfig.model_validate(known), spoil_at({5}))
    check_lines(turned.folder, turned.loop.state, least=200)
    assert turned.back == [True]
    assert (turned.loop.state.bad_updates, turned.loop.state.rolled_back_updates) == ({"nonfinite": 1}, 5 - 3)


# ------------------------------------------------------------ the game


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(TextServer()) as port:
        yield port


def game(folder: Path, port: int, **train: Any) -> RunConfig:
    teacher = {**GAD["teacher"], "target": f"grpc://127.0.0.1:{port}", "prices": None}
    budgets = {"cold_start_tokens": 60, "on_policy_tokens": 160, "checkpoint_every": 100}
    return run_config(folder, port, **{**GAD, "teacher": teacher, "train": {**GAD["train"], **budgets, **train}})


def poison_discriminator(turned: Turned) -> None:
    """Its next gradient will hold a NaN."""
    head = turned.session.adversary.discriminator._scorer.head.weight

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return gradient * float("nan")

    handle = head.register_hook(spoil)


def break_discriminator(turned: Turned) -> None:
    """Its scores will be NaN from now on."""
    with torch.no_grad():
        turned.session.adversary.discriminator._scorer.head.weight.fill_(float("nan"))


@pytest.mark.parametrize("spoil", [poison, break_discriminator])
async def test_a_game_goes_back_with_both_its_players(tmp_path, port: int, spoil: Callable[[Any], None]) -> None:
    turned = await turn(game(tmp_path, port, on_nonfinite="roll_back"), spoil_at({6}, spoil))
    check_lines(turned.folder, turned.loop.state, least=160)
    assert turned.back == [True]
    state = turned.loop.state
    assert state.bad_updates == {"nonfinite" if spoil is poison else "discriminator": 1}
    assert all(line["discriminator_loss"] > 0 for line in turned.folder.read_lines("metrics.jsonl"))


async def test_a_cycle_whose_discriminator_has_no_gradient_is_skipped_by_both(tmp_path, port: int) -> None:
    turned = await turn(game(tmp_path, port, on_nonfinite="skip"), spoil_at({1, 5}, poison_discriminator))
    check_lines(turned.folder, turned.loop.state, least=160)
    assert turned.loop.state.bad_updates == {"discriminator": 2}
    (first, _) = [note for note in turned.watcher.notes if "was skipped" in note]
    assert "update 5: the discriminator's gradient norm is nan: it was skipped, with its" in first
    assert all(bool(torch.isfinite(tensor).all()) for tensor in turned.beside()["discriminator"].values())


async def test_a_discriminator_that_is_lost_ends_the_run_at_its_last_checkpoint(tmp_path, port: int) -> None:
    config = game(tmp_path, port, on_nonfinite="skip", bad_updates_in_a_row=1)
    with pytest.raises(DivergedError, match=r"scores are not finite: the 2nd bad update in a row.*lower objective.gad.discriminator_lr"):
        await turn(config, spoil_at({6}, break_discriminator))
    folder = Path(config.output)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    state = json.loads((checkpoint / "state.json").read_text())["state"]
    assert (state["step"], state["bad_updates"]) == (state["cold_start_steps"], {})
    lower = config.model_dump(mode="json")
    lower["objective"]["gad"]["discriminator_lr"] = 1e-4
    turned = await turn(RunConfig.model_validate(lower), lambda turned: None)
    assert saved_state(turned.folder).on_policy_tokens >= 160
    assert any("another configuration: objective.gad.discriminator_lr" in note for note in turned.watcher.notes)
