"""Whether the teacher's answers can be trusted: the same twice, right about its own words, and worth nothing to a student like it.

Shape suffixes: ``N`` response tokens, ``V`` vocabulary, ``K`` ids a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bbopd.config_objective import ObjectiveConfig, SideConfig, value_at
from bbopd.data.assemble import assemble
from bbopd.data.streams import each
from bbopd.doctor.findings import SetUp, Verdict, passed, warned
from bbopd.errors import TeacherError
from bbopd.evaluate.agreement import AgreementMeter, signal_to_measure
from bbopd.evaluate.student import StudentView
from bbopd.ops import linear_distill
from bbopd.pipeline.texts import texts_to_compare
from bbopd.rpc.signals import with_sampled
from bbopd.teachers.remote import RemoteTeacher
from bbopd.teachers.replicas import largest_difference
from bbopd.types import CandidateTeacher, FullTeacher, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherSignal, TopKTeacher

__all__ = ["check_agreement", "check_determinism", "check_own_words", "check_zero"]

_NO_SIGNAL = "the run takes the teacher's text alone, no signal on tokens"
_ROUNDS = 3
_GREEDY_TOKENS = 16
_GREEDY_NATS = 0.25  # two logits that bfloat16 cannot tell apart may change places
_ZERO_NATS = 1e-3  # float16 on the wire is the same on both sides of the comparison: what is left is the op's own rounding
_SAME_MODEL_NATS = 0.02  # bfloat16 at the student, float16 on the wire
_PROBE_ROWS = 32
_MANY_NATS = 5.0


async def check_determinism(setup: SetUp) -> Verdict:
    """The same input, several times at once, to every replica."""
    assert setup.teacher is not None
    assert setup.prompts is not None
    assert setup.want is not None
    if setup.want.level == "text":
        setup.steady = True
        return Verdict("skip", _NO_SIGNAL)
    rollouts, limit = _texts(setup), setup.config.teacher.max_replica_difference
    if isinstance(setup.teacher, RemoteTeacher):
        difference = await setup.teacher.compare_replicas(rollouts, setup.want, limit=limit, rounds=_ROUNDS)
    else:
        answers = [await _score(setup, rollouts) for _ in range(_ROUNDS)]
        difference = max(largest_difference([one[name].signal for one in answers]) for name in answers[0])
        if difference > limit:
            raise TeacherError(
                f"the same text scored {_ROUNDS} times gave answers that differ by {difference:.3g} of a token's probability, "
                f"teacher.max_replica_difference is {limit:g}: ask for a model that is served alike everywhere, or raise the limit"
            )
    setup.steady = True
    count = max(1, len(setup.config.teacher.targets))
    return passed(
        f"{len(rollouts)} texts, {_ROUNDS} times each at {'the teacher' if count == 1 else f'{count} replicas'}: answers differ by at most "
        f"{difference:.2g} of a token's probability ({limit:g} allowed)"
    )


async def check_own_words(setup: SetUp) -> Verdict:
    """The teacher's own greedy answer, scored by it: each of its words must be the one that it holds most likely there."""
    assert setup.teacher is not None
    assert setup.prompts is not None
    assert setup.want is not None
    info, want = setup.teacher.info, setup.want
    if info.offer("text") is None:
        return Verdict("skip", "the teacher writes no answers (it does not offer text)")
    if want.level not in ("full", "topk"):
        return Verdict("skip", f"a {want.level} signal does not say what the teacher would rather have written")
    room = info.max_sequence_tokens or _GREEDY_TOKENS + max(len(prompt.token_ids) for prompt in setup.prompts.to_train)
    questions = [
        Prompt(f"doctor-{number}", prompt.token_ids)
        for number, prompt in enumerate(setup.prompts.to_train[:2])
        if len(prompt.token_ids) < room
    ]
    longest = max(len(prompt.token_ids) for prompt in questions)
    sampling = Sampling(min(_GREEDY_TOKENS, room - longest), temperature=want.temperature, top_k=1)
    written = [completion async for completion in setup.teacher.complete(each(questions), sampling)]
    rollouts = [Rollout(one.prompt.prompt_id, one.prompt, one.token_ids, origin="teacher") for one in written if one.token_ids]
    if not rollouts:
        return warned(f"the teacher wrote nothing at all to {len(questions)} prompts: look at its chat template and end of text")
    said = {one.prompt.prompt_id: one.logprobs for one in written}
    deficits = [(_deficits(scored), scored) for scored in (await _score(setup, rollouts)).values()]
    worst, where = max(((float(nats.max()), scored) for nats, scored in deficits), key=lambda pair: pair[0])
    tokens = sum(len(rollout) for rollout in rollouts)
    if worst > _GREEDY_NATS:
        place = int(_deficits(where).argmax())
        raise TeacherError(
            f"token {place} of the teacher's greedy answer to {where.rollout.prompt.prompt_id} is {worst:.3g} nats less likely than "
            f"another by its own score ({_GREEDY_NATS} allowed): rows are off by one, other weights score than write, or prompts are "
            "changed on the way; `bbopd check-teacher` looks closer"
        )
    found = f"{tokens} tokens that it wrote greedily are the likeliest by its own score, within {worst:.2g} nats"
    if not all(said[rollout.rollout_id] for rollout in rollouts):
        return passed(f"{found}; it reports no logprobs with what it writes")
    apart = max(float(np.abs(np.array(said[one.rollout.rollout_id]) - _own_logprobs(one)).max()) for _, one in deficits)
    if not apart <= _GREEDY_NATS:
        raise TeacherError(
            f"a token of the teacher's greedy answer was written with a logprob that is {apart:.3g} nats from its score ({_GREEDY_NATS} "
            "allowed): another temperature, or other weights, score than write; `bbopd check-teacher` looks closer"
        )
    return passed(f"{found}, and have the logprobs that it reported, within {apart:.2g} nats")


