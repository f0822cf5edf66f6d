"""Checks of answers: every level right in shape, mass and order; the levels agree; chunks, credit and resuming work."""

from __future__ import annotations

import dataclasses

import numpy as np

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.answers import payload_bytes
from bbopd.rpc.batches import add_part
from bbopd.rpc.codec import fill_item
from bbopd.rpc.conformance.probe import Check, FailedError, Probe, SkippedError, require
from bbopd.types import Level, Rollout, SignalSpec, TeacherSignal

__all__ = ["AGREEMENT", "CHECKS", "level_check", "own_logprobs"]

AGREEMENT = 0.03  # nats: float16 on the wire, and a batch of another shape in the model
_LARGEST_CHUNK = 2**21  # bytes


def level_check(level: Level) -> Check:
    """Every temperature and width at the edges of an offer, over short and long rollouts."""

    async def check(probe: Probe) -> str:
        offer = probe.info.offer(level)
        assert offer is not None
        middle = min(max(1.0, offer.temperature_min), offer.temperature_max)
        temperatures = [middle] if level == "full" else sorted({middle, max(offer.temperature_min, 0.5), min(offer.temperature_max, 2.0)})
        widths: list[int | None] = [None]
        if level == "topk":
            widths = sorted({1, min(64, offer.max_top_k), min(offer.max_top_k, probe.info.vocab_size, 1024)})  # type: ignore[assignment]
        for temperature in temperatures:
            for width in widths:
                want = probe.want(level, temperature, width)
                rollouts = [probe.rollout(want, length) for length in (1, 2, 40)]
                await probe.score(rollouts, want)
        shown = f"T in {', '.join(f'{one:g}' for one in temperatures)}" + (
            f", K in {', '.join(map(str, widths))}" if level == "topk" else ""
        )
        return f"shape, order, mass, checksums and input hash are right ({shown})"

    return check


async def levels_agree(probe: Probe) -> str:
    """The logprob of the response token is the same whichever way it is asked for, at every temperature in common."""
    found: dict[str, np.ndarray] = {}
    rollout = probe.rollout(SignalSpec("sampled"), 20)
    temperature = _common_temperature(probe)
    for level in probe.levels:
        want = probe.want(level, temperature)
        asked = rollout
        if level == "candidates":
            with_candidates = probe.rollout(want, 20)
            asked = dataclasses.replace(with_candidates, prompt=rollout.prompt, token_ids=rollout.token_ids)
        (signal,) = await probe.score([asked], want)
        found[level] = own_logprobs(signal, rollout, temperature)
    if len(found) < 2:
        raise SkippedError("it offers a single level")
    first, *others = found
    for other in others:
        worst = float(np.abs(np.exp(found[first]) - np.exp(found[other])).max())
        require(worst <= AGREEMENT, f"levels {first} and {other} differ by {worst:.3g} in the probability of a response token")
    return f"{', '.join(found)} give the same probability to the response token, at T = {temperature:g}"


def _common_temperature(probe: Probe) -> float:
    offers = [offer for offer in probe.info.offers if offer.level in probe.levels and offer.level != "full"]
    if not offers:
        return 1.0
    low, high = max(offer.temperature_min for offer in offers), min(offer.temperature_max for offer in offers)
    if low > high:
        raise SkippedError("its levels have no temperature in common")
    return min(max(2.0, low), high)


def own_logprobs(signal: TeacherSignal, rollout: Rollout, temperature: float) -> np.ndarray:
    if signal.sampled is not None:
        return signal.sampled
    assert signal.logits is not None
    scaled = signal.logits.astype(np.float64) / temperature
    return scaled[np.arange(len(rollout)), list(rollout.token_ids)] - np.log(np.exp(scaled).sum(axis=1))


async def rows_are_causal(probe: Probe) -> str:
    """A row depends on what stands before its token, and on nothing after it: off by one, or bidirectional, is found here."""
    want = probe.any_want()
    rollout = probe.rollout(want, 12)
    if len(rollout) < 3 or probe.info.vocab_size < 3:
        raise SkippedError("its sequences, or its vocabulary, are too short")
    changed = dataclasses.replace(rollout, token_ids=(*rollout.token_ids[:-1], (rollout.token_ids[-1] + 1) % probe.info.vocab_size))
    before, after = await probe.score([rollout], want), await probe.score([changed], want)
    one, other = (_rows(signal[0])[:-1] for signal in (before, after))
    worst = float(np.abs(np.exp(one) - np.exp(other)).max())
    require(worst <= AGREEMENT, f"another last token changed an earlier row by {worst:.3g}: rows must not see what comes after them")
    return "another last token leaves all rows before it as they were"


