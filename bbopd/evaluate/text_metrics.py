"""How near a written answer is to those accepted: SQuAD's exact match and F1, ROUGE by rouge-score, BLEU and chrF by sacrebleu."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np

from bbopd.config_task import Metric
from bbopd.evaluate.scores import Scores
from bbopd.extras import need

METRICS: tuple[Metric, ...] = get_args(Metric)

Answers = Sequence[Sequence[str]]  # for each item, those that are right

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """As SQuAD's own evaluation does (Rajpurkar et al., 2016): lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(written: str, accepted: Sequence[str]) -> float:
    """1 where ``written`` is one of ``accepted``, both normalised, else 0."""
    return float(any(normalise(written) == normalise(answer) for answer in accepted))


def token_f1(written: str, accepted: Sequence[str]) -> float:
    """The best F1, in [0, 1], of the normalised words of ``written`` with those of an accepted answer (SQuAD).

    Where one of the two has no words, it is 1 if the other has none either, as in SQuAD 2.
    """
    return max(_f1(normalise(written).split(), normalise(answer).split()) for answer in accepted)


def _f1(written: list[str], answer: list[str]) -> float:
    if not written or not answer:
        return float(written == answer)
    common = (Counter(written) & Counter(answer)).total()
    return 2 * common / (len(written) + len(answer))


def check_libraries(metrics: Sequence[Metric], where: str) -> None:
    """Raises `ConfigError` where a metric's library is not installed."""
    for metric in metrics:
        if metric.startswith("rouge"):
            need("rouge_score", f"{where}: metric {metric}", extra="eval")
        elif metric in ("bleu", "chrf"):
            need("sacrebleu", f"{where}: metric {metric}", extra="eval")


def score_texts(metric: Metric, items: Sequence[str], written: Sequence[str], accepted: Answers, clusters: Sequence[str] = ()) -> Scores:
    """``metric`` of what was ``written`` for each of ``items``, against the answers ``accepted`` for it (one or more).

    ROUGE is the F-measure with Porter's stemmer, in [0, 1], by the best of the accepted answers. BLEU and chrF are those of the whole
    corpus, in [0, 100], with all accepted answers as references.
    """
    if metric in ("bleu", "chrf"):
        return _corpus_scores(metric, items, written, accepted, clusters)
    of_one = _rouge(metric) if metric.startswith("rouge") else {"exact_match": exact_match, "f1": token_f1}[metric]
    return Scores.mean(items, [of_one(text, answers) for text, answers in zip(written, accepted, strict=True)], clusters=clusters)


def _rouge(metric: str) -> Callable[[str, Sequence[str]], float]:
    scorer = need("rouge_score.rouge_scorer", f"metric {metric}", extra="eval").RougeScorer([metric], use_stemmer=True)
    return lambda written, accepted: float(scorer.score_multi(accepted, written)[metric].fmeasure)


def _corpus_scores(metric: str, items: Sequence[str], written: Sequence[str], accepted: Answers, clusters: Sequence[str]) -> Scores:
    library = need("sacrebleu.metrics", f"metric {metric}", extra="eval")
    scorer: Any = library.BLEU() if metric == "bleu" else library.CHRF()
    width = max(map(len, accepted))
    references = [[answers[index] if index < len(answers) else None for answers in accepted] for index in range(width)]
    # the statistics of each sentence, which sacrebleu's own significance tests add up in the same way
    table_IC = np.array(scorer._extract_corpus_statistics(list(written), references), np.float64)

    def corpus(table_IC: np.ndarray, weight_I: np.ndarray) -> float:
        return float(scorer._compute_score_from_stats((weight_I @ table_IC).tolist()).score)

    return Scores(tuple(items), table_IC, corpus, tuple(clusters))
