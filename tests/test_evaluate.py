"""Standard errors, bits per byte and agreement with a teacher against dense float64 computations of the same thing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bbopd.errors import DataError, TrainingError
from bbopd.evaluate.agreement import AgreementMeter, signal_to_measure
from bbopd.evaluate.bits_per_byte import NO_TEXT, document_windows, score_text, token_byte_counts
from bbopd.evaluate.statistics import ratio
from bbopd.evaluate.student import StudentView, in_batches
from bbopd.types import Offer, Prompt, Rollout, ScoredRollout, SignalSpec, TeacherInfo
from tests.dense_teacher import TEXT, VOCAB, DenseTeacher, byte_length, dense_logprobs, measure_agreement, nats_of, random_prompts
from tests.tiny_models import tiny_gemma2, tiny_llama, tiny_tokenizer

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