async def companions_do_not_matter(probe: Probe) -> str:
    """An answer is the same alone and in company, but for rounding."""
    want = probe.any_want()
    rollouts = [probe.rollout(want, length) for length in (3, 17, 9, 30)]
    together = await probe.score_together(rollouts, want)
    for rollout, signal in zip(rollouts, together, strict=True):
        (alone,) = await probe.score([rollout], want)
        worst = float(np.abs(np.exp(_rows(alone)) - np.exp(_rows(signal))).max())
        require(worst <= AGREEMENT, f"an answer changes by {worst:.3g} with what is asked beside it")
    return "answers are the same alone and in company"


def _rows(signal: TeacherSignal) -> np.ndarray:
    """One number a row, in nats."""
    if signal.sampled is not None:
        return signal.sampled
    assert signal.logits is not None
    return signal.logits.astype(np.float32).min(axis=1)


async def items_are_multiplexed(probe: Probe) -> str:
    """Many items over one stream, each answered once, and the stream ends with OK when the client has no more."""
    want = probe.any_want()
    rollouts = [probe.rollout(want, 1 + number % 9) for number in range(40)]
    async with probe.stream() as stream:
        numbers = [7919 * (number + 1) for number in range(len(rollouts))]
        for number, rollout in zip(numbers, rollouts, strict=True):
            await stream.send(number, rollout, want)
        await stream.call.done_writing()
        asked = {number: (rollout, want) for number, rollout in zip(numbers, rollouts, strict=True)}
        outcomes = await stream.take(asked, grants=False)  # nothing can be written any more
        failed = [one for one in outcomes.values() if isinstance(one, pb.ItemFailure)]
        require(not failed, f"{len(failed)} proper items failed, the first: {failed[0].message if failed else ''}")
        require(await stream.next() is None, "something came after every item was answered")
    return "40 items over one stream are answered once each, and the stream ends with OK"


async def batches_are_batches_of_messages(probe: Probe) -> str:
    """Many items in one message, a bad one and a credit among them, mean what they would mean one by one; answers may come so too."""
    want = probe.any_want()
    rollouts = [probe.rollout(want, 1 + number % 9) for number in range(40)]
    async with probe.stream(takes_batches=True) as stream:
        if not stream.takes_batches:
            raise SkippedError("it takes no batches")
        message = pb.ScoreRequest()
        for number, rollout in enumerate(rollouts, 1):
            fill_item(add_part(message, True).item, number, rollout, want)
        add_part(message, True).credit.bytes = 1
        fill_item(add_part(message, True).item, 99, rollouts[0], want)
        message.batch.messages[-1].item.prompt_tokens = 0
        await stream.call.write(message)
        outcomes = await stream.take({**{number: (rollout, want) for number, rollout in enumerate(rollouts, 1)}, 99: (rollouts[0], want)})
        failed = [number for number, one in outcomes.items() if isinstance(one, pb.ItemFailure)]
        require(failed == [99], f"of a batch with one bad item, number 99, those that failed are {failed}")
    return f"40 items in one message are answered once each, {stream.largest_batch or 1} at most in one message"


async def chunks_are_small(probe: Probe) -> str:
    """A long answer comes in chunks of whole rows, none larger than 2 MiB unless a single row is."""
    level = max(probe.levels, key=lambda one: ("sampled", "candidates", "topk", "full").index(one), default=None)
    if level is None:
        raise SkippedError("it offers no level that scores")
    want = probe.want(level, top_k=None if level != "topk" else min(1024, probe.info.offer("topk").max_top_k))  # type: ignore[union-attr]
    async with probe.stream() as stream:
        rollout = probe.rollout(want, 200)
        await stream.send(1, rollout, want)
        largest, count, rows = 0, 0, 0
        while rows < len(rollout):
            message = await stream.next()
            require(message is not None and message.WhichOneof("kind") == "chunk", f"a proper item of {len(rollout)} tokens failed")
            assert message is not None
            size = payload_bytes(message.chunk)
            require(
                size <= _LARGEST_CHUNK or message.chunk.rows == 1,
                f"a chunk of {message.chunk.rows} rows has {size} bytes, allowed are 2 MiB",
            )
            largest, count, rows = max(largest, size), count + 1, rows + message.chunk.rows
            await stream.grant(size)
    return f"{rows} rows at level {level} came in {count} chunks of at most {largest} bytes"


