"""One optimizer step: the same loss and gradient as an ordinary padded model, however the tokens are split, or no update at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from bbopd.config import ObjectiveConfig, TrainConfig
from bbopd.errors import ModelError, TrainingError
from bbopd.objectives import make_objective
from bbopd.trainer import Trainer, parameter_groups
from bbopd.types import FullTeacher
from tests.batches import VOCABULARY, pack, random_sequences, random_teacher
from tests.tiny_models import tiny_gemma2, tiny_llama, tiny_qwen2

TEMPERATURE = 2.0


def make_trainer(model, train: TrainConfig | None = None, objective: ObjectiveConfig | None = None, **options) -> Trainer:
    config = objective or ObjectiveConfig(alpha=0.3, temperature=TEMPERATURE, ramp=0)
    options = {"planned_steps": 20, **options}
    return Trainer(model, make_objective(config), train=train or TrainConfig(warmup=0, clip=1e9), objective_config=config, **options)


def sequences_and_batch(seed: int, count: int = 6):
    sequences = random_sequences(count, seed)
    teacher = random_teacher(sequences, seed + 100)
    return sequences, teacher, pack(sequences, teacher)


def padded_loss(model, sequences, teacher) -> torch.Tensor:
    """The formula of the objective over an ordinary left-to-right padded batch with dense logits: no packing, no fused op."""
    ids = torch.nn.utils.rnn.pad_sequence([one for one, _, _ in sequences], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one, _, _ in sequences], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask).logits
    ce, kd, labelled, signalled = 0.0, 0.0, 0, 0
    for row, (one, prompt, is_labelled), target in zip(logits, sequences, teacher, strict=True):
        z = row[prompt - 1 : len(one) - 1]
        p, q = F.log_softmax(target / TEMPERATURE, -1), F.log_softmax(z / TEMPERATURE, -1)
        kd = kd + TEMPERATURE**2 * (p.exp() * (p - q)).sum()
        signalled += len(z)
        if is_labelled:
            ce = ce + F.cross_entropy(z, one[prompt:], reduction="sum")
            labelled += len(z)
    return 0.3 * ce / labelled + 0.7 * kd / signalled


# With both betas 0 AdamW's update is -lr * g / (|g| + eps), which shows the gradient that reached the optimizer.
SHOWS_GRADIENT = TrainConfig(lr=1.0, warmup=0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0, clip=1e9)


@pytest.mark.parametrize(
    "make", [tiny_llama, lambda: tiny_llama(tied=False), tiny_qwen2, tiny_gemma2], ids=["llama", "untied", "qwen2", "gemma2"]
)
def test_packing_equals_padding(make):
    model = make()
    sequences, teacher, batch = sequences_and_batch(seed=1)
    expected = padded_loss(model, sequences, teacher)
    expected.backward()
    gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    model.zero_grad()
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, SHOWS_GRADIENT)
    step = trainer.train_step([batch])
    assert step.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert step.grad_norm == pytest.approx(float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm()), rel=1e-5)
    for name, value in trainer.weights():
        g = gradients[name]
        torch.testing.assert_close(value.double() - before[name], -g / (g.abs() + 1.0), rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("split", [[[0, 1, 2, 3], [4, 5]], [[5, 3, 1], [0], [2, 4]], [[1, 3, 5], [0, 2, 4]]], ids=["2", "3", "by label"])
def test_splitting_into_micro_batches_changes_nothing(split):
    sequences, teacher, whole = sequences_and_batch(seed=2)
    parts = [pack([sequences[i] for i in part], [teacher[i] for i in part]) for part in split]
    one, many = make_trainer(tiny_llama(), SHOWS_GRADIENT), make_trainer(tiny_llama(), SHOWS_GRADIENT)
    first, second = one.train_step([whole]), many.train_step(parts)
    for name in ("loss", "ce", "kd", "grad_norm"):
        assert getattr(second, name) == pytest.approx(getattr(first, name), rel=1e-5), name
    for name in ("tokens", "labelled_tokens", "signal_tokens", "rollout_tokens", "packed_tokens"):
        assert getattr(second, name) == getattr(first, name), name
    for (name, a), (_, b) in zip(one.weights(), many.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6, msg=name)


def test_the_metrics_are_the_terms_of_the_loss():
    sequences, _, batch = sequences_and_batch(seed=3)
    step = make_trainer(tiny_llama()).train_step([batch])
    assert step.loss == pytest.approx(0.3 * step.ce + 0.7 * step.kd, rel=1e-6)
    assert (step.step, step.ce_weight, step.kd_weight, step.lr) == (1, 0.3, pytest.approx(0.7), 2e-5)
    assert step.labelled_tokens + step.rollout_tokens == step.tokens == step.signal_tokens == batch.response_tokens
    assert step.packed_tokens == sum(len(ids) for ids, _, _ in sequences)
    assert step.teacher_tail_mass is None
    assert step.seconds > 0


def test_tail_mass_is_a_mean_over_the_tokens_of_the_step():
    sequences = random_sequences(4, 4)
    teacher = random_teacher(sequences, 5)
    objective = ObjectiveConfig(temperature=1.0, ramp=0)
    parts = [pack(sequences[:1], teacher[:1], top_k=8), pack(sequences[1:], teacher[1:], top_k=8)]
    step = make_trainer(tiny_llama(), objective=objective).train_step(parts)
    best = torch.cat(teacher).softmax(-1).topk(8, -1).values.sum(-1)
    assert step.teacher_tail_mass == pytest.approx(float((1 - best).mean()), rel=1e-4)


class TellsMore:
    """Forward KL that tells a mean, a largest value and a count of it, and keeps what it found."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.inner, self.found = make_objective(config), []

    def loss(self, *arguments, **options):
        out = self.inner.loss(*arguments, **options)
        self.found.append(out.kd)
        more = {"mean_kd": out.kd.mean(), "kd_max": out.kd.max(), "ratio_capped": (out.kd > 5).sum().float()}
        return dataclasses.replace(out, metrics={**out.metrics, **more})


