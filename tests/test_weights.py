"""What a push gives an engine: everything once, then what may have changed; nothing where the tensors are shared."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bbopd.config import LoRAConfig
from bbopd.modeling import add_lora
from bbopd.pipeline.parts import Parts
from bbopd.pipeline.timing import Timeline
from bbopd.pipeline.weights import Weights
from tests.test_trainer import make_trainer, sequences_and_batch
from tests.tiny_models import tiny_llama


class CopyingEngine:
    """Keeps copies of what it is given, as an engine in another process does."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.given: list[set[str]] = []

    async def load_weights(self, weights, version) -> None:
        new = {name: tensor.clone() for name, tensor in weights}
        self.given.append(set(new))
        self.weights |= new


def open_parts(trainer, engine, **options) -> Parts:
    return Parts(trainer=trainer, engine=engine, prompts=None, gate=None, teacher=None, want=None, save=SimpleNamespace, **options)


def open_weights(trainer, engine, **options) -> Weights:
    return Weights(open_parts(trainer, engine, **options), Timeline())


@pytest.mark.parametrize("with_lora", [False, True])
async def test_frozen_weights_are_pushed_once_and_the_engine_has_the_students_after_every_push(with_lora):
    model = tiny_llama()
    names = {name for name, _ in model.named_parameters()}
    if with_lora:
        add_lora(model, LoRAConfig(rank=2), base="base")
    trainer, engine = make_trainer(model), CopyingEngine()
    weights = open_weights(trainer, engine)
    for version in range(3):
        await weights.push(version)
        await weights.push(version)
        for name, tensor in trainer.weights():
            assert torch.equal(engine.weights[name], tensor), (version, name)
        trainer.train_step([sequences_and_batch(seed=version)[2]])
    first, *later = engine.given
    assert first == names
    frozen = {name for name in names if "norm" in name or "embed" in name} if with_lora else set()
    assert later == [names - frozen] * 2


async def test_a_push_tells_its_share_of_the_time_since_the_one_before():
    now = 100.0

    class SlowEngine:
        async def load_weights(self, weights, version) -> None:
            nonlocal now
            now += 4.0 + version

    parts = open_parts(make_trainer(tiny_llama()), SlowEngine())
    weights = Weights(parts, Timeline(lambda: now))
    await weights.push(0)
    assert weights.figures == {"push_seconds": 4.0}
    for version, passed, share in ((1, 95.0, 0.05), (2, 6.0, 0.5)):
        now += passed  # sampling and training
        await weights.push(version)
        assert weights.figures == {"push_seconds": 4.0 + version, "push_share": share}


async def test_an_engine_that_slept_is_given_weights_that_it_had(tmp_path):
    trainer, engine, naps = make_trainer(tiny_llama()), CopyingEngine(), []

    async def sleep() -> None:
        naps.append(len(engine.given))

    weights = open_weights(trainer, engine, sleep=sleep)
    await weights.push(0)
    await weights.push(0)
    await weights.sleep()
    await weights.sleep()
    await weights.push(0)
    await weights.push(0)
    assert (naps, len(engine.given)) == ([1], 2)


async def test_an_engine_with_the_trainers_own_tensors_is_told_the_version_alone():
    trainer, engine = make_trainer(tiny_llama()), CopyingEngine()
    weights = open_weights(trainer, engine, shares_weights=True)
    await weights.push(0)
    await weights.push(1)
    assert engine.given == [set(), set()]
