"""The loss of judged answers, from rewards to gradients, against autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bbopd.config import ObjectiveConfig
from bbopd.data.assemble import assemble
from bbopd.data.streams import each
from bbopd.objectives import make_objective
from bbopd.output_head import OutputHead
from bbopd.pipeline.prompt_groups import PromptGroups
from bbopd.pipeline.rewards import GroupRewards
from bbopd.types import Prompt, Reward, Rollout, SignalSpec

V, D, T = 37, 8, 0.7


class Given:
    """Rewards by draw."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    async def rewards(self, group):
        return [Reward(float(self._values[rollout.draw])) for rollout in group]


@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("clip", [(0.2, 0.28), None])
async def test_it_is_the_clipped_surrogate_of_advantages_in_their_groups(divide_by_std: bool, clip) -> None:
    random = np.random.default_rng(0)
    prompts = [Prompt(f"p{number // 4}", (1, 2)) for number in range(12)]
    values = random.normal(size=12)
    values[4:8] = 0.3  # a group without spread
    groups = PromptGroups(prompts, by_group=True)
    rollouts = []
    for draw, prompt in enumerate(prompts):
        length = int(random.integers(1, 7))
        ids, logprobs = tuple(random.integers(0, V, length).tolist()), random.normal(-3.5, 0.5, length).astype(np.float32)
        rollouts += groups.accept(Rollout(f"r{draw}", prompt, ids, logprobs=logprobs, temperature=T, draw=draw))
    labelled = Rollout("l", Prompt("q", (3,)), (4, 5, 6), origin="reference", draw=99)
    want = SignalSpec("text", temperature=T)
    stage = GroupRewards(Given(values), divide_by_std=divide_by_std)
    scored = sorted([one async for one in stage.score(each([*rollouts, labelled]), want)], key=lambda one: one.rollout.draw)
    batch = assemble(scored, want)

    hidden = torch.randn(batch.response_tokens, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    objective = make_objective(ObjectiveConfig(name="verbal", temperature=T, clip=clip))
    found = objective.loss(hidden, OutputHead(weight), batch, ce_weight=0.3, kd_weight=0.7, normalizer=None)
    found.loss.backward()

    h, w = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logits = h @ w.T
    advantages = []
    for draw, rollout in enumerate(rollouts):
        group = values[draw // 4 * 4 : draw // 4 * 4 + 4]
        advantage = values[draw] - group.mean()
        advantages += [advantage / (group.std(ddof=1) + 1e-6) if divide_by_std else advantage] * len(rollout)
    N = len(advantages)
    log_q = (logits[:N] / T).log_softmax(-1).gather(1, batch.target_ids[:N, None])[:, 0]
    ratio = (log_q - torch.from_numpy(np.concatenate([rollout.logprobs for rollout in rollouts])).double()).exp()
    A = torch.tensor(advantages, dtype=torch.float64)
    clipped = ratio if clip is None else ratio.clamp(1 - clip[0], 1 + clip[1])
    surrogate = -torch.minimum(ratio * A, clipped * A).mean()
    ce = torch.nn.functional.cross_entropy(logits[N:], batch.labels[N:])
    expected = 0.3 * ce + 0.7 * surrogate
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-3, atol=1e-5)
    flat = sum(len(rollout) for rollout in rollouts[:4])
    assert not hidden.grad[flat : flat + sum(len(rollout) for rollout in rollouts[4:8])].any(), "nothing is better than anything there"