def test_further_figures_of_an_objective_are_those_of_the_whole_step():
    sequences, teacher, _ = sequences_and_batch(seed=12)
    parts = [pack(sequences[:1], teacher[:1]), pack(sequences[1:], teacher[1:]), pack(sequences[:2], None)]  # the last has no signal
    config = ObjectiveConfig(temperature=1.0, ramp=0)
    objective = TellsMore(config)
    step = Trainer(tiny_llama(), objective, train=TrainConfig(warmup=0), objective_config=config, planned_steps=20).train_step(parts)
    kd_N = torch.cat(objective.found[:2])
    assert step.more["mean_kd"] == pytest.approx(kd_N.mean().item(), rel=1e-5)
    assert (step.more["kd_max"], step.more["ratio_capped"]) == (kd_N.max().item(), (kd_N > 5).sum().item())
    assert 0 < step.more["ratio_capped"] < len(kd_N)


def test_cross_entropy_alone_needs_no_teacher():
    batch = pack(random_sequences(4, 6), None)
    step = make_trainer(tiny_llama(), objective=ObjectiveConfig(name="sft")).train_step([batch])
    assert (step.kd, step.signal_tokens, step.kd_weight) == (0.0, 0, 0.0)
    assert step.loss == pytest.approx(step.ce) != 0


def test_a_step_of_rollouts_alone_has_no_ce():
    sequences = [one for one in random_sequences(6, 7) if not one[2]]
    step = make_trainer(tiny_llama()).train_step([pack(sequences, random_teacher(sequences, 8))])
    assert (step.ce, step.labelled_tokens) == (0.0, 0)
    assert step.loss == pytest.approx(0.7 * step.kd, rel=1e-6)


