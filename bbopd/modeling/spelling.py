"""What tokens spell, so that two tokenizers can speak of one text: ids to bytes, text to ids, and ids of one to ids of the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bbopd.alignment import SpelledVocabulary
from bbopd.errors import ModelError
from bbopd.modeling.vocabulary import token_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Speller", "counterparts"]

_PROBE = "The cat's 12 mats:\n\tx = y[0] (and so on)."
_ANCHOR = "\n"  # what no tokenizer joins with a letter after it


class Speller:
    """A tokenizer, by what its ids below ``rows`` spell.

    Special tokens are marks and no text: the same characters in a text are not read as them.

    Raises
    ------
    ModelError : the tokens of a plain text do not spell that text (a tokenizer that drops case or spaces), or none ends a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int, *, named: str) -> None:
        self._tokenizer = tokenizer
        table = token_table(tokenizer, rows)
        marks = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
        self.marks = {index: table[index].decode() for index in sorted(marks) if index in table}
        """Special tokens, by their ids."""
        self.vocabulary = SpelledVocabulary.of({index: raw for index, raw in table.items() if index not in self.marks})
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer {named} names no token that ends a text (eos_token): take one that does")
        self.end = int(tokenizer.eos_token_id)
        """The token that ends a text."""
        self.end_of_turn = self._end_of_turn()
        """The token that ends an answer in its chat template; that of a text where there is no template."""
        spelled = self.bytes_of(self.encode(_PROBE))
        if spelled != _PROBE.encode():
            raise ModelError(
                f"the tokenizer {named} changes text: {_PROBE!r} becomes {spelled.decode(errors='backslashreplace')!r}, so its tokens "
                "cannot be laid beside another's; learn from what the teacher writes (objective.name=seqkd with teacher.signal=text)"
            )

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """What ``ids`` spell, marks left out."""
        return b"".join(filter(None, (self.vocabulary[index] for index in ids)))

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` as the continuation of another, so without a space that the tokenizer puts before every text."""
        ids = self._ids(text)
        if self.bytes_of(ids) != text.encode():
            anchored = self._ids(_ANCHOR + text)
            for cut in range(1, len(anchored)):
                is_before_text = self.bytes_of(anchored[:cut]).lstrip(b" ") == _ANCHOR.encode()
                if is_before_text and self.bytes_of(anchored[cut:]) == text.encode():
                    return anchored[cut:]
        return ids

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def _end_of_turn(self) -> int:
        if not getattr(self._tokenizer, "chat_template", None):
            return self.end
        question = [{"role": "user", "content": "a"}]
        try:
            asked = self._tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
            answer = {"role": "assistant", "content": "b"}
            answered = self._tokenizer.apply_chat_template([*question, answer], return_dict=False)
        except Exception:  # a template raises what it likes; what it refuses here is no chat of two turns
            return self.end
        return next((index for index in answered[len(asked) :] if index in self.marks), self.end)


def counterparts(teacher: Speller, student: Speller) -> np.ndarray:
    """For every id of the teacher's the student's that stands for the same, [V_teacher] int64; -1 where there is none.

    Text goes by its bytes, special tokens by their names, and what ends a text or an answer by that. Several ids of the teacher's may have
    one counterpart (a letter and its byte, where there is a token for every byte); of several of the student's it is the one that its
    tokenizer writes.
    """
    size = 1 + max(len(teacher.vocabulary.is_text) - 1, *teacher.marks, teacher.end_of_turn)
    found = np.full(size, -1, np.int64)
    by_bytes: dict[bytes, int] = {}
    for index in range(len(student.vocabulary.is_text)):
        raw = student.vocabulary[index]
        if raw is None:
            continue
        known = by_bytes.get(raw)
        by_bytes[raw] = index if known is None else _written(student, raw, known, index)
    for index in range(len(teacher.vocabulary.is_text)):
        raw = teacher.vocabulary[index]
        if raw is not None:
            found[index] = by_bytes.get(raw, -1)
    by_name = {name: index for index, name in student.marks.items()}
    for index, name in teacher.marks.items():
        found[index] = by_name.get(name, -1)
    found[[teacher.end, teacher.end_of_turn]] = student.end
    return found


def _written(student: Speller, raw: bytes, known: int, other: int) -> int:
    """Which of two ids with the same bytes the tokenizer writes; the first where it writes neither by itself."""
    try:
        return other if student.encode(raw.decode()) == [other] else known
    except UnicodeDecodeError:
        return known
