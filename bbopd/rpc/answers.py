"""One answer to `Score`: a signal cut into chunks by the server, and put together again by the client.

Shape suffixes: ``L`` response tokens of one rollout, ``V`` vocabulary, ``K`` top-k, ``M`` candidates.
"""

from __future__ import annotations

import numpy as np

import bbopd.rpc.teacher_pb2 as pb
from bbopd._C import crc32
from bbopd.errors import BadAnswerError
from bbopd.rpc.codec import LEVEL_NUMBERS, input_sha256, packed_ids
from bbopd.rpc.pieces import Pieces, inside, tensor_pieces
from bbopd.rpc.rows import id_dtype, kept_rows
from bbopd.rpc.signals import signal_temperature
from bbopd.rpc.tensors import decode_tensor, tensor_bytes
from bbopd.types import Level, Rollout, SignalSpec, TeacherSignal

__all__ = ["CHUNK_BYTES", "SignalAssembler", "SignalCutter", "answer_bytes", "payload_bytes", "token_bytes"]

CHUNK_BYTES = 3 * 2**19
"""Payload of one chunk, about: messages of 1 to 2 MiB move fastest."""

_TENSORS = ("logits", "ids", "logprobs", "log_tail", "sampled")  # in the order of their field numbers
_FIELD_NUMBERS: dict[str, int] = {name: getattr(pb.SignalChunk, f"{name.upper()}_FIELD_NUMBER") for name in _TENSORS}
_BELONGING: dict[Level, tuple[str, ...]] = {
    "full": ("logits",),
    "topk": ("ids", "logprobs", "log_tail", "sampled"),
    "candidates": ("logprobs", "log_tail", "sampled"),
    "sampled": ("sampled",),
}


def answer_bytes(rollout: Rollout, want: SignalSpec, vocab_size: int) -> int:
    """Bytes that an answer takes on the wire (a full one as float16)."""
    candidates = rollout.candidate_ids.shape[1] if rollout.candidate_ids is not None else 0
    return len(rollout) * token_bytes(want, vocab_size, candidates)


def token_bytes(want: SignalSpec, vocab_size: int, candidates: int) -> int:
    """The same of one response token, at ``candidates`` ids that the student chose; of a written one its id and its text, about."""
    id_bytes = 2 if vocab_size <= 2**16 else 4
    return {
        "full": 2 * vocab_size,
        "topk": min(want.top_k, vocab_size) * (id_bytes + 2) + 8,
        "candidates": 2 * candidates + 8,
        "sampled": 4,
        "text": 8,
    }[want.level]


def payload_bytes(message: pb.SignalChunk) -> int:
    """What a chunk takes of the byte credit: its tensors' data."""
    return sum(tensor_bytes(getattr(message, name)) for name in _TENSORS if message.HasField(name))


