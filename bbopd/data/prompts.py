"""Prompts, with their true continuations where they are known, from documents: tokenised, split and drawn reproducibly.

How text becomes tokens:

* Running text is cut into windows of ``prompt_tokens`` then ``response_tokens``, side by side. The special tokens that the tokenizer puts
  in front of a text by default (BOS, for some) stand in front of every window and count as part of its prompt. A continuation is cut
  somewhere in the middle, so that it carries no EOS. A last window is kept where its continuation is a quarter full.
* A raw ``prompt`` is tokenised as the tokenizer does by default; ``messages`` go through its chat template with the generation
  prompt, and nothing is added to that. A ``response`` ends with EOS; one that is cut at ``max_seq_len`` does not.

A *document* is trained on or held out as a whole, by the hash of its content: neither order nor seed moves it. Copies are dropped, and
near-duplicates where ``data.near_duplicates`` says so: the first one in the order of the sources stays.

Of a data set, which *flows* (see `flow`), only the first documents are read here: those of them that are held out, and a few samples of
the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from bbopd.config import DataConfig, PromptSource
from bbopd.data.distinct import Distinct
from bbopd.data.documents import Document
from bbopd.data.draws import Share
from bbopd.data.flow import Flow
from bbopd.data.near_duplicates import NearDuplicates
from bbopd.data.sources import read_documents
from bbopd.errors import DataError
from bbopd.types import Prompt

_ENCODE_BATCH = 256
_SAMPLED = 256  # documents of a flow that are looked at before the run


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts to train on, in the order of their sources, and those held out, in an order that mixes documents.

    ``shares`` says how often those of each source are drawn, where the sources have weights or flow. ``skipped`` counts what was left out:
    ``copy`` and ``near_duplicate`` documents, ``long_prompt``, and rows that were ``empty`` or a ``bad_row``.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    shares: tuple[Share, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def flows(self) -> tuple[Flow, ...]:
        return tuple(share.flow for share in self.shares if share.flow is not None)

    @property
    def to_train(self) -> list[Prompt]:
        """Those to train on, as far as they are known before the run: of a flow its samples."""
        return [*self.train, *(sample for flow in self.flows for sample in flow.samples)]

    @property
    def known(self) -> list[Prompt]:
        """All that are known before the run."""
        return [*self.to_train, *self.held_out]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every id and token that is known: two runs on the same data agree in it."""
        digest = hashlib.sha256()
        for prompt in self.known:
            digest.update(json.dumps([prompt.prompt_id, prompt.token_ids, prompt.reference_ids]).encode())
        return digest.hexdigest()


def load_prompts(config: DataConfig, tokenizer: Any, *, max_seq_len: int, eos_token_id: int, max_new_tokens: int = 1) -> PromptSet:
    """Read, tokenise and split everything that ``config.prompts`` names; of what flows, the beginning.

    Parameters
    ----------
    max_seq_len
        Tokens of prompt and response together.
    eos_token_id
        Ends a known response.
    max_new_tokens
        Room that a prompt must leave for an answer within ``max_seq_len``.

    Raises
    ------
    DataError
        For data that cannot be read, is empty, or does not fit, naming file and line.
    """
    limit = max_seq_len - max_new_tokens
    if config.prompt_tokens > limit or config.prompt_tokens + config.response_tokens > max_seq_len:
        raise DataError(
            f"data.prompt_tokens {config.prompt_tokens} with data.response_tokens {config.response_tokens} or {max_new_tokens} new tokens "
            f"exceeds train.max_seq_len {max_seq_len}: raise it, or lower them"
        )
    skipped: Counter[str] = Counter()
    encode = _Encoder(tokenizer, config, limit, max_seq_len, eos_token_id, skipped)
    near = None if config.near_duplicates is None else NearDuplicates(config.near_duplicates, None, "data.near_duplicates")
    train: list[Prompt] = []
    held_out: list[Prompt] = []
    shares: list[Share] = []
    for source in config.prompts:
        ours: list[Document] = []
        theirs: list[Document] = []
        for _, alike in groupby(sorted(_distinct(read_documents(source, skipped), near, skipped), key=_kind), key=_kind):
            kept, set_aside = split_documents(list(alike), config.held_out)
            ours += kept
            theirs += set_aside
        held_out.extend(encode(theirs))
        encode_ours = _asked_of(source, encode)
        if source.flows:
            samples = list(encode_ours(ours[:_SAMPLED]))
            is_held_out = _HeldOut(config.held_out, ours, theirs)
            found = Share(0, source.weight or 1.0, Flow(source, encode_ours, is_held_out, samples, config.near_duplicates))
        else:
            samples = list(encode_ours(ours))
            train.extend(samples)
            found = Share(len(samples), source.weight or 1.0)
        if source.weight is not None or source.flows:
            shares.append(found)
            if not samples:
                weighted = "" if source.weight is None else f", which has data.prompts.weight {source.weight}"
                raise DataError(f"nothing to train on in {source.name}{weighted}{_left_out(skipped)}")
    named = ", ".join(source.name for source in config.prompts)
    for side, prompts in (("train on", train or shares), ("hold out", held_out)):
        if not prompts:
            raise DataError(
                f"nothing to {side} in data.prompts ({named}): it takes two documents or more, with running text longer than "
                f"data.prompt_tokens {config.prompt_tokens} + {config.response_tokens // 4 or 1} tokens{_left_out(skipped)}"
            )
    held_out.sort(key=lambda prompt: hashlib.sha256(prompt.prompt_id.encode()).digest())
    return PromptSet(train=train, held_out=held_out, shares=tuple(shares), skipped=dict(skipped))


