"""Bits per byte of text: a likelihood that models with different tokenizers can be compared by.

``nats of the scored tokens / (ln 2 * UTF-8 bytes those tokens put into the text)``. A special token (an end of turn, say) puts
nothing into the text; it is the tokenizer's own, so neither its nats nor its bytes count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bbopd.data.assemble import assemble
from bbopd.errors import DataError
from bbopd.evaluate.scores import Scores
from bbopd.evaluate.student import StudentView, in_batches, sum_by_sequence
from bbopd.modeling import token_bytes
from bbopd.pipeline.cycle import as_labelled
from bbopd.types import DistillBatch, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEXT = -1  # in byte counts: the token stands for no text


@dataclass(frozen=True, slots=True)
class BitsPerByte:
    """``standard_error`` takes prompts of one id (the windows of one document) as a cluster; None for a single one."""

    bits_per_byte: float
    standard_error: float | None
    nats: float
    bytes: int
    tokens: int


def token_byte_counts(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Bytes [V] int64 that each id puts into a text, `NO_TEXT` for special tokens and ids without a token.

    Counted from the tokens themselves, not from decoded text: a token may hold a part of a character, which decodes to nothing
    that could be counted, while its neighbours hold the rest.
    """
    tokens = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    to_bytes = token_bytes(tokenizer)
    counts = torch.full((max(tokens.values(), default=-1) + 1,), NO_TEXT, dtype=torch.int64)
    for token, index in tokens.items():
        counts[index] = len(token.encode() if token in added else to_bytes(token))
    counts[list(tokenizer.all_special_ids)] = NO_TEXT
    return counts


class ByteMeter:
    """Adds up nats and bytes of scored sequences. ``byte_counts_V`` comes from `token_byte_counts`."""

    def __init__(self, byte_counts_V: Tensor) -> None:
        self._byte_counts_V = byte_counts_V
        self._nats: dict[str, float] = {}  # by prompt id
        self._bytes: dict[str, float] = {}
        self._tokens = 0

    def add(self, rollouts: Sequence[Rollout], batch: DistillBatch, logprobs_N: Tensor) -> None:
        """Take the sequences of one batch with the log-probabilities [N], in nats, of their response tokens."""
        bytes_N = self._byte_counts_V[batch.target_ids.cpu()]
        is_text_N = bytes_N != NO_TEXT
        self._tokens += int(is_text_N.sum())
        nats_S = sum_by_sequence(torch.where(is_text_N, -logprobs_N.double().cpu(), 0.0), batch)
        bytes_S = sum_by_sequence(bytes_N.clamp(min=0), batch)
        for rollout, nats, size in zip(rollouts, nats_S, bytes_S, strict=True):
            document = rollout.prompt.prompt_id
            self._nats[document] = self._nats.get(document, 0.0) + nats
            self._bytes[document] = self._bytes.get(document, 0.0) + size

    def result(self) -> BitsPerByte:
        """Raises `DataError` where no text was scored."""
        found = self.scores().estimate()
        return BitsPerByte(found.value, found.standard_error, math.fsum(self._nats.values()), int(sum(self._bytes.values())), self._tokens)

    def scores(self) -> Scores:
        """Bits and bytes by document. Raises `DataError` where no text was scored."""
        if not sum(self._bytes.values()):
            raise DataError("there is no text to score: give prompts with a reference answer, or documents of at least two tokens")
        bits = [nats / math.log(2) for nats in self._nats.values()]
        return Scores(tuple(self._nats), np.array([bits, list(self._bytes.values())]).T, higher_is_better=False)


def score_text(student: StudentView, prompts: Sequence[Prompt], byte_counts_V: Tensor) -> ByteMeter:
    """A meter that has scored each prompt's reference given the prompt; prompts without a reference are passed over.

    Parameters
    ----------
    student
        The model.
    prompts
        Held-out text. `document_windows` makes prompts of whole documents.
    byte_counts_V
        From `token_byte_counts`.
    """
    meter = ByteMeter(byte_counts_V)
    for rollouts in in_batches(as_labelled(prompt, draw=index) for index, prompt in enumerate(prompts) if prompt.reference_ids):
        batch = assemble(rollouts, None)
        logprobs_N = student.logprobs(student.hidden(batch), token_ids=batch.target_ids.to(student.device)).sampled
        assert logprobs_N is not None, "token_ids were given"
        meter.add(rollouts, batch, logprobs_N)
    return meter


def document_windows(
    document_id: str, token_ids: Sequence[int], *, window: int, stride: int, start_token_id: int | None = None
) -> Iterator[Prompt]:
    """Cut a document into prompts whose references are its tokens, each exactly once and in order.

    A window holds ``window`` tokens at most. The first begins at the start of the document; each next one moves on by ``stride``
    and scores what the last one did not reach, so every token has ``window - stride`` tokens of context or all there are. The
    first token is scored given ``start_token_id``, or, where that is None, not at all: nothing precedes it.

    Raises
    ------
    ValueError
        ``stride`` is not within 1 and ``window - 1``.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride {stride} must lie between 1 and window - 1 = {window - 1}, so that every token has some context")
    ids = tuple(token_ids) if start_token_id is None else (start_token_id, *token_ids)
    begin, scored = 0, 1  # tokens before ``scored`` are done
    while scored < len(ids):
        end = min(begin + window, len(ids))
        yield Prompt(document_id, ids[begin:scored], ids[scored:end])
        begin, scored = begin + stride, end
