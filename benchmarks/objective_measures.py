"""How far a student is from what an objective asks of it, document by document, on prompts that no run has trained on."""

from __future__ import annotations

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bbopd.config import DataConfig, ObjectiveConfig
from bbopd.data.assemble import assemble
from bbopd.data.prompts import load_prompts
from bbopd.data.streams import each
from bbopd.evaluate.bits_per_byte import NO_TEXT, token_byte_counts
from bbopd.evaluate.student import StudentView, in_batches, sequence_of_rows
from bbopd.modeling import compute_dtype, load_model, load_tokenizer, output_head, used_vocabulary
from bbopd.modeling.spelling import Speller
from bbopd.objectives import make_objective
from bbopd.pipeline.cycle import as_labelled
from bbopd.rollouts.hf import HFEngine
from bbopd.teachers.aligned import AligningTeacher
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.types import DistillBatch, Divergence, Prompt, Rollout, Sampling, SignalSpec
from benchmarks.grader import grade

PROMPT_TOKENS, RESPONSE_TOKENS = 32, 32
NEW_TOKENS = 24
HELD_OUT = 0.25
TOP_K = 64
DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")

_WINDOWS = 1  # of one document
_ROWS = 256  # of logits at a time
_QUESTIONS = 30
_SEED = 20_179
Kind = Literal["text", "aligned", "questions"]
Values = dict[str, dict[str, float]]
"""By measure, then by document: its mean over tokens (or over bytes, or answers)."""


@dataclass(frozen=True, slots=True)
class Change:
    """From ``before`` to ``after`` on the same documents; means of documents, and the standard error of their differences."""

    before: float
    after: float
    standard_error: float
    documents: int

    @property
    def change(self) -> float:
        return self.after - self.before

    def verdict(self, *, lower_is_better: bool) -> str:
        """By two standard errors."""
        if not math.isfinite(self.after):
            return "diverged"
        if abs(self.change) < 2 * self.standard_error:
            return "no difference"
        return "improved" if (self.change < 0) == lower_is_better else "worse"


def compare(before: dict[str, float], after: dict[str, float]) -> Change:
    names = sorted(before.keys() & after.keys())
    pairs = np.array([(before[name], after[name]) for name in names])
    differences = pairs[:, 1] - pairs[:, 0]
    error = float(differences.std(ddof=1) / math.sqrt(len(names)))
    return Change(float(pairs[:, 0].mean()), float(pairs[:, 1].mean()), error, len(names))


def text_data(folder: Path) -> dict[str, Any]:
    """``data`` of a run on running text."""
    return _data([{"demo": True}])


def question_data(folder: Path) -> dict[str, Any]:
    """``data`` of a run on questions with the teacher's answers."""
    return _data([{"jsonl": str(folder / "questions.jsonl")}])


def _data(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"prompts": prompts, "prompt_tokens": PROMPT_TOKENS, "response_tokens": RESPONSE_TOKENS, "held_out": HELD_OUT}


def divergences(log_p_NV: Tensor, log_q_NV: Tensor, beta: float = 0.5, skew: float = 0.1) -> dict[Divergence, Tensor]:
    """All five [N] of teacher and student, written down once more, apart from the library's own."""
    p, q = log_p_NV.exp(), log_q_NV.exp()

    def kl(of: Tensor, log_of: Tensor, log_to: Tensor) -> Tensor:
        return (of * (log_of - log_to)).sum(dim=1)

    log_m = (beta * p + (1 - beta) * q).log()
    return {
        "forward_kl": kl(p, log_p_NV, log_q_NV),
        "reverse_kl": kl(q, log_q_NV, log_p_NV),
        "jsd": beta * kl(p, log_p_NV, log_m) + (1 - beta) * kl(q, log_q_NV, log_m),
        "skew_forward_kl": kl(p, log_p_NV, (skew * p + (1 - skew) * q).log()),
        "skew_reverse_kl": kl(q, log_q_NV, (skew * q + (1 - skew) * p).log()),
    }


