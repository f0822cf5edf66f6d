"""A skew for every sample, from how far teacher and student are apart on it (DistiLLM-2: Ko et al. 2025, arXiv 2503.07067, section 3.3).

To first order the gradient of a skewed KL shrinks by (1 - skew) times how far the two probabilities are apart. Held at one size ``m``
for all samples, that gives

    skew_s = 1 - m / lead_s,   m = (1 - skew) * gap,   between 0.01 and skew

``lead_s`` is p - q on a labelled sequence, q - p on a rollout, p and q being each model's geometric mean probability of a token of the
sample; the authors' code clips as here, and takes the mean lead of its first steps for ``gap``.

Shape suffixes: ``N`` rows of a batch, ``S`` its packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample_leads", "sample_skews"]

_SMALLEST = 0.01
_EPSILON = 1e-5


def sample_leads(ahead_N: Tensor, behind_N: Tensor, valid_N: Tensor, sequence_N: Tensor) -> Tensor:
    """``exp(mean ahead) - exp(mean behind)`` of every sequence [S], float64, over its ``valid`` rows; 0 where there are none.

    Both are logprobs of the tokens that are there; ``sequence_N`` says which of the sequences a row belongs to.
    """
    count = int(sequence_N.max()) + 1 if len(sequence_N) else 0
    tokens_S = torch.zeros(count, dtype=torch.float64, device=sequence_N.device).index_add_(0, sequence_N, valid_N.double())

    def mean_probability(logprobs_N: Tensor) -> Tensor:
        kept_N = torch.where(valid_N, logprobs_N.double(), 0.0)
        return (torch.zeros_like(tokens_S).index_add_(0, sequence_N, kept_N) / tokens_S.clamp(min=1)).exp()

    return mean_probability(ahead_N) - mean_probability(behind_N)


def sample_skews(leads_S: Tensor, skew: float, gap: float) -> Tensor:
    """The skew of every sample [S]: ``skew`` where its lead is ``gap`` or more, less where the models are closer than that.

    A lead below 0, where the model that should be behind is ahead, keeps ``skew``, as in the authors' code.
    """
    skews_S = 1 - (1 - skew) * gap / (leads_S + _EPSILON)
    return torch.where(leads_S < 0, skew, skews_S.clamp(min(_SMALLEST, skew), skew))
