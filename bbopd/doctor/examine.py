"""The examination of a run: all checks in their order, from a configuration to findings, and every part closed again."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from bbopd.config import RunConfig
from bbopd.doctor.answers import check_agreement, check_determinism, check_own_words, check_zero
from bbopd.doctor.cost import check_cost, check_disk
from bbopd.doctor.findings import Check, Finding, SetUp, examine
from bbopd.doctor.fit import check_formats, check_room, check_tokens
from bbopd.doctor.parts import check_plugins, check_prompts, check_signal, check_student, check_teacher, check_tokenizer
from bbopd.doctor.tasks import check_tasks
from bbopd.doctor.trackers import check_trackers
from bbopd.pipeline.folder import RunFolder

__all__ = ["CHECKS", "examine_run"]

CHECKS = (
    Check("plug-ins", check_plugins),
    Check("tokenizer", check_tokenizer),
    Check("prompts", check_prompts, ("tokenizer", "eos_token_id")),
    Check("student", check_student),
    Check("teacher", check_teacher),
    Check("vocabulary", check_tokens, ("tokenizer", "model", "teacher")),
    Check("formats", check_formats, ("tokenizer", "teacher")),
    Check("room", check_room, ("prompts", "teacher")),
    Check("signal", check_signal, ("teacher",)),
    Check("determinism", check_determinism, ("prompts", "teacher", "want", "vocab_size")),
    Check("own words", check_own_words, ("prompts", "teacher", "want", "vocab_size", "steady")),
    Check("zero", check_zero, ("prompts", "teacher", "want", "vocab_size")),
    Check("agreement", check_agreement, ("prompts", "teacher", "model", "vocab_size", "steady")),
    Check("tasks", check_tasks),
    Check("track", check_trackers),
    Check("disk", check_disk, ("model",)),
    Check("cost", check_cost, ("tokenizer", "eos_token_id", "prompts", "model")),
)


async def examine_run(
    config: RunConfig, *, time_limit: float = 120.0, teacher_tokenizer: str | None = None, more: Sequence[Check] = ()
) -> AsyncGenerator[Finding, None]:
    """Findings as each is there; the run's own folder is not touched.

    Parameters
    ----------
    time_limit : seconds that any one check may take; the teacher's own limits are lowered to it.
    teacher_tokenizer : hub id or folder of the teacher's tokenizer, to name the tokens that differ.
    more : checks that come first.
    """
    teacher = config.teacher
    limits = {"timeout": min(teacher.timeout, 0.9 * time_limit), "start_timeout": min(teacher.start_timeout, 0.9 * time_limit)}
    config = config.model_copy(update={"teacher": teacher.model_copy(update=limits)})
    async with AsyncExitStack() as stack:
        scratch = RunFolder(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bbopd-doctor-"))))
        setup = SetUp(config, stack, scratch, teacher_tokenizer)
        async for finding in examine(setup, [*more, *CHECKS], time_limit=time_limit):
            yield finding
