"""The client against a real server over loopback: right numbers, and a named end to everything that goes wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys

import grpc
import numpy as np
import pytest

from bbopd.errors import ConfigError, TeacherError
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec, Teacher
from tests.faults import collect, connected, served, stream
from tests.waiting import PATIENCE, HeldBackend, hasty, hurried, measure, open_calls, until, unused_port

VOCAB = 97


def make_rollouts(count: int, seed: int = 0, longest: int = 30, candidates: int = 0) -> list[Rollout]:
    random = np.random.default_rng(seed)
    made: list[Rollout] = []
    for number in range(count):
        prompt = Prompt(f"p{number}", tuple(random.integers(0, VOCAB, random.integers(1, 9)).tolist()))
        answer = tuple(random.integers(0, VOCAB, random.integers(1, longest + 1)).tolist())
        ids = np.stack([random.permutation(VOCAB)[: candidates or 1] for _ in answer]).astype(np.int32)
        name = f"r{seed}-{number}"
        made.append(Rollout(name, prompt, answer, candidate_ids=ids if candidates else None))
    return made


def check_topk(backend, scored, want):
    """Against the dense distribution in fp64."""
    z = backend.logits(scored.rollout).astype(np.float64) / want.temperature
    dense = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    ids = np.argsort(-dense, axis=1, kind="stable")[:, : want.top_k]
    np.testing.assert_array_equal(scored.signal.ids, ids)
    np.testing.assert_allclose(scored.signal.logprobs, np.take_along_axis(dense, ids, 1), atol=5e-3)
    own = np.take_along_axis(dense, np.array(scored.rollout.token_ids)[:, None], 1)[:, 0]
    np.testing.assert_allclose(scored.signal.sampled, own, atol=1e-5)


async def test_many_interleaved_rollouts_each_get_their_own_distribution():
    backend, want = FakeBackend(VOCAB), SignalSpec("topk", 1.3, 8)
    rollouts = make_rollouts(150)
    async with served(backend, batch_tokens=300, inflight_tokens=600) as teacher:
        assert isinstance(teacher, Teacher)
        assert teacher.info == dataclasses.replace(backend.info, max_request_tokens=262_144)
        scored = await collect(teacher.score(stream(rollouts), want))
    assert sorted(item.rollout.rollout_id for item in scored) == sorted(rollout.rollout_id for rollout in rollouts)
    for item in scored:
        assert any(item.rollout is rollout for rollout in rollouts)
        check_topk(backend, item, want)
    assert max(backend.calls) > 4, "rollouts are batched"
    assert len(backend.calls) > 10, "but not beyond the batch's tokens"
    assert not any(teacher.counters.values())


@pytest.mark.parametrize("level", ["full", "candidates", "sampled"])
async def test_the_other_levels(level):
    backend, want = FakeBackend(VOCAB), SignalSpec(level, 1.7)
    rollouts = make_rollouts(12, candidates=5)
    async with served(backend) as teacher:
        scored = await collect(teacher.score(stream(rollouts), want))
    assert len(scored) == 12
    for item in scored:
        z = backend.logits(item.rollout).astype(np.float64)
        dense = z / 1.7 - np.log(np.exp(z / 1.7).sum(axis=1, keepdims=True))
        if level == "full":
            np.testing.assert_allclose(item.signal.logits, z - z.max(axis=1, keepdims=True), rtol=2**-11, atol=1e-6)
        else:
            own = np.take_along_axis(dense, np.array(item.rollout.token_ids)[:, None], 1)[:, 0]
            np.testing.assert_allclose(item.signal.sampled, own, atol=1e-5)
        if level == "candidates":
            expected = np.take_along_axis(dense, item.rollout.candidate_ids, 1)
            np.testing.assert_allclose(item.signal.logprobs, expected, atol=5e-3)
            np.testing.assert_allclose(np.exp(item.signal.log_tail), 1 - np.exp(expected).sum(axis=1), atol=5e-3)


async def test_long_answers_pass_in_chunks_within_the_credit():
    backend = FakeBackend(40_000, sharpness=1.0)
    random = np.random.default_rng(1)
    rollouts = [Rollout(f"r{n}", Prompt("p", (1, 2)), tuple(random.integers(0, 40_000, 200).tolist())) for n in range(6)]
    async with served(backend, batch_tokens=450, max_inflight_bytes=20_000_000) as teacher:  # 96 MB through windows of 67 and 20
        scored = await collect(teacher.score(stream(rollouts), SignalSpec("full")))
    assert len(scored) == 6
    for item in scored:
        z = backend.logits(item.rollout)
        np.testing.assert_array_equal(item.signal.logits, (z - z.max(axis=1, keepdims=True)).astype(np.float16))


@hasty
async def test_a_slow_caller_is_waited_for():
    server = await start_server(FakeBackend(40_000), batch_tokens=302)
    async with connected(server.port) as teacher:
        rollouts = [Rollout(f"r{n}", Prompt("p", (1, 2)), (7,) * 300) for n in range(8)]  # 24 MB each: more than two windows of 67
        count = 0
        async for _ in teacher.score(stream(rollouts), SignalSpec("full")):
            count += 1
            if count == 1:
                await until(lambda: measure(server, "answer_bytes_total", level="full") >= 4 * 24_000_000)  # a window is ready
                async with hurried():
                    await asyncio.sleep(1.5 * PATIENCE)  # longer than the time limit of the teacher
        assert not any(teacher.counters.values())
    await server.stop(0.2)
    assert count == 8


async def test_a_source_that_waits_for_each_answer_is_served():
    answered = asyncio.Event()
    answered.set()

    async def one_at_a_time():
        for rollout in make_rollouts(5):
            await asyncio.wait_for(answered.wait(), PATIENCE)
            answered.clear()
            yield rollout

    async with served(FakeBackend(VOCAB)) as teacher:
        count = 0
        async for _ in teacher.score(one_at_a_time(), SignalSpec("sampled")):
            count += 1
            answered.set()
    assert count == 5


async def test_errors_of_the_source_pass_through():
    async def failing():
        yield make_rollouts(1)[0]
        raise KeyError("the source's own")

    async with served(FakeBackend(VOCAB)) as teacher:
        with pytest.raises(KeyError, match="the source's own"):
            await collect(teacher.score(failing(), SignalSpec("sampled")))


async def test_an_item_that_fails_for_a_while_is_asked_again():
    backend = FakeBackend(VOCAB, failures={"r0-2": 4})  # each ask fails in its batch and by itself
    async with served(backend) as teacher:
        scored = await collect(teacher.score(stream(make_rollouts(6)), SignalSpec("topk", 1.0, 4)))
        assert len(scored) == 6
        assert 1 <= teacher.counters["retries"] <= 3
    for item in scored:
        check_topk(backend, item, SignalSpec("topk", 1.0, 4))


async def test_an_item_that_always_fails_ends_the_pass_by_name():
    backend = FakeBackend(VOCAB, failures={"r0-2": 1000})
    async with served(backend) as teacher:
        with pytest.raises(TeacherError, match=r"failed the same item 4 times.*cannot score r0-2.*rollouts were scored"):
            await collect(teacher.score(stream(make_rollouts(6)), SignalSpec("sampled")))
        assert teacher.counters["retries"] == 3
        good = await collect(teacher.score(stream(make_rollouts(2)), SignalSpec("sampled")))
        assert len(good) == 2, "the teacher goes on"


async def test_nan_is_never_sent_and_is_named():
    async with served(FakeBackend(VOCAB, nan_ids={"r0-3"})) as teacher:
        for level in ("full", "sampled"):
            with pytest.raises(TeacherError, match=r"rollout r0-3: the model's answer .*nan"):
                await collect(teacher.score(stream(make_rollouts(6)), SignalSpec(level)))


@pytest.mark.parametrize(
    ("want", "message"),
    [
        (SignalSpec("topk", 1.0, 33), r"top_k 33 is outside 1\.\.32"),
        (SignalSpec("topk", 1.0, 0), "top_k 0 is outside"),
        (SignalSpec("topk", 1e-4, 4), "temperature 0.0001 is outside"),
        (SignalSpec("full"), "does not offer level 'full'; it offers topk, sampled"),
    ],
)
async def test_what_is_not_offered_is_refused_before_anything_is_sent(want, message):
    backend = FakeBackend(VOCAB, levels=("topk", "sampled"), max_top_k=32)
    async with served(backend) as teacher:
        with pytest.raises(TeacherError, match=message):
            await collect(teacher.score(stream(make_rollouts(2)), want))
    assert backend.calls == []


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (Rollout("x", Prompt("p", (1, VOCAB)), (1,)), f"rollout x holds token id {VOCAB}, outside .* vocabulary of {VOCAB}"),
        (Rollout("x", Prompt("p", (1,)), (-1,)), "rollout x holds token id -1"),
        (Rollout("x", Prompt("p", (1,) * 40), (1,) * 25), "rollout x has 65 tokens, more than .* 64 tokens"),
        (Rollout("x", Prompt("p", (1,)), ()), "rollout x has no response tokens"),
        (Rollout("x", Prompt("p", ()), (1,)), "rollout x has no prompt"),
    ],
)
async def test_rollouts_that_do_not_fit_are_refused_by_name(rollout, message):
    async with served(FakeBackend(VOCAB, max_sequence_tokens=64)) as teacher:
        with pytest.raises(TeacherError, match=message):
            await collect(teacher.score(stream([rollout]), SignalSpec("sampled")))


# ---------------------------------------------------------------- teachers that break


async def test_nobody_there_is_said_with_what_to_try():
    port = unused_port()
    with pytest.raises(TeacherError, match=rf"cannot reach a teacher at grpc://localhost:{port} within 0.5 s.*bbopd serve"):
        await asyncio.wait_for(RemoteTeacher.connect(f"grpc://localhost:{port}", connect_timeout=0.5), PATIENCE)


@pytest.mark.parametrize("target", ["localhost:7070", "grpc://localhost", "http://localhost:1", "grpc://:1", "grpc://localhost:99999999"])
async def test_a_target_that_is_none(target):
    with pytest.raises(ConfigError, match="grpc://host:port"):
        await RemoteTeacher.connect(target)


async def test_another_machine_needs_what_is_not_there_yet():
    with pytest.raises(ConfigError, match=r"TLS and a token.*ssh -L"):
        await RemoteTeacher.connect("grpc://10.0.0.1:7070")


async def test_something_else_on_the_port():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(TeacherError, match="not a bbopd teacher"):
        await RemoteTeacher.connect(f"grpc://127.0.0.1:{port}", connect_timeout=PATIENCE)
    await server.stop(0)


_SERVE_SLOWLY = f"""
import asyncio
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend

async def main():
    server = await start_server(FakeBackend({VOCAB}, delay=0.2), batch_tokens=60)
    print(server.port, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@hasty
async def test_a_killed_teacher_is_an_error_soon_and_names_what_was_finished():
    process = subprocess.Popen([sys.executable, "-c", _SERVE_SLOWLY], stdout=subprocess.PIPE, text=True)
    try:
        port = await asyncio.to_thread(process.stdout.readline)
        teacher = await RemoteTeacher.connect(f"grpc://127.0.0.1:{int(port)}", timeout=PATIENCE)
        answers = teacher.score(stream(make_rollouts(40)), SignalSpec("sampled"))
        await anext(answers)
        process.kill()
        collecting = asyncio.create_task(collect(answers))
        await until(lambda: teacher.counters["reconnects"])
        with pytest.raises(TeacherError, match=r"has not answered for 60 s.*UNAVAILABLE.*[1-9]\d* rollouts were scored, unanswered: .*r0-"):
            async with hurried():
                await collecting
        await teacher.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_a_silent_teacher_is_an_error_after_the_time_limit():
    backend = HeldBackend(VOCAB)
    async with served(backend, timeout=0.5) as teacher:
        with pytest.raises(TeacherError, match=r"has not answered for 0.5 s.*0 rollouts were scored, unanswered: r0-0"):
            await collect(teacher.score(stream(make_rollouts(3)), SignalSpec("sampled")))
        backend.go_on()


async def test_a_caller_that_stops_leaves_nothing_running():
    backend = HeldBackend(VOCAB, free=1)
    server = await start_server(backend, batch_tokens=40)
    async with connected(server.port) as teacher:
        tasks_before = asyncio.all_tasks()
        answers = teacher.score(stream(make_rollouts(100)), SignalSpec("sampled"))
        await anext(answers)
        await until(lambda: len(backend.calls) == 2)
        await answers.aclose()
        client_tasks = {task for task in asyncio.all_tasks() - tasks_before if "score_session" in str(task.get_coro())}
        assert not client_tasks
        await until(lambda: open_calls(server, "score") == 0)
        backend.go_on()
        assert len(await collect(teacher.score(stream(make_rollouts(3)), SignalSpec("sampled")))) == 3
        assert len(backend.calls) <= 2 + 3, "the server dropped what the caller no longer wants"
    await server.stop(0.2)


# ---------------------------------------------------------------- the teacher's own text


async def test_completions_are_those_of_the_model():
    backend = FakeBackend(VOCAB)
    prompts = [Prompt(f"p{n}", (n, n + 1)) for n in range(40)]
    sampling = Sampling(max_new_tokens=6, seed=4, stop_token_ids=(5,))
    async with served(backend) as teacher:
        completions = await collect(teacher.complete(stream(prompts), sampling))
    assert len(completions) == 40
    expected = {done.prompt.prompt_id: done for done in FakeBackend(VOCAB).generate(prompts, sampling)}
    for done in completions:
        assert done == expected[done.prompt.prompt_id]
    assert max(backend.calls) > 4


async def test_completions_that_cannot_be_are_refused():
    async with served(FakeBackend(VOCAB, levels=("full",))) as teacher:
        with pytest.raises(TeacherError, match="does not offer level 'text'"):
            await collect(teacher.complete(stream([Prompt("p", (1,))]), Sampling(4)))
    async with served(FakeBackend(VOCAB, max_sequence_tokens=16)) as teacher:
        with pytest.raises(TeacherError, match="prompt p has 10 tokens and 7 to write"):
            await collect(teacher.complete(stream([Prompt("p", (1,) * 10)]), Sampling(7)))
        with pytest.raises(TeacherError, match=r"sampling.temperature 0.0 cannot be used \(top_k=1 is greedy\)"):
            await collect(teacher.complete(stream([Prompt("p", (1,))]), Sampling(7, temperature=0.0)))


async def test_a_teacher_that_writes_nothing_is_an_error_after_the_time_limit():
    backend = HeldBackend(VOCAB)
    async with served(backend, timeout=0.3) as teacher:
        with pytest.raises(TeacherError, match=r"has not written an answer for 0.3 s"):
            await collect(teacher.complete(stream([Prompt("p", (1,))]), Sampling(7)))
        backend.go_on()


async def test_what_was_lost_on_its_way_is_given_again_without_running_the_model():
    backend, want, rollouts = FakeBackend(VOCAB), SignalSpec("topk", 1.3, 8), make_rollouts(10)
    async with served(backend) as teacher:
        first = {item.rollout.rollout_id: item.signal for item in await collect(teacher.score(stream(rollouts), want))}
        calls = sum(backend.calls)
        again = await collect(teacher.score(stream(rollouts), want))
        assert sum(backend.calls) == calls, "the same questions again"
        for item in again:
            np.testing.assert_array_equal(item.signal.logprobs, first[item.rollout.rollout_id].logprobs)
        assert await teacher.compare_replicas(rollouts, want, limit=0.1, rounds=2) < 1e-6
        assert sum(backend.calls) == calls + 20, "but replicas are compared by what they compute"
