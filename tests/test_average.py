"""The average of the weights: the recurrence in float64, no memory for what is frozen, and a checkpoint that goes on exactly."""

from __future__ import annotations

import pytest
import torch

from bbopd.config import RunConfig
from bbopd.errors import CheckpointError
from bbopd.modeling import trained_bytes
from bbopd.pipeline.student import bytes_beside
from bbopd.trainer import Trainer, load_beside, load_checkpoint, save_checkpoint
from bbopd.trainer.average import WeightAverage
from tests.test_lora import adapted
from tests.test_trainer import make_trainer, sequences_and_batch
from tests.tiny_models import tiny_llama, tiny_tokenizer


def with_adapters():
    torch.manual_seed(0)  # A begins at random
    return adapted(tiny_llama())


MODELS = pytest.mark.parametrize("make", [tiny_llama, with_adapters], ids=["whole", "lora"])


def trainer_of(model, decay: float) -> Trainer:
    return make_trainer(model, average=WeightAverage(model, decay))


def train(trainer: Trainer, steps: range) -> None:
    for step in steps:
        trainer.train_step([sequences_and_batch(seed=60 + step)[2]])


@MODELS
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 1.0])
def test_it_is_the_recurrence_over_the_weights_of_every_update(make, decay):
    model = make()
    trainer = trainer_of(model, decay)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    first = {name: model.get_parameter(name).detach().clone() for name in names}
    expected = {name: value.double() for name, value in first.items()}
    for step in range(6):
        train(trainer, range(step, step + 1))
        expected = {name: decay * old + (1 - decay) * model.get_parameter(name).detach().double() for name, old in expected.items()}
    found = trainer.average.tensors()
    assert list(found) == names
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7, msg=name)
        moved = model.get_parameter(name) if decay == 0.0 else first[name]
        assert torch.equal(value, moved) == (decay in (0.0, 1.0)), name
    assert not any(parameter.requires_grad for parameter in trainer.average.model.parameters() if parameter not in set(model.parameters()))


def test_of_adapters_these_alone_are_held_twice():
    model = adapted(tiny_llama())
    average = WeightAverage(model, 0.9)
    own = {id(parameter) for parameter in model.parameters()}
    more = sum(parameter.nbytes for parameter in average.model.parameters() if id(parameter) not in own)
    assert more == trained_bytes(model) < 0.5 * sum(parameter.nbytes for parameter in model.parameters())


@MODELS
def test_a_run_goes_on_with_the_average_it_had(make, tmp_path):
    whole, first = trainer_of(make(), 0.9), trainer_of(make(), 0.9)
    train(whole, range(5))
    train(first, range(3))
    folder = save_checkpoint(
        tmp_path,
        3,
        model=first.model,
        tokenizer=tiny_tokenizer(),
        optimizer=first.optimizer,
        state={},
        keep=2,
        beside={"average": first.average.tensors()},
    )
    second = trainer_of(make(), 0.9)
    train(second, range(7, 8))  # other weights, until the checkpoint comes
    load_checkpoint(folder, model=second.model, optimizer=second.optimizer)
    second.average.load_tensors(load_beside(folder), "average")
    second.steps_done = 3
    train(second, range(3, 5))
    for name, value in whole.average.tensors().items():
        assert torch.equal(second.average.tensors()[name], value), name


def test_a_checkpoint_of_another_run_is_refused():
    average = WeightAverage(tiny_llama(), 0.9)
    with pytest.raises(CheckpointError, match=r"no average of the weights: set teacher\.self\.weights back"):
        average.load_tensors({}, "average")
    with pytest.raises(CheckpointError, match=r"does not fit \(they are of another model than LlamaForCausalLM"):
        average.load_tensors({"average": WeightAverage(tiny_llama(hidden=64), 0.9).tensors()}, "average")


def test_room_on_the_disk_is_asked_for_what_lies_beside_the_student():
    model = adapted(tiny_llama())
    own = {"teacher": {"self": {"context": "{prompt}", "weights": "ema"}}, "rollouts": {"max_staleness": 0}}
    game = {
        "teacher": {"target": "grpc://localhost:1", "signal": "text"},
        "objective": {"name": "gad"},
        "train": {"cold_start_tokens": 1},
        "rollouts": {"per_update": 8},
    }
    for sections, copies in ((own, 1), (game, 4), ({"teacher": {"target": "grpc://localhost:1"}}, 0)):
        config = RunConfig.model_validate({"student": {"model": "x"}, **sections})
        assert bytes_beside(config, model) == copies * trained_bytes(model)
