"""Whether an endpoint numbers tokens as the student does: by what its ids stand for, not by a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bbopd.errors import TeacherError
from bbopd.modeling import load_tokenizer, vocabulary_sha256
from bbopd.rpc.limits import RefusedError
from bbopd.teachers.openai_client import ApiClient, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["endpoint_vocabulary_sha256"]

_CHUNK = 2048  # ids of one request
_BYTES_PER_ID = 1024


async def endpoint_vocabulary_sha256(
    client: ApiClient, model: str, student: PreTrainedTokenizerBase, vocab_size: int, named: str | None
) -> str:
    """The fingerprint of the endpoint's vocabulary, as far as the student's ``vocab_size`` entries go.

    Where ``named`` gives the teacher's tokenizer, it is that one's. Else the endpoint is asked what text every id of the student's
    vocabulary stands for, some thousands at once (vLLM's and SGLang's ``/detokenize``), and the student's own fingerprint is returned
    where all of it is the same text.

    Raises
    ------
    TeacherError : an id stands for something else, by name; or the endpoint does not tell.
    """
    if named is not None:
        return vocabulary_sha256(load_tokenizer(named), vocab_size)
    known = sorted(index for index in set(student.get_vocab().values()) if index < vocab_size)
    for ids in (known, [token for token in student(_wide_text(), add_special_tokens=False)["input_ids"] if token < vocab_size]):
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            if await _text_of(client, model, chunk) != _own_text(student, chunk):
                await _name_the_difference(client, model, student, chunk)
    return vocabulary_sha256(student, vocab_size)


def _wide_text() -> str:
    """Characters of all lengths in UTF-8: pieces of a character have no text of their own, in their places they are known by the whole."""
    rare = (*range(0x80, 0x800), *range(0x800, 0xD800, 29), *range(0xE000, 0x10000, 29), *range(0x10000, 0x110000, 997))
    return "".join(map(chr, rare))


async def _name_the_difference(client: ApiClient, model: str, student: PreTrainedTokenizerBase, chunk: Sequence[int]) -> None:
    """Halve the chunk until the first id that differs is left; where none does by itself, name the chunk."""
    ids = list(chunk)
    while len(ids) > 1:
        half = ids[: len(ids) // 2]
        ids = half if await _text_of(client, model, half) != _own_text(student, half) else ids[len(ids) // 2 :]
    theirs, ours = await _text_of(client, model, ids), _own_text(student, ids)
    if theirs == ours:  # pieces of characters differ only together
        ids, theirs, ours = list(chunk), "another text", "one text"
    at = f"id {ids[0]} is" if len(ids) == 1 else f"among the {len(ids)} ids {', '.join(map(str, ids[:8]))}, ... are such as make"
    raise TeacherError(
        f"teacher {model} at {client.address.target} does not number tokens as the student does: {at} {theirs!r} there and {ours!r} here; "
        "token-level distillation needs the same vocabulary: take a student of the teacher's family"
    )


def _own_text(student: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(student.decode(list(ids), skip_special_tokens=False))


async def _text_of(client: ApiClient, model: str, ids: Sequence[int]) -> str:
    refusals = []
    for base in (client.address.root, client.address.url):
        question = Question(
            name=f"the text of ids {ids[0]} to {ids[-1]}",
            url=f"{base}/detokenize",
            body={"model": model, "tokens": list(ids)},
            read=_text,
            prompt_tokens=0,
            answer_tokens=0,
            max_bytes=_BYTES_PER_ID * (len(ids) + 16),
            is_free=True,
        )
        try:
            return await client.ask(question)
        except RefusedError as error:
            if error.is_retryable:
                raise
            refusals.append(str(error))
    raise TeacherError(
        f"teacher {model} at {client.address.target} does not tell what its token ids stand for ({refusals[0]}), and ids that mean "
        "something else would teach nonsense: set teacher.tokenizer to the Hub id, or a folder, of its tokenizer; or "
        "teacher.api.scoring=none, where it shall only write"
    )


def _text(said: Any) -> str:
    text = said.get("prompt", said.get("text")) if isinstance(said, Mapping) else None
    if not isinstance(text, str):
        raise ValueError("it holds no text")
    return text
