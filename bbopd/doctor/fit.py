"""Whether teacher and student speak of the same tokens, and whether the longest text has room at the teacher."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from bbopd.doctor.findings import SetUp, Verdict, passed, warned
from bbopd.errors import TeacherError
from bbopd.modeling import chat_template_sha256, tokenizer_sha256
from bbopd.pipeline.preflight import check_lengths, check_vocabulary
from bbopd.pipeline.teacher import aligning_teacher, load_teacher_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_formats", "check_room", "check_tokens"]


async def check_tokens(setup: SetUp) -> Verdict:
    """Vocabularies, compared by content."""
    assert setup.teacher is not None
    assert setup.model is not None
    assert setup.tokenizer is not None
    info, tokenizer = setup.teacher.info, setup.tokenizer
    theirs = await asyncio.to_thread(load_teacher_tokenizer, setup.config)
    if theirs is not None:
        return await _align(setup, theirs)
    rows, serve = setup.model.get_input_embeddings().weight.shape[0], setup.config.teacher.serve
    named = setup.teacher_tokenizer_name or (serve.model if serve is not None else None)
    try:
        used = await asyncio.to_thread(check_vocabulary, info, tokenizer, rows, named=named)
    except TeacherError as error:
        if setup.config.teacher.signal == "text":
            return passed(f"other tokens than the student's, which text does without ({error})")
        if "differ, first:" in str(error):
            raise
        raise TeacherError(f"{error}; to see which tokens differ, name the teacher's tokenizer with --teacher-tokenizer") from error
    setup.vocab_size = used
    if not info.vocab_sha256:
        return warned(
            f"both have {rows:,} entries, but the teacher does not say which: answers about other tokens would look all right; serve it "
            "with its tokenizer"
        )
    said = f"the same {len(tokenizer):,} tokens under the same ids (SHA-256 {info.vocab_sha256[:12]}...)"
    if used < max(rows, info.vocab_size):
        said += f"; padding is left out: the student's head has {rows:,} rows, the teacher gives {info.vocab_size:,}, {used:,} are used"
    return passed(said)


async def _align(setup: SetUp, theirs: tuple[PreTrainedTokenizerBase, str]) -> Verdict:
    """Whether tokens of the teacher's own can be laid beside the student's."""
    assert setup.teacher is not None
    assert setup.model is not None
    assert setup.tokenizer is not None
    rows, notes = setup.model.get_input_embeddings().weight.shape[0], list[str]()
    setup.aligning = await asyncio.to_thread(aligning_teacher, setup.teacher, theirs, setup.tokenizer, rows, notes.append)
    share = setup.aligning.common_ids / max(1, len(theirs[0]))
    said = f"{'; '.join(notes)} ({share:.0%})"
    return passed(said) if len(notes) == 1 else warned(f"{said}: take the files that it is served with")


async def check_formats(setup: SetUp) -> Verdict:
    """Whether both cut text into the same tokens, and write messages down alike."""
    assert setup.teacher is not None
    assert setup.tokenizer is not None
    info, differ, unknown = setup.teacher.info, [], []
    for what, theirs, ours in (
        ("tokenizer", info.tokenizer_sha256, tokenizer_sha256(setup.tokenizer)),
        ("chat template", info.chat_template_sha256, chat_template_sha256(setup.tokenizer)),
    ):
        if theirs and theirs != ours:
            differ.append(f"{what} ({theirs[:12]}... there, {ours[:12] or 'none'}... here)")
        elif not theirs:
            unknown.append(what)
    if differ and (setup.config.teacher.signal == "text" or setup.config.objective.name == "aligned"):
        return passed(f"the teacher has another {' and another '.join(differ)}: each side reads and writes by its own")
    if differ:
        return warned(
            f"the teacher has another {' and another '.join(differ)}: it would read the student's prompts as nobody wrote them in its "
            "training; take the teacher's tokenizer files for the student where their vocabularies are one"
        )
    if unknown:
        return warned(
            f"the teacher does not say which {' and '.join(unknown)} it has: compare them by hand, or serve it with its tokenizer"
        )
    return passed("the same tokenizer and the same chat template on both sides")


async def check_room(setup: SetUp) -> Verdict:
    """Prompt and answer fit into what the teacher takes, and the longest request into what it takes at a time."""
    assert setup.teacher is not None
    assert setup.prompts is not None
    config, info = setup.config, setup.teacher.info
    prompts = setup.prompts.known
    new = max(config.rollouts.max_new_tokens, config.eval.max_new_tokens)
    if config.teacher.signal == "text" and setup.vocab_size is None:
        setup.has_room = True
        longest = max(len(prompt.token_ids) for prompt in prompts)
        return passed(f"prompts have up to {longest:,} of the student's tokens; of its own the teacher takes {info.max_sequence_tokens:,}")
    if setup.aligning is not None:
        await asyncio.to_thread(setup.aligning.check_prompts, prompts)
        setup.has_room = True
        return passed(f"every prompt leaves room for an answer in the teacher's {info.max_sequence_tokens:,} of its own tokens")
    lengths = [len(prompt.token_ids) + max(new, len(prompt.reference_ids or ())) for prompt in prompts]
    try:
        check_lengths(info, prompts, max_new_tokens=new)
    except TeacherError as error:
        count = sum(length > info.max_sequence_tokens for length in lengths)
        raise TeacherError(f"{error} ({count:,} of {len(prompts):,} prompts, {count / len(prompts):.0%}, are too long)") from error
    if not info.max_sequence_tokens:
        setup.has_room = True
        return warned(f"up to {max(lengths):,} tokens, and the teacher does not say how many it takes: ask whoever runs it")
    if info.max_request_tokens and max(lengths) > info.max_request_tokens:
        raise TeacherError(
            f"a sequence may have {max(lengths):,} tokens, teacher {info.model} takes {info.max_request_tokens:,} of one client at a time: "
            "lower rollouts.max_new_tokens, or raise max_client_tokens where it is served"
        )
    setup.has_room = True
    return passed(f"prompt and answer have up to {max(lengths):,} tokens, the teacher takes {info.max_sequence_tokens:,}")
