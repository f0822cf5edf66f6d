"""A teacher that reads more: prompts by hand, signals at the right tokens, the student's own live weights, and what it refuses."""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bbopd.config import RunConfig, SelfConfig, TrainConfig
from bbopd.config_file import load_config
from bbopd.data.streams import each
from bbopd.errors import DataError, TeacherError
from bbopd.modeling import output_head
from bbopd.modeling.response_logprobs import response_logprobs
from bbopd.pipeline.parts import at_once, in_executor
from bbopd.pipeline.teacher import own_teacher
from bbopd.teachers.privileged import Context
from bbopd.types import Prompt, Rollout, SignalSpec
from tests.test_lora import adapted
from tests.test_trainer import make_trainer, sequences_and_batch
from tests.tiny_models import tiny_gemma2, tiny_llama, tiny_qwen2, tiny_tokenizer

HINT = SelfConfig(context="Known: {reference}\nAsked: {prompt}")
TOKENIZER = tiny_tokenizer()


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def teacher_of(model, config: SelfConfig = HINT, dtype: torch.dtype = torch.float32):
    return own_teacher(config, model, TOKENIZER, compute_dtype=dtype, run=at_once)


def random_rollouts(seed: int, count: int = 4) -> list[Rollout]:
    random = np.random.default_rng(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(int(token) for token in random.integers(3, 262, random.integers(least, most)))

    def rollout(number: int) -> Rollout:
        prompt = Prompt(f"p{number}", ids(1, 9), reference_ids=(*encode(f"it is {number * number}"), 2))
        return Rollout(f"r{number}", prompt, ids(1, 12), candidate_ids=None, draw=number)

    return [rollout(number) for number in range(count)]


def score(teacher, rollouts, want):
    async def all_of_them():
        return {scored.rollout.rollout_id: scored async for scored in teacher.score(each(rollouts), want)}

    return asyncio.run(all_of_them())


# ---------------------------------------------------------------- what it reads


def test_of_ids_the_prompt_stays_as_it_is_and_texts_stand_around_it():
    prompt = Prompt("p", (7, 8, 9), reference_ids=(*encode("the end"), 2))
    assert Context("a {reference}: {prompt} b", TOKENIZER).ids(prompt, prompt.reference_ids) == (
        *encode("a the end: "),
        *(7, 8, 9),
        *encode(" b"),
    )
    assert Context("{prompt}", TOKENIZER).ids(prompt, None) == (7, 8, 9)
    assert Context("{reference}{prompt}", TOKENIZER).ids(prompt, encode("{prompt}")) == (*encode("{prompt}"), 7, 8, 9)


def test_what_a_tokenizer_puts_in_front_stays_in_front():
    class WithBos:
        """The tiny tokenizer, with a token in front as Llama's has."""

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [0] * add_special_tokens + list(encode(text))}

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return str(TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens))

    context = Context("see: {prompt}", WithBos())
    assert context.ids(Prompt("p", (0, 7, 8)), None) == (0, *encode("see: "), 7, 8)
    assert context.ids(Prompt("p", (7, 8)), None) == (*encode("see: "), 7, 8)


def test_of_messages_the_filled_template_is_the_last_question():
    prompt = Prompt(
        "p", (1,), reference_ids=(*encode("four"), 2), messages=(("system", "s"), ("user", "2+2?"), ("assistant", "?"), ("user", "say"))
    )
    found = Context("{prompt} Hint: {reference}", TOKENIZER).ids(prompt, prompt.reference_ids)
    messages = [{"role": role, "content": content} for role, content in (*prompt.messages[:3], ("user", "say Hint: four"))]
    assert found == tuple(TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    "make", [tiny_llama, tiny_qwen2, tiny_gemma2, lambda **how: adapted(tiny_llama(**how))], ids=["llama", "qwen2", "gemma2", "lora"]
)
def test_every_row_is_of_its_token_after_the_longer_prompt(make):
    student = make(vocab_size=262)
    rollouts = random_rollouts(seed=1)
    exact = copy.deepcopy(student).double()
    expected = {}
    for rollout in rollouts:
        hint = (*encode(f"Known: it is {rollout.draw**2}\nAsked: "), *rollout.prompt.token_ids)
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([[*hint, *rollout.token_ids]]), use_cache=False).logits[0]
        expected[rollout.rollout_id] = logits[len(hint) - 1 : -1].double()
    teacher = teacher_of(student)
    full = score(teacher, rollouts, SignalSpec("full"))
    sampled = score(teacher, rollouts, SignalSpec("sampled", temperature=0.7))
    topk = score(teacher, rollouts, SignalSpec("topk", top_k=5))
    for rollout in rollouts:
        z = expected[rollout.rollout_id]
        assert full[rollout.rollout_id].rollout is rollout, "the student is trained after its own prompt"
        found = torch.from_numpy(full[rollout.rollout_id].signal.logits).double()
        torch.testing.assert_close(found, z - z.amax(1, keepdim=True), rtol=2e-3, atol=2e-3)  # float16
        chosen = (z / 0.7).log_softmax(1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(sampled[rollout.rollout_id].signal.sampled).double(), chosen, rtol=1e-4, atol=1e-4)
        best = z.log_softmax(1).topk(5, dim=1).values
        found = np.sort(topk[rollout.rollout_id].signal.logprobs.astype(float), axis=1)[:, ::-1]
        np.testing.assert_allclose(found, best.numpy(), rtol=1e-4, atol=1e-4)


