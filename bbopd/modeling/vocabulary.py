"""Fingerprints of a vocabulary, a tokenizer and a chat template, so that a teacher and a student can prove they agree."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# GPT-2's printable stand-ins back to bytes. The bytes that have one are marked, since as characters of their own they are no stand-ins.
_BYTE_OF_CHARACTER = {
    **dict.fromkeys(range(256), "\uffff"),
    **{ord(character): chr(byte) for byte, character in bytes_to_unicode().items()},
}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """SHA-256 over what each token id stands for, as lowercase hex.

    For every id below ``vocab_size`` that the tokenizer knows, in rising order: the id (uint32, little-endian), the length of its
    bytes (uint32, little-endian), its bytes. The bytes are those that the token puts into a text: a byte-level token is mapped back
    from its printable stand-ins, a SentencePiece token has its ``▁`` as a space and ``<0x0A>`` as that byte, an added token is the
    UTF-8 of its content. Ids without a token are left out, so rows that only pad an embedding matrix change nothing.
    """
    digest = hashlib.sha256()
    for index, raw in token_table(tokenizer, vocab_size).items():
        digest.update(struct.pack("<II", index, len(raw)))
        digest.update(raw)
    return digest.hexdigest()


def token_table(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[int, bytes]:
    """What each id below ``vocab_size`` that the tokenizer knows puts into a text, in rising order of ids."""
    added = {index: token.content.encode() for index, token in tokenizer.added_tokens_decoder.items()}
    to_bytes = token_bytes(tokenizer)
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index < vocab_size)
    return {index: added[index] if index in added else to_bytes(token) for index, token in pairs}


def used_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """How many of a head's ``rows`` stand for a token, up to the highest that does: what is above only pads the matrix."""
    return 1 + max((index for index in tokenizer.get_vocab().values() if index < rows), default=rows - 1)


def differing_ids(first: Mapping[int, bytes], other: Mapping[int, bytes]) -> list[int]:
    """The ids, rising, for which two `token_table`s hold other bytes, or which only one of them holds."""
    return [index for index in sorted(first.keys() | other.keys()) if first.get(index) != other.get(index)]


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that decides how text becomes ids: the whole pipeline of a fast tokenizer, in canonical JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline: dict[str, Any] = json.loads(backend.to_str())
        for state in ("padding", "truncation"):  # set by whoever called it last
            pipeline.pop(state, None)
    else:
        pipeline = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    return _sha256_of_json(pipeline)


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the chat template as lowercase hex; empty where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return _sha256_of_json(template) if template else ""


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """How a token of the vocabulary, as the tokenizer spells it, becomes the bytes that it puts into a text.

    Added tokens are not spelled this way: theirs are the UTF-8 of their content.
    """
    return _byte_level if _is_byte_level(tokenizer) else _sentencepiece


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_encoder")
    pipeline = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    return any(part.get("type") == "ByteLevel" for part in (pipeline, *pipeline.get("decoders", ())))


def _byte_level(token: str) -> bytes:
    try:
        return token.translate(_BYTE_OF_CHARACTER).encode("latin-1")
    except UnicodeEncodeError:  # a token that no byte sequence produced stands for itself
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()