def test_training_brings_the_student_to_its_teacher():
    _, _, batch = sequences_and_batch(seed=9)
    trainer = make_trainer(tiny_llama(), TrainConfig(lr=1e-2, warmup=0), ObjectiveConfig(ce_weight=0.0, kd_weight=1.0, ramp=0))
    losses = [trainer.train_step([batch]).kd for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_schedules_move_with_the_steps():
    _, _, batch = sequences_and_batch(seed=10)
    train, objective = TrainConfig(lr=1e-3, warmup=2, schedule="linear"), ObjectiveConfig(alpha=0.5, ramp=2)
    trainer = make_trainer(tiny_llama(), train, objective, planned_steps=4)
    steps = [trainer.train_step([batch]) for _ in range(4)]
    assert [step.lr for step in steps] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    assert [step.kd_weight for step in steps] == [0.0, 0.25, 0.5, 0.5]
    assert [step.ce_weight for step in steps] == [0.5] * 4
    assert [step.step for step in steps] == [1, 2, 3, 4]


def test_clipping_bounds_the_gradient_that_is_applied():
    _, _, batch = sequences_and_batch(seed=11)
    free = TrainConfig(lr=1e-3, warmup=0, betas=(0.0, 0.0), eps=1e3, weight_decay=0.0, clip=1e9)  # linear in the gradient
    loose, tight = (
        make_trainer(tiny_llama(), free),
        make_trainer(tiny_llama(), free.model_copy(update={"clip": 0.01, "eps": 10.0, "lr": 1e3})),
    )
    norm = loose.train_step([batch]).grad_norm
    before = {name: value.clone() for name, value in tight.weights()}
    assert tight.train_step([batch]).grad_norm == pytest.approx(norm)  # reported before clipping
    applied = torch.stack([((value - before[name]) * 10.0 / 1e3).double().norm() for name, value in tight.weights()]).norm()
    assert float(applied) == pytest.approx(0.01, rel=1e-2)


class BrokenGradient(torch.autograd.Function):
    """A value that is fine and a gradient that is not."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, torch.nan)


class NanGradientLlama(type(tiny_llama().model)):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = BrokenGradient.apply(output.last_hidden_state)
        return output


def test_a_nan_gradient_leaves_weights_and_optimizer_as_they_were():
    _, _, batch = sequences_and_batch(seed=12)
    model = tiny_llama()
    trainer = make_trainer(model)
    trainer.train_step([batch])
    weights = {name: value.clone() for name, value in trainer.weights()}
    moments = [entry["exp_avg"].clone() for entry in trainer.optimizer.state.values()]
    model.model.__class__ = NanGradientLlama
    with pytest.raises(TrainingError, match="gradient norm of update 2 is nan, so the update was not applied"):
        trainer.train_step([batch])
    assert all(torch.equal(value, weights[name]) for name, value in trainer.weights())
    assert all(torch.equal(entry["exp_avg"], old) for entry, old in zip(trainer.optimizer.state.values(), moments, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (trainer.steps_done, model.training) == (1, False)


def test_a_diverged_student_is_not_updated():
    _, _, batch = sequences_and_batch(seed=13)
    trainer = make_trainer(tiny_llama())
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = torch.inf
    with pytest.raises(TrainingError):
        trainer.train_step([batch])
    assert trainer.steps_done == 0


def test_bfloat16_compute_is_close_and_masters_stay_float32():
    _, _, batch = sequences_and_batch(seed=14)
    exact = make_trainer(tiny_llama()).train_step([batch])
    trainer = make_trainer(tiny_llama(), compute_dtype=torch.bfloat16)
    step = trainer.train_step([batch])
    assert step.loss == pytest.approx(exact.loss, rel=0.02)
    assert step.loss != exact.loss
    assert step.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)
    assert all(value.dtype == torch.float32 for _, value in trainer.weights())


def test_bfloat16_reaches_the_products_of_the_loss():
    """The residual stream stays float32 under autocast; a float32 operand would make the head's products float32, several times slower."""

    class Recording:
        def __init__(self, objective):
            self.objective, self.dtypes = objective, set()

        def loss(self, hidden_ND, head, *others, **options):
            self.dtypes |= {hidden_ND.dtype, head.weight_VD.dtype}
            return self.objective.loss(hidden_ND, head, *others, **options)

    _, _, batch = sequences_and_batch(seed=14)
    trainer = make_trainer(tiny_llama(), compute_dtype=torch.bfloat16)
    trainer.objective = recording = Recording(trainer.objective)
    trainer.train_step([batch])
    assert recording.dtypes == {torch.bfloat16}


def test_activation_checkpointing_changes_no_value():
    _, _, batch = sequences_and_batch(seed=15)
    plain = make_trainer(tiny_llama()).train_step([batch])
    checkpointed = make_trainer(tiny_llama(), activation_checkpointing=True).train_step([batch])
    assert checkpointed.loss == pytest.approx(plain.loss, rel=1e-6)
    assert checkpointed.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)


