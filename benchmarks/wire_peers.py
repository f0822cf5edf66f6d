"""Other ways to say the same: each an encoding of one answer, moved by a bare gRPC stream that gives it every advantage.

No scheduler, no limits, no credits, no checksum, no retries; what arrives is checked as bbopd checks it, but for the floor.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from bbopd.types import Rollout, TeacherSignal
from benchmarks.wire_load import WANT, Load


class Encoding(Protocol):
    """Questions and answers as bytes."""

    name: str
    note: str
    tokens: int
    """Of one round: enough for a tenth of a second or more."""

    def encode_question(self, rollout: Rollout) -> bytes: ...
    def decode_question(self, data: bytes) -> str: ...
    def encode_answer(self, rollout_id: str, load: Load) -> bytes: ...
    def decode_answer(self, data: bytes) -> tuple[str, TeacherSignal | None]: ...


class Json:
    """As APIs do: one dict of token to logprob for every position."""

    name = "JSON, a dict for each token"
    note = "as OpenAI-style APIs answer, without their HTTP"
    tokens = 4096

    def encode_question(self, rollout: Rollout) -> bytes:
        return json.dumps({"id": rollout.rollout_id, "prompt": rollout.prompt.token_ids, "response": rollout.token_ids}).encode()

    def decode_question(self, data: bytes) -> str:
        return str(json.loads(data)["id"])

    def encode_answer(self, rollout_id: str, load: Load) -> bytes:
        signal = load.answer(rollout_id)
        ids, logprobs, log_tail, sampled = _arrays(signal)
        positions = [
            {"logprob": own, "log_tail": tail, "top_logprobs": {str(token): value for token, value in zip(row, values, strict=True)}}
            for row, values, tail, own in zip(ids.tolist(), logprobs.tolist(), log_tail.tolist(), sampled.tolist(), strict=True)
        ]
        return json.dumps({"id": rollout_id, "logprobs": positions}).encode()

    def decode_answer(self, data: bytes) -> tuple[str, TeacherSignal | None]:
        answer = json.loads(data)
        positions = answer["logprobs"]
        ids = np.array([[int(token) for token in one["top_logprobs"]] for one in positions], np.int32)
        logprobs = np.array([list(one["top_logprobs"].values()) for one in positions], np.float32)
        tail = np.array([one["log_tail"] for one in positions], np.float32)
        sampled = np.array([one["logprob"] for one in positions], np.float32)
        return answer["id"], _signal(ids, logprobs, tail, sampled)


class Nested:
    """Protobuf as one writes it first: a message for each token, with repeated numbers."""

    name = "protobuf, repeated floats for each token"
    note = ""
    tokens = 65_536

    def __init__(self) -> None:
        self._question, self._answer = _nested_messages()

    def encode_question(self, rollout: Rollout) -> bytes:
        return bytes(self._question(id=rollout.rollout_id, prompt=rollout.prompt.token_ids, response=rollout.token_ids).SerializeToString())

    def decode_question(self, data: bytes) -> str:
        return str(self._question.FromString(data).id)

    def encode_answer(self, rollout_id: str, load: Load) -> bytes:
        message = self._answer(id=rollout_id)
        ids, logprobs, log_tail, sampled = _arrays(load.answer(rollout_id))
        for row, values, tail, own in zip(ids.tolist(), logprobs.tolist(), log_tail.tolist(), sampled.tolist(), strict=True):
            message.positions.add(ids=row, logprobs=values, log_tail=tail, sampled=own)
        return bytes(message.SerializeToString())

    def decode_answer(self, data: bytes) -> tuple[str, TeacherSignal | None]:
        answer = self._answer.FromString(data)
        ids = np.array([one.ids for one in answer.positions], np.int32)
        logprobs = np.array([one.logprobs for one in answer.positions], np.float32)
        tail = np.array([one.log_tail for one in answer.positions], np.float32)
        sampled = np.array([one.sampled for one in answer.positions], np.float32)
        return answer.id, _signal(ids, logprobs, tail, sampled)


class Floor:
    """The packed bytes, ready beforehand, sent and received: what gRPC itself takes of one core at either end."""

    name = "gRPC alone"
    note = "packed bytes made beforehand, neither checked nor made into tensors"
    tokens = 262_144

    def __init__(self) -> None:
        self._ready: dict[str, bytes] = {}

    def encode_question(self, rollout: Rollout) -> bytes:
        return rollout.rollout_id.encode()

    def decode_question(self, data: bytes) -> str:
        return data.decode()

    def encode_answer(self, rollout_id: str, load: Load) -> bytes:
        if rollout_id not in self._ready:
            ids, logprobs, log_tail, sampled = _arrays(load.answer(rollout_id))
            parts = (ids, logprobs.astype(np.float16), log_tail, sampled)
            self._ready[rollout_id] = rollout_id.encode().ljust(8) + b"".join(part.tobytes() for part in parts)
        return self._ready[rollout_id]

    def decode_answer(self, data: bytes) -> tuple[str, TeacherSignal | None]:
        return data[:8].decode().strip(), None


def _arrays(signal: TeacherSignal) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    ids, logprobs, log_tail, sampled = signal.ids, signal.logprobs, signal.log_tail, signal.sampled
    assert ids is not None
    assert logprobs is not None
    assert log_tail is not None
    assert sampled is not None
    return ids, logprobs, log_tail, sampled


def _signal(ids: np.ndarray, logprobs: np.ndarray, log_tail: np.ndarray, sampled: np.ndarray) -> TeacherSignal:
    return TeacherSignal(WANT.level, WANT.temperature, ids=ids, logprobs=logprobs, log_tail=log_tail, sampled=sampled)


def _nested_messages() -> tuple[Any, Any]:
    """The classes of the nested encoding's question and answer."""
    Field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="bbopd_benchmark_nested.proto", package="bbopd.benchmark", syntax="proto3")
    for name, fields in (
        ("Question", (("id", "STRING", False), ("prompt", "INT32", True), ("response", "INT32", True))),
        ("Position", (("ids", "INT32", True), ("logprobs", "FLOAT", True), ("log_tail", "FLOAT", False), ("sampled", "FLOAT", False))),
        ("Answer", (("id", "STRING", False), ("positions", "MESSAGE", True))),
    ):
        message = file.message_type.add(name=name)
        for number, (field, kind, is_repeated) in enumerate(fields, 1):
            added = message.field.add(name=field, number=number)
            added.type = Field.Type.Value(f"TYPE_{kind}")
            added.label = Field.LABEL_REPEATED if is_repeated else Field.LABEL_OPTIONAL
            if kind == "MESSAGE":
                added.type_name = ".bbopd.benchmark.Position"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = [pool.FindMessageTypeByName(f"bbopd.benchmark.{name}") for name in ("Question", "Answer")]
    question, answer = map(message_factory.GetMessageClass, found)
    return question, answer


PEERS: tuple[Encoding, ...] = (Floor(), Nested(), Json())