def _own_logprobs(scored: ScoredRollout) -> np.ndarray:
    """The teacher's score [N] of the answer's own tokens, in nats."""
    signal = scored.signal
    if signal.logits is None:
        assert signal.sampled is not None
        return signal.sampled.astype(np.float64)
    logits_NV = signal.logits.astype(np.float64)
    return logits_NV[np.arange(len(scored.rollout)), list(scored.rollout.token_ids)] - np.log(np.exp(logits_NV).sum(axis=1))


def _deficits(scored: ScoredRollout) -> np.ndarray:
    """By how many nats [N] each token is less likely than the likeliest."""
    signal = scored.signal
    if signal.logits is not None:
        own = signal.logits[np.arange(len(scored.rollout)), list(scored.rollout.token_ids)].astype(np.float64)
        return signal.logits.astype(np.float64).max(axis=1) - own
    assert signal.logprobs is not None
    assert signal.sampled is not None
    return np.maximum(0.0, signal.logprobs[:, 0].astype(np.float64) - signal.sampled)


async def check_zero(setup: SetUp) -> Verdict:
    """A student whose logits are the teacher's own has no divergence from it, by the run's loss at the run's temperature."""
    assert setup.teacher is not None
    assert setup.prompts is not None
    assert setup.want is not None
    assert setup.objective is not None
    if setup.want.level == "text":
        return Verdict("skip", _NO_SIGNAL)
    if setup.want.level == "sampled":
        return Verdict("skip", "a sampled signal is no distribution")
    scored = list((await _score(setup, _texts(setup)[:1])).values())
    batch = assemble(scored, setup.want)
    N = min(_PROBE_ROWS, batch.response_tokens)
    signal = with_sampled(scored[0].signal, scored[0].rollout.token_ids)
    logits_NV = _logits_of(signal, setup.teacher.info.vocab_size)[:N]
    kept: FullTeacher | TopKTeacher | CandidateTeacher
    match batch.teacher:
        case FullTeacher(logits=Tensor() as logits):
            kept = FullTeacher(logits=logits[:N])
        case TopKTeacher() as teacher:
            kept = TopKTeacher(teacher.ids[:N], teacher.logprobs[:N], teacher.log_tail[:N], teacher.temperature)
        case CandidateTeacher() as teacher:
            kept = CandidateTeacher(teacher.ids[:N], teacher.logprobs[:N], teacher.log_tail[:N], teacher.temperature)
        case _:
            raise AssertionError(f"a {setup.want.level} signal is a distribution")
    objective = setup.config.objective
    if objective.plugin_use is not None:
        return Verdict("skip", f"whether {objective.name}, a plug-in, is 0 for a student that equals the teacher is its own affair")
    name = "reverse_kl" if objective.name == "policy_gradient" else objective.name  # which a policy gradient goes down
    sides: list[SideConfig | ObjectiveConfig] = [objective.labelled, objective.rollouts] if objective.name == "mixed" else [objective]
    found = [
        linear_distill(
            torch.eye(N),
            logits_NV.T.contiguous(),
            kept,
            temperature=objective.temperature,
            ce_weight=0.0,
            kd_weight=1.0,
            divergence="reverse_kl" if side.name == "policy_gradient" else side.name,
            beta=side.beta,
            skew=value_at(side.skew, 0.0),
            t2_scaling=False,
        )
        for side in sides
    ]
    worst = max(float(one.kd.abs().max()) for one in found)
    if not worst <= _ZERO_NATS:
        raise TeacherError(
            f"a student with the teacher's own logits is {worst:.3g} nats from it by {name} at T = {objective.temperature:g}, "
            f"and should be at 0 ({_ZERO_NATS:g} allowed): what the teacher sends is not one distribution; `bbopd check-teacher` looks "
            "closer"
        )
    return passed(f"{name} at T = {objective.temperature:g} is {worst:.1e} nats for a student that equals the teacher")


