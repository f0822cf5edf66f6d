"""A teacher in this process with the dense logits of a tiny model, and the same figures computed from them in float64."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bbopd.evaluate.agreement import Agreement, AgreementMeter
from bbopd.evaluate.student import StudentView
from bbopd.types import Completion, Offer, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherInfo, TeacherSignal

VOCAB = 320
TEXT = "The naïve café: 日本語 and the thing in Ελλάδα 🙂🙂, then the end."
MERGED_BYTES = {259: 2, 260: 3, 261: 2}  # th, the, in


def dense_logprobs(model: Any, ids: Sequence[int], first: int) -> Tensor:
    """Log-probabilities [L, V] float64 of the tokens from ``first`` on, from the model's own logits."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0, first - 1 : -1].double().log_softmax(-1)


def nats_of(model: Any, prompt: Sequence[int], reference: Sequence[int]) -> Tensor:
    logprobs_LV = dense_logprobs(model, [*prompt, *reference], len(prompt))
    return -logprobs_LV.gather(1, torch.tensor(reference)[:, None])[:, 0]


def byte_length(ids: Iterable[int]) -> int:
    return sum(MERGED_BYTES.get(index, 1) for index in ids if index > 2)


def random_prompts(seed: int, count: int = 7) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 14, size=(count, 2))
    return [
        Prompt(f"p{i}", tuple(rng.integers(3, 262, size=n).tolist()), tuple(rng.integers(3, 262, size=m).tolist()))
        for i, (n, m) in enumerate(sizes)
    ]


class DenseTeacher:
    """A teacher in this process that answers with its own dense logits, counts what it is asked, and answers out of order."""

    def __init__(self, model: Any, *, levels: Sequence[str] = ("full", "topk"), dtype: Any = np.float16) -> None:
        self.model = model
        self.dtype = dtype
        offers = tuple(Offer(level, max_top_k=8, temperature_max=1.0) for level in levels)  # type: ignore[arg-type]
        self.info = TeacherInfo(model="dense", vocab_size=VOCAB, offers=offers)
        self.asked: list[str] = []

    def signal(self, rollout: Rollout, want: SignalSpec) -> TeacherSignal:
        logprobs = dense_logprobs(self.model, rollout.all_ids, len(rollout.prompt.token_ids)).numpy()
        if want.level == "full":
            return TeacherSignal("full", logits=(logprobs - logprobs.max(-1, keepdims=True)).astype(self.dtype))
        ids = np.argsort(-logprobs, axis=-1)[:, : want.top_k].astype(np.int32)
        best = np.take_along_axis(logprobs, ids, axis=-1)
        sampled = np.take_along_axis(logprobs, np.array(rollout.token_ids)[:, None], axis=-1)[:, 0]
        tail = np.log1p(-np.exp(best).sum(-1))
        return TeacherSignal("topk", 1.0, None, ids, best.astype(np.float32), tail.astype(np.float32), sampled.astype(np.float32))

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        waiting = [rollout async for rollout in rollouts]
        for rollout in reversed(waiting):
            self.asked.append(rollout.rollout_id)
            yield ScoredRollout(rollout, self.signal(rollout, want))

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        waiting = [prompt async for prompt in prompts]
        for prompt in reversed(waiting):
            yield Completion(prompt, (5,), f"answer to {prompt.prompt_id}", "stop")


def measure_agreement(student: StudentView, scored: Iterable[ScoredRollout], want: SignalSpec) -> Agreement:
    meter = AgreementMeter(student, want)
    for item in scored:
        meter.add(item)
    return meter.result()
