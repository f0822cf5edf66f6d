"""Measures of a student against dense fp64 computations of the same thing, and a suite on a tiny student with a real teacher."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bbopd.config import EvalConfig
from bbopd.errors import DataError, TeacherError, TrainingError
from bbopd.evaluate.agreement import Agreement, AgreementMeter, signal_to_measure
from bbopd.evaluate.bits_per_byte import NO_TEXT, document_windows, score_text, token_byte_counts
from bbopd.evaluate.samples import student_rollouts, teacher_answers
from bbopd.evaluate.statistics import ratio
from bbopd.evaluate.student import StudentView, in_batches
from bbopd.evaluate.suite import EvalSuite
from bbopd.rollouts.hf import HFEngine
from bbopd.rpc.server import start_server
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Completion, Offer, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, Teacher, TeacherInfo, TeacherSignal
from tests.tiny_models import tiny_gemma2, tiny_llama, tiny_tokenizer

VOCAB = 320
TEXT = "The naïve café: 日本語 and the thing in Ελλάδα 🙂🙂, then the end."
MERGED_BYTES = {259: 2, 260: 3, 261: 2}  # th, the, in


def dense_logprobs(model: Any, ids: Sequence[int], first: int) -> Tensor:
    """Log-probabilities [L, V] float64 of the tokens from ``first`` on, from the model's own logits."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0, first - 1 : -1].double().log_softmax(-1)


def nats_of(model: Any, prompt: Sequence[int], reference: Sequence[int]) -> Tensor:
    logprobs_LV = dense_logprobs(model, [*prompt, *reference], len(prompt))
    return -logprobs_LV.gather(1, torch.tensor(reference)[:, None])[:, 0]


def byte_length(ids: Iterable[int]) -> int:
    return sum(MERGED_BYTES.get(index, 1) for index in ids if index > 2)


def random_prompts(seed: int, count: int = 7) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 14, size=(count, 2))
    return [
        Prompt(f"p{i}", tuple(rng.integers(3, 262, size=n).tolist()), tuple(rng.integers(3, 262, size=m).tolist()))
        for i, (n, m) in enumerate(sizes)
    ]


class DenseTeacher:
    """A teacher in this process that answers with its own dense logits, counts what it is asked, and answers out of order."""

    def __init__(self, model: Any, *, levels: Sequence[str] = ("full", "topk"), dtype: Any = np.float16) -> None:
        self.model = model
        self.dtype = dtype
        offers = tuple(Offer(level, max_top_k=8, temperature_max=1.0) for level in levels)  # type: ignore[arg-type]
        self.info = TeacherInfo(model="dense", vocab_size=VOCAB, offers=offers)
        self.asked: list[str] = []

    def signal(self, rollout: Rollout, want: SignalSpec) -> TeacherSignal:
        logprobs = dense_logprobs(self.model, rollout.all_ids, len(rollout.prompt.token_ids)).numpy()
        if want.level == "full":
            return TeacherSignal("full", logits=(logprobs - logprobs.max(-1, keepdims=True)).astype(self.dtype))
        ids = np.argsort(-logprobs, axis=-1)[:, : want.top_k].astype(np.int32)
        best = np.take_along_axis(logprobs, ids, axis=-1)
        sampled = np.take_along_axis(logprobs, np.array(rollout.token_ids)[:, None], axis=-1)[:, 0]
        tail = np.log1p(-np.exp(best).sum(-1))
        return TeacherSignal("topk", 1.0, None, ids, best.astype(np.float32), tail.astype(np.float32), sampled.astype(np.float32))

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        waiting = [rollout async for rollout in rollouts]
        for rollout in reversed(waiting):
            self.asked.append(rollout.rollout_id)
            yield ScoredRollout(rollout, self.signal(rollout, want))

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        waiting = [prompt async for prompt in prompts]
        for prompt in reversed(waiting):
            yield Completion(prompt, (5,), f"answer to {prompt.prompt_id}", "stop")


# ---------------------------------------------------------------- statistics


def test_standard_error_of_equal_clusters_is_that_of_their_means() -> None:
    means = np.random.default_rng(0).normal(size=9)
    found = ratio((means * 5).tolist(), [5.0] * 9)
    assert found.value == pytest.approx(means.mean(), rel=1e-12)
    assert found.standard_error == pytest.approx(means.std(ddof=1) / 3, rel=1e-12)


