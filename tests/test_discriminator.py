"""The discriminator: packed scores and gradients as of ordinary float64 forward passes, learning, and going on from saved tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from bbopd.config import TrainConfig
from bbopd.errors import TrainingError
from bbopd.modeling import merge_lora
from bbopd.trainer.discriminator import Contest, Discriminator
from tests.test_lora import adapted
from tests.tiny_models import tiny_gemma2, tiny_llama, tiny_qwen2

VOCABULARY = 320
# With both betas 0 AdamW's update is -lr * g / (|g| + eps), which shows the gradient that reached the optimizer.
SHOWS_GRADIENT = TrainConfig(warmup=0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0, clip=1e9)
MODELS = pytest.mark.parametrize(
    "make", [tiny_llama, lambda: tiny_llama(tied=False), tiny_qwen2, tiny_gemma2], ids=["llama", "untied", "qwen2", "gemma2"]
)


def random_contests(seed: int, prompts: int = 3, longest: int = 12) -> list[Contest]:
    random = torch.Generator().manual_seed(seed)

    def ids() -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (), generator=random))
        return tuple(torch.randint(0, VOCABULARY, (length,), generator=random).tolist())

    return [Contest(ids(), ids(), tuple(ids() for _ in range(1 + index))) for index in range(prompts)]


def plain_scores(model, head, contests) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """One sequence at a time through the model as transformers made it."""

    def score(prompt, answer):
        output = model.get_decoder()(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False)
        return output.last_hidden_state[0, -1] @ head

    teacher = torch.stack([score(one.prompt, one.teacher) for one in contests])
    student = torch.stack([score(one.prompt, answer) for one in contests for answer in one.students])
    return teacher, student, [index for index, one in enumerate(contests) for _ in one.students]


@MODELS
@pytest.mark.parametrize("micro_batch_tokens", [4096, 40])
def test_scores_and_gradient_are_those_of_plain_forward_passes(make, micro_batch_tokens):
    contests, student = random_contests(seed=1), make()
    train = SHOWS_GRADIENT.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
    discriminator = Discriminator(student, train=train, learning_rate=1.0)
    before = {name: tensor.double() for name, tensor in discriminator.tensors().items()}
    head = before["weights/head.weight"][0].clone().requires_grad_()
    oracle = copy.deepcopy(student).double()
    teacher, answers, prompt = plain_scores(oracle, head, contests)
    scores = discriminator.score(contests, seed=5)
    torch.testing.assert_close(scores.teacher.double(), teacher.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.student.double(), answers.detach(), rtol=1e-4, atol=1e-5)
    assert scores.prompt.tolist() == prompt
    loss = -F.logsigmoid(teacher[prompt] - answers).mean()
    loss.backward()
    figures = discriminator.learn(contests, scores, seed=5)
    assert figures["discriminator_loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {f"weights/body.{name}": one.grad for name, one in oracle.get_decoder().named_parameters()} | {
        "weights/head.weight": head.grad[None]
    }
    norm = torch.stack([one.norm() for one in expected.values()]).norm()
    assert figures["discriminator_grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    after = discriminator.tensors()
    for name, g in expected.items():
        torch.testing.assert_close(after[name].double() - before[name], -g / (g.abs() + 1.0), rtol=1e-2, atol=5e-6, msg=name)


def test_order_and_packing_change_no_score():
    contests = random_contests(seed=2, prompts=5)
    discriminator = Discriminator(tiny_llama(), train=TrainConfig(micro_batch_tokens=30), learning_rate=1e-3)
    first, other = discriminator.score(contests, seed=1), discriminator.score(contests, seed=2)
    alone = [discriminator.score([contest], seed=0) for contest in contests]
    torch.testing.assert_close(first.student, other.student, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.teacher, torch.cat([one.teacher for one in alone]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.student, torch.cat([one.student for one in alone]), rtol=1e-5, atol=1e-6)


def test_it_learns_whose_words_are_whose_and_leaves_the_student_alone():
    """The teacher writes even tokens, the student odd ones; on answers never seen it tells them apart."""

    def contests(seed: int) -> list[Contest]:
        return [
            Contest(
                one.prompt,
                tuple(token // 2 * 2 for token in one.teacher),
                tuple(tuple(token // 2 * 2 + 1 for token in answer) for answer in one.students),
            )
            for one in random_contests(seed, prompts=6)
        ]

    student = tiny_llama(tied=False)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    discriminator = Discriminator(student, train=TrainConfig(), learning_rate=3e-3)
    start = discriminator.score(contests(99), seed=0).accuracy()
    for step in range(60):
        shown = contests(step)
        discriminator.learn(shown, discriminator.score(shown, seed=step), seed=step)
    unseen = discriminator.score(contests(99), seed=0)
    assert unseen.accuracy() > 0.95 > start
    assert float(unseen.margins.mean()) > 1.0
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())


def test_bfloat16_multiplies_and_float32_is_kept():
    contests = random_contests(seed=3)
    exact = Discriminator(tiny_llama(), train=TrainConfig(), learning_rate=1e-3)
    rounded = Discriminator(tiny_llama(), train=TrainConfig(), learning_rate=1e-3, compute_dtype=torch.bfloat16)
    a, b = exact.score(contests, seed=0), rounded.score(contests, seed=0)
    assert a.student.dtype == b.student.dtype == torch.float32
    difference = float((a.student - b.student).abs().max())
    assert 0 < difference < 0.05 * float(a.student.abs().max())
    rounded.learn(contests, b, seed=0)
    assert {tensor.dtype for tensor in rounded.tensors().values()} == {torch.float32}


def test_going_on_from_its_tensors_repeats_what_it_would_have_done():
    def teach(discriminator: Discriminator, steps: range) -> list[float]:
        losses = []
        for step in steps:
            contests = random_contests(seed=step)
            losses.append(discriminator.learn(contests, discriminator.score(contests, seed=step), seed=step)["discriminator_loss"])
        return losses

    train = TrainConfig(micro_batch_tokens=50)
    whole = Discriminator(tiny_llama(), train=train, learning_rate=1e-3)
    expected = teach(whole, range(6))
    first = Discriminator(tiny_llama(), train=train, learning_rate=1e-3)
    teach(first, range(3))
    tensors = {name: tensor.clone() for name, tensor in first.tensors().items()}
    again = Discriminator(tiny_llama(seed=4), train=train.model_copy(update={"seed": 9}), learning_rate=1e-3)
    again.load_tensors(tensors)
    assert teach(again, range(3, 6)) == expected[3:]
    with pytest.raises(ValueError, match="another model"):
        Discriminator(tiny_llama(hidden=64), train=train, learning_rate=1e-3).load_tensors(tensors)


def test_activations_may_be_made_again_in_the_backward_pass():
    contests = random_contests(seed=6)
    kept, again = (Discriminator(tiny_llama(), train=SHOWS_GRADIENT, learning_rate=1.0) for _ in range(2))
    checkpointed = tiny_llama()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    again = Discriminator(checkpointed, train=SHOWS_GRADIENT, learning_rate=1.0)
    for one in (kept, again):
        one.learn(contests, one.score(contests, seed=0), seed=0)
    for name, tensor in kept.tensors().items():
        torch.testing.assert_close(again.tensors()[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_one_that_has_diverged_says_so_and_is_not_updated():
    contests = random_contests(seed=7)
    discriminator = Discriminator(tiny_llama(), train=TrainConfig(), learning_rate=1e-3)
    scores = discriminator.score(contests, seed=0)
    broken = {name: tensor.clone() for name, tensor in discriminator.tensors().items()}
    broken["weights/head.weight"].fill_(float("nan"))
    discriminator.load_tensors(broken)
    assert scores.is_finite
    assert not discriminator.score(contests, seed=0).is_finite
    with pytest.raises(TrainingError, match=r"gradient norm is nan"):
        discriminator.learn(contests, scores, seed=0)
    assert all(torch.equal(tensor, broken[name]) or "head" in name for name, tensor in discriminator.tensors().items())


def test_beside_a_student_with_adapters_it_trains_adapters_of_its_own_on_the_same_body():
    contests, student = random_contests(seed=8), adapted(tiny_llama())
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    discriminator = Discriminator(student, train=SHOWS_GRADIENT, learning_rate=1.0)
    own = {name: tensor.clone() for name, tensor in discriminator.tensors().items()}
    assert {name.removeprefix("weights/body.") for name in own} == {"weights/head.weight"} | {
        name.removeprefix("model.") for name in before if "lora_" in name
    }
    head = own["weights/head.weight"][0].double()
    dense = copy.deepcopy(student)
    merge_lora(dense)
    teacher, answers, prompt = plain_scores(dense.double(), head, contests)
    scores = discriminator.score(contests, seed=5)
    torch.testing.assert_close(scores.teacher.double(), teacher.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.student.double(), answers.detach(), rtol=1e-4, atol=1e-5)

    exact = copy.deepcopy(student).double()  # plain forward passes through the adapters, for their gradients
    teacher, answers, prompt = plain_scores(exact, head.requires_grad_(), contests)
    (-F.logsigmoid(teacher[prompt] - answers).mean()).backward()
    discriminator.learn(contests, scores, seed=5)
    after = discriminator.tensors()
    for name, parameter in exact.named_parameters():
        if "lora_" in name:
            g, key = parameter.grad, f"weights/body.{name.removeprefix('model.')}"
            torch.testing.assert_close(after[key].double() - own[key].double(), -g / (g.abs() + 1.0), rtol=1e-2, atol=5e-6, msg=name)
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())

    changed = discriminator.score(contests, seed=5)
    again = Discriminator(student, train=SHOWS_GRADIENT.model_copy(update={"seed": 3}), learning_rate=1.0)
    again.load_tensors({name: tensor.clone() for name, tensor in after.items()})
    assert torch.equal(again.score(contests, seed=5).student, changed.student)
    assert float((changed.student - scores.student).abs().max()) > 0.01