def test_the_model_writes_between_steps_as_ever():
    _, _, batch = sequences_and_batch(seed=16)
    trainer = make_trainer(tiny_llama(), activation_checkpointing=True)
    trainer.train_step([batch])
    prompt = torch.tensor([[5, 6, 7]])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(trainer.model.generate(prompt, **options), trainer.model.generate(prompt, **options, use_cache=False))


def test_half_precision_masters_are_refused():
    with pytest.raises(ModelError, match=r"is torch\.bfloat16; training keeps float32 masters"):
        make_trainer(tiny_llama().bfloat16())


@pytest.mark.parametrize("exempt", ["biases_and_norms", "biases"])
def test_decay_groups(exempt):
    model = tiny_qwen2()  # biases on q, k, v; an untied head
    model.model.embed_tokens.weight.requires_grad_(False)
    groups = parameter_groups(model, TrainConfig(weight_decay=0.25, decay_exempt=exempt))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    is_bias, is_norm = (lambda name: name.endswith(".bias")), (lambda name: "norm" in name)
    assert {name for name in free if is_bias(name)} == {name for name in names.values() if is_bias(name)} != set()
    assert {name for name in names.values() if is_norm(name)} <= set(free if exempt == "biases_and_norms" else decayed)
    assert "lm_head.weight" in decayed
    assert "model.embed_tokens.weight" not in decayed + free
    assert len(decayed) + len(free) == len(names) - 1


def test_a_tied_head_is_one_weight():
    model = tiny_llama(tied=True)
    trainer = make_trainer(model)
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    assert "lm_head.weight" not in dict(trainer.weights())
    assert dict(trainer.weights())["model.embed_tokens.weight"].data_ptr() == model.lm_head.weight.data_ptr()


def test_tokens_without_a_signal_do_not_count():
    sequences, teacher, batch = sequences_and_batch(seed=17)
    valid = torch.arange(batch.response_tokens) % 3 != 0
    logits = torch.cat(teacher)
    marked = dataclasses.replace(batch, teacher=FullTeacher(logits=logits, valid=valid))
    step = make_trainer(tiny_llama()).train_step([marked])
    model = tiny_llama()
    hidden = torch.cat([model(input_ids=ids[None]).logits[0, prompt - 1 : len(ids) - 1] for ids, prompt, _ in sequences])
    p, q = F.log_softmax(logits / TEMPERATURE, -1), F.log_softmax(hidden / TEMPERATURE, -1)
    expected = TEMPERATURE**2 * (p.exp() * (p - q)).sum(-1)[valid].mean().detach()
    assert step.signal_tokens == int(valid.sum())
    assert step.kd == pytest.approx(float(expected), rel=1e-5)
    assert logits.shape[1] == VOCABULARY
