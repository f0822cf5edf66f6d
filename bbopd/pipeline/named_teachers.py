"""The teachers of a run beside its own one, connected and held to the same tokens and the same signal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bbopd.config import RunConfig
from bbopd.errors import TeacherError
from bbopd.objectives import Objective, check_offer
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.plugged import open_plugged_teacher
from bbopd.pipeline.preflight import check_candidates, check_lengths, check_vocabulary
from bbopd.pipeline.progress import Progress
from bbopd.pipeline.teacher import open_api, remembering, start_teacher
from bbopd.teachers.fitted import fitted
from bbopd.types import Prompt, SignalSpec, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bbopd.teachers.openai import OpenAITeacher
    from bbopd.teachers.remote import RemoteTeacher


@dataclass(frozen=True, slots=True)
class NamedTeachers:
    """``asked``: each as the loop asks it, by its name. ``connections``: those that are services, for their counters."""

    asked: dict[str, Teacher]
    connections: tuple[RemoteTeacher | OpenAITeacher, ...]

    @property
    def retries(self) -> int:
        return sum(one.counters["retries"] for one in self.connections)


async def open_named_teachers(
    config: RunConfig,
    objective: Objective,
    want: SignalSpec,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    prompts: Sequence[Prompt],
    folder: RunFolder,
    stack: AsyncExitStack,
    progress: Progress,
) -> NamedTeachers:
    """The ``teachers`` of ``config``; ``tokenizer`` and ``rows`` are the student's and its head's, ``prompts`` those to train on.

    Raises
    ------
    TeacherError
        One does not answer, has other tokens than the student, does not offer ``want``, takes no text as long, or costs money.
    """
    asked: dict[str, Teacher] = {}
    connections: list[RemoteTeacher | OpenAITeacher] = []
    for name, one in config.teachers.items():
        try:
            teacher: Teacher
            if one.plugin is not None:
                teacher = await open_plugged_teacher(one, tokenizer, rows, stack, progress)
            else:
                remote, _ = await start_teacher(one, folder, stack, progress)
                teacher = counted = remote or await open_api(one, tokenizer, rows, None, stack, progress)
                connections.append(counted)
            check_offer(objective, teacher.info, want)
            check_candidates(teacher.info, config.candidates)
            vocab_size = check_vocabulary(teacher.info, tokenizer, rows)
            its_own = [prompt for prompt in prompts if name in dict(prompt.teachers)]
            check_lengths(teacher.info, its_own, max_new_tokens=config.rollouts.max_new_tokens)
            if teacher.info.price_per_million_tokens:
                raise TeacherError(
                    f"teacher {teacher.info.model} costs money, which is counted of the run's own teacher alone: let that be the paid one"
                )
        except TeacherError as error:
            raise TeacherError(f"teachers.{name}: {error}") from error
        kept = remembering(teacher, None, one, folder, stack)
        assert kept is not None, "there is a teacher"
        asked[name] = fitted(kept, vocab_size)
    return NamedTeachers(asked, tuple(connections))
