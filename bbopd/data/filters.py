"""Which rollouts are not worth a teacher's time, and when so few are that the run should stop.

Shape: ``L`` response tokens of one rollout.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from bbopd.config import FiltersConfig
from bbopd.data.near_duplicates import AcceptedAnswers
from bbopd.data.rejected import Rejection
from bbopd.data.text_checks import TextCheck
from bbopd.errors import RolloutsRejectedError
from bbopd.types import Rollout


class RolloutFilter:
    """Judges rollouts by `FiltersConfig`, in this order; the first reason counts.

    ``empty``, ``too_short``, ``too_long``, ``truncated``, ``no_eos``, ``repetition``, ``duplicate``; then, on the text, ``charset``,
    ``language``, hooks and ``near_duplicate``. Two equal answers to one prompt are duplicates within one update cycle: `start_cycle`
    forgets them; near-duplicates are sought among the last accepted answers of the run. The token that ends an answer is no part of its
    length, repetition or text.

    Parameters
    ----------
    stop_token_ids
        Tokens that end an answer (end of text).
    decode
        Token ids to text; needed where there are ``text_checks`` or ``accepted``.
    text_checks
        From `text_checks.text_checks`.
    accepted
        Answers accepted so far, where near-duplicates of them are turned away.
    """

    def __init__(
        self,
        config: FiltersConfig,
        stop_token_ids: Iterable[int],
        *,
        decode: Callable[[list[int]], str] | None = None,
        text_checks: Sequence[TextCheck] = (),
        accepted: AcceptedAnswers | None = None,
    ) -> None:
        self._config = config
        self._stop_ids = frozenset(stop_token_ids)
        self._decode, self._text_checks, self._accepted = decode, tuple(text_checks), accepted
        self._seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        self.kept = KeptShare(config.min_kept, config.kept_window)

    def start_cycle(self) -> None:
        self._seen.clear()

    def check(self, rollout: Rollout) -> Rejection | None:
        """The first reason to reject ``rollout``, or None. Raises `DataError` where a hook fails."""
        ids = rollout.token_ids
        has_end = bool(ids) and ids[-1] in self._stop_ids
        if has_end:
            ids = ids[:-1]
        return self._check_tokens(rollout, ids, has_end) or self._check_text(rollout, ids)

    def _check_tokens(self, rollout: Rollout, ids: tuple[int, ...], has_end: bool) -> Rejection | None:
        config = self._config
        if not ids:
            return Rejection("empty", 0, 1)
        if len(ids) < config.min_tokens:
            return Rejection("too_short", len(ids), config.min_tokens)
        if config.max_tokens is not None and len(ids) > config.max_tokens:
            return Rejection("too_long", len(ids), config.max_tokens)
        if config.reject_truncated and rollout.finish_reason == "length":
            return Rejection("truncated", len(ids))
        if config.reject_no_eos and not has_end:
            return Rejection("no_eos", len(ids), detail=f"ended with token {ids[-1]} (finish_reason {rollout.finish_reason})")
        share = repeated_share(ids, config.repetition_ngram)
        if share > config.max_repetition:
            return Rejection("repetition", round(share, 4), config.max_repetition)
        if config.reject_duplicates:
            key = (rollout.prompt.token_ids, ids)
            if key in self._seen:
                return Rejection("duplicate")
            self._seen.add(key)
        return None

    def _check_text(self, rollout: Rollout, ids: tuple[int, ...]) -> Rejection | None:
        if not self._text_checks and self._accepted is None:
            return None
        assert self._decode is not None, "filters of text need a tokenizer's decode"
        text = self._decode(list(ids))
        for check in self._text_checks:
            rejection = check(rollout, text)
            if rejection is not None:
                return rejection
        return None if self._accepted is None else self._accepted.check_and_add(rollout, text)


class KeptShare:
    """Of the last ``window`` rollouts, the share that passed; `count` raises once a whole window has fewer than ``minimum``."""

    def __init__(self, minimum: float, window: int) -> None:
        self._minimum = minimum
        self._recent: deque[str | None] = deque(maxlen=window)

    def count(self, rejection: Rejection | None) -> None:
        """Take in one decision. Raises `RolloutsRejectedError` with the window's reasons."""
        self._recent.append(None if rejection is None else rejection.reason)
        window = self._recent.maxlen
        if len(self._recent) != window or rejection is None:
            return
        kept = self._recent.count(None)
        if kept >= self._minimum * window:
            return
        reasons = Counter(reason for reason in self._recent if reason is not None).most_common()
        raise RolloutsRejectedError(
            f"the filters let {kept} of the last {window} rollouts through ({kept / window:.1%}; data.filters.min_kept is "
            f"{self._minimum:.1%}): {', '.join(f'{reason} {count}' for reason, count in reasons)}. rejected.jsonl has their texts, with "
            "what was measured and what was allowed. Where they are gibberish, raise train.cold_start_tokens; where they are cut off, "
            "rollouts.max_new_tokens; else loosen data.filters, or lower data.filters.min_kept, and run the same command again"
        )


def repeated_share(ids: tuple[int, ...], n: int) -> float:
    """Share of the n-grams of ``ids`` [L] that occurred before in it: 0 where all differ, near 1 for one phrase over and over."""
    total = len(ids) - n + 1
    if total < 1:
        return 0.0
    return 1.0 - len({ids[start : start + n] for start in range(total)}) / total