def on_candidates(log_p_NV: Tensor, log_q_NV: Tensor, count: int = TOP_K) -> Tensor:
    """KL(q‖p) [N] over the student's ``count`` likeliest tokens and all the rest as one."""
    ids_NK = log_q_NV.topk(min(count, log_q_NV.shape[1] - 1), dim=1).indices
    bucketed = []
    for log_NV in (log_p_NV, log_q_NV):
        rest_N1 = log_NV.scatter(1, ids_NK, -torch.inf).logsumexp(dim=1, keepdim=True)
        bucketed.append(torch.cat([log_NV.gather(1, ids_NK), rest_N1], dim=1))
    log_p_NC, log_q_NC = bucketed
    return (log_q_NC.exp() * (log_q_NC - log_p_NC)).sum(dim=1)


class Yardstick:
    """Holds teachers and prompts of ``folder`` (see `objective_models`), and measures one student after another."""

    def __init__(self, folder: Path) -> None:
        self._dtype = compute_dtype("auto", torch.device("cpu"))
        self._tokenizer = load_tokenizer(folder / "teacher")
        teacher = load_model(folder / "teacher")
        self._teacher = StudentView(teacher, compute_dtype=self._dtype)
        self._teacher_weight = teacher.get_output_embeddings().weight
        self._byte_counts = token_byte_counts(self._tokenizer)
        texts = self._held_out(text_data(folder))
        self._texts = list(_first_windows([prompt for prompt in texts if prompt.reference_ids], _WINDOWS))
        self._questions = self._held_out(question_data(folder))[:_QUESTIONS]
        their_tokenizer = load_tokenizer(folder / "other_tokens")
        theirs = LocalTeacher(HFBackend(load_model(folder / "other_tokens", dtype=self._dtype), their_tokenizer))
        rows = self._teacher_weight.shape[0]
        self._aligning = AligningTeacher(
            theirs,
            Speller(their_tokenizer, theirs.info.vocab_size, named="other_tokens"),
            Speller(self._tokenizer, rows, named="student"),
            their_tokenizer,
        )

    def _held_out(self, data: dict[str, Any]) -> list[Prompt]:
        config = DataConfig.model_validate(data)
        return load_prompts(config, self._tokenizer, max_seq_len=512, eos_token_id=self._tokenizer.eos_token_id).held_out

    def measure(self, student: Path, kinds: Collection[Kind] = ("text", "aligned", "questions")) -> Values:
        """Measures of the student in a folder, of some kinds.

        ``text``: ``text_*`` on held-out text and ``own_*`` on what the student writes to its beginnings, at temperature 1, divergences in
        nats a token, ``*_candidates`` that of `on_candidates`; ``bits_per_byte`` of the text; ``mixed``, the mean of that objective's two
        divergences.
        ``aligned``: ``own_aligned``, forward KL on the tokens that it has in common with a teacher of other tokens, ids and tail.
        ``questions``: ``answer_bits_per_byte`` of the teacher's answers to held-out questions; ``grade`` of the student's own.
        """
        model = load_model(student)
        view = StudentView(model, compute_dtype=self._dtype)
        values: Values = {}
        if "text" in kinds or "aligned" in kinds:
            rollouts = asyncio.run(self._write(model, self._texts))
        if "text" in kinds:
            text, own = self._divergences(view, model, _labelled(self._texts)), self._divergences(view, model, rollouts)
            values |= {f"text_{name}": found for name, found in text.items()} | {f"own_{name}": found for name, found in own.items()}
            values["mixed"] = {name: (value + own["skew_reverse_kl"][name]) / 2 for name, value in text["skew_forward_kl"].items()}
            values["bits_per_byte"] = self._bits_per_byte(view, self._texts)
        if "aligned" in kinds:
            values["own_aligned"] = asyncio.run(self._aligned(view, model, rollouts))
        if "questions" in kinds:
            values["answer_bits_per_byte"] = self._bits_per_byte(view, self._questions)
            answers = asyncio.run(self._write(model, self._questions))
            values["grade"] = {answer.prompt.prompt_id: grade(self._decode(answer)) for answer in answers}
        return values

    def _decode(self, rollout: Rollout) -> str:
        return str(self._tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True))

    async def _write(self, model: Any, prompts: Sequence[Prompt]) -> list[Rollout]:
        end = self._tokenizer.eos_token_id
        engine = HFEngine(
            model,
            eos_token_ids=[end],
            pad_token_id=end,
            vocab_size=used_vocabulary(self._tokenizer, len(self._teacher_weight)),
            compute_dtype=self._dtype,
        )
        written = [rollout async for rollout in engine.generate(each(prompts), Sampling(NEW_TOKENS, seed=_SEED))]
        return sorted(written, key=lambda rollout: rollout.draw)

    @torch.no_grad()
    def _divergences(self, student: StudentView, model: Any, rollouts: Iterable[Rollout]) -> Values:
        meters = {name: _Meter() for name in (*DIVERGENCES, "candidates")}
        for items in in_batches(rollouts):
            batch = assemble(items, None)
            heads = ((self._teacher, self._teacher_weight), (student, model.get_output_embeddings().weight))
            found: dict[str, list[Tensor]] = {name: [] for name in meters}
            hidden = [(view.hidden(batch).split(_ROWS), weight) for view, weight in heads]
            for rows in zip(*(parts for parts, _ in hidden), strict=True):
                log_p, log_q = ((part @ weight.T).log_softmax(dim=1) for part, (_, weight) in zip(rows, hidden, strict=True))
                for name, values in divergences(log_p, log_q).items():
                    found[name].append(values)
                found["candidates"].append(on_candidates(log_p, log_q))
            for name, meter in meters.items():
                meter.add(items, batch, torch.cat(found[name]))
        return {name: meter.means() for name, meter in meters.items()}

    def _bits_per_byte(self, student: StudentView, prompts: Sequence[Prompt]) -> dict[str, float]:
        nats, sizes = _Meter(), _Meter()
        for items in in_batches(_labelled(prompts)):
            batch = assemble(items, None)
            counts_N = self._byte_counts[batch.target_ids]
            logprobs_N = student.logprobs(student.hidden(batch), token_ids=batch.target_ids).sampled
            assert logprobs_N is not None, "token_ids were given"
            nats.add(items, batch, -logprobs_N, counts_N != NO_TEXT)
            sizes.add(items, batch, counts_N, counts_N != NO_TEXT)
        sizes_by_name = sizes.means()
        return {name: value / math.log(2) / sizes_by_name[name] for name, value in nats.means().items()}

    async def _aligned(self, student: StudentView, model: Any, rollouts: Sequence[Rollout]) -> dict[str, float]:
        want, meter = SignalSpec("topk", top_k=TOP_K), _Meter()
        objective = make_objective(ObjectiveConfig(name="aligned", temperature=1.0, span_weight=0.0, rank_weight=0.0))
        head = output_head(model)
        scored = [one async for one in self._aligning.score(each(rollouts), want)]
        for items in in_batches(sorted(scored, key=lambda one: one.rollout.draw)):
            batch = assemble(items, want)
            with torch.no_grad():
                found = objective.loss(student.hidden(batch), head, batch, ce_weight=0.0, kd_weight=1.0, normalizer=None)
            assert batch.teacher is not None, "the teacher was asked"
            meter.add([item.rollout for item in items], batch, found.kd, batch.teacher.valid)
        return meter.means()