def test_a_labelled_sequence_is_itself_the_known_answer():
    student = tiny_llama(vocab_size=262)
    (rollout,) = random_rollouts(seed=2, count=1)
    answer = encode("it is 0")
    labelled = Rollout("r", Prompt("p", rollout.prompt.token_ids), (*answer, 2), origin="reference")
    by_hand = Rollout("r", Prompt("p", rollout.prompt.token_ids, reference_ids=answer), (*answer, 2))
    found, expected = (score(teacher_of(student), [one], SignalSpec("sampled"))["r"].signal.sampled for one in (labelled, by_hand))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_hint_the_student_agrees_with_itself_whatever_it_has_learned(dtype):
    student = tiny_llama()
    before = student.generation_config
    teacher = teacher_of(student, SelfConfig(context="{prompt}"), dtype)
    assert student.generation_config is before
    trainer = make_trainer(student, TrainConfig(lr=1e-2, warmup=0), compute_dtype=dtype)
    rollouts = random_rollouts(seed=3)
    first = score(teacher, rollouts, SignalSpec("sampled"))
    for step in range(3):
        trainer.train_step([sequences_and_batch(seed=step)[2]])
    found = score(teacher, rollouts, SignalSpec("sampled"))
    for rollout in rollouts:
        own = response_logprobs(student, output_head(student, 262), [rollout], compute_dtype=dtype)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        np.testing.assert_allclose(found[rollout.rollout_id].signal.sampled, own, atol=tolerance)
        assert np.abs(found[rollout.rollout_id].signal.sampled - first[rollout.rollout_id].signal.sampled).max() > 0.1


def test_asked_while_it_trains_every_answer_is_of_the_weights_between_two_steps():
    rollouts = random_rollouts(seed=4, count=12)
    want, train, steps = SignalSpec("sampled"), TrainConfig(lr=1e-2, warmup=0), 4
    student, twin = tiny_llama(), tiny_llama()
    versions = [score(teacher_of(twin), rollouts, want)]
    trainer = make_trainer(twin, train)
    for step in range(steps):
        trainer.train_step([sequences_and_batch(seed=step)[2]])
        versions.append(score(teacher_of(twin), rollouts, want))

    async def both() -> list[tuple[str, np.ndarray]]:
        with ThreadPoolExecutor(1) as executor:
            run = in_executor(executor)
            learner = make_trainer(student, train)
            teacher = own_teacher(HINT, student, TOKENIZER, compute_dtype=torch.float32, run=run)
            found = []

            async def learn() -> None:
                for step in range(steps):
                    await run(learner.train_step, [sequences_and_batch(seed=step)[2]])

            learning = asyncio.create_task(learn())
            for rollout in rollouts:
                async for scored in teacher.score(each([rollout]), want):
                    found.append((scored.rollout.rollout_id, scored.signal.sampled))
            await learning
            return found

    heard = []
    for name, signal in asyncio.run(both()):
        fits = [number for number, told in enumerate(versions) if np.allclose(told[name].signal.sampled, signal, atol=1e-4)]
        assert len(fits) == 1, name
        heard += fits
    assert heard == sorted(heard)
    assert len(set(heard)) > 1, "it was asked while it learned"


# ---------------------------------------------------------------- what is refused


def test_prompts_that_have_no_answer_or_leave_no_room_are_refused():
    teacher = teacher_of(tiny_llama(vocab_size=262, max_positions=64))
    known = Prompt("p", (5, 6, 7), reference_ids=encode("yes"))
    assert teacher.check_prompts([known], max_new_tokens=20) == len(encode("Known: yes\nAsked: ")) + 3 + 20
    with pytest.raises(DataError, match=r"no answer to prompt q is known: add responses"):
        teacher.check_prompts([known, Prompt("q", (5,))], max_new_tokens=20)
    with pytest.raises(TeacherError, match=r"prompt p has, with teacher\.self\.context and an answer, up to \d+ tokens.*takes 64"):
        teacher.check_prompts([known], max_new_tokens=60)
    with pytest.raises(DataError, match="prompt c has no message of a user"):
        teacher.check_prompts([Prompt("c", (5,), reference_ids=(6,), messages=(("system", "s"),))], max_new_tokens=1)


@pytest.mark.parametrize(
    ("teacher", "sections", "said"),
    [
        ({"context": "no place"}, {}, r"needs one \{prompt\}"),
        ({"context": "{prompt}{prompt}"}, {}, r"needs one \{prompt\}"),
        ({"ema_decay": 1.5}, {}, "ema_decay"),
        ({}, {"teacher": {"target": "grpc://localhost:1"}}, "give exactly one of target"),
        ({}, {"teacher": {"signal": "text"}}, "own texts teach it nothing"),
        ({}, {"teacher": {"cache": {"path": "x"}}}, "cache with self"),
        ({}, {"teacher": {"writes_labels": True}}, "writes_labels with self"),
        ({}, {"teacher": {"prices": {"prompt": 1.0}}}, "prices is for a teacher elsewhere"),
        ({}, {"rollouts": {"max_staleness": 1}}, r"cannot write and be asked about it at the same time; set rollouts\.max_staleness=0"),
        ({}, {"objective": {"name": "aligned", "temperature": 1.0}, "teacher": {"topk": 8}}, "nothing to align"),
    ],
)
def test_settings_that_cannot_work_are_refused(teacher, sections, said):
    own = {"self": {"context": "{prompt}", **teacher}}
    data = {"student": {"model": "x"}, "rollouts": {"max_staleness": 0}, **sections}
    with pytest.raises(ValidationError, match=said):
        RunConfig.model_validate({**data, "teacher": {**own, **sections.get("teacher", {})}})


def test_the_ready_file_of_settings_is_valid():
    config = load_config(Path(__file__).parents[1] / "configs" / "self.yaml")
    assert (config.teacher.self.weights, config.student.quantize, config.train.optimizer) == ("ema", "nf4", "adamw_8bit")
    assert config.student.lora is not None
