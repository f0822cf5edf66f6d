"""Sample answers token by token: the disagreement with the teacher is the float64 KL, and the pieces are the text."""

from __future__ import annotations

import numpy as np
import pytest

from bbopd.evaluate.samples import disagreement, spelled
from bbopd.evaluate.student import StudentView
from bbopd.types import Prompt, Rollout
from tests.dense_teacher import VOCAB, DenseTeacher, dense_logprobs
from tests.tiny_models import tiny_llama, tiny_tokenizer


async def test_disagreement_is_the_kl_of_every_token() -> None:
    student, other = tiny_llama(VOCAB, seed=1), tiny_llama(VOCAB, seed=2)
    rollouts = [
        Rollout("a", Prompt("a", (5, 6, 7)), (8, 9, 10, 11)),
        Rollout("b", Prompt("b", (4,)), (3, 30)),
        Rollout("c", Prompt("c", (4,)), ()),
    ]

    def decode(ids: object) -> str:
        return "".join(f"<{index}>" for index in ids)  # type: ignore[attr-defined]

    found = await disagreement(StudentView(student), DenseTeacher(other, dtype=np.float32), rollouts, decode)
    assert set(found) == {"a", "b"}, "an empty answer has no tokens"
    for rollout in rollouts[:2]:
        q, p = (dense_logprobs(model, rollout.all_ids, len(rollout.prompt.token_ids)).double() for model in (student, other))
        pieces = found[rollout.rollout_id]
        assert [piece.kl for piece in pieces] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3, abs=1e-4)
        assert [piece.teacher for piece in pieces] == [f"<{index}>" for index in p.argmax(-1).tolist()]
        assert "".join(piece.text for piece in pieces) == decode(rollout.token_ids)
    assert all(piece.kl == 0.0 for piece in (await disagreement(StudentView(student), DenseTeacher(student), rollouts[:1], decode))["a"])


def test_pieces_are_whole_characters_and_add_up_to_the_text() -> None:
    tokenizer = tiny_tokenizer()  # a token is a byte here
    text = "the naïve 日本 🙂 end"
    ids = tokenizer(text)["input_ids"]
    kl = [float(number) for number in range(len(ids))]
    pieces = spelled(ids, tokenizer.decode, kl, [str(number) for number in range(len(ids))])
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) < len(ids)
    assert [piece.text for piece in pieces if len(piece.text.encode()) > 2 and piece.text != "the"] == ["日", "本", "🙂"]
    smile = next(piece for piece in pieces if piece.text == "🙂")
    last = len(ids) - len(tokenizer(" end")["input_ids"]) - 1
    assert (smile.kl, smile.teacher) == (float(last), str(last - 3)), "the largest KL of its four bytes, and the teacher at the first"
    assert spelled(ids, tokenizer.decode)[0].kl is None
    assert spelled(tokenizer("日")["input_ids"][:2], tokenizer.decode)[-1].text == "\ufffd", "an answer that ends within a character"
