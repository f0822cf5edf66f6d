"""AdamW with moments in eight bits: updates as float64 makes them of what is stored, a quarter of the memory, exact to go on with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bbopd.config import ObjectiveConfig, TrainConfig
from bbopd.errors import CheckpointError
from bbopd.objectives import make_objective
from bbopd.trainer import Trainer, build_optimizer, load_checkpoint
from bbopd.trainer.checkpoint import moment_bytes
from tests.test_checkpoint import OBJECTIVE, batch_of, load, save
from tests.test_lora import adapted
from tests.tiny_models import tiny_llama

EIGHT_BITS = TrainConfig(lr=1e-2, warmup=0, optimizer="adamw_8bit", weight_decay=0.1)


def make_trainer(seed: int = 0, train: TrainConfig = EIGHT_BITS, hidden: int = 64) -> Trainer:
    model = tiny_llama(seed=seed, hidden=hidden)
    return Trainer(model, make_objective(OBJECTIVE), train=train, objective_config=OBJECTIVE, planned_steps=8)


def test_updates_and_moments_are_those_of_float64_from_what_was_stored():
    generator = torch.Generator().manual_seed(3)
    layers = nn.ModuleDict({"wide": nn.Linear(96, 64, bias=False), "bias": nn.Linear(1, 7)})
    optimizer = build_optimizer(layers, EIGHT_BITS)
    beta1, beta2 = EIGHT_BITS.betas

    def stored(parameter: nn.Parameter, number: int) -> torch.Tensor:
        state = optimizer.state[parameter]
        if not state:
            return torch.zeros(parameter.shape, dtype=torch.float64)
        codes = state[f"state{number}"]
        if codes.dtype == torch.float32:
            return codes.double()
        blocks = zip(codes.flatten().split(256), state[f"absmax{number}"], strict=True)
        table = state[f"qmap{number}"].double()
        return torch.cat([table[block.long()] * scale.double() for block, scale in blocks]).view(parameter.shape)

    for step in range(1, 6):
        expected = {}
        for parameter in layers.parameters():
            parameter.grad = 10.0 ** -(step % 3) * torch.randn(parameter.shape, generator=generator)
            g, decay = parameter.grad.double(), EIGHT_BITS.weight_decay if parameter.ndim > 1 else 0.0
            first = beta1 * stored(parameter, 1) + (1 - beta1) * g
            second = beta2 * stored(parameter, 2) + (1 - beta2) * g**2
            update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + EIGHT_BITS.eps)
            expected[parameter] = (parameter.detach().double() * (1 - EIGHT_BITS.lr * decay) - EIGHT_BITS.lr * update, first, second)
        optimizer.step()
        for parameter, (value, *moments) in expected.items():
            torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)
            for number, moment in enumerate(moments, start=1):
                is_in_eight_bits = parameter.numel() >= 4096
                limit = 0.02 * float(moment.abs().max()) if is_in_eight_bits else 1e-7
                assert float((stored(parameter, number) - moment).abs().max()) <= limit
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8, torch.float32}


def test_the_moments_take_a_quarter_of_the_memory():
    held = {}
    for name in ("adamw", "adamw_8bit"):
        trainer = make_trainer(train=EIGHT_BITS.model_copy(update={"optimizer": name}), hidden=128)
        trainer.train_step([batch_of(0)])
        held[name] = moment_bytes(trainer.optimizer)
    assert held["adamw_8bit"] / held["adamw"] == pytest.approx(0.25, abs=0.06)  # norms, and the tables of codes, are small only here


def test_a_run_goes_on_bit_for_bit(tmp_path):
    whole, first = make_trainer(), make_trainer()
    expected = [whole.train_step([batch_of(step)]) for step in range(6)]
    for step in range(3):
        first.train_step([batch_of(step)])
    folder = save(first, tmp_path)
    second = make_trainer(seed=9)
    load(folder, second)
    found = [second.train_step([batch_of(step)]) for step in range(3, 6)]
    assert [(one.loss, one.grad_norm) for one in found] == [(one.loss, one.grad_norm) for one in expected[3:]]
    for (name, a), (_, b) in zip(second.weights(), whole.weights(), strict=True):
        assert torch.equal(a, b), name
    assert any(state["state1"].dtype == torch.uint8 for state in second.optimizer.state.values())
    save(second, tmp_path)


@pytest.mark.parametrize(("saved", "now"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_moments_of_the_other_optimizer_are_refused(saved, now, tmp_path):
    first, second = (make_trainer(train=EIGHT_BITS.model_copy(update={"optimizer": name}), seed=4) for name in (saved, now))
    first.train_step([batch_of(0)])
    folder = save(first, tmp_path)
    before = [value.clone() for _, value in second.weights()]
    with pytest.raises(CheckpointError, match=r"moments of another optimizer: set train\.optimizer back"):
        load_checkpoint(folder, model=second.model, optimizer=second.optimizer)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, second.weights(), strict=True))


def test_adapters_may_be_trained_so():
    model = adapted(tiny_llama(hidden=64))
    objective = ObjectiveConfig(ramp=0)
    trainer = Trainer(model, make_objective(objective), train=EIGHT_BITS, objective_config=objective, planned_steps=8)
    losses = [trainer.train_step([batch_of(0)]).loss for _ in range(4)]
    assert losses[-1] < losses[0]