def test_standard_error_covers_the_spread_of_unequal_clusters() -> None:
    rng = np.random.default_rng(1)
    estimates, errors = [], []
    for _ in range(1500):
        sizes = rng.integers(1, 9, size=60)
        sums = sizes * rng.normal(2.0, 1.0, size=60) + rng.normal(size=60) * np.sqrt(sizes)  # tokens of a sequence move together
        found = ratio(sums.tolist(), sizes.tolist())
        estimates.append(found.value)
        errors.append(found.standard_error or math.nan)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.08)


def test_ratio_of_one_cluster_or_of_nothing() -> None:
    assert ratio([3.0], [2]).standard_error is None
    with pytest.raises(ValueError, match="positive sum"):
        ratio([], [])
    with pytest.raises(ValueError, match="2 numerators, 1 denominators"):
        ratio([1.0, 2.0], [1.0])


# ---------------------------------------------------------------- bits per byte


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_bytes_of_characters_split_over_tokens(cut: int) -> None:
    """Wherever the reference begins, also inside a character, its bytes are the rest of the text's bytes."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    counts = token_byte_counts(tokenizer)
    assert int(counts[ids].sum()) == len(TEXT.encode())
    assert int(counts[ids[cut:]].sum()) == len(TEXT.encode()) - byte_length(ids[:cut])
    assert counts[:3].tolist() == [NO_TEXT] * 3


def test_added_tokens_are_text_and_special_ones_are_not() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<é>"])
    counts = token_byte_counts(tokenizer)
    assert int(counts[tokenizer.convert_tokens_to_ids("<é>")]) == 4
    assert int(counts[tokenizer.eos_token_id]) == NO_TEXT


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
def test_bits_per_byte_is_that_of_the_dense_logits(make: Any) -> None:
    model, tokenizer = make(VOCAB, seed=3), tiny_tokenizer()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    end = tokenizer.eos_token_id
    pieces = [(ids[:9], ids[9:30]), (ids[30:41], [*ids[41:], end]), (ids[:1], ids[1:2])]
    prompts = [Prompt(f"d{i}", tuple(prompt), tuple(reference)) for i, (prompt, reference) in enumerate(pieces)]
    nats = [nats_of(model, prompt, reference) for prompt, reference in pieces]
    nats[1] = nats[1][:-1]  # the end of turn is no text
    bits = [float(values.sum()) / math.log(2) for values in nats]
    sizes = [byte_length(reference) for _, reference in pieces]
    expected = ratio(bits, sizes)

    found = score_text(StudentView(model), [*prompts, Prompt("question", (4, 5, 6))], token_byte_counts(tokenizer)).result()
    assert found.bits_per_byte == pytest.approx(sum(bits) / sum(sizes), rel=2e-6)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-4)
    assert (found.bytes, found.tokens) == (sum(sizes), sum(map(len, nats)))
    assert found.nats == pytest.approx(sum(bits) * math.log(2), rel=2e-6)


def test_windows_score_each_token_once_with_its_context() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        length, window = int(rng.integers(1, 60)), int(rng.integers(2, 20))
        stride = int(rng.integers(1, window))
        ids = tuple(range(100, 100 + length))
        for start in (None, 7):
            whole = ids if start is None else (start, *ids)
            scored: list[int] = []
            for piece in document_windows("doc", ids, window=window, stride=stride, start_token_id=start):
                assert piece.reference_ids
                seen = (*piece.token_ids, *piece.reference_ids)
                assert len(seen) <= window
                end = whole.index(seen[-1]) + 1
                assert whole[end - len(seen) : end] == seen
                context = len(piece.token_ids)
                assert context >= window - stride or seen[0] == whole[0]
                scored += piece.reference_ids
            assert tuple(scored) == whole[1:]


def test_windows_of_a_document_give_its_sliding_likelihood() -> None:
    model, tokenizer = tiny_llama(VOCAB, seed=1), tiny_tokenizer()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    whole, window, stride = [0, *ids], 16, 6
    nats = 0.0
    for target in range(1, len(whole)):  # one token at a time, with the window that scores it
        shifts = 0 if target < window else math.ceil((target + 1 - window) / stride)
        context = whole[shifts * stride : target]
        nats += float(nats_of(model, context, [whole[target]])[0])
    windows = list(document_windows("doc", ids, window=window, stride=stride, start_token_id=0))
    found = score_text(StudentView(model), windows, token_byte_counts(tokenizer)).result()
    assert found.nats == pytest.approx(nats, rel=2e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=2e-6)
    assert found.standard_error is None, "the windows of one document are one cluster"


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 0)])
def test_windows_without_context_are_refused(window: int, stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        list(document_windows("doc", [1, 2, 3], window=window, stride=stride))


def test_no_text_to_score() -> None:
    with pytest.raises(DataError, match="no text"):
        score_text(
            StudentView(tiny_llama(VOCAB)), [Prompt("a", (4, 5)), Prompt("b", (4,), (2,))], token_byte_counts(tiny_tokenizer())
        ).result()


def test_batches_keep_order_and_size() -> None:
    rollouts = [Rollout(str(i), prompt, prompt.reference_ids or ()) for i, prompt in enumerate(random_prompts(3, 25))]
    batches = list(in_batches(rollouts, 40))
    assert [rollout for batch in batches for rollout in batch] == rollouts
    assert all(len(batch) == 1 or sum(len(rollout.all_ids) for rollout in batch) <= 40 for batch in batches)
    assert len(list(in_batches(rollouts, 1))) == len(rollouts)


# ---------------------------------------------------------------- agreement


def scored_rollouts(teacher: DenseTeacher, want: SignalSpec, seed: int) -> list[ScoredRollout]:
    rollouts = [Rollout(p.prompt_id, p, p.reference_ids or ()) for p in random_prompts(seed)]
    return [ScoredRollout(rollout, teacher.signal(rollout, want)) for rollout in rollouts]


def measure_agreement(student: StudentView, scored: Iterable[ScoredRollout], want: SignalSpec) -> Agreement:
    meter = AgreementMeter(student, want)
    for item in scored:
        meter.add(item)
    return meter.result()


@pytest.mark.parametrize("seed", [0, 1])
def test_agreement_from_full_signals_is_that_of_the_dense_distributions(seed: int) -> None:
    student, teacher = tiny_llama(VOCAB, seed=seed), DenseTeacher(tiny_llama(VOCAB, seed=seed + 10), dtype=np.float32)
    want = SignalSpec("full")
    scored = scored_rollouts(teacher, want, seed)
    forward, reverse, same, sizes = [], [], [], []
    for item in scored:
        first = len(item.rollout.prompt.token_ids)
        log_p, log_q = (dense_logprobs(model, item.rollout.all_ids, first) for model in (teacher.model, student))
        forward.append(float((log_p.exp() * (log_p - log_q)).sum()))
        reverse.append(float((log_q.exp() * (log_q - log_p)).sum()))
        same.append(float((log_p.argmax(-1) == log_q.argmax(-1)).sum()))
        sizes.append(len(item.rollout))
    found = measure_agreement(StudentView(student), scored, want)
    for measured, sums in ((found.forward_kl, forward), (found.reverse_kl, reverse), (found.top1, same)):
        assert measured is not None
        assert measured.value == pytest.approx(sum(sums) / sum(sizes), rel=1e-4)
        assert measured.standard_error == pytest.approx(ratio(sums, sizes).standard_error, rel=1e-3)
    assert (found.tokens, found.sequences, found.is_bucketed) == (sum(sizes), len(scored), False)
    assert found.forward_kl.value > 0.1, "two random models do not agree"


def test_agreement_from_topk_signals_is_the_bucketed_forward_kl() -> None:
    student, teacher = tiny_llama(VOCAB, seed=2), DenseTeacher(tiny_llama(VOCAB, seed=12))
    want, rng = SignalSpec("topk", top_k=8), np.random.default_rng(4)
    total, exact, same, scored = 0.0, 0.0, 0, []
    for prompt in random_prompts(4):
        answer: list[int] = []
        for _ in range(int(rng.integers(1, 9))):  # written from the teacher's best ids, so that they are its whole support
            ids = [*prompt.token_ids, *answer]
            log_p, log_q = (dense_logprobs(model, [*ids, 0], len(ids))[0] for model in (teacher.model, student))
            support = log_p.topk(8).indices.tolist()
            outside = [index for index in range(VOCAB) if index not in support]
            p = [*log_p[support].exp().tolist(), float(log_p[outside].exp().sum())]
            q = [*log_q[support].exp().tolist(), float(log_q[outside].exp().sum())]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            exact += float((log_p.exp() * (log_p - log_q)).sum())
            same += support[0] == int(log_q.argmax())
            answer.append(support[int(rng.integers(8))])
        rollout = Rollout(prompt.prompt_id, prompt, tuple(answer))
        scored.append(ScoredRollout(rollout, teacher.signal(rollout, want)))
    found = measure_agreement(StudentView(student), scored, want)
    tokens = sum(len(item.rollout) for item in scored)
    assert found.forward_kl.value == pytest.approx(total / tokens, rel=1e-4)
    assert 0.1 < found.forward_kl.value < exact / tokens
    assert found.top1.value == pytest.approx(same / tokens)
    assert (found.reverse_kl, found.is_bucketed, found.tokens) == (None, True, tokens)


def test_teacher_agrees_with_itself() -> None:
    model = tiny_llama(VOCAB, seed=4)
    found = measure_agreement(StudentView(model), scored_rollouts(DenseTeacher(model), SignalSpec("full"), 9), SignalSpec("full"))
    assert 0 <= found.forward_kl.value < 1e-5
    assert found.top1.value == 1.0


def test_batch_boundaries_do_not_change_agreement() -> None:
    student, teacher = StudentView(tiny_llama(VOCAB, seed=5)), DenseTeacher(tiny_llama(VOCAB, seed=6))
    scored = scored_rollouts(teacher, SignalSpec("full"), 11)
    values = []
    for packed_tokens in (1, 30, 4096):
        meter = AgreementMeter(student, SignalSpec("full"), packed_tokens=packed_tokens)
        for item in scored:
            meter.add(item)
        values.append(meter.result())
    for other in values[1:]:
        assert other.forward_kl.value == pytest.approx(values[0].forward_kl.value, rel=1e-5)
        assert other.top1 == values[0].top1


def test_agreement_needs_a_fitting_signal() -> None:
    view = StudentView(tiny_llama(VOCAB))
    with pytest.raises(ValueError, match="temperature 1"):
        AgreementMeter(view, SignalSpec("full", temperature=2.0))
    with pytest.raises(ValueError, match="candidates"):
        AgreementMeter(view, SignalSpec("candidates"))
    with pytest.raises(DataError, match="no token"):
        AgreementMeter(view, SignalSpec("full")).result()


def test_a_student_that_diverges_is_a_training_error() -> None:
    student, teacher = tiny_llama(VOCAB), DenseTeacher(tiny_llama(VOCAB, seed=1))
    scored, view = scored_rollouts(teacher, SignalSpec("full"), 3), StudentView(student)
    with torch.no_grad():
        student.get_parameter("model.norm.weight")[0] = torch.nan
    with pytest.raises(TrainingError, match="the student's hidden states are not finite"):
        measure_agreement(view, scored, SignalSpec("full"))
    with pytest.raises(TrainingError, match="hidden states are not finite"):
        score_text(view, random_prompts(3), token_byte_counts(tiny_tokenizer())).result()
    with pytest.raises(TrainingError, match=r"the student's weights model\.norm\.weight are not finite"):
        StudentView(student)


def test_signal_to_measure_prefers_the_exact_one() -> None:
    def info(*offers: Offer) -> TeacherInfo:
        return TeacherInfo("t", 8, offers)

    full, topk = Offer("full", temperature_min=0.5, temperature_max=4.0), Offer("topk", max_top_k=20)
    assert signal_to_measure(info(topk, full)) == SignalSpec("full")
    assert signal_to_measure(info(topk)) == SignalSpec("topk", top_k=20)
    assert signal_to_measure(info(Offer("full", temperature_min=2.0, temperature_max=4.0), Offer("sampled"))) is None


# ---------------------------------------------------------------- the suite


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
