"""How the game of adversarial distillation stands on prompts that neither side has trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from bbopd.data.streams import each
from bbopd.evaluate.win_rate import Pair, win_rate
from bbopd.pipeline.cycle import as_generator
from bbopd.teachers.written import WritingTeacher
from bbopd.trainer.discriminator import Contest, Discriminator
from bbopd.types import Prompt, Rollout, RolloutEngine, Sampling, SignalSpec, Teacher

_SEED = 20_178  # apart from the seeds of training cycles, and the same at every stage


class HeldOutGame:
    """Built once from held-out prompts; `measure` has the student answer them with the weights that ``engine`` holds.

    Parameters
    ----------
    count : prompts, spread evenly over ``prompts``.
    sampling : as rollouts are written.
    decode : the student's tokens to text.
    judge : compares the answers of both; None: nobody.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        count: int,
        *,
        engine: RolloutEngine,
        teacher: WritingTeacher,
        discriminator: Discriminator,
        sampling: Sampling,
        decode: Callable[[Sequence[int]], str],
        judge: Teacher | None,
    ) -> None:
        count = min(count, len(prompts))
        self._prompts = [prompts[index * len(prompts) // count] for index in range(count)]
        self._engine, self._teacher, self._discriminator, self._judge = engine, teacher, discriminator, judge
        self._sampling = Sampling(sampling.max_new_tokens, temperature=sampling.temperature, seed=_SEED)
        self._decode = decode

    async def measure(self) -> dict[str, Any]:
        """Figures for evals.jsonl; none without held-out prompts, and None of a discriminator that has diverged.

        Raises what engine, teacher and judge raise.
        """
        if not self._prompts:
            return {}
        own, its = await self._written_by_student(), await self._written_by_teacher()
        places = sorted(own.keys() & its.keys())
        contests = [Contest(own[place].prompt.token_ids, its[place].token_ids, (own[place].token_ids,)) for place in places]
        if not contests:
            return {}
        scores = self._discriminator.score(contests, seed=_SEED)
        lengths = [float(np.mean([len(side[place]) for place in places])) for side in (own, its)]
        figures: dict[str, Any] = {
            "discriminator_accuracy": scores.accuracy() if scores.is_finite else None,
            "discriminator_margin": float(scores.margins.mean()) if scores.is_finite else None,
            "student_length_mean": lengths[0],
            "teacher_length_mean": lengths[1],
            "length_drift": lengths[0] / lengths[1] - 1.0,
        }
        if self._judge is not None:
            pairs = [self._pair(own[place], its[place]) for place in places]
            won = await win_rate(self._judge, pairs)
            figures |= won.to_json()
            figures["standard_errors"] = {} if won.standard_error is None else {"win_rate": won.standard_error}
        return figures

    def _pair(self, own: Rollout, its: Rollout) -> Pair:
        prompt = own.prompt
        request = "\n\n".join(f"{role}: {content}" for role, content in prompt.messages) or prompt.text or self._decode(prompt.token_ids)
        return Pair(prompt.prompt_id, request, self._decode(own.token_ids), self._decode(its.token_ids))

    async def _written_by_student(self) -> dict[int, Rollout]:
        async with aclosing(as_generator(self._engine.generate(each(self._prompts), self._sampling))) as rollouts:
            return {rollout.draw: rollout async for rollout in rollouts if len(rollout)}

    async def _written_by_teacher(self) -> dict[int, Rollout]:
        asked = [Rollout(f"held out {place}", prompt, (0,), origin="reference", draw=place) for place, prompt in enumerate(self._prompts)]
        async with aclosing(as_generator(self._teacher.score(each(asked), SignalSpec("text")))) as answers:
            return {scored.rollout.draw: scored.rollout async for scored in answers if len(scored.rollout)}
