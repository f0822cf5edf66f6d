"""Learning from what a teacher of another tokenizer writes: text in, text out, each side with its own tokens and chat template."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bbopd.config import ObjectiveConfig, RunConfig, TeacherConfig
from bbopd.data.assemble import assemble
from bbopd.data.streams import each
from bbopd.errors import ConfigError, TeacherError
from bbopd.modeling import load_tokenizer
from bbopd.objectives import check_offer, make_objective, signal_for
from bbopd.pipeline.cycle import as_labelled
from bbopd.rpc.codec import decode_completion, decode_prompt, encode_completion, encode_prompt
from bbopd.rpc.limits import RefusedError
from bbopd.rpc.server import start_server
from bbopd.rpc.tensors import encode_tensor
from bbopd.teachers.answer_store import AnswerStore
from bbopd.teachers.cache import CachedTeacher
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.teachers.remote import RemoteTeacher
from bbopd.teachers.written import WritingTeacher
from bbopd.types import Completion, Offer, Prompt, Sampling, SignalSpec, TeacherInfo
from tests.doctor_page import OTHER_MERGES, Case, Teacher, examine_case, make_folders
from tests.test_any_vocabulary import TOKENS, session_of
from tests.tiny_models import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.timeout(600)
TEXT = SignalSpec("text")


class Echo(HFBackend):
    """Its answer to a prompt is what it was asked, in capitals, after its own template; ``quiet`` prompts get an end and no text."""

    def __init__(self) -> None:
        super().__init__(tiny_llama(300, seed=3), tiny_tokenizer(OTHER_MERGES))
        self.asked: list[tuple[int, ...]] = []

    def generate(self, prompts, sampling):
        self.asked.extend(prompt.token_ids for prompt in prompts)
        texts = [self._tokenizer.decode(prompt.token_ids) for prompt in prompts]
        answers = ["" if "quiet" in text else text.upper() for text in texts]
        ids = [(*self._tokenizer(answer)["input_ids"], 2)[: sampling.max_new_tokens] for answer in answers]
        reasons = ["stop" if one[-1] == 2 else "length" for one in ids]
        return [
            Completion(prompt, one, self._tokenizer.decode(one, skip_special_tokens=True), reason)
            for prompt, one, reason in zip(prompts, ids, reasons, strict=True)
        ]


async def written(teacher, prompts, **options):
    options = {"max_seq_len": 200, "shares_ids": False} | options
    writing = WritingTeacher(teacher, tiny_tokenizer(), Sampling(120), **options)
    rollouts = [as_labelled(prompt, draw=number) for number, prompt in enumerate(prompts)]
    scored = [one async for one in writing.score(each(rollouts), TEXT)]
    return writing, sorted(scored, key=lambda one: one.rollout.draw)


def question(name: str, **fields) -> Prompt:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(fields["text"])["input_ids"] if "text" in fields else tokenizer("hello")["input_ids"]
    return Prompt(name, tuple(ids), (2,), **fields)


async def test_each_side_reads_and_writes_by_its_own_tokenizer_and_template():
    backend, tokenizer = Echo(), tiny_tokenizer()
    server = await start_server(backend)
    teacher = await RemoteTeacher.connect(f"grpc://127.0.0.1:{server.port}")
    assert teacher.info.takes_text
    prompts = [
        question("text", text="out of the thing"),
        question("chat", messages=(("system", "the outer"), ("user", "in?"))),
        Prompt("window", tuple(tokenizer("the line about")["input_ids"]), (2,)),
        question("none", text="quiet"),
        question("text", text="out of the thing"),
    ]
    try:
        writing, scored = await written(teacher, prompts)
        theirs = tiny_tokenizer(OTHER_MERGES)
        template = "<|im_start|>system\nthe outer<|im_end|>\n<|im_start|>user\nin?<|im_end|>\n<|im_start|>assistant\n"
        expected = ["out of the thing", template, "the line about", "quiet"]
        assert sorted(backend.asked) == sorted(tuple(theirs(text)["input_ids"]) for text in expected), "each once, in the teacher's own ids"
        assert [scored[0].rollout.token_ids, scored[4].rollout.token_ids] == [(*tokenizer("OUT OF THE THING")["input_ids"], 2)] * 2
        assert tokenizer.decode(scored[1].rollout.token_ids[:-1]).startswith("<|IM_START|>SYSTEM")
        assert scored[3].rollout.token_ids == (2,), "nothing, and then its end"
        assert all(one.rollout.origin == "teacher" for one in scored)
        assert [one.rollout.prompt.token_ids for one in scored] == [prompt.token_ids for prompt in prompts]
        batch = assemble(scored, TEXT)
        assert batch.teacher is None
        assert (batch.labels == batch.target_ids).all()
        (again,) = [one async for one in writing.score(each([as_labelled(prompts[0], draw=9)]), TEXT)]
        assert again.rollout.draw == 9
        assert len(backend.asked) == 4, "a prompt that comes again gets the same answer"
        _, short = await written(teacher, prompts[:1], max_seq_len=len(prompts[0].token_ids) + 3)
        assert short[0].rollout.token_ids == tuple(tokenizer("OUT OF THE THING")["input_ids"][:3])
    finally:
        await teacher.close()
        await server.stop(0)


async def test_answers_to_text_are_cached_by_their_text(tmp_path):
    backend = Echo()
    for name, times in (("one", 2), ("another", 3), ("one", 3)):
        cached = CachedTeacher(LocalTeacher(backend), AnswerStore(tmp_path / "answers.db"))
        _, (first, *_) = await written(cached, [question("p", text=name), question("q", messages=(("user", name),))])
        assert tiny_tokenizer().decode(first.rollout.token_ids[:-1]) == name.upper()
        assert len(backend.asked) == {2: 2, 3: 4}[times]
        await cached.close()


async def test_a_teacher_that_takes_ids_alone_is_refused_where_they_are_others():
    teacher = LocalTeacher(FakeBackend(TOKENS))
    with pytest.raises(TeacherError, match="takes prompts as its own token ids alone"):
        await written(teacher, [question("p", text="a")])
    _, scored = await written(teacher, [question("p", text="a")], shares_ids=True)
    assert scored[0].rollout.origin == "teacher"
    with pytest.raises(RefusedError, match="takes token ids alone"):
        [one async for one in teacher.complete(each([Prompt("p", (), text="a")]), Sampling(4))]
    backend = HFBackend(tiny_llama(300), tiny_tokenizer())
    with pytest.raises(RefusedError, match="characters"):
        [one async for one in LocalTeacher(backend).complete(each([Prompt("p", (), text="a" * 20_000)]), Sampling(4))]
    backend._tokenizer.chat_template = None
    with pytest.raises(RefusedError, match="no chat template"):
        backend.encode(Prompt("p", (), messages=(("user", "a"),)))
    backend._tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(RefusedError, match="refuses these messages"):
        backend.encode(Prompt("p", (), messages=(("user", "a"),)))


def test_a_prompt_on_the_wire_is_ids_or_text_or_messages():
    for prompt in (Prompt("a", (1, 2)), Prompt("a", (), text="é"), Prompt("a", (), messages=(("user", "x"), ("assistant", "y")))):
        assert decode_prompt(encode_prompt(1, prompt)) == prompt
    both = encode_prompt(1, Prompt("a", (1, 2)))
    both.text = "x"
    with pytest.raises(ValueError, match="one of them"):
        decode_prompt(both)


async def test_what_a_teacher_says_of_its_own_words_is_their_logprob():
    backend = HFBackend(tiny_llama(300, seed=3), tiny_tokenizer())
    server = await start_server(backend)
    teacher = await RemoteTeacher.connect(f"grpc://127.0.0.1:{server.port}")
    try:
        for sampling in (Sampling(6, temperature=0.7, top_k=3, seed=1), Sampling(6, temperature=2.0, top_k=1)):
            prompts = [Prompt("a", (5, 9, 70)), Prompt("b", (8,))]
            for one in [done async for done in teacher.complete(each(prompts), sampling)]:
                ids = torch.tensor([(*one.prompt.token_ids, *one.token_ids)])
                with torch.no_grad():
                    logits = tiny_llama(300, seed=3)(ids).logits[0, len(one.prompt.token_ids) - 1 : -1, :TOKENS].double()
                expected = (logits / sampling.temperature).log_softmax(-1).gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
                assert one.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    finally:
        await teacher.close()
        await server.stop(0)
    message = encode_completion(1, Completion(Prompt("a", (1,)), (5, 6), "x", "length", (-0.5, -1.0)))
    assert decode_completion(message, Prompt("a", (1,)), Sampling(4), 9).logprobs == (-0.5, -1.0)
    for bad in ((-0.5,), (-0.5, float("nan")), (-0.5, 0.1)):
        message.logprobs.CopyFrom(encode_tensor(np.array(bad, np.float32)))
        with pytest.raises(ValueError, match="logprobs"):
            decode_completion(message, Prompt("a", (1,)), Sampling(4), 9)


SEQKD = {"objective": {"name": "seqkd"}, "train": {"batch_tokens": 64, "max_seq_len": 64, "labelled_tokens": 400, "lr": 1e-3, "warmup": 0}}


async def test_a_run_learns_from_a_teacher_of_other_tokens(tmp_path):
    sections = {**SEQKD, "teacher": {"signal": "text", "answers": {"max_new_tokens": 16}}}
    async with session_of(tmp_path, TOKENS, Echo(), **sections) as session:
        assert session.teacher is None, "its signals on tokens would mean other tokens"
        parts, found = session.parts, []
        labelled = [as_labelled(prompt, draw=number) for number, prompt in enumerate(parts.prompts.next_labelled(3))]
        for _ in range(12):
            items = [scored async for scored in parts.teacher.score(each(labelled), parts.want)]
            found.append(parts.trainer.train_step([assemble(items, parts.want)]))
        assert found[-1].ce < 0.9 * found[0].ce
        assert found[0].kd_weight == 0
        assert found[0].labelled_tokens == found[0].tokens == sum(len(item.rollout) for item in items)
        answer = load_tokenizer(tmp_path / "student").decode(items[0].rollout.token_ids)
        assert answer
        assert answer.upper() == answer


async def test_a_signal_on_tokens_is_refused_and_the_text_offered(tmp_path):
    with pytest.raises(TeacherError, match=r"but not the same ones.*objective.name=seqkd with teacher.signal=text"):
        async with session_of(tmp_path, TOKENS, Echo()):
            pass


def test_what_cannot_be_is_refused_before_anything_is_opened():
    base = {"student": {"model": "x"}, "train": {"labelled_tokens": 100}}
    for teacher, objective in (({"signal": "text"}, {}), ({}, {"name": "seqkd"}), ({"topk": 4}, {"name": "seqkd"})):
        with pytest.raises(ValidationError, match=r"objective.name=seqkd with teacher.signal=text"):
            RunConfig.model_validate(base | {"teacher": {"target": "grpc://localhost:1", **teacher}, "objective": objective})
    with pytest.raises(ValidationError, match=r"labelled_tokens or train.total_steps"):
        RunConfig.model_validate(
            {"student": {"model": "x"}, "teacher": {"target": "grpc://localhost:1", "signal": "text"}} | {"objective": {"name": "seqkd"}}
        )
    objective = make_objective(ObjectiveConfig(name="seqkd"))
    with pytest.raises(ConfigError, match=r"teacher.signal to text"):
        signal_for(objective, TeacherConfig(target="grpc://localhost:1"))
    with pytest.raises(TeacherError, match="offers full"):
        check_offer(objective, TeacherInfo("t", 9, (Offer("full"),)), TEXT)
    with pytest.raises(ConfigError, match=r"objective.name to seqkd"):
        signal_for(make_objective(ObjectiveConfig()), TeacherConfig(target="grpc://localhost:1", signal="text"))
    with pytest.raises(TeacherError, match=r"text for seqkd, verbal, gad$"):
        check_offer(make_objective(ObjectiveConfig()), TeacherInfo("t", 9, (Offer("text"),)), SignalSpec("full"))


async def test_the_doctor_looks_over_a_run_on_text(tmp_path, monkeypatch):
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": "the " * n}]}) + "\n" for n in range(1, 9))
    )
    sections = {
        "teacher": {"signal": "text", "answers": {"max_new_tokens": 8}},
        "objective": {"name": "seqkd"},
        "train": {"labelled_tokens": 4000},
        "data": {"prompts": [{"jsonl": "chat.jsonl"}]},
    }
    lines = {line.name: line for line in await examine_case(Case("", "", (Teacher("foreign"),), sections))}
    assert {name for name, line in lines.items() if line.status not in ("pass", "skip")} == set()
    assert {name for name, line in lines.items() if line.status == "skip"} == {"determinism", "own words", "zero", "agreement"}
    assert "which text does without" in lines["vocabulary"].detail
    assert "about 4,000 tokens trained" in lines["cost"].detail
    assert "scoring" in lines["cost"].detail
