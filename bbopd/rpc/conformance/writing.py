"""Checks of level text: answers of the teacher's own, within what was asked."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import numpy as np

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.codec import PROTOCOL_VERSION, decode_completion, encode_prompt, encode_sampling
from bbopd.rpc.conformance.probe import Check, FailedError, Probe, SkippedError, require
from bbopd.rpc.conformance.scoring import AGREEMENT as _AGREEMENT
from bbopd.rpc.conformance.scoring import own_logprobs
from bbopd.types import Completion, Prompt, Rollout, Sampling

__all__ = ["CHECKS", "not_offered_is_refused"]

_SAMPLING = Sampling(8, temperature=1.0, seed=1)


async def _generate(probe: Probe, prompts: list[Prompt], sampling: Sampling) -> dict[int, Completion | pb.ItemFailure]:
    request = pb.GenerateRequest(
        protocol_version=PROTOCOL_VERSION,
        prompts=[encode_prompt(number, prompt) for number, prompt in enumerate(prompts, 1)],
        sampling=encode_sampling(sampling),
    )
    outcomes: dict[int, Completion | pb.ItemFailure] = {}

    async def read() -> None:
        async for response in probe.stub.Generate(request):
            part = response.completion if response.WhichOneof("kind") == "completion" else response.failure
            require(1 <= part.request_id <= len(prompts), f"prompt {part.request_id} was answered, which was not asked")
            require(part.request_id not in outcomes, f"prompt {part.request_id} was answered twice")
            is_failure = isinstance(part, pb.ItemFailure)
            outcomes[part.request_id] = (
                part if is_failure else decode_completion(part, prompts[part.request_id - 1], sampling, probe.info.vocab_size)
            )

    try:
        await asyncio.wait_for(read(), probe.timeout)
    except TimeoutError:
        raise FailedError(f"Generate did not end within {probe.timeout:g} s") from None
    require(len(outcomes) == len(prompts), f"Generate ended with {len(prompts) - len(outcomes)} of {len(prompts)} prompts unanswered")
    return outcomes


async def _completions(probe: Probe, prompts: list[Prompt], sampling: Sampling) -> list[Completion]:
    outcomes = await _generate(probe, prompts, sampling)
    completions = []
    for number in range(1, len(prompts) + 1):
        outcome = outcomes[number]
        if not isinstance(outcome, Completion):
            raise FailedError(f"a proper prompt failed: {outcome.message}")
        completions.append(outcome)
    return completions


def _prompts(probe: Probe) -> list[Prompt]:
    return [Prompt(f"check-{length}", tuple(number % probe.info.vocab_size for number in range(1, length + 1))) for length in (1, 3, 6)]


async def answers_keep_to_the_sampling(probe: Probe) -> str:
    for completion in await _completions(probe, _prompts(probe), _SAMPLING):
        require(bool(completion.token_ids), "an answer is empty: even the end of sequence is a token")
        if completion.finish_reason == "length":
            found = len(completion.token_ids)
            require(found == _SAMPLING.max_new_tokens, f"an answer of {found} tokens says that it reached {_SAMPLING.max_new_tokens}")
    greedy = dataclasses.replace(_SAMPLING, top_k=1)
    first = await _completions(probe, _prompts(probe), greedy)
    again = await _completions(probe, _prompts(probe), greedy)
    require([one.token_ids for one in first] == [one.token_ids for one in again], "greedy answers differ from one call to the next")
    stop = first[0].token_ids[0]
    (stopped, *_) = await _completions(probe, _prompts(probe)[:1], dataclasses.replace(greedy, stop_token_ids=(stop,)))
    require((stopped.token_ids, stopped.finish_reason) == ((stop,), "stop"), f"token {stop} among stop_token_ids does not end an answer")
    return "answers are within max_new_tokens and the vocabulary, stop where asked, and greedy ones repeat"


async def own_words_are_scored_alike(probe: Probe) -> str:
    """What it says of its words while it writes is what it says of them when it is asked to score them."""
    level = next((level for level in ("sampled", "topk", "full") if level in probe.levels), None)
    if level is None:
        raise SkippedError("it offers no level that scores a written answer")
    want = probe.want(level)
    greedy = dataclasses.replace(_SAMPLING, top_k=1, temperature=1.0 if level == "full" else want.temperature)
    written = await _completions(probe, _prompts(probe), greedy)
    if not all(one.logprobs for one in written):
        raise SkippedError("it gives no logprobs with its written answers")
    rollouts = [Rollout(one.prompt.prompt_id, one.prompt, one.token_ids) for one in written]
    worst = 0.0
    for one, rollout, signal in zip(written, rollouts, await probe.score(rollouts, want), strict=True):
        worst = max(worst, float(np.abs(np.exp(one.logprobs) - np.exp(own_logprobs(signal, rollout, greedy.temperature))).max()))
    require(worst <= _AGREEMENT, f"the probability of a token that it wrote is {worst:.3g} off when it is scored")
    return f"written answers have the logprobs that they are scored with, within {worst:.2g} of a probability"


async def prompts_as_text(probe: Probe) -> str:
    """Text and messages are read where the teacher says so, and refused where it does not; never together with ids."""
    text = Prompt("check-text", (), text="Once upon a time")
    if not probe.info.takes_text:
        (outcome,) = (await _generate(probe, [text], _SAMPLING)).values()
        require(isinstance(outcome, pb.ItemFailure), "a prompt of text was answered, though takes_text is not set")
        return "prompts of text fail, as takes_text is not set"
    greedy = dataclasses.replace(_SAMPLING, top_k=1)
    first, again = await _completions(probe, [text, dataclasses.replace(text, prompt_id="check-again")], greedy)
    require(first.token_ids == again.token_ids, "the same text has two greedy answers")
    return "prompts of text are answered"


async def bad_prompts_fail_alone(probe: Probe) -> str:
    prompts = [*_prompts(probe)[:1], Prompt("outside", (probe.info.vocab_size,)), Prompt("empty", ()), *_prompts(probe)[1:2]]
    outcomes = await _generate(probe, prompts, _SAMPLING)
    for number, what in ((2, "a prompt outside the vocabulary"), (3, "an empty prompt")):
        outcome = outcomes[number]
        require(isinstance(outcome, pb.ItemFailure) and outcome.code == pb.FAILURE_CODE_INVALID, f"{what} did not fail with INVALID")
    require(all(isinstance(outcomes[number], Completion) for number in (1, 4)), "a proper prompt failed beside a bad one")
    return "bad prompts fail alone, with INVALID"


async def bad_sampling_is_refused(probe: Probe) -> str:
    cases: list[Sampling] = [
        dataclasses.replace(_SAMPLING, temperature=0.0),
        dataclasses.replace(_SAMPLING, temperature=float("nan")),
        dataclasses.replace(_SAMPLING, max_new_tokens=0),
        dataclasses.replace(_SAMPLING, top_p=0.0),
        dataclasses.replace(_SAMPLING, top_p=1.5),
        dataclasses.replace(_SAMPLING, stop_token_ids=(probe.info.vocab_size,)),
    ]
    for sampling in cases:
        await _require_refusal(probe, sampling, grpc.StatusCode.INVALID_ARGUMENT)
    return f"{len(cases)} impossible samplings end the call with INVALID_ARGUMENT"


async def not_offered_is_refused(probe: Probe) -> str:
    await _require_refusal(probe, _SAMPLING, grpc.StatusCode.INVALID_ARGUMENT)
    return "Generate is refused, as level text is not offered"


async def _require_refusal(probe: Probe, sampling: Sampling, expected: grpc.StatusCode) -> None:
    try:
        await _generate(probe, _prompts(probe)[:1], sampling)
    except grpc.aio.AioRpcError as error:
        require(error.code() is expected, f"{sampling} ended with {error.code().name}, expected was {expected.name}")
    else:
        raise FailedError(f"{sampling} was answered, expected was {expected.name}")


CHECKS: list[tuple[str, Check]] = [
    ("written answers", answers_keep_to_the_sampling),
    ("own words", own_words_are_scored_alike),
    ("prompts as text", prompts_as_text),
    ("bad prompts", bad_prompts_fail_alone),
    ("bad sampling", bad_sampling_is_refused),
]