def _logits_of(signal: TeacherSignal, V: int) -> Tensor:
    """Logits [N, V] in float32 that have the distribution of a signal; what a tail holds lies evenly over the other ids."""
    if signal.logits is not None:
        return torch.from_numpy(signal.logits.astype(np.float32))
    assert signal.ids is not None
    assert signal.logprobs is not None
    assert signal.log_tail is not None
    spread_N = signal.log_tail - np.log(np.maximum(1, V - (signal.ids >= 0).sum(axis=1)))
    logits_NV = np.repeat(spread_N[:, None], V, axis=1).astype(np.float32)
    row, slot = np.nonzero(signal.ids >= 0)  # -1 is an empty slot
    logits_NV[row, signal.ids[row, slot]] = signal.logprobs[row, slot]
    return torch.from_numpy(np.maximum(logits_NV, -1e4) * signal.temperature)


async def check_agreement(setup: SetUp) -> Verdict:
    """How far this student is from this teacher, on a few texts of the run."""
    assert setup.teacher is not None
    assert setup.prompts is not None
    assert setup.model is not None
    want = signal_to_measure(setup.teacher.info)
    if want is None:
        return Verdict("skip", "the teacher offers neither full nor topk at T = 1, which KL is measured from")
    scored = await _score(setup, _texts(setup), want)

    def measure() -> tuple[float, float]:
        assert setup.model is not None
        meter = AgreementMeter(StudentView(setup.model, compute_dtype=setup.compute_dtype, vocab_size=setup.vocab_size), want)
        for one in scored.values():
            meter.add(one)
        result = meter.result()
        return float(result.forward_kl.value), float(result.top1.value)

    kl, top1 = await asyncio.to_thread(measure)
    said = f"KL(teacher || student) is {kl:.3g} nats a token, and both prefer the same token in {top1:.0%} of places"
    if _is_same_model(setup):
        if kl > _SAME_MODEL_NATS:
            raise TeacherError(
                f"student and teacher are one model, {setup.config.student.model}, yet {said} (0 expected, {_SAME_MODEL_NATS:g} "
                "allowed): the teacher serves other weights, or reads the tokens differently; look at revision and dtype where it is served"
            )
        return passed(f"{said}: student and teacher are one model")
    if kl > _MANY_NATS:
        return warned(
            f"{said}: they hardly agree on anything; right for a student that starts from nothing, else look at the chat template and at "
            "student.model"
        )
    return passed(said)


def _is_same_model(setup: SetUp) -> bool:
    assert setup.teacher is not None
    student, info = setup.config.student, setup.teacher.info
    return student.model == info.model and student.init.keep_layers is None and (student.revision or "") == info.revision


def _texts(setup: SetUp) -> list[Rollout]:
    """A few texts of the run, as its teacher is asked about them."""
    assert setup.teacher is not None
    assert setup.prompts is not None
    return texts_to_compare(setup.prompts, setup.teacher.info, setup.chooser())


async def _score(setup: SetUp, rollouts: Sequence[Rollout], want: SignalSpec | None = None) -> dict[str, ScoredRollout]:
    assert setup.teacher is not None
    asked = want or setup.want
    assert asked is not None
    answers = setup.teacher.score(each(rollouts), asked)
    found = {scored.rollout.rollout_id: scored async for scored in answers}
    return {rollout.rollout_id: found[rollout.rollout_id] for rollout in rollouts}