class SignalCutter:
    """A checked signal on its way out: whole rows, from ``resume_from`` on, one chunk after the other.

    Parameters
    ----------
    request_id, rollout : the question.
    vocab_size, weights_version : of the teacher.
    resume_from : first row wanted.
    digest : the `input_sha256` of the question, where that is known already.
    """

    def __init__(
        self,
        request_id: int,
        rollout: Rollout,
        signal: TeacherSignal,
        vocab_size: int,
        resume_from: int = 0,
        weights_version: int = 0,
        digest: bytes = b"",
    ) -> None:
        self._request_id = request_id
        self._level, self._temperature = LEVEL_NUMBERS[signal.level], signal.temperature
        self._weights_version = weights_version
        self._digest = digest or input_sha256(rollout, SignalSpec(signal.level, signal.temperature))
        self._arrays = _wire_arrays(signal, vocab_size)
        self._row_bytes = sum(array[:1].nbytes for array in self._arrays.values())
        self._rows_per_chunk = max(1, CHUNK_BYTES // self._row_bytes)
        self._position = resume_from
        self._total = len(rollout)

    @property
    def is_done(self) -> bool:
        return self._position >= self._total

    @property
    def next_bytes(self) -> int:
        """Payload of the next chunk."""
        return min(self._rows_per_chunk, self._total - self._position) * self._row_bytes

    def cut(self) -> Pieces:
        """The next chunk, a `SignalChunk`."""
        start, stop = self._position, min(self._position + self._rows_per_chunk, self._total)
        chunk = pb.SignalChunk(
            request_id=self._request_id,
            level=self._level,
            temperature=self._temperature,
            position=start,
            rows=stop - start,
            total_rows=self._total,
            input_sha256=self._digest,
            weights_version=self._weights_version,
        )
        tensors: Pieces = []
        for name, array in self._arrays.items():
            tensors += inside(_FIELD_NUMBERS[name], tensor_pieces(array[start:stop]))
            chunk.crc32 = crc32(array[start:stop], chunk.crc32)
        self._position = stop
        return [chunk.SerializeToString(), *tensors]


def _wire_arrays(signal: TeacherSignal, vocab_size: int) -> dict[str, np.ndarray]:
    """The arrays that travel at this level, in their compact dtypes."""
    arrays: dict[str, np.ndarray] = {}
    if signal.logits is not None:
        arrays["logits"] = np.ascontiguousarray(signal.logits)
    if signal.ids is not None and signal.level == "topk":  # candidates are known to the one who chose them
        arrays["ids"] = signal.ids.astype(id_dtype(vocab_size), order="C", copy=False)
    if signal.logprobs is not None:
        arrays["logprobs"] = signal.logprobs.astype(np.float16, order="C", copy=False)
    if signal.log_tail is not None:
        arrays["log_tail"] = np.ascontiguousarray(signal.log_tail)
    if signal.sampled is not None:
        arrays["sampled"] = np.ascontiguousarray(signal.sampled)
    return arrays


class SignalAssembler:
    """Takes the chunks of one answer in order, checks every row, and gives the signal.

    Parameters
    ----------
    rollout, want : what was asked.
    vocab_size : V of the teacher.
    request : how messages name the request.
    """

    def __init__(self, rollout: Rollout, want: SignalSpec, vocab_size: int, request: str) -> None:
        self.position = 0
        """Rows taken so far: where to resume after a broken stream."""
        self._rollout = rollout
        self._want = want
        self._vocab_size = vocab_size
        self._request = request
        self.packed = packed_ids(rollout)
        """All ids of what is scored, as they travel."""
        self.digest = input_sha256(rollout, want, self.packed)
        """SHA-256 of what is scored."""
        candidates = rollout.candidate_ids if want.level == "candidates" else None
        self.candidate_bytes = 4 * candidates.size if candidates is not None else 0
        """Bytes of the candidate ids, as they travel."""
        self._target_ids = np.frombuffer(self.packed, "<i4")[len(rollout.prompt.token_ids) :]
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def is_complete(self) -> bool:
        return self.position == len(self._rollout)

    def add(self, chunk: pb.SignalChunk) -> None:
        """Take the next rows. Raises `BadAnswerError` naming the request and the value, and is of no further use then."""
        try:
            self._check_header(chunk)
            own = self._target_ids[self.position : self.position + chunk.rows]
            rows = kept_rows(self._decode(chunk), self._want, own, self._vocab_size, self.position)
        except ValueError as error:
            raise BadAnswerError(f"{self._request}: the answer {error}") from None
        self._store(rows, chunk.rows)
        self.position += chunk.rows

    def signal(self) -> TeacherSignal:
        """The whole answer. Logprobs are float32, and the mass of every row is 1."""
        assert self.is_complete, "every chunk must be there"
        arrays = dict(self._arrays)
        if self._want.level == "candidates":
            arrays["ids"] = np.ascontiguousarray(self._rollout.candidate_ids, np.int32)
        return TeacherSignal(self._want.level, signal_temperature(self._want), **arrays)

    def _check_header(self, chunk: pb.SignalChunk) -> None:
        length = len(self._rollout)
        if chunk.position != self.position or chunk.rows < 1 or chunk.position + chunk.rows > length or chunk.total_rows != length:
            raise ValueError(
                f"brings rows {chunk.position}..{chunk.position + chunk.rows} of {chunk.total_rows}, "
                f"expected from {self.position} on, of {length}"
            )
        if chunk.level != LEVEL_NUMBERS[self._want.level]:
            raise ValueError(f"has level {chunk.level}, asked was {LEVEL_NUMBERS[self._want.level]} ({self._want.level})")
        if chunk.input_sha256 != self.digest:
            raise ValueError(f"is about other tokens: input_sha256 {chunk.input_sha256.hex()[:16]}…, expected {self.digest.hex()[:16]}…")

    def _decode(self, chunk: pb.SignalChunk) -> TeacherSignal:
        """The rows as they came: views of the message's bytes, verified by the checksum."""
        arrays: dict[str, np.ndarray] = {}
        checksum = 0
        for name in _TENSORS:
            if chunk.HasField(name):
                if name not in _BELONGING[self._want.level]:
                    raise ValueError(f"has {name}, which does not belong to level {self._want.level!r}")
                arrays[name] = decode_tensor(getattr(chunk, name), name)
                checksum = crc32(arrays[name], checksum)
        if checksum != chunk.crc32:
            raise ValueError(f"was damaged on its way: crc32 {checksum:#010x}, expected {chunk.crc32:#010x}")
        if "ids" in arrays and arrays["ids"].dtype.kind not in "iu":
            raise ValueError(f"has ids {arrays['ids'].dtype}, expected int32 or uint16")
        if self._want.level == "candidates":
            assert self._rollout.candidate_ids is not None
            arrays["ids"] = self._rollout.candidate_ids[self.position : self.position + chunk.rows].astype(np.int32, copy=False)
        return TeacherSignal(self._want.level, chunk.temperature, **arrays)

    def _store(self, rows: TeacherSignal, count: int) -> None:
        arrays = {name: getattr(rows, name) for name in _TENSORS if getattr(rows, name) is not None}
        if self._want.level == "candidates":
            del arrays["ids"]
        if count == len(self._rollout):
            self._arrays = arrays
            return
        for name, array in arrays.items():
            if name not in self._arrays:
                self._arrays[name] = np.empty((len(self._rollout), *array.shape[1:]), array.dtype)
            kept = self._arrays[name]
            if kept.dtype != array.dtype:
                raise BadAnswerError(f"{self._request}: {name} came as {kept.dtype} and then as {array.dtype}")
            kept[self.position : self.position + count] = array
