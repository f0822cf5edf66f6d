"""How endpoints that speak OpenAI's protocol score tokens that are given by id, and how what they say becomes a teacher's signal.

Three ways are in use. All of them give log-probabilities at temperature 1 and no tail: it is derived as 1 − Σp.

Shape suffixes: ``L`` response tokens of one rollout, ``K`` top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from bbopd.errors import BadAnswerError
from bbopd.rpc.limits import RefusedError
from bbopd.rpc.signals import MASS_TOLERANCE, check_signal
from bbopd.teachers.openai_client import ApiClient, Question
from bbopd.types import Rollout, SignalSpec, TeacherSignal

__all__ = ["STYLES", "ScoringStyle", "find_style", "scoring_question"]

_BYTES_PER_ID = 512  # of JSON, and the same again for what comes with a whole answer
_ID_PREFIX = "token_id:"

Row = tuple[float, list[tuple[int, float]]]
"""Of one token: its own logprob, and the ids and logprobs of the likeliest, in any order; the token itself may be one more of them."""


class ScoringStyle(Protocol):
    """One way of asking."""

    name: str

    def url(self, client: ApiClient) -> str: ...
    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]: ...
    def rows(self, said: Any, ids: Sequence[int], start: int, top_k: int) -> list[Row]:
        """What was said of ``ids[start:]``. Raises `ValueError`, or what wrong indexing raises."""
        ...


class PromptLogprobs:
    """vLLM: ``prompt_logprobs`` of ``/completions``, keyed by token id."""

    name = "prompt_logprobs"

    def url(self, client: ApiClient) -> str:
        return f"{client.address.url}/completions"

    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]:
        whole = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # over a server's own defaults
        return {"model": model, "prompt": list(ids), "max_tokens": 1, "prompt_logprobs": top_k, **whole}

    def rows(self, said: Any, ids: Sequence[int], start: int, top_k: int) -> list[Row]:
        given = _same_length(_only_choice(said)["prompt_logprobs"], ids, "prompt_logprobs")
        rows = []
        for token, entries in zip(ids[start:], given[start:], strict=True):
            found = {int(key): float(entry["logprob"]) for key, entry in entries.items()}
            rows.append((found[token], list(found.items())))
        return rows


class SGLang:
    """SGLang's own ``/generate``: triples of logprob, id and text."""

    name = "sglang"

    def url(self, client: ApiClient) -> str:
        return f"{client.address.root}/generate"

    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]:
        how = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": top_k}
        return {"input_ids": list(ids), "sampling_params": {"max_new_tokens": 1, "temperature": 1.0}, **how}

    def rows(self, said: Any, ids: Sequence[int], start: int, top_k: int) -> list[Row]:
        said = said[0] if isinstance(said, list) else said
        own = _same_length(said["meta_info"]["input_token_logprobs"], ids, "input_token_logprobs")
        best = _same_length(said["meta_info"]["input_top_logprobs"], ids, "input_top_logprobs") if top_k else [()] * len(ids)
        for position, (token, entry) in enumerate(zip(ids, own, strict=True)):
            if entry[1] != token:
                raise ValueError(f"token {position} is {entry[1]} in the answer, and was {token} in the request")
        return [
            (float(entry[0]), [(int(other[1]), float(other[0])) for other in others])
            for entry, others in zip(own[start:], best[start:], strict=True)
        ]


class Echo:
    """OpenAI's old ``echo`` with ``logprobs``, where the tokens come with their ids (``token_id:…``, or ``token_ids`` beside them)."""

    name = "echo"

    def url(self, client: ApiClient) -> str:
        return f"{client.address.url}/completions"

    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]:
        how = {"echo": True, "logprobs": top_k, "return_tokens_as_token_ids": True, "temperature": 1.0}
        return {"model": model, "prompt": list(ids), "max_tokens": 1, **how}

    def rows(self, said: Any, ids: Sequence[int], start: int, top_k: int) -> list[Row]:
        given = _only_choice(said)["logprobs"]
        told = given.get("token_ids") or [_id_of(token) for token in given["tokens"]]
        own, best = given["token_logprobs"], given.get("top_logprobs")
        if len(told) < len(ids) or len(own) < len(ids):
            raise ValueError(f"{len(told)} tokens with {len(own)} logprobs came back, {len(ids)} were sent")
        for position, token in enumerate(ids):
            if told[position] != token:
                raise ValueError(f"token {position} is {told[position]} in the answer, and was {token} in the request")
        if top_k and (best is None or len(best) < len(ids)):
            raise ValueError("top_logprobs are missing")
        rows: list[Row] = []
        for position in range(start, len(ids)):
            others = [(_id_of(key), float(value)) for key, value in best[position].items()] if top_k else []
            rows.append((float(own[position]), others))
        return rows


STYLES: tuple[ScoringStyle, ...] = (PromptLogprobs(), SGLang(), Echo())


def scoring_question(
    client: ApiClient, style: ScoringStyle, model: str, rollout: Rollout, want: SignalSpec, vocab_size: int
) -> Question[TeacherSignal]:
    """The request that has one rollout scored; what it gives has been validated as any teacher's answer is."""
    ids, start = rollout.all_ids, len(rollout.prompt.token_ids)
    targets = np.array(rollout.token_ids, np.int32)

    def read(said: Any) -> TeacherSignal:
        signal = _signal(style.rows(said, ids, start, want.top_k), ids[start:], want, vocab_size)
        check_signal(signal, want, targets, vocab_size)
        return signal

    return Question(
        name=f"rollout {rollout.rollout_id}",
        url=style.url(client),
        body=style.body(model, ids, want.top_k),
        read=read,
        prompt_tokens=len(ids),
        answer_tokens=1,
        max_bytes=_BYTES_PER_ID * (len(ids) + 1) * (want.top_k + 2),
    )