def _asked_of(source: PromptSource, encode: _Encoder) -> Callable[[Sequence[Document]], Iterable[Prompt]]:
    """``encode``, with the teachers that ``source`` names in its prompts."""
    teachers = tuple(source.teachers.items())
    return lambda documents: (replace(prompt, teachers=teachers) for prompt in encode(documents)) if teachers else encode(documents)


def split_documents(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(train, held out): held out is every document whose content hashes below ``share``, or the lowest one where none does.

    At least one document stays on either side, where there are two.
    """
    ranked = sorted(documents, key=lambda document: _hash_of(document.content))
    count = sum(_hash_of(document.content) < share for document in ranked)
    count = min(max(count, 1), len(ranked) - 1)
    chosen = {document.content for document in ranked[:count]}
    return [d for d in documents if d.content not in chosen], [d for d in documents if d.content in chosen]


def _hash_of(content: str) -> float:
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2.0**64


def _kind(document: Document) -> str:
    return "text" if document.text is not None else "question"


def _left_out(skipped: Mapping[str, int]) -> str:
    return f" (left out: {', '.join(f'{reason} {count}' for reason, count in sorted(skipped.items()))})" if skipped else ""


class _HeldOut:
    """Whether a document of a flow is held out: by its hash, and by what has been decided of the first ones against it."""

    def __init__(self, share: float, ours: Sequence[Document], theirs: Sequence[Document]) -> None:
        self._share = share
        decided = {document.content: False for document in ours} | {document.content: True for document in theirs}
        self._exceptions = {content: held for content, held in decided.items() if held != (_hash_of(content) < share)}

    def __call__(self, document: Document) -> bool:
        return self._exceptions.get(document.content, _hash_of(document.content) < self._share)


def _distinct(documents: Iterable[Document], near: NearDuplicates | None, skipped: Counter[str]) -> Iterable[Document]:
    """Every document of a source once: copies are sought within it, near-duplicates in all of them."""
    distinct = Distinct(near)
    for document in documents:
        reason = distinct.find_or_add(document)
        if reason is None:
            yield document
        else:
            skipped[reason] += 1


class _Encoder:
    """Documents to prompts, by the rules at the top of this file."""

    def __init__(
        self, tokenizer: Any, config: DataConfig, prompt_limit: int, max_seq_len: int, eos_token_id: int, skipped: Counter[str]
    ) -> None:
        self._tokenizer, self._config, self._skipped = tokenizer, config, skipped
        self._prompt_limit, self._max_seq_len, self._eos_token_id = prompt_limit, max_seq_len, eos_token_id
        bare = self._ids(["a"], special=False)[0]
        framed = self._ids(["a"], special=True)[0]
        self._prefix = framed[: next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)]
        if len(self._prefix) >= config.prompt_tokens:
            raise DataError(
                f"data.prompt_tokens {config.prompt_tokens} leaves no room beside the tokenizer's own {len(self._prefix)} in front"
            )

    def __call__(self, documents: Sequence[Document]) -> Iterable[Prompt]:
        for start in range(0, len(documents), _ENCODE_BATCH):
            batch = documents[start : start + _ENCODE_BATCH]
            for document, ids in zip(batch, self._ids([d.text or d.response or "" for d in batch], special=False), strict=True):
                if document.text is not None:
                    yield from self._windows(document, ids)
                else:
                    question = self._question(document, ids if document.response is not None else None)
                    if question is not None:
                        yield question

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]

    def _windows(self, document: Document, ids: list[int]) -> Iterable[Prompt]:
        ahead = self._config.prompt_tokens - len(self._prefix)
        for number, start in enumerate(range(0, len(ids), ahead + self._config.response_tokens)):
            reference = ids[start + ahead : start + ahead + self._config.response_tokens]
            if len(reference) >= max(1, self._config.response_tokens // 4):
                yield Prompt(
                    prompt_id=f"{document.name}:{number}",
                    token_ids=tuple(self._prefix + ids[start : start + ahead]),
                    reference_ids=tuple(reference),
                    source=document.where,
                )

    def _question(self, document: Document, response: list[int] | None) -> Prompt | None:
        ids = self._ids([document.prompt], special=True)[0] if document.prompt is not None else self._chat(document)
        asked: dict[str, Any] = {"text": document.prompt or "", "messages": document.messages or ()}
        if len(ids) > self._prompt_limit:
            if self._config.long_prompts == "error":
                raise DataError(
                    f"{document.where}: the prompt has {len(ids)} tokens, {self._prompt_limit} fit (train.max_seq_len {self._max_seq_len} "
                    f"less {self._max_seq_len - self._prompt_limit} for the answer): shorten or drop it, raise train.max_seq_len, or set "
                    "data.long_prompts to skip or truncate"
                )
            if self._config.long_prompts == "skip":
                self._skipped["long_prompt"] += 1
                return None
            front = self._prefix if ids[: len(self._prefix)] == self._prefix else []  # BOS stays in front
            ids, asked = front + ids[len(ids) - self._prompt_limit + len(front) :], {}
        reference = None if response is None else tuple((*response, self._eos_token_id)[: self._max_seq_len - len(ids)])
        return Prompt(prompt_id=document.name, token_ids=tuple(ids), reference_ids=reference, source=document.where, **asked)

    def _chat(self, document: Document) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise DataError(f"{document.where}: 'messages' need a chat template, and this tokenizer has none: give 'prompt' instead")
        messages = [{"role": role, "content": content} for role, content in document.messages or ()]
        try:
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # a template raises what it likes, most often jinja2's own errors
            raise DataError(f"{document.where}: the chat template refuses these messages: {error}") from error
        return list(ids)