async def credit_is_kept(probe: Probe) -> str:
    """Without credit nothing is sent; with more, the rest."""
    want = probe.any_want()
    rollouts = [probe.rollout(want, 4) for _ in range(3)]
    async with probe.stream(credit=1) as stream:
        for number, rollout in enumerate(rollouts, 1):
            await stream.send(number, rollout, want)
        first = await stream.next()
        require(first is not None and first.WhichOneof("kind") == "chunk", "a balance above zero lets one chunk through")
        try:
            second = await stream.next(timeout=0.4)
        except FailedError:
            return "a stream whose credit is used up sends nothing"
        raise FailedError(f"{second.WhichOneof('kind') if second else 'the end'} came although the credit was used up")


async def credit_opens_the_stream_again(probe: Probe) -> str:
    want = probe.any_want()
    rollouts = [probe.rollout(want, 4) for _ in range(3)]
    async with probe.stream(credit=1) as stream:
        for number, rollout in enumerate(rollouts, 1):
            await stream.send(number, rollout, want)
        await stream.take({number: (rollout, want) for number, rollout in enumerate(rollouts, 1)})  # grants as it reads
    return "more credit brings the rest"


async def answers_are_resumed(probe: Probe) -> str:
    """A broken stream is taken up again at any row, with no row twice and none missing."""
    for level in probe.levels:
        want = probe.want(level)
        rollout = probe.rollout(want, 10)
        (whole,) = await probe.score([rollout], want)
        for start in {len(rollout) // 2, len(rollout) - 1}:
            async with probe.stream() as stream:
                await stream.send(1, rollout, want, resume_from=start)
                message = await stream.next()
                require(message is not None and message.WhichOneof("kind") == "chunk", f"level {level} cannot be resumed from row {start}")
                assert message is not None
                chunk = message.chunk
                require(
                    (chunk.position, chunk.rows, chunk.total_rows) == (start, len(rollout) - start, len(rollout)),
                    f"resuming from row {start} of {len(rollout)} brought {chunk.rows} rows from {chunk.position} of {chunk.total_rows}",
                )
                if whole.sampled is not None:
                    got = np.frombuffer(chunk.sampled.data, "<f4")
                    worst = float(np.abs(np.exp(got) - np.exp(whole.sampled[start:])).max())
                    require(worst <= AGREEMENT, f"rows that were resumed differ from the same rows in one piece by {worst:.3g}")
    return f"{', '.join(probe.levels)} go on at the row asked for"


async def answers_are_replayed(probe: Probe) -> str:
    """A replay_id gives the very same answer again, and stands for one question alone."""
    want = probe.any_want()
    rollout, other = probe.rollout(want, 10), probe.rollout(want, 10)
    name = f"{rollout.rollout_id}-replay"
    (first,) = await probe.score([rollout], want, replay_id=name)
    (again,) = await probe.score([rollout], want, replay_id=name)
    async with probe.stream() as stream:
        await stream.send(1, other, want, replay_id=name)
        outcome = (await stream.take({1: (other, want)}))[1]
    if isinstance(outcome, TeacherSignal):
        raise SkippedError("it keeps no answers (another question under the same replay_id was answered)")
    require(outcome.code == pb.FAILURE_CODE_MISMATCH, f"another question under a replay_id failed with {pb.FailureCode.Name(outcome.code)}")
    require(bool((_rows(first) == _rows(again)).all()), "the same replay_id brought another answer")
    return "a replay_id brings the very same answer, and refuses another question"


CHECKS: list[tuple[str, Check]] = [
    ("levels agree", levels_agree),
    ("rows are causal", rows_are_causal),
    ("company does not matter", companions_do_not_matter),
    ("many items on one stream", items_are_multiplexed),
    ("batches", batches_are_batches_of_messages),
    ("chunks", chunks_are_small),
    ("credit used up", credit_is_kept),
    ("credit given again", credit_opens_the_stream_again),
    ("resuming", answers_are_resumed),
    ("replay", answers_are_replayed),
]
