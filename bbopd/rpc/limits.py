"""What may be asked of a teacher: one set of checks, made by the client before sending and by the server before its model sees anything.

Shape suffixes: ``L`` response tokens of one rollout, ``M`` candidates.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from bbopd.errors import TeacherError
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec, TeacherInfo

__all__ = ["Code", "RefusedError", "check_prompt", "check_rollout", "check_sampling", "check_want"]

CHARACTERS_PER_TOKEN = 64  # of text, at most, that is turned into tokens at all
_ANY_TOKENS = 2**20

Code = Literal["invalid", "too_long", "not_offered", "bad_signal", "internal", "unavailable", "over_limit", "mismatch"]


class RefusedError(TeacherError):
    """One item that gets no answer: ``code`` says of which kind, ``is_retryable`` whether the same may succeed later."""

    def __init__(self, code: Code, message: str, *, is_retryable: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.is_retryable = is_retryable
        self.retry_after = retry_after


def check_want(want: SignalSpec, info: TeacherInfo) -> None:
    """Whether the teacher offers this level, with this top_k, at this temperature. Raises `RefusedError`."""
    offer = info.offer(want.level)
    if offer is None:
        offered = ", ".join(offer.level for offer in info.offers) or "nothing"
        raise RefusedError("not_offered", f"teacher {info.model} does not offer level {want.level!r}; it offers {offered}")
    if want.level == "text":
        raise RefusedError("invalid", "level 'text' has no signal per token: let the teacher write (complete), do not let it score")
    is_topk = want.level == "topk"
    if is_topk and not 1 <= want.top_k <= offer.max_top_k:
        raise RefusedError("not_offered", f"top_k {want.top_k} is outside 1..{offer.max_top_k}, what teacher {info.model} offers")
    if not is_topk and want.top_k != 0:
        raise RefusedError("invalid", f"top_k {want.top_k} with level {want.level!r}: it belongs to level 'topk' alone, set it to 0")
    if not (math.isfinite(want.temperature) and want.temperature > 0):
        raise RefusedError("invalid", f"temperature {want.temperature} must be a finite number above 0")
    if want.level != "full" and not offer.temperature_min <= want.temperature <= offer.temperature_max:
        raise RefusedError(
            "not_offered",
            f"temperature {want.temperature} is outside {offer.temperature_min}..{offer.temperature_max}, "
            f"what teacher {info.model} applies exactly at level {want.level!r}",
        )


def check_rollout(rollout: Rollout, want: SignalSpec, info: TeacherInfo) -> None:
    """Whether one rollout can be scored: positions, length, ids, candidates. Raises `RefusedError` naming the rollout."""
    name = f"rollout {rollout.rollout_id}"
    if not rollout.token_ids:
        raise RefusedError("invalid", f"{name} has no response tokens: nothing to score")
    if not rollout.prompt.token_ids:
        raise RefusedError("invalid", f"{name} has no prompt: its first response token has no row that predicts it")
    _check_ids(name, rollout.all_ids, info)
    if want.level == "candidates":
        _check_candidates(name, rollout, info)


def check_prompt(prompt: Prompt, sampling: Sampling, info: TeacherInfo) -> None:
    """Whether the teacher can answer one prompt. Raises `RefusedError` naming the prompt."""
    name = f"prompt {prompt.prompt_id}"
    if prompt.is_text:
        _check_text(name, prompt, info)
        return
    if not prompt.token_ids:
        raise RefusedError("invalid", f"{name} is empty")
    _check_ids(name, prompt.token_ids, info, room=sampling.max_new_tokens)


def check_sampling(sampling: Sampling, info: TeacherInfo) -> None:
    """Whether the teacher writes at all, and can write like this. Raises `RefusedError`."""
    if info.offer("text") is None:
        raise RefusedError("not_offered", f"teacher {info.model} does not offer level 'text': it writes no answers")
    for field, valid in (
        ("max_new_tokens", sampling.max_new_tokens >= 1),
        ("temperature", math.isfinite(sampling.temperature) and sampling.temperature > 0),
        ("top_p", 0 < sampling.top_p <= 1),
        ("top_k", sampling.top_k >= 0),
        ("seed", 0 <= sampling.seed < 2**63),
        ("stop_token_ids", all(0 <= token < info.vocab_size for token in sampling.stop_token_ids)),
    ):
        if not valid:
            raise RefusedError("invalid", f"sampling.{field} {getattr(sampling, field)!r} cannot be used (top_k=1 is greedy)")


def _check_text(name: str, prompt: Prompt, info: TeacherInfo) -> None:
    if not info.takes_text:
        raise RefusedError("not_offered", f"{name} is text, and teacher {info.model} takes token ids alone: give it those of its tokenizer")
    size = len(prompt.text) + sum(len(role) + len(content) for role, content in prompt.messages)
    most = CHARACTERS_PER_TOKEN * (info.max_sequence_tokens or _ANY_TOKENS)
    if size > most:
        raise RefusedError("too_long", f"{name} has {size:,} characters, teacher {info.model} looks at {most:,}: shorten it")


def _check_ids(name: str, ids: tuple[int, ...], info: TeacherInfo, room: int = 0) -> None:
    limit = info.max_sequence_tokens
    if limit and len(ids) + room > limit:
        asked = f"{len(ids)} tokens" + (f" and {room} to write" if room else "")
        raise RefusedError("too_long", f"{name} has {asked}, more than teacher {info.model}'s {limit} tokens a sequence")
    smallest, largest = min(ids), max(ids)
    if smallest < 0 or largest >= info.vocab_size:
        worst = largest if largest >= info.vocab_size else smallest
        raise RefusedError(
            "invalid", f"{name} holds token id {worst}, outside teacher {info.model}'s vocabulary of {info.vocab_size} entries"
        )


def _check_candidates(name: str, rollout: Rollout, info: TeacherInfo) -> None:
    ids = rollout.candidate_ids
    if ids is None:
        raise RefusedError("invalid", f"{name} brings no candidate_ids, which level 'candidates' needs")
    offer = info.offer("candidates")
    assert offer is not None, "check_want comes first"
    if ids.ndim != 2 or ids.shape[0] != len(rollout) or not 1 <= ids.shape[1] <= offer.max_top_k:
        raise RefusedError("invalid", f"{name} has candidate_ids {list(ids.shape)}: expected [{len(rollout)}, 1..{offer.max_top_k}]")
    if ids.min() < -1 or ids.max() >= info.vocab_size:
        raise RefusedError("invalid", f"{name} has candidate ids {ids.min()}..{ids.max()}: allowed are -1 (empty) to {info.vocab_size - 1}")
    ordered = np.sort(ids, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        row = int(repeated.any(axis=1).argmax())
        raise RefusedError("invalid", f"{name} asks for a candidate id twice at response token {row}: {ids[row].tolist()}")
