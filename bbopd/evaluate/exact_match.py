"""Questions with one right answer each: how many of them a model, writing greedily, gets exactly right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bbopd.data.streams import each
from bbopd.errors import DataError
from bbopd.types import Prompt, RolloutEngine, Sampling


@dataclass(frozen=True, slots=True)
class Answered:
    """What a model wrote to one question, what of it counts, and whether that is the answer."""

    prompt_id: str
    wrote: str
    found: str
    answer: str
    tokens: int  # that were written

    @property
    def is_right(self) -> bool:
        return self.found == self.answer


def read_answers(path: str | Path) -> dict[str, str]:
    """The ``answer`` of every line of a JSONL file, by the id that `data.prompts` gives its prompt.

    Raises
    ------
    DataError
        The file cannot be read, or a line has no answer.
    """
    path = Path(path)
    answers = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from error
        answer = row.get("answer") if isinstance(row, dict) else None
        if not isinstance(answer, str | int) or not str(answer).strip():
            raise DataError(f"{path}:{number}: no 'answer' that what a model writes could be compared with; got {answer!r}")
        answers[f"{path.name}:{number}"] = str(answer).strip()
    return answers


async def exact_match(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    answers: dict[str, str],
    *,
    pattern: str | None,
    max_new_tokens: int,
    decode: Callable[[Sequence[int]], str],
) -> list[Answered]:
    """Ask every one of ``prompts``, and compare what ``pattern`` finds last in each text with its answer; in the order of ``prompts``.

    Parameters
    ----------
    answers
        From `read_answers`, by prompt id.
    pattern
        A regular expression, of which the first group counts where it has one. None: the whole text, without white space around it.
    decode
        Ids to text, without special tokens.
    """
    greedy = Sampling(max_new_tokens=max_new_tokens, top_k=1)
    written = {rollout.prompt.prompt_id: rollout.token_ids async for rollout in engine.generate(each(prompts), greedy)}
    return [
        Answered(prompt.prompt_id, text, _found(text, pattern), answers[prompt.prompt_id], len(ids))
        for prompt in prompts
        for ids in [written.get(prompt.prompt_id, ())]
        for text in [decode(ids)]
    ]


def _found(text: str, pattern: str | None) -> str:
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return ""
    last = matches[-1]
    return str(last.group(1 if last.re.groups else 0) or "").strip()
