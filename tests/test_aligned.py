"""A teacher with other tokens: which of its rows go to which of the student's, and what they say there, against the model's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bbopd.data.assemble import assemble
from bbopd.data.streams import each
from bbopd.errors import TeacherError
from bbopd.modeling.spelling import Speller
from bbopd.teachers.aligned import AligningTeacher, renumber
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.types import ALIGNED_ID, ALIGNED_RANK, ALIGNED_SPAN, Prompt, Rollout, SignalSpec
from tests.tiny_models import tiny_llama, tiny_tokenizer
from tests.two_tokenizers import TURNS, byte_level_tokenizer, composing_tokenizer, sentencepiece_tokenizer

WANT = SignalSpec("topk", temperature=1.0, top_k=12)
END = 2  # the student's


def aligning(theirs, ours=None, *, model=None, **limits) -> AligningTeacher:
    ours = ours or tiny_tokenizer()
    backend = HFBackend(model or tiny_llama(330, seed=5, max_positions=512), theirs, **limits)
    return AligningTeacher(
        LocalTeacher(backend), Speller(theirs, len(theirs), named="theirs"), Speller(ours, len(ours), named="ours"), theirs
    )


def written(ids, *, prompt="so ", name="r", logprobs=True, origin="student", reason="length", **fields) -> Rollout:
    """What the student wrote to ``prompt``, as text or, where that is None, as ids."""
    asked = fields.pop("asked", None) or Prompt("p", tuple(tiny_tokenizer()(prompt)["input_ids"]), text=prompt, **fields)
    own = -np.random.default_rng(0).random(len(ids)).astype(np.float32) if logprobs else None
    return Rollout(name, asked, tuple(ids), origin=origin, finish_reason=reason, logprobs=own)


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


async def signal_of(teacher: AligningTeacher, rollout: Rollout):
    (scored,) = [one async for one in teacher.score(each([rollout]), WANT)]
    assert scored.rollout is rollout
    return scored.signal


def spelled(teacher: AligningTeacher, rollout: Rollout) -> list[tuple[bytes, bytes]]:
    """The groups of both sides, in bytes."""
    found = teacher.align(rollout)
    theirs = found.question.token_ids
    return [
        (teacher._ours.bytes_of(rollout.token_ids[i0:i1]), teacher._theirs.bytes_of(theirs[j0:j1]))
        for (i0, j0), (i1, j1) in zip(found.ends[:-1].tolist(), found.ends[1:].tolist(), strict=True)
    ]


# ---------------------------------------------------------------- which tokens lie side by side


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("text", ["the thing in there", "ding 🙂🏽 the", " é\n\nthe ", "thou"])
def test_groups_spell_the_same_and_the_ends_meet(make, text):
    teacher = aligning(make())
    rollout = written([*ids_of(text), END], reason="stop")
    groups = spelled(teacher, rollout)
    assert all(ours == theirs for ours, theirs in groups)
    assert b"".join(ours for ours, _ in groups).decode() == text
    assert groups[-1] == (b"", b""), "the last group is the end of both"
    found = teacher.align(rollout)
    assert found.ends[-1].tolist() == [len(rollout), len(found.question.token_ids)]


def test_prompts_are_written_down_by_the_teachers_own_template_and_begin_as_it_begins():
    tokenizer = sentencepiece_tokenizer()
    teacher = aligning(tokenizer)
    chat = Prompt("c", tuple(ids_of("whatever")), messages=(("user", "the thing"),))
    asked = teacher.align(written([*ids_of("in"), END], asked=chat, reason="stop")).question
    said = tokenizer.apply_chat_template([{"role": "user", "content": "the thing"}], add_generation_prompt=True, return_dict=False)
    assert list(asked.prompt.token_ids) == said
    assert asked.token_ids[-1] == tokenizer.convert_tokens_to_ids("[/turn]"), "an answer ends as its turns do"
    asked = teacher.align(written([*ids_of("in"), END], prompt="the thing", reason="stop")).question
    assert list(asked.prompt.token_ids) == tokenizer("the thing")["input_ids"]
    assert asked.prompt.token_ids[0] == tokenizer.bos_token_id, "the student's own begins with nothing"
    assert asked.token_ids[-1] == tokenizer.eos_token_id
    window = Prompt("w", (0, *ids_of("the thing")))  # running text, after a token that is no text
    assert teacher.align(written(ids_of(" in"), asked=window)).question.prompt == Prompt("w", tuple(tokenizer("the thing")["input_ids"]))


def test_an_answer_goes_on_without_the_space_that_texts_begin_with():
    teacher = aligning(sentencepiece_tokenizer())
    question = teacher.align(written(ids_of("ld thing"), prompt="wor")).question
    assert teacher._theirs.bytes_of(question.token_ids[:-1]) == b"ld thing"


def test_a_character_cut_by_the_length_is_left_out_and_one_begun_by_the_prompt_belongs_to_it():
    teacher = aligning(byte_level_tokenizer())
    emoji = ids_of("🙂")
    cut = teacher.align(written([*ids_of("in"), *emoji[:3]]))
    assert cut.ends[-1].tolist() == [1, 1]
    assert teacher._theirs.bytes_of(cut.question.token_ids) == b"in"
    begun = Prompt("p", (*ids_of("in"), *emoji[:2]))
    rest = teacher.align(written([*emoji[2:], *ids_of("in")], asked=begun))
    assert teacher._theirs.bytes_of(rest.question.prompt.token_ids).decode() == "in🙂"
    assert rest.ends.tolist() == [[2, 0], [3, 1]]


def test_nothing_is_aligned_after_a_token_that_is_no_text_or_a_character_that_is_composed():
    mark = 1  # <|im_start|>, in the middle of an answer
    found = aligning(byte_level_tokenizer()).align(written([*ids_of("in"), mark, *ids_of("in"), END], reason="stop"))
    assert found.ends.tolist() == [[0, 0], [1, 1]]
    spelt = written(ids_of("<|im_end|>"), prompt="a")
    assert spelt.token_ids[0] == END, "the student's tokenizer reads a mark where it may"
    letters = [token for letter in "<|im_end|>" for token in ids_of(letter)]
    found = aligning(byte_level_tokenizer()).align(written(letters))
    assert found.ends[-1].tolist() == [len(letters), len(found.question.token_ids) - 1], "characters of a text are no mark"
    composed = aligning(composing_tokenizer())
    rollout = written(ids_of("in e\u0301 in"))
    assert composed.align(rollout).ends[-1, 0] == len(ids_of("in "))


async def test_a_teacher_that_takes_less_is_asked_about_the_beginning():
    teacher = aligning(byte_level_tokenizer(), max_sequence_tokens=12)
    rollout = written([*ids_of("in in in in in in in"), END], prompt="in in", reason="stop")
    question = teacher.align(rollout).question
    assert len(question.all_ids) == 12
    rows = (await signal_of(teacher, rollout)).rows
    assert rows.any()
    assert not rows[-3:].any()
    long = written(ids_of("in"), prompt="in " * 12)
    with pytest.raises(TeacherError, match=r"prompt p has \d+ of the teacher's tokens, and teacher LlamaForCausalLM takes 12"):
        teacher.align(long)
    with pytest.raises(TeacherError, match="the answer included: shorten or drop it"):
        teacher.check_prompts([rollout.prompt, long.prompt])
    teacher.check_prompts([rollout.prompt])
    without = byte_level_tokenizer()
    without.chat_template = None
    with pytest.raises(TeacherError, match="has no chat template for messages"):
        aligning(without).check_prompts([Prompt("c", (5,), messages=(("user", "the"),))])


# ---------------------------------------------------------------- what they say


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
async def test_every_row_says_what_the_teachers_model_says_after_the_same_text(make):
    tokenizer, model = make(), tiny_llama(330, seed=5, max_positions=512)
    teacher = aligning(tokenizer, model=model)
    text = "the thing 🙂 outer there"
    rollout = written([*ids_of(text), END], reason="stop")
    found, signal = teacher.align(rollout), await signal_of(teacher, rollout)
    question = found.question
    with torch.no_grad():
        logits = model(torch.tensor([question.all_ids])).logits[0, :, : len(tokenizer)].double()
    log_p = logits[len(question.prompt.token_ids) - 1 : -1].log_softmax(1)
    own = log_p.gather(1, torch.tensor(question.token_ids)[:, None])[:, 0]
    seen = np.zeros(len(rollout), bool)
    singles = spans = 0
    for (i0, j0), (i1, j1) in zip(found.ends[:-1].tolist(), found.ends[1:].tolist(), strict=True):
        seen[i0:i1] = True
        values, ids = log_p[j0].topk(WANT.top_k)
        mass = signal.logprobs[i0].astype(np.float64)
        assert np.exp(mass).sum() + np.exp(signal.log_tail[i0]) == pytest.approx(1, abs=2e-3)
        if (i1 - i0, j1 - j0) == (1, 1):
            singles += 1
            assert signal.rows[i0] == ALIGNED_ID
            expected: dict[int, float] = {}
            support = dict(zip(ids.tolist(), values.exp().tolist(), strict=True))
            support[question.token_ids[j0]] = own[j0].exp().item()  # the token that is there has a place of its own
            for token, value in support.items():
                raw, name = teacher._theirs.vocabulary[token], teacher._theirs.marks.get(token)
                same = [one for one in range(262) if teacher._ours.vocabulary[one] == raw is not None]
                same += [one for one, known in teacher._ours.marks.items() if known == name]
                if token in (teacher._theirs.end, teacher._theirs.end_of_turn):
                    same = [END]
                if same:
                    expected[same[0]] = expected.get(same[0], 0.0) + value
            told = {int(one): float(np.exp(value)) for one, value in zip(signal.ids[i0], mass, strict=True) if one >= 0}
            assert told == pytest.approx(expected, abs=1e-3)
        else:
            spans += 1
            assert signal.rows[i0] == ALIGNED_RANK | ALIGNED_SPAN
            assert (signal.rows[i0 + 1 : i1] == ALIGNED_SPAN).all()
            assert (signal.ids[i0:i1] == -1).all()
            np.testing.assert_allclose(signal.logprobs[i0, : WANT.top_k], values, atol=0.01)
            gain = own[j0:j1].sum().item() - rollout.logprobs[i0:i1].astype(np.float64).sum()
            np.testing.assert_allclose(signal.advantages[i0:i1], gain, atol=0.02)
    assert seen.all()
    assert singles > 5
    assert spans


async def test_labelled_text_has_no_advantages_and_a_row_after_the_same_text_is_told_whatever_came():
    teacher = aligning(byte_level_tokenizer())
    labelled = await signal_of(teacher, written([*ids_of("thou the"), END], logprobs=False, origin="reference", reason="reference"))
    assert (labelled.rows & ALIGNED_RANK).any()
    assert not (labelled.rows & ALIGNED_SPAN).any()
    assert not labelled.advantages.any()
    marked = await signal_of(teacher, written([*ids_of("in"), 1, *ids_of("in"), END], reason="stop"))
    assert marked.rows.tolist() == [ALIGNED_ID, ALIGNED_ID, 0, 0], "that no mark comes here is told, and nothing of what follows it"
    only = await signal_of(teacher, written([1], reason="length"))
    assert only.rows.tolist() == [ALIGNED_ID]


async def test_a_text_of_the_same_tokens_is_told_as_it_would_be_without_an_alignment():
    tokenizer = tiny_tokenizer()
    plain = LocalTeacher(HFBackend(tiny_llama(262, seed=5), tokenizer))
    teacher = AligningTeacher(plain, *[Speller(tokenizer, 262, named="one")] * 2, tokenizer)
    rollouts = [
        written([*ids_of("the thing in there 🙂"), END], reason="stop", name="a"),
        written(ids_of("within the thing"), name="b", logprobs=False, origin="reference", reason="reference"),
    ]
    ours = assemble([one async for one in teacher.score(each(rollouts), WANT)], WANT)
    theirs = assemble([one async for one in plain.score(each(rollouts), WANT)], WANT)
    assert ours.spans is not None
    assert not ours.spans.valid.any()
    assert ours.teacher.valid.all()
    for name in ("ids", "log_tail", "logprobs"):
        torch.testing.assert_close(getattr(ours.teacher, name), getattr(theirs.teacher, name), atol=1e-3, rtol=0)


def test_ids_are_told_under_their_counterparts_and_no_mass_is_lost():
    generator = np.random.default_rng(3)
    counterparts = generator.integers(-1, 9, 40)
    for _ in range(50):
        ids = np.stack([generator.permutation(40)[:7] for _ in range(5)])
        p = generator.dirichlet(np.full(8, 0.4), 5)
        ids[0, 2] = -1
        p[0, 7] += p[0, 2]
        p[0, 2] = 0
        with np.errstate(divide="ignore"):
            own, logprobs, tail = renumber(
                ids.astype(np.int32), np.log(p[:, :7]).astype(np.float32), np.log(p[:, 7]).astype(np.float32), counterparts
            )
        for row in range(5):
            expected: dict[int, float] = {}
            rest = p[row, 7]
            for token, mass in zip(ids[row], p[row], strict=False):
                if token >= 0 and counterparts[token] >= 0:
                    expected[int(counterparts[token])] = expected.get(int(counterparts[token]), 0) + mass
                else:
                    rest += mass
            told = {int(one): float(np.exp(value)) for one, value in zip(own[row], logprobs[row], strict=True) if one >= 0}
            assert told == pytest.approx(expected, abs=1e-6)
            assert np.exp(tail[row]) == pytest.approx(rest, abs=1e-6)
            assert (logprobs[row][own[row] < 0] == -np.inf).all()


async def test_assembled_rows_of_ids_and_of_spans_do_not_meet():
    teacher = aligning(sentencepiece_tokenizer())
    rollouts = [written([*ids_of("thing 🙂 in"), END], reason="stop", name="a"), written(ids_of("out the"), name="b", logprobs=False)]
    scored = [one async for one in teacher.score(each(rollouts), WANT)]
    batch = assemble([*scored, written(ids_of("in"), name="bare")], WANT)
    flags = np.concatenate([*(one.signal.rows for one in scored), np.zeros(len(ids_of("in")), np.uint8)])
    assert batch.teacher.valid.tolist() == ((flags & ALIGNED_ID) > 0).tolist()
    assert batch.spans.sampled.valid.tolist() == ((flags & ALIGNED_SPAN) > 0).tolist()
    assert not (batch.spans.valid & batch.teacher.valid).any()
    assert batch.spans.rank_rows.tolist() == np.flatnonzero(flags & ALIGNED_RANK).tolist()
    assert (batch.teacher.logprobs[~batch.teacher.valid] == -torch.inf).all()
    assert (batch.spans.rank_logprobs.diff(dim=1) <= 0).all()


def test_templates_that_differ_are_each_sides_own():
    teacher = aligning(byte_level_tokenizer(TURNS))
    chat = Prompt("c", tuple(ids_of("whatever")), messages=(("user", "the"),))
    question = teacher.align(written(ids_of("in"), asked=chat)).question
    assert teacher._theirs.bytes_of(question.prompt.token_ids) == b"[user]the[/turn][assistant]"
