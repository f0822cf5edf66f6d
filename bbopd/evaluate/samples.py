"""The same prompts answered by the student at different times and by its teacher, to be read side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bbopd.data.streams import each
from bbopd.types import Completion, Prompt, Rollout, RolloutEngine, Sampling, Teacher

Decode = Callable[[Sequence[int]], str]


async def student_answers(engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling, decode: Decode) -> list[str]:
    """The answers of the student as ``engine`` holds it now, in the order of ``prompts``; the same seed gives the same answers."""
    rollouts: dict[str, Rollout] = {rollout.prompt.prompt_id: rollout async for rollout in engine.generate(each(prompts), sampling)}
    return [decode(rollouts[prompt.prompt_id].token_ids) if prompt.prompt_id in rollouts else "" for prompt in prompts]


async def teacher_answers(teacher: Teacher, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
    """The teacher's own answers, in the order of ``prompts``."""
    answers: dict[str, Completion] = {answer.prompt.prompt_id: answer async for answer in teacher.complete(each(prompts), sampling)}
    return [answers[prompt.prompt_id].text if prompt.prompt_id in answers else "" for prompt in prompts]
