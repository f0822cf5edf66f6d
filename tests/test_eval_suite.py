"""The set of measures that a run takes of its student, on a tiny student with a teacher in this process and across gRPC."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bbopd.config import EvalConfig
from bbopd.errors import TeacherError
from bbopd.evaluate.bits_per_byte import score_text, token_byte_counts
from bbopd.evaluate.samples import student_rollouts, teacher_answers
from bbopd.evaluate.student import StudentView
from bbopd.evaluate.suite import EvalSuite
from bbopd.rollouts.hf import HFEngine
from bbopd.rpc.server import start_server
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, Teacher
from tests.dense_teacher import VOCAB, DenseTeacher, measure_agreement, random_prompts
from tests.tiny_models import tiny_llama, tiny_tokenizer


def make_suite(student: Any, teacher: Teacher | None, prompts: Sequence[Prompt], **options: Any) -> EvalSuite:
    engine = HFEngine(student, eos_token_ids=(2,), pad_token_id=0)
    config = options.pop("config", EvalConfig(sequences=5, rollouts=6, max_new_tokens=12))
    return EvalSuite(prompts, config, byte_counts_V=token_byte_counts(tiny_tokenizer()), engine=engine, teacher=teacher, **options)


async def test_suite_measures_held_out_text_and_the_students_own() -> None:
    student, teacher = tiny_llama(VOCAB, seed=7), DenseTeacher(tiny_llama(VOCAB, seed=8))
    prompts = [*random_prompts(1, 7), Prompt("chat", (5, 6, 7))]
    suite = make_suite(student, teacher, prompts)
    student.train()
    before = torch.get_rng_state()
    result = await suite.run("start", student, 3)
    assert student.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in student.parameters())
    student.eval()

    want, view = SignalSpec("full"), StudentView(student)
    held_out = [Rollout(p.prompt_id, p, p.reference_ids or ()) for p in prompts[:5]]
    expected = measure_agreement(view, [ScoredRollout(r, teacher.signal(r, want)) for r in held_out], want)
    text = score_text(view, prompts[:5], token_byte_counts(tiny_tokenizer())).result()
    assert result.bits_per_byte == pytest.approx(text.bits_per_byte, rel=1e-6)
    assert result.kl_held_out == pytest.approx(expected.forward_kl.value, rel=1e-5)
    assert expected.reverse_kl is not None
    assert result.reverse_kl_held_out == pytest.approx(expected.reverse_kl.value, rel=1e-5)
    assert result.top1_held_out == pytest.approx(expected.top1.value)
    assert result.standard_errors["kl_held_out"] == pytest.approx(expected.forward_kl.standard_error, rel=1e-4)

    written = [name for name in teacher.asked if "reference" not in name]
    assert len(written) == result.sequences["rollouts"] == 6
    assert 6 <= result.tokens["rollouts"] <= 6 * 12
    assert result.kl_rollouts is not None
    assert result.kl_rollouts > 0.1
    assert result.tokens["held_out"] == text.tokens
    assert set(result.seconds_by_part) == {"held_out", "sampling", "rollouts"}
    assert sum(result.seconds_by_part.values()) <= result.seconds + 0.01

    line = json.loads(json.dumps(result.to_json()))
    assert (line["stage"], line["step"], line["kl_rollouts"], line["kl_is_bucketed"]) == ("start", 3, result.kl_rollouts, False)


@pytest.mark.parametrize(("kept_bytes", "asked_again"), [(10**9, 0), (VOCAB * 2 * 14, 4), (0, 5)])
async def test_held_out_signals_are_asked_for_once_as_far_as_they_are_kept(kept_bytes: int, asked_again: int) -> None:
    student, teacher = tiny_llama(VOCAB, seed=7), DenseTeacher(tiny_llama(VOCAB, seed=8))
    prompts = [Prompt(p.prompt_id, p.token_ids, (*(p.reference_ids or ()), 9, 9, 9, 9, 9, 9, 9)[:8]) for p in random_prompts(2, 5)]
    prompts = [Prompt(p.prompt_id, p.token_ids, tuple(range(20, 28))) for p in prompts]  # 8 tokens each
    suite = make_suite(student, teacher, prompts, kept_bytes=kept_bytes)
    first = await suite.run("start", student, 0)
    teacher.asked.clear()
    second = await suite.run("end", student, 9)
    assert sum("reference" in name for name in teacher.asked) == asked_again
    assert second.kl_held_out == pytest.approx(first.kl_held_out, rel=1e-6)
    assert second.kl_rollouts == pytest.approx(first.kl_rollouts, rel=1e-6), "the same student writes the same rollouts"


async def test_suite_sees_the_student_change() -> None:
    """Half way from the student's weights to the teacher's, and all the way."""
    student, target = tiny_llama(VOCAB, seed=1), tiny_llama(VOCAB, seed=2)
    suite = make_suite(student, DenseTeacher(target), random_prompts(6))
    start = await suite.run("start", student, 0)
    student.load_state_dict(target.state_dict())
    end = await suite.run("end", student, 1)
    assert start.kl_rollouts is not None
    assert end.kl_rollouts is not None
    assert end.kl_rollouts < 1e-4 < start.kl_rollouts
    assert (end.top1_rollouts, end.top1_held_out) == (1.0, 1.0)


async def test_suite_without_teacher_measures_text_alone() -> None:
    student = tiny_llama(VOCAB, seed=3)
    result = await make_suite(student, None, random_prompts(0)).run("start", student, 0)
    assert result.bits_per_byte is not None
    assert (result.kl_held_out, result.kl_rollouts, result.top1_held_out, result.reverse_kl_rollouts) == (None,) * 4
    assert set(result.tokens) == {"held_out"}


async def test_suite_with_topk_teacher_marks_its_kl() -> None:
    student = tiny_llama(VOCAB, seed=3)
    result = await make_suite(student, DenseTeacher(tiny_llama(VOCAB, seed=4), levels=("topk",)), random_prompts(0)).run("end", student, 1)
    assert result.kl_is_bucketed
    assert result.reverse_kl_held_out is None
    assert result.kl_held_out is not None


async def test_suite_without_labelled_prompts_measures_rollouts_alone() -> None:
    student = tiny_llama(VOCAB, seed=3)
    prompts = [Prompt("q1", (4, 5)), Prompt("q2", (6,))]
    result = await make_suite(student, DenseTeacher(tiny_llama(VOCAB, seed=4)), prompts).run("end", student, 1)
    assert (result.bits_per_byte, result.kl_held_out) == (None, None)
    assert result.sequences == {"rollouts": 6}, "prompts are answered several times where there are too few"


async def test_suite_measures_the_same_in_process_and_across_grpc() -> None:
    student, teacher = tiny_llama(VOCAB, seed=3), tiny_llama(VOCAB, seed=4)
    prompts = random_prompts(8)
    backend = HFBackend(teacher)
    local = LocalTeacher(backend)
    expected = await make_suite(student, local, prompts).run("end", student, 1)
    await local.close()
    server = await start_server(backend)
    remote = await RemoteTeacher.connect(f"grpc://127.0.0.1:{server.port}")
    try:
        found = await make_suite(student, remote, prompts).run("end", student, 1)
    finally:
        await remote.close()
        await server.stop(grace=1.0)
    for name in (
        "bits_per_byte",
        "kl_held_out",
        "kl_rollouts",
        "reverse_kl_held_out",
        "reverse_kl_rollouts",
        "top1_held_out",
        "top1_rollouts",
    ):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert expected.kl_rollouts is not None
    assert expected.kl_rollouts > 0.1


def test_teacher_that_cannot_be_measured_against() -> None:
    student = tiny_llama(VOCAB)
    with pytest.raises(TeacherError, match="offers sampled"):
        make_suite(student, DenseTeacher(student, levels=("sampled",)), random_prompts(0))


# ---------------------------------------------------------------- samples


async def test_answers_come_in_the_order_of_the_prompts() -> None:
    student = tiny_llama(VOCAB, seed=2)
    engine = HFEngine(student, eos_token_ids=(2,), pad_token_id=0)
    prompts = [Prompt("long", tuple(range(10, 30))), Prompt("short", (8, 9))]
    greedy = Sampling(max_new_tokens=6, top_k=1)
    rollouts = await student_rollouts(engine, prompts, greedy)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = list(prompt.token_ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(student(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        assert rollout is not None
        assert list(rollout.token_ids) == ids[len(prompt.token_ids) :]
    assert await teacher_answers(DenseTeacher(student), prompts, greedy) == ["answer to long", "answer to short"]
