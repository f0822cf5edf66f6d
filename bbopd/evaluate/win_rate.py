"""How often a judge likes the student's answer better than the teacher's, asked in both orders, as judges favour a place."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from bbopd.data.streams import each
from bbopd.errors import TeacherError
from bbopd.pipeline.cycle import as_generator
from bbopd.types import Prompt, Sampling, Teacher

_REPLY_TOKENS = 8
_VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}  # of the answer that stands first
QUESTION = """Two assistants answered the same request. Judge which answer is better: correct, helpful, and of the right length.

<request>
{request}
</request>

<answer_a>
{first}
</answer_a>

<answer_b>
{second}
</answer_b>

Reply with one word and nothing else: A, B, or tie."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A request with the student's and the teacher's answer, all as text."""

    name: str
    request: str
    student: str
    teacher: str


@dataclass(frozen=True, slots=True)
class WinRate:
    """``value``: 1 where the student's answers are always better, 0.5 where they are as good; ``pairs`` that were judged in both orders."""

    value: float
    standard_error: float | None
    pairs: int
    unread: int  # pairs for which a reply was no verdict

    def to_json(self) -> dict[str, float | int | None]:
        return {"win_rate": self.value, "win_rate_pairs": self.pairs, "win_rate_unread": self.unread}


async def win_rate(judge: Teacher, pairs: Sequence[Pair]) -> WinRate:
    """The mean of `judged` over those pairs that it holds. Raises as that does."""
    found = await judged(judge, pairs)
    wins = list(found.values())
    mean = sum(wins) / len(wins)
    spread = sum((win - mean) ** 2 for win in wins)
    error = math.sqrt(spread / (len(wins) - 1) / len(wins)) if len(wins) > 1 else None
    return WinRate(mean, error, len(wins), len(pairs) - len(wins))


async def judged(judge: Teacher, pairs: Sequence[Pair]) -> dict[str, float]:
    """By a pair's name, how good the student's answer is beside the teacher's: 1 better, 0.5 as good, 0 worse, the mean over both orders.

    ``judge``, a teacher that takes messages, is asked about every pair twice. A reply that is none of the three words leaves its pair out.
    Raises `TeacherError` where no pair at all could be judged, or as the judge does.
    """
    questions = {f"{order} {pair.name}": _question(pair, order) for pair in pairs for order in ("student first", "teacher first")}
    found: dict[str, float] = {}
    last = ""

    async def asked() -> AsyncIterator[Prompt]:
        async for prompt in each(list(questions.values())):
            yield prompt

    source = asked()
    async with aclosing(as_generator(judge.complete(source, Sampling(_REPLY_TOKENS, top_k=1)))) as replies:
        async for reply in replies:
            verdict = _VERDICTS.get(reply.text.strip().strip(".").lower())
            if verdict is None:
                last = reply.text
            else:
                found[reply.prompt.prompt_id] = verdict
    wins = {}
    for pair in pairs:
        first, second = found.get(f"student first {pair.name}"), found.get(f"teacher first {pair.name}")
        if first is not None and second is not None:
            wins[pair.name] = (first + 1.0 - second) / 2
    if not wins:
        raise TeacherError(
            f"judge {judge.info.model} gave a verdict on none of {len(pairs)} pairs, but such as {last[:200]!r}: take another eval.judge"
        )
    return wins


def _question(pair: Pair, order: str) -> Prompt:
    first, second = (pair.student, pair.teacher) if order == "student first" else (pair.teacher, pair.student)
    text = QUESTION.format(request=pair.request, first=first, second=second)
    return Prompt(f"{order} {pair.name}", (), messages=(("user", text),))