def _signal(rows: list[Row], targets: Sequence[int], want: SignalSpec, vocab_size: int) -> TeacherSignal:
    sampled = np.array([own for own, _ in rows], np.float32)
    if want.level == "sampled":
        return TeacherSignal("sampled", sampled=sampled)
    width = min(want.top_k, vocab_size)
    ids = np.empty((len(rows), width), np.int32)
    logprobs = np.empty((len(rows), width), np.float64)
    for number, ((_, others), target) in enumerate(zip(rows, targets, strict=True)):
        if len(others) > width:  # the token itself comes beside the likeliest
            others = [entry for entry in others if entry[0] != target]
        if len(others) != width:
            raise ValueError(f"response token {number} has {len(others)} ids, asked were {width}")
        others.sort(key=lambda entry: (-entry[1], entry[0]))
        for column, (token, logprob) in enumerate(others):
            if not 0 <= token < 2**31:
                raise ValueError(f"response token {number} has id {token}")
            ids[number, column], logprobs[number, column] = token, logprob
    _check_derived(logprobs, ids, sampled, targets, vocab_size)
    return TeacherSignal(
        "topk", ids=ids, logprobs=logprobs.astype(np.float32), log_tail=_derived_tail(logprobs).astype(np.float32), sampled=sampled
    )


def _check_derived(logprobs_LK: np.ndarray, ids_LK: np.ndarray, sampled_L: np.ndarray, targets: Sequence[int], vocab_size: int) -> None:
    """What a sum of 1 proves of a teacher that tells its tail, and of a derived tail does not: that these are the likeliest ids.

    No other token is likelier than the last of them. So the rest holds at most so many times its probability, and the response token,
    where it is not among them, is no likelier. Raises `ValueError`.
    """
    last_L = np.exp(np.minimum(logprobs_LK[:, -1], 80.0))
    rest_L = 1.0 - np.exp(np.minimum(logprobs_LK, 80.0)).sum(axis=1)
    most_L = (vocab_size - logprobs_LK.shape[1]) * last_L
    if (bad_L := rest_L > most_L + MASS_TOLERANCE).any():
        at = int(bad_L.argmax())
        raise ValueError(
            f"{rest_L[at]:.4g} of the probability is missing at response token {at}, at most {most_L[at]:.4g} is left to others"
        )
    outside_L = ~(ids_LK == np.asarray(targets)[:, None]).any(axis=1)
    if (bad_L := outside_L & (np.exp(np.minimum(sampled_L, 80.0)) > last_L + MASS_TOLERANCE)).any():
        at = int(bad_L.argmax())
        raise ValueError(f"response token {at} has logprob {sampled_L[at]:.4g} and is not among the likeliest, the last of which has less")


def _derived_tail(logprobs_LK: np.ndarray) -> np.ndarray:
    """log(1 − Σp) [L], in float64; −inf where rounding leaves nothing. Raises `ValueError` where Σp is more than rounding above 1."""
    mass = np.exp(np.minimum(logprobs_LK, 80.0)).sum(axis=1)
    if (mass > 1.0 + MASS_TOLERANCE).any():
        at = int((mass > 1.0 + MASS_TOLERANCE).argmax())
        raise ValueError(f"total probability is not 1: {mass[at]:.6g} at response token {at}")
    with np.errstate(divide="ignore"):
        return np.log1p(-np.minimum(mass, 1.0))


async def find_style(
    client: ApiClient, model: str, probe: Rollout, top_k: int, styles: Sequence[ScoringStyle], vocab_size: int
) -> tuple[ScoringStyle | None, int, list[str]]:
    """The first way in which an endpoint scores ``probe``, the most ids a token, up to ``top_k``, that it gives, and what it refused.

    0 ids: the token's own logprob alone.
    """
    troubles: list[str] = []
    is_there = True

    async def gives(style: ScoringStyle, k: int) -> bool:
        nonlocal is_there
        want = SignalSpec("topk", top_k=k) if k else SignalSpec("sampled")
        try:
            await client.ask(scoring_question(client, style, model, probe, want, vocab_size), retries=1)
        except (BadAnswerError, RefusedError) as error:
            if isinstance(error, RefusedError) and error.code == "unavailable":
                raise
            is_there = not (isinstance(error, RefusedError) and error.code == "not_offered")
            troubles.append(f"{style.name} with {k} ids: {error}")
            return False
        return True

    for style in styles:
        if await gives(style, top_k):
            return style, top_k, troubles
        if not is_there or not await gives(style, 0):
            continue
        low, high = 0, top_k  # it gives low and does not give high
        for guess in (20, 21, 5, 6):  # 20 and 5 are what servers commonly allow
            if low < guess < high:
                low, high = (guess, high) if await gives(style, guess) else (low, guess)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if await gives(style, middle) else (low, middle)
        return style, low, troubles
    return None, 0, troubles


def _only_choice(said: Any) -> Any:
    choices = said["choices"]
    if len(choices) != 1:
        raise ValueError(f"{len(choices)} choices came back, 1 was asked for")
    return choices[0]


def _same_length(given: Any, ids: Sequence[int], name: str) -> Any:
    if not isinstance(given, list) or len(given) != len(ids):
        raise ValueError(f"{name} is {f'{len(given)} long' if isinstance(given, list) else 'missing'}, {len(ids)} tokens were sent")
    return given


def _id_of(token: str) -> int:
    if not token.startswith(_ID_PREFIX):
        raise ValueError(f"tokens come as text ({token[:20]!r}), not by id: the same text may be several tokens")
    return int(token.removeprefix(_ID_PREFIX))
