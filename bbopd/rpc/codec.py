"""The nouns of `bbopd.types` to and from the messages of ``bbopd.v1`` (all but answers to `Score`: see `answers`).

A decoder raises `ValueError` naming the field and the value; its caller knows whose message it was.
Shape suffixes: ``L`` response tokens of one rollout, ``M`` candidates.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from typing import TypeVar, get_args

import numpy as np

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.limits import Code, RefusedError
from bbopd.rpc.tensors import decode_ids, decode_tensor, encode_tensor, fill_tensor
from bbopd.types import LEVELS, Completion, FinishReason, Level, Offer, Prompt, Rollout, Sampling, SignalSpec, TeacherInfo

__all__ = [
    "LEVEL_NUMBERS",
    "PROTOCOL_VERSION",
    "decode_completion",
    "decode_failure",
    "decode_info",
    "decode_item",
    "decode_prompt",
    "decode_replay_id",
    "decode_sampling",
    "encode_completion",
    "encode_failure",
    "encode_info",
    "encode_item",
    "encode_prompt",
    "encode_sampling",
    "fill_item",
    "input_sha256",
    "packed_ids",
    "peek_level",
]

PROTOCOL_VERSION = 1
"""The only version there is; both sides speak the range from it to itself."""

LEVEL_NUMBERS: dict[Level, pb.Level] = {level: pb.Level.Value(f"LEVEL_{level.upper()}") for level in LEVELS}
_LEVELS: dict[int, Level] = {number: level for level, number in LEVEL_NUMBERS.items()}
_ROUNDING = 1e-4  # above 0, of a logprob summed in float32
_TAILS = {pb.TAIL_EXACT: "exact", pb.TAIL_DERIVED: "derived", pb.TAIL_NONE: "none"}
_FINISH: dict[FinishReason, pb.FinishReason] = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_CODES: dict[Code, pb.FailureCode] = {code: pb.FailureCode.Value(f"FAILURE_CODE_{code.upper()}") for code in get_args(Code)}
_LONGEST_LABEL = 200  # characters
_LONGEST_NAME = 1024  # characters of a model's name, which may be the path of a folder
_LONGEST_MESSAGE = 1000  # characters of a failure that are shown
_CHARACTERS_PER_TOKEN = 1024  # the longest entries of vocabularies are runs of a few hundred spaces

Key = TypeVar("Key")
Value = TypeVar("Value")


def decode_replay_id(text: str) -> str:
    """The name that a client gave a question; empty where it gave none."""
    return _decode_label(text, "replay_id")


def peek_level(number: int) -> str:
    """How a level that came is called, before anything else of its message is looked at."""
    return _LEVELS.get(number, "unknown")


def _decode_label(text: str, name: str, longest: int = _LONGEST_LABEL) -> str:
    """A name that goes into messages and logs as it is."""
    if len(text) > longest or not text.isprintable():
        raise ValueError(f"{name} {text[:_LONGEST_LABEL]!r} is no name: at most {longest} printable characters")
    return text


def _lookup(table: dict[Key, Value], key: Key, name: str) -> Value:
    if key not in table:
        raise ValueError(f"{name} {key!r} is not one this version knows: {', '.join(str(known) for known in table)}")
    return table[key]


# ---------------------------------------------------------------- who a teacher is


def encode_info(info: TeacherInfo) -> pb.GetInfoResponse:
    message = pb.TeacherInfo(
        model=info.model,
        revision=info.revision,
        weights_version=info.weights_version,
        vocab_size=info.vocab_size,
        vocab_sha256=info.vocab_sha256,
        tokenizer_sha256=info.tokenizer_sha256,
        chat_template_sha256=info.chat_template_sha256,
        max_sequence_tokens=info.max_sequence_tokens,
        max_request_tokens=info.max_request_tokens,
        max_requests_per_second=info.max_requests_per_second,
        price_per_million_tokens=info.price_per_million_tokens,
        currency=info.currency,
        takes_text=info.takes_text,
    )
    numbers = {name: number for number, name in _TAILS.items()}
    for offer in info.offers:
        message.offers.add(
            level=LEVEL_NUMBERS[offer.level],
            max_top_k=offer.max_top_k,
            temperature_min=offer.temperature_min,
            temperature_max=offer.temperature_max,
            tail=numbers[offer.tail],
        )
    return pb.GetInfoResponse(protocol_min=PROTOCOL_VERSION, protocol_max=PROTOCOL_VERSION, info=message)


def decode_info(message: pb.TeacherInfo) -> TeacherInfo:
    """Raises `ValueError` for what no teacher can be: no vocabulary, a hash that is none, temperatures that are no range."""
    if message.vocab_size < 1:
        raise ValueError("vocab_size is 0")
    for name in ("price_per_million_tokens", "max_requests_per_second"):
        if not 0 <= getattr(message, name) < math.inf:
            raise ValueError(f"{name} is {getattr(message, name)}")
    names = {name: _decode_label(getattr(message, name), name, _LONGEST_NAME) for name in ("model", "revision", "currency")}
    hashes = {name: getattr(message, name) for name in ("vocab_sha256", "tokenizer_sha256", "chat_template_sha256")}
    for name, value in hashes.items():
        if value and not re.fullmatch("[0-9a-f]{64}", value):
            raise ValueError(f"{name} {value!r} is not a SHA-256 in lowercase hex")
    offers = []
    for offer in message.offers:
        if not 0 < offer.temperature_min <= offer.temperature_max < math.inf:
            raise ValueError(f"temperatures {offer.temperature_min}..{offer.temperature_max} are no range")
        level, tail = _lookup(_LEVELS, offer.level, "level"), _lookup(_TAILS, offer.tail, "tail")
        offers.append(Offer(level, offer.max_top_k, offer.temperature_min, offer.temperature_max, tail))  # type: ignore[arg-type]
    return TeacherInfo(
        vocab_size=message.vocab_size,
        offers=tuple(offers),
        weights_version=message.weights_version,
        max_sequence_tokens=message.max_sequence_tokens,
        max_request_tokens=message.max_request_tokens,
        max_requests_per_second=message.max_requests_per_second,
        price_per_million_tokens=message.price_per_million_tokens,
        takes_text=message.takes_text,
        **names,
        **hashes,
    )


# ---------------------------------------------------------------- one rollout to score


def encode_item(request_id: int, rollout: Rollout, want: SignalSpec, resume_from: int = 0) -> pb.ScoreRequest:
    """A question alone in its message."""
    request = pb.ScoreRequest()
    fill_item(request.item, request_id, rollout, want, resume_from)
    return request


def fill_item(
    item: pb.ScoreItem,
    request_id: int,
    rollout: Rollout,
    want: SignalSpec,
    resume_from: int = 0,
    replay_id: str = "",
    packed: bytes = b"",
) -> None:
    """Write a question into a message in place. ``packed``: the `packed_ids`, where they are known already."""
    item.request_id, item.rollout_id, item.resume_from, item.replay_id = request_id, rollout.rollout_id, resume_from, replay_id
    item.prompt_tokens = len(rollout.prompt.token_ids)
    packed = packed or packed_ids(rollout)
    item.token_ids.dtype, item.token_ids.data = pb.DTYPE_INT32, packed
    item.token_ids.shape.append(len(packed) // 4)
    item.want.level, item.want.temperature, item.want.top_k = LEVEL_NUMBERS[want.level], want.temperature, want.top_k
    candidates = _candidates(rollout, want)
    if candidates is not None:
        fill_tensor(item.candidate_ids, candidates)


def decode_item(item: pb.ScoreItem) -> tuple[Rollout, SignalSpec, int]:
    """The rollout, what is wanted of it, and the first row wanted. Values are for `limits` to check."""
    rollout_id = _decode_label(item.rollout_id, "rollout_id")
    ids = decode_ids(item.token_ids, "token_ids")
    if item.prompt_tokens > len(ids):
        raise ValueError(f"prompt_tokens {item.prompt_tokens} is more than the {len(ids)} token_ids")
    prompt, answer = Prompt("", ids[: item.prompt_tokens]), ids[item.prompt_tokens :]
    if answer and item.resume_from >= len(answer):
        raise ValueError(f"resume_from {item.resume_from} leaves nothing of {len(answer)} response tokens")
    level = _lookup(_LEVELS, item.want.level, "level")
    want = SignalSpec(level, item.want.temperature, item.want.top_k)
    if level != "candidates":
        if item.HasField("candidate_ids"):
            raise ValueError(f"candidate_ids come with level {level!r}: they belong to 'candidates' alone")
        return Rollout(rollout_id, prompt, answer), want, item.resume_from
    candidates = decode_tensor(item.candidate_ids, "candidate_ids")
    if candidates.dtype != np.int32:
        raise ValueError(f"candidate_ids are {candidates.dtype}, expected int32")
    return Rollout(rollout_id, prompt, answer, candidate_ids=candidates), want, item.resume_from


def input_sha256(rollout: Rollout, want: SignalSpec, packed: bytes = b"") -> bytes:
    """SHA-256 of what is scored: length of the prompt, all ids, then the candidate ids where there are any, as int32.

    ``packed``: the `packed_ids`, where they are known already.
    """
    digest = hashlib.sha256(len(rollout.prompt.token_ids).to_bytes(4, "little") + (packed or packed_ids(rollout)))
    candidates = _candidates(rollout, want)
    if candidates is not None:
        digest.update(candidates.astype("<i4", copy=False).tobytes())
    return digest.digest()


def packed_ids(rollout: Rollout) -> bytes:
    """All ids of a rollout as little-endian int32; `struct` takes half as long as NumPy for a tuple."""
    ids = rollout.all_ids
    return struct.pack(f"<{len(ids)}i", *ids)


def _candidates(rollout: Rollout, want: SignalSpec) -> np.ndarray | None:
    if want.level != "candidates":
        return None
    assert rollout.candidate_ids is not None, "check_rollout comes first"
    return rollout.candidate_ids.astype(np.int32, copy=False)


def encode_failure(request_id: int, error: RefusedError) -> pb.ItemFailure:
    return pb.ItemFailure(
        request_id=request_id,
        code=_CODES[error.code],
        message=str(error),
        retryable=error.is_retryable,
        retry_after_seconds=error.retry_after,
    )


def decode_failure(message: pb.ItemFailure) -> RefusedError:
    codes = {number: code for code, number in _CODES.items()}
    retry_after = message.retry_after_seconds if 0 < message.retry_after_seconds < math.inf else 0.0
    return RefusedError(
        codes.get(message.code, "internal"), message.message[:_LONGEST_MESSAGE], is_retryable=message.retryable, retry_after=retry_after
    )


# ---------------------------------------------------------------- the teacher's own text


def encode_sampling(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
    )


def decode_sampling(message: pb.Sampling) -> Sampling:
    return Sampling(
        max_new_tokens=message.max_new_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
    )


def encode_prompt(request_id: int, prompt: Prompt) -> pb.GeneratePrompt:
    if prompt.is_text:
        messages = [pb.ChatMessage(role=role, content=content) for role, content in prompt.messages]
        return pb.GeneratePrompt(request_id=request_id, prompt_id=prompt.prompt_id, text="" if messages else prompt.text, messages=messages)
    return pb.GeneratePrompt(
        request_id=request_id, prompt_id=prompt.prompt_id, token_ids=encode_tensor(np.array(prompt.token_ids, np.int32))
    )


def decode_prompt(message: pb.GeneratePrompt) -> Prompt:
    """Raises `ValueError` for a prompt that is not exactly one of ids, text and messages."""
    name = _decode_label(message.prompt_id, "prompt_id")
    given = [part for part, is_there in (("text", message.text), ("messages", message.messages)) if is_there]
    if not given:
        return Prompt(name, decode_ids(message.token_ids, "token_ids"))
    if len(given) > 1 or message.HasField("token_ids"):
        raise ValueError("a prompt is token_ids, text or messages: give one of them")
    return Prompt(name, (), text=message.text, messages=tuple((one.role, one.content) for one in message.messages))


def encode_completion(request_id: int, completion: Completion, weights_version: int = 0) -> pb.GeneratedText:
    logprobs = encode_tensor(np.array(completion.logprobs, np.float32)) if completion.logprobs else None
    return pb.GeneratedText(
        request_id=request_id,
        token_ids=encode_tensor(np.array(completion.token_ids, np.int32)),
        text=completion.text,
        finish_reason=_FINISH[completion.finish_reason],
        weights_version=weights_version,
        logprobs=logprobs,
    )


def decode_completion(message: pb.GeneratedText, prompt: Prompt, sampling: Sampling, vocab_size: int) -> Completion:
    ids = decode_ids(message.token_ids, "token_ids")
    if len(ids) > sampling.max_new_tokens:
        raise ValueError(f"completion has {len(ids)} tokens, asked were at most {sampling.max_new_tokens}")
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"completion holds token ids {min(ids)}..{max(ids)}, outside the vocabulary of {vocab_size} entries")
    if len(message.text) > _CHARACTERS_PER_TOKEN * (len(ids) + 1):
        raise ValueError(f"completion has {len(message.text)} characters of text for {len(ids)} tokens")
    reasons = {number: reason for reason, number in _FINISH.items()}
    finish_reason = _lookup(reasons, message.finish_reason, "finish_reason")
    return Completion(prompt, ids, message.text, finish_reason, _written_logprobs(message, len(ids)))


def _written_logprobs(message: pb.GeneratedText, count: int) -> tuple[float, ...]:
    if not message.HasField("logprobs"):
        return ()
    logprobs = decode_tensor(message.logprobs, "logprobs")
    if logprobs.dtype != np.float32 or logprobs.shape != (count,):
        raise ValueError(f"logprobs is {logprobs.dtype} {list(logprobs.shape)}, expected float32 [{count}]")
    if not (logprobs <= _ROUNDING).all():
        raise ValueError("logprobs holds NaN, or a number above 0")
    return tuple(logprobs.tolist())
