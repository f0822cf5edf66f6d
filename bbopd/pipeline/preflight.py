"""What is checked before the first rollout: whether this teacher can teach this student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bbopd.errors import ModelError, TeacherError
from bbopd.modeling import load_tokenizer, used_vocabulary, vocabulary_sha256
from bbopd.modeling.vocabulary import differing_ids, token_table
from bbopd.types import Prompt, TeacherInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED_IDS = 3
_OTHER_WAYS = (
    ": take a student of the teacher's family, let its tokens be laid beside the student's (objective.name=aligned with teacher.topk and "
    "teacher.tokenizer), or learn from what the teacher writes (objective.name=seqkd with teacher.signal=text)"
)


def check_vocabulary(info: TeacherInfo, tokenizer: PreTrainedTokenizerBase, rows: int, *, named: str | None = None) -> int:
    """How many ids teacher and student have in common: the tokenizer's; what their heads have beyond them is padding.

    Parameters
    ----------
    tokenizer, rows : the student's, and the rows of its head.
    named : hub id or folder of the teacher's tokenizer, to name the tokens that differ; None tries a folder of the teacher's name.

    Raises
    ------
    TeacherError : they number tokens differently, or the teacher does not say how and has another number of them.
    """
    used, own = used_vocabulary(tokenizer, rows), vocabulary_sha256(tokenizer, rows)
    if info.vocab_sha256 == own or (not info.vocab_sha256 and info.vocab_size in (rows, used)):
        return used
    if not info.vocab_sha256:
        raise TeacherError(
            f"teacher {info.model} has a vocabulary of {info.vocab_size} entries, the student of {rows}, and does not say of which tokens: "
            f"they may be padding, or others altogether. Serve it with its tokenizer{_OTHER_WAYS}"
        )
    sizes = (
        f"both have {info.vocab_size} tokens, but not the same ones"
        if info.vocab_size in (rows, used)
        else f"do not have the same tokens: it has a vocabulary of {info.vocab_size} entries, the student of {rows}"
    )
    named = named or (info.model if Path(info.model).is_dir() else None)
    raise TeacherError(
        f"teacher {info.model} and the student {sizes} (SHA-256 over the vocabulary {info.vocab_sha256[:12]}... against {own[:12]}...)"
        f"{_name_differences(info, tokenizer, rows, named)}. Signals on tokens need the same ones{_OTHER_WAYS}"
    )


def check_candidates(info: TeacherInfo, count: int) -> None:
    """Raises `TeacherError` where the teacher answers at fewer ids a token than the ``count`` that the student will choose."""
    offer = info.offer("candidates")
    if count and offer is not None and count > offer.max_top_k:
        raise TeacherError(
            f"teacher.topk is {count}, but teacher {info.model} answers at no more than {offer.max_top_k} ids a token that the student "
            f"chose: set teacher.topk={offer.max_top_k} or less"
        )


def check_teacher_tokenizer(info: TeacherInfo, tokenizer: PreTrainedTokenizerBase, named: str) -> int:
    """How many of the teacher's ids are tokens of ``tokenizer``, which is called ``named`` and must be the teacher's own.

    Raises
    ------
    TeacherError : the teacher has other tokens, or does not say which it has and has fewer.
    """
    own = vocabulary_sha256(tokenizer, info.vocab_size)
    if info.vocab_sha256 and info.vocab_sha256 != own:
        raise TeacherError(
            f"teacher.tokenizer {named} is not the tokenizer of teacher {info.model}: SHA-256 over the vocabulary {own[:12]}... here, "
            f"{info.vocab_sha256[:12]}... there; name the files that the teacher is served with"
        )
    if not info.vocab_sha256 and len(tokenizer) > info.vocab_size:
        raise TeacherError(
            f"teacher.tokenizer {named} has {len(tokenizer)} tokens, teacher {info.model} {info.vocab_size}: name the files that it is "
            "served with"
        )
    return used_vocabulary(tokenizer, info.vocab_size)


def _name_differences(info: TeacherInfo, tokenizer: PreTrainedTokenizerBase, rows: int, named: str | None) -> str:
    """Which ids differ first, where the teacher's tokenizer can be had and its hash proves it to be the teacher's."""
    if named is None:
        return ""
    try:
        theirs = load_tokenizer(named)
    except ModelError:
        return ""
    if vocabulary_sha256(theirs, info.vocab_size) != info.vocab_sha256:
        return ""
    here, there = token_table(tokenizer, rows), token_table(theirs, info.vocab_size)
    ids = differing_ids(here, there)
    shown = ", ".join(f"{index} is {_shown(there.get(index))} there and {_shown(here.get(index))} here" for index in ids[:_NAMED_IDS])
    return f"; of {len(here.keys() | there.keys()):,} ids {len(ids):,} differ, first: {shown}"


def _shown(raw: bytes | None) -> str:
    return "nothing" if raw is None else repr(raw.decode(errors="backslashreplace"))


def check_lengths(info: TeacherInfo, prompts: Sequence[Prompt], *, max_new_tokens: int) -> None:
    """Raises `TeacherError` where a prompt and its answer could be longer than the teacher takes."""
    limit = info.max_sequence_tokens
    if not limit:
        return
    for prompt in prompts:
        longest = len(prompt.token_ids) + max(max_new_tokens, len(prompt.reference_ids or ()))
        if longest > limit:
            raise TeacherError(
                f"prompt {prompt.prompt_id} has {len(prompt.token_ids)} tokens, with its answer up to {longest}: teacher {info.model} "
                f"takes {limit}; lower rollouts.max_new_tokens or data.response_tokens, or shorten the prompt"
            )
