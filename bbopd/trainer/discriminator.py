"""The discriminator of adversarial distillation: a copy of the student that gives one number to an answer, the teacher's or the student's.

A cycle asks it twice: `Discriminator.score`, whose numbers reward the student, and `Discriminator.learn`, which follows the loss of
those same numbers back into the weights. Between the two nothing changes, so a cycle that is dropped after scoring leaves no trace.

Shape suffixes: ``P`` packed tokens, ``S`` answers, ``D`` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from bbopd.config import TrainConfig
from bbopd.errors import TrainingError
from bbopd.modeling import can_share_prefixes, copy_of_trained, packed_attention, packed_hidden, trained_weights
from bbopd.modeling.layers import decoder
from bbopd.objectives.bradley_terry import PairScores, bradley_terry, bradley_terry_gradient
from bbopd.trainer.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD_STD = 0.02  # of the new head's weights, as transformers initialises a head


@dataclass(frozen=True, slots=True)
class Contest:
    """One prompt with the teacher's answer to it and the student's, all as ids of the student's tokenizer."""

    prompt: tuple[int, ...]
    teacher: tuple[int, ...]
    students: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class _Packing:
    """Sequences laid end to end, and which answer ends at which of their tokens."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    prefixes: list[int | None] = field(default_factory=list)
    last_rows: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, start: int = 0, prefix: int | None = None, answer: int | None = None) -> None:
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.lengths.append(len(ids))
        self.prefixes.append(prefix)
        if answer is not None:
            self.last_rows.append(len(self.ids) - 1)
            self.answers.append(answer)


class _Scorer(nn.Module):
    """What is trained: a student's body, and the head."""

    def __init__(self, body: nn.Module, width: int, seed: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 1, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(_HEAD_STD * torch.randn(1, width, generator=torch.Generator().manual_seed(seed)))


class Discriminator:
    """``D(x, y)``: the hidden state of the last token of prompt and answer, times a vector (GAD, 2511.10643, section 2.2).

    Parameters
    ----------
    student
        Its weights are copied, all but those of its output head and what is frozen: of one with adapters these alone are the
        discriminator's own, beside the same frozen body.
    learning_rate
        Of the discriminator's own AdamW, constant; betas, weight decay and clipping are those of ``train``.
    compute_dtype
        torch.bfloat16 multiplies matrices in bfloat16 by autocast; weights, head and scores stay float32.
    """

    def __init__(
        self, student: PreTrainedModel, *, train: TrainConfig, learning_rate: float, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        output = student.get_output_embeddings()
        self._model = copy_of_trained(student, {id(output): output})  # its own body; the head, which is not used, is not copied
        width = student.get_input_embeddings().weight.shape[1]
        self._scorer = _Scorer(decoder(self._model), width, train.seed).to(student.device)
        self._optimizer = build_optimizer(self._scorer, train.model_copy(update={"lr": learning_rate}))
        self._train = train
        self._compute_dtype = compute_dtype
        self._shares_prompts = can_share_prefixes(self._model)
        self._scorer.eval()

    def score(self, contests: Sequence[Contest], *, seed: int) -> PairScores:
        """Scores of every answer, teacher's and student's in one shuffled batch; float32, on the CPU, without gradients.

        Of a discriminator that has diverged they are not finite.
        """
        scores_S = torch.empty(sum(1 + len(contest.students) for contest in contests))
        with torch.no_grad():
            for packing in self._packings(contests, seed):
                scores_S[packing.answers] = self._forward(packing).cpu()
        prompts = [index for index, contest in enumerate(contests) for _ in contest.students]
        return PairScores(scores_S[: len(contests)], scores_S[len(contests) :], torch.tensor(prompts, dtype=torch.int64))

    def learn(self, contests: Sequence[Contest], scores: PairScores, *, seed: int) -> Mapping[str, float]:
        """One AdamW step on the Bradley-Terry loss of ``scores``, which `score` gave with these weights; figures of the step.

        Raises `TrainingError` where the gradient is not finite; nothing has changed then.
        """
        gradient_S = torch.cat(bradley_terry_gradient(scores)).to(self._model.device)
        self._scorer.train()
        try:
            for packing in self._packings(contests, seed):
                with packed_attention(self._model):
                    (self._forward(packing) * gradient_S[packing.answers]).sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(self._scorer.parameters(), self._train.clip)
            if not bool(torch.isfinite(norm)):
                raise TrainingError(f"the discriminator's gradient norm is {norm.item()}")
            self._optimizer.step()
        finally:
            self._optimizer.zero_grad(set_to_none=True)
            self._scorer.eval()
        return {"discriminator_loss": bradley_terry(scores).item(), "discriminator_grad_norm": norm.item()}

    # ------------------------------------------------------------ for a checkpoint

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, and its optimizer moments, by name: all that `load_tensors` needs."""
        moments = optimizer_tensors(self._scorer, self._optimizer)
        weights = {f"weights/{name}": tensor for name, tensor in trained_weights(self._scorer).items()}
        return weights | {f"moments/{name}": tensor for name, tensor in moments.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from where `tensors` were taken. Raises `ValueError` for those of another model; nothing has changed then."""
        weights = {name.removeprefix("weights/"): tensor for name, tensor in tensors.items() if name.startswith("weights/")}
        target = trained_weights(self._scorer)
        if {name: one.shape for name, one in weights.items()} != {name: one.shape for name, one in target.items()}:
            raise ValueError("the discriminator is of another model")
        for name, tensor in target.items():
            tensor.copy_(weights[name])
        moments = {name.removeprefix("moments/"): tensor for name, tensor in tensors.items() if name.startswith("moments/")}
        load_optimizer_tensors(self._scorer, self._optimizer, moments)

    # ------------------------------------------------------------ forward

    def _forward(self, packing: _Packing) -> Tensor:
        """Scores [S] of the packing's answers."""
        device = self._model.device
        ids_P, positions_P = torch.tensor(packing.ids, device=device), torch.tensor(packing.positions, device=device)
        boundaries = torch.tensor([0, *accumulate(packing.lengths)], dtype=torch.int32)
        prefixes = packing.prefixes if self._shares_prompts else None
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._compute_dtype == torch.bfloat16):
            hidden_PD = packed_hidden(self._model, ids_P, positions_P, boundaries, prefixes)
        return hidden_PD[packing.last_rows].float() @ self._scorer.head.weight[0]

    def _packings(self, contests: Sequence[Contest], seed: int) -> Iterator[_Packing]:
        """All answers, prompts in random order and the answers to each as well, in batches of about ``micro_batch_tokens``.

        Answers are numbered: those of the teacher by prompt, then the student's in their order. A prompt is laid once into a batch for all
        its answers there, where the model can share it.
        """
        random = np.random.default_rng(seed)
        first = list(accumulate((len(contest.students) for contest in contests), initial=len(contests)))
        packing = _Packing()
        for index in random.permutation(len(contests)):
            contest, prefix = contests[index], None
            for place in random.permutation(1 + len(contest.students)):
                answer, number = (contest.students[place - 1], first[index] + place - 1) if place else (contest.teacher, index)
                size = len(answer) + (len(contest.prompt) if prefix is None else 0)
                if packing.ids and len(packing.ids) + size > self._train.micro_batch_tokens:
                    yield packing
                    packing, prefix = _Packing(), None
                if not self._shares_prompts:
                    packing.add((*contest.prompt, *answer), answer=number)
                    continue
                if prefix is None:
                    prefix = len(packing.lengths)
                    packing.add(contest.prompt)
                packing.add(answer, start=len(contest.prompt), prefix=prefix, answer=number)
        if packing.ids:
            yield packing
