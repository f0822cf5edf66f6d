"""What an examination is made of: checks that run one by one, the set-up they open between them, and a finding for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bbopd.config import RunConfig
from bbopd.errors import BbopdError, TeacherError
from bbopd.pipeline.engine import candidate_chooser
from bbopd.types import Teacher

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bbopd.data.prompts import PromptSet
    from bbopd.objectives import Objective
    from bbopd.pipeline.folder import RunFolder
    from bbopd.rollouts.candidates import CandidateChooser
    from bbopd.teachers.aligned import AligningTeacher
    from bbopd.types import SignalSpec

__all__ = ["Check", "Finding", "SetUp", "Verdict", "examine", "passed", "warned"]

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check has to say where nothing was raised; ``detail`` ends with the way out where there is something to mend."""

    status: Status
    detail: str


def passed(detail: str) -> Verdict:
    return Verdict("pass", detail)


def warned(detail: str) -> Verdict:
    return Verdict("warn", detail)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of an examination."""

    name: str
    status: Status
    detail: str
    seconds: float


@dataclass(slots=True)
class SetUp:
    """The parts of a run, each None until a check has opened it; what a check opens is closed with ``stack``."""

    config: RunConfig
    stack: AsyncExitStack
    scratch: RunFolder
    """A temporary folder, so that nothing of the examination is left in the run's own."""
    teacher_tokenizer_name: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    eos_token_id: int | None = None
    prompts: PromptSet | None = None
    model: PreTrainedModel | None = None
    compute_dtype: torch.dtype | None = None
    teacher: Teacher | None = None
    vocab_size: int | None = None
    """How many ids teacher and student have in common."""
    aligning: AligningTeacher | None = None
    """The teacher in the student's tokens, where the run lays its own beside them."""
    has_room: bool | None = None
    """That the longest sequence fits into what the teacher takes."""
    objective: Objective | None = None
    want: SignalSpec | None = None
    steady: bool | None = None
    """That the teacher answers the same twice."""

    def chooser(self) -> CandidateChooser | None:
        """What has the student choose ids for its teacher; None where the run's signal needs none. Raises `TeacherError`."""
        if not self.config.candidates:
            return None
        assert self.model is not None
        assert self.compute_dtype is not None
        if self.vocab_size is None:
            raise TeacherError("a student can choose ids for its teacher only where both have the same tokens")
        return candidate_chooser(self.config, self.model, self.compute_dtype, self.vocab_size)


@dataclass(frozen=True, slots=True)
class Check:
    """One check. ``needs`` are fields of `SetUp`: where one is None, the check is skipped."""

    name: str
    run: Callable[[SetUp], Awaitable[Verdict]]
    needs: tuple[str, ...] = ()


_FOR_PEOPLE = {
    "tokenizer": "the student's tokenizer",
    "eos_token_id": "a token that ends a text",
    "prompts": "prompts",
    "model": "the student",
    "teacher": "a teacher that answers",
    "vocab_size": "a vocabulary in common",
    "want": "a signal that the teacher offers",
    "steady": "answers that do not change",
}


async def examine(setup: SetUp, checks: Sequence[Check], *, time_limit: float) -> AsyncGenerator[Finding, None]:
    """Run ``checks`` in their order, each for at most ``time_limit`` seconds; what one of them raises is its own failing line."""
    for check in checks:
        missing = [_FOR_PEOPLE[need] for need in check.needs if getattr(setup, need) is None]
        if missing:
            yield Finding(check.name, "skip", f"needs {' and '.join(missing)}", 0.0)
            continue
        started = time.perf_counter()
        try:
            verdict = await asyncio.wait_for(check.run(setup), time_limit)
        except TimeoutError:
            verdict = Verdict("fail", f"nothing came of it within {time_limit:g} s: see whether what it asks is up, or raise --timeout")
        except BbopdError as error:
            verdict = Verdict("fail", str(error))
        except Exception as error:  # whatever it is, the other checks still have something to say
            verdict = Verdict("fail", f"the check itself broke with {type(error).__name__}: {error}")
        yield Finding(check.name, verdict.status, verdict.detail, time.perf_counter() - started)