class _Meter:
    """Means over tokens, by document."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, rollouts: Sequence[Rollout], batch: DistillBatch, values_N: Tensor, valid_N: Tensor | None = None) -> None:
        keep_N = torch.ones(len(values_N), dtype=torch.bool) if valid_N is None else valid_N
        sequences_N = sequence_of_rows(batch)
        for place, rollout in enumerate(rollouts):
            mine = values_N[keep_N & (sequences_N == place)].double()
            self._sums[_document(rollout.prompt)] += float(mine.sum())
            self._counts[_document(rollout.prompt)] += len(mine)

    def means(self) -> dict[str, float]:
        return {name: self._sums[name] / count for name, count in self._counts.items() if count}


def _document(prompt: Prompt) -> str:
    """Of running text the document that a window is of; a question is one of its own."""
    return prompt.prompt_id if prompt.messages else prompt.prompt_id.rpartition(":")[0]


def _first_windows(prompts: Iterable[Prompt], count: int) -> Iterator[Prompt]:
    seen: dict[str, int] = defaultdict(int)
    for prompt in sorted(prompts, key=lambda prompt: prompt.prompt_id):
        seen[_document(prompt)] += 1
        if seen[_document(prompt)] <= count:
            yield prompt


def _labelled(prompts: Iterable[Prompt]) -> Iterator[Rollout]:
    return (as_labelled(prompt, draw=place) for place, prompt in enumerate(prompts))


def remembered(path: Path, measure: Callable[[], Values]) -> Values:
    """What lies at ``path``, or what ``measure`` finds, which is put there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())
