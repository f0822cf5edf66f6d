"""Scores of written answers against the libraries' own and against SQuAD's rules by hand."""

from __future__ import annotations

import random

import pytest

from bbopd.evaluate.text_metrics import exact_match, normalise, score_texts, token_f1

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "house", "quickly,", "running.", "Runs", "3", "naïve", "café"]


def sentence(seed: int) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(chosen.randrange(3, 20)))


WRITTEN = [sentence(seed) for seed in range(12)]
ACCEPTED = [[sentence(seed + 5), *([sentence(seed + 40)] if seed % 2 else [])] for seed in range(12)]
ITEMS = [str(seed) for seed in range(12)]


def test_exact_match_and_f1_are_squads() -> None:
    assert normalise("The  Cat, a dog!") == "cat dog"
    assert exact_match("the cat.", ["Dog", "A cat"]) == 1.0
    assert exact_match("cats", ["cat"]) == 0.0
    assert token_f1("the big cat sat", ["a cat"]) == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert token_f1("cat cat dog", ["cat dog dog"]) == pytest.approx(2 / 3)
    assert token_f1("x", ["cat", "x y"]) == pytest.approx(2 / 3)
    assert token_f1("", ["cat"]) == 0.0
    assert token_f1("the", [""]) == 1.0


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_rouge_scores(metric: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer([metric], use_stemmer=True)
    found = score_texts(metric, ITEMS, WRITTEN, ACCEPTED)
    expected = [
        max(scorer.score(answer, text)[metric].fmeasure for answer in answers) for text, answers in zip(WRITTEN, ACCEPTED, strict=True)
    ]
    assert found.table[:, 0].tolist() == pytest.approx(expected)
    assert found.estimate().value == pytest.approx(sum(expected) / 12)
    assert 0 < found.estimate().value < 1


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_corpus_scores_are_sacrebleus(metric: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    references = [[answers[0] for answers in ACCEPTED], [answers[1] if len(answers) > 1 else None for answers in ACCEPTED]]
    score = sacrebleu.corpus_bleu if metric == "bleu" else sacrebleu.corpus_chrf
    found = score_texts(metric, ITEMS, WRITTEN, ACCEPTED)
    assert found.estimate().value == pytest.approx(score(WRITTEN, references).score)
    some = ITEMS[3:8]
    part = [[column[int(item)] for item in some] for column in references]
    assert found.only(some).estimate().value == pytest.approx(score([WRITTEN[int(item)] for item in some], part).score)
    assert (found.estimate().standard_error or 0) > 0
