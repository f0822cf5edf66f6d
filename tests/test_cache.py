"""What was paid once is not paid again: across passes, runs, kills and processes, and no damaged answer is ever believed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from bbopd.cli.main import main
from bbopd.errors import TeacherError
from bbopd.teachers.answer_store import AnswerStore, StoreFullError
from bbopd.teachers.cache import CachedTeacher
from bbopd.teachers.fake import FakeBackend
from bbopd.types import Prompt, Sampling, SignalSpec
from tests.cache_worker import VOCAB, WANT, PaidTeacher
from tests.fault_registry import fault
from tests.faults import assert_nothing_lost, make_rollouts, stream
from tests.waiting import PATIENCE, wait_until

BACKEND = FakeBackend(VOCAB)


@contextlib.asynccontextmanager
async def caching(folder: Path, backend: FakeBackend = BACKEND, **options) -> AsyncIterator[tuple[CachedTeacher, PaidTeacher]]:
    teacher = PaidTeacher(backend, folder / "paid.log")
    cached = CachedTeacher(teacher, AnswerStore(folder / "cache.db", max_bytes=options.pop("max_bytes", None)), **options)
    try:
        yield cached, teacher
    finally:
        await cached.close()
        await teacher.close()


async def score_all(cached, rollouts, want=WANT):
    return [item async for item in cached.score(stream(rollouts), want)]


def paid(folder: Path) -> Counter[str]:
    log = folder / "paid.log"
    return Counter(log.read_text().splitlines()) if log.exists() else Counter()


def with_candidates(rollouts):
    random = np.random.default_rng(8)
    return [
        dataclasses.replace(rollout, candidate_ids=np.stack([random.permutation(VOCAB)[:5] for _ in rollout.token_ids]).astype(np.int32))
        for rollout in rollouts
    ]


@pytest.mark.parametrize("want", [WANT, SignalSpec("full"), SignalSpec("sampled", 0.7), SignalSpec("candidates", 1.3)])
async def test_a_kept_answer_is_the_same_to_the_last_bit(tmp_path, want):
    rollouts = make_rollouts(20, VOCAB)
    rollouts = with_candidates(rollouts) if want.level == "candidates" else rollouts
    async with caching(tmp_path) as (cached, _):
        first = {item.rollout.rollout_id: item for item in await score_all(cached, rollouts, want)}
    async with caching(tmp_path) as (cached, teacher):
        again = await score_all(cached, rollouts, want)
        assert (cached.counters["hits"], cached.counters["misses"], teacher.paid) == (20, 0, 0)
    for item in again:
        assert any(item.rollout is rollout for rollout in rollouts)
        before = first[item.rollout.rollout_id].signal
        assert (item.signal.level, item.signal.temperature) == (before.level, before.temperature)
        for name in ("logits", "ids", "logprobs", "log_tail", "sampled"):
            old, new = getattr(before, name), getattr(item.signal, name)
            assert (old is None) == (new is None)
            if old is not None:
                assert old.dtype == new.dtype
                np.testing.assert_array_equal(old, new)
    assert_nothing_lost(BACKEND, rollouts, again, want)


async def test_whatever_could_change_the_answer_is_part_of_the_question(tmp_path):
    rollout = make_rollouts(1, VOCAB, length=6)[0]
    moved = dataclasses.replace(rollout, prompt=Prompt("p", rollout.all_ids[:-2]), token_ids=rollout.all_ids[-2:])
    other = dataclasses.replace(rollout, token_ids=(*rollout.token_ids[:-1], (rollout.token_ids[-1] + 1) % VOCAB))
    asked = [(rollout, WANT), (moved, WANT), (other, WANT)]
    asked += [(rollout, dataclasses.replace(WANT, **change)) for change in ({"temperature": 1.31}, {"top_k": 7})]
    asked += [(rollout, SignalSpec("full")), (rollout, SignalSpec("sampled", 1.3))]
    asked += [(each, SignalSpec("candidates", 1.3)) for seed in (1, 2) for each in with_candidates([rollout] * seed)[-1:]]
    for number, (each, want) in enumerate(asked):
        async with caching(tmp_path) as (cached, teacher):
            assert len(await score_all(cached, [each], want)) == 1
            assert teacher.paid == 1, number
    infos = [dataclasses.replace(BACKEND.info, **change) for change in ({"model": "b"}, {"revision": "b"}, {"weights_version": 1})]
    infos.append(dataclasses.replace(BACKEND.info, vocab_sha256="0" * 64))
    for info in infos:
        backend = FakeBackend(VOCAB)
        backend.info = info
        async with caching(tmp_path, backend) as (cached, teacher):
            await score_all(cached, [rollout])
            assert teacher.paid == 1, info
    renamed = dataclasses.replace(rollout, rollout_id="other", prompt=dataclasses.replace(rollout.prompt, prompt_id="other"))
    async with caching(tmp_path) as (cached, teacher):
        assert [item.rollout for item in await score_all(cached, [renamed])] == [renamed]
        assert teacher.paid == 0, "names are no part of it"


async def test_the_same_question_twice_in_a_pass_is_asked_once(tmp_path):
    rollouts = make_rollouts(10, VOCAB)
    twins = [dataclasses.replace(rollout, rollout_id=f"{rollout.rollout_id}-twin") for rollout in rollouts]
    async with caching(tmp_path) as (cached, teacher):
        scored = await score_all(cached, [*rollouts, *twins])
        assert teacher.paid == 10
        assert (cached.counters["hits"], cached.counters["misses"]) == (10, 10)
    assert_nothing_lost(BACKEND, [*rollouts, *twins], scored, WANT)


async def test_completions_are_kept_too(tmp_path):
    prompts = [Prompt(f"p{n}", (n, n + 1)) for n in range(12)]
    sampling = Sampling(max_new_tokens=6, seed=4)
    async with caching(tmp_path) as (cached, _):
        first = {done.prompt.prompt_id: done async for done in cached.complete(stream(prompts), sampling)}
    async with caching(tmp_path) as (cached, teacher):
        again = {done.prompt.prompt_id: done async for done in cached.complete(stream(prompts), sampling)}
        assert (again, teacher.paid) == (first, 0)
        other = [done async for done in cached.complete(stream(prompts), dataclasses.replace(sampling, seed=5))]
        assert (len(other), teacher.paid) == (12, 12)


# ---------------------------------------------------------------- faults


@fault("corrupt cache entry", "drops it, counts it, asks again")
@pytest.mark.parametrize("damage", ["a bit", "another's answer", "no tensors", "another shape"])
async def test_a_damaged_entry(tmp_path, damage):
    rollouts = make_rollouts(8, VOCAB)
    async with caching(tmp_path) as (cached, _):
        await score_all(cached, rollouts)
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.db")) as db, db:
        (key, data, _), (_, other_data, other_digest) = db.execute("SELECT key, data, digest FROM answers LIMIT 2").fetchall()
        if damage == "a bit":
            db.execute("UPDATE answers SET data=? WHERE key=?", (data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], key))
        elif damage == "another's answer":
            db.execute("UPDATE answers SET data=?, digest=? WHERE key=?", (other_data, other_digest, key))
        else:
            wrong = b"nothing" if damage == "no tensors" else data[: len(data) // 2]
            db.execute(
                "UPDATE answers SET data=?, digest=? WHERE key=?", (wrong, hashlib.blake2b(wrong, digest_size=16, key=key).digest(), key)
            )  # what it holds is looked at too
    async with caching(tmp_path) as (cached, teacher):
        scored = await score_all(cached, rollouts)
        assert (cached.counters["corrupt"], teacher.paid) == (1, 1)
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)


@fault("a cache file that is none", "refuses it by name, with the way out")
async def test_a_file_that_is_no_cache(tmp_path):
    (tmp_path / "cache.db").write_bytes(b"something else" * 1000)
    with pytest.raises(TeacherError, match=r"cache.db cannot be used \(file is not a database\): move it away"):
        AnswerStore(tmp_path / "cache.db")
    with pytest.raises(TeacherError, match="cannot open the cache"):
        AnswerStore(tmp_path / "cache.db" / "below a file")


@fault("disk full", "warns once and goes on without keeping answers, or stops where `teacher.cache.on_full` says so")
async def test_a_full_disk(tmp_path, caplog):
    rollouts = make_rollouts(60, VOCAB, length=30)
    async with caching(tmp_path, max_bytes=60_000) as (cached, teacher):
        scored = await score_all(cached, rollouts)
        assert cached.counters["unstored"] > 10
        assert teacher.paid == 60
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)
    assert caplog.text.count("going on without keeping answers") == 1
    async with caching(tmp_path) as (cached, teacher):
        scored = await score_all(cached, rollouts)
        assert 0 < teacher.paid < 60, "what there was room for was kept"
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)
    (tmp_path / "other").mkdir()
    async with caching(tmp_path / "other", max_bytes=60_000, on_full="stop") as (cached, _):
        with pytest.raises(StoreFullError, match=r"cannot write to the cache .*full; make room, or set teacher.cache.on_full=continue"):
            await score_all(cached, rollouts)


@fault(
    "crash between paid answer and cache write (SIGKILL at any instant)",
    "asks again at most what was in flight, all of it listed in the ledger",
)
def test_killed_at_random_instants(tmp_path):
    random = np.random.default_rng(1)
    count, in_doubt, kills = 40, Counter(), 0
    command = [sys.executable, "-m", "tests.cache_worker", str(tmp_path / "cache.db"), str(tmp_path / "paid.log")]
    while True:
        process = subprocess.Popen([*command, str(count), "0", "0.02"], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "asking\n"
        if kills >= 4 and in_doubt:
            output, _ = process.communicate(timeout=3 * PATIENCE)
            assert output == "done\n"
            break
        enough = paid(tmp_path).total() + random.integers(0, 20)
        wait_until(lambda enough=enough, process=process: paid(tmp_path).total() >= enough or process.poll() is not None)
        time.sleep(random.uniform(0.0, 0.04))
        process.kill()
        process.communicate()
        kills, count = kills + 1, count + 20  # so that even one that was done before it was killed leaves work
        assert kills < 20, "none was killed while it asked"
        store = AnswerStore(tmp_path / "cache.db")
        in_doubt.update(entry.name for entry in store.stats().unfinished if not entry.is_running)
        store.close()
    times_paid = paid(tmp_path)
    assert set(times_paid) == {f"r{number}" for number in range(count)}
    for name, times in times_paid.items():
        assert times <= 1 + in_doubt[name], "paid again, though the ledger did not say that it might be"
    assert not AnswerStore(tmp_path / "cache.db").stats().unfinished


@fault("two runs that share a cache", "each question is asked by one of them, the other waits for its answer")
def test_two_processes_share_what_is_paid(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cache_worker", str(tmp_path / "cache.db"), str(tmp_path / "paid.log"), "80", str(seed), "0.02"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    for process in started:
        output, _ = process.communicate(timeout=3 * PATIENCE)
        assert output == "asking\ndone\n"
    assert paid(tmp_path) == Counter({f"r{number}": 1 for number in range(80)})


@fault("the run that asks a question dies while another waits for it", "the other asks it itself")
async def test_the_question_of_a_dead_owner_is_taken_over(tmp_path):
    rollouts = make_rollouts(30, VOCAB)
    command = [sys.executable, "-m", "tests.cache_worker", str(tmp_path / "cache.db"), str(tmp_path / "paid.log"), "30", "0", "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "asking\n"
    store = AnswerStore(tmp_path / "cache.db")
    wait_until(lambda: store.stats().unfinished)
    assert all(entry.is_running for entry in store.stats().unfinished)
    store.close()
    async with caching(tmp_path) as (cached, _):
        answers = cached.score(stream(rollouts), WANT)
        process.kill()
        process.communicate()
        scored = [item async for item in answers]
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)


async def test_what_was_given_up_is_listed_and_may_be_asked_again(tmp_path):
    rollouts = make_rollouts(30, VOCAB)
    async with caching(tmp_path, FakeBackend(VOCAB, die_after=15)) as (cached, _):
        with pytest.raises(TeacherError, match="died"):
            await score_all(cached, rollouts)
        unfinished = await cached.in_thread(lambda: cached._store.stats().unfinished)
        assert unfinished
        assert not any(entry.is_running for entry in unfinished)
    async with caching(tmp_path) as (cached, _):
        scored = await score_all(cached, rollouts)
        assert not (await cached.in_thread(lambda: cached._store.stats().unfinished))
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)


# ---------------------------------------------------------------- the command line


async def fill(folder: Path, count: int = 6) -> None:
    async with caching(folder) as (cached, _):
        await score_all(cached, make_rollouts(count, VOCAB))


async def test_stats_verify_and_prune(tmp_path, capsys):
    await fill(tmp_path)
    path = str(tmp_path / "cache.db")
    store = AnswerStore(path)
    store.find_or_claim(b"k" * 32, "r99", 41)
    store.give_up([b"k" * 32])
    store.close()
    assert main(["cache", "stats", path]) == 0
    output = capsys.readouterr().out
    assert "fake-97-0, topk: 6 answers" in output
    assert "without an answer kept: 1 (41 tokens)" in output
    assert "r99: 41 tokens, asked 20" in output
    assert main(["cache", "verify", path]) == 0
    assert capsys.readouterr().out == "6 answers are right, 0 were damaged and have been dropped\n"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE answers SET data=x'00' WHERE key=(SELECT key FROM answers LIMIT 1)")
        db.execute("UPDATE answers SET stored_at=stored_at-864000 WHERE key IN (SELECT key FROM answers WHERE data!=x'00' LIMIT 2)")
    assert main(["cache", "verify", path]) == TeacherError.exit_code
    assert "5 answers are right, 1 were damaged" in capsys.readouterr().out
    assert main(["cache", "prune", path]) == 2
    assert main(["cache", "prune", path, "--older-than", "5", "--unfinished"]) == 0
    assert "removed 2 answers" in capsys.readouterr().out
    store = AnswerStore(path)
    (_, _, count, size), *_ = store.stats().rows
    assert (count, store.stats().unfinished) == (3, ())
    store.close()
    assert main(["cache", "prune", path, "--keep-bytes", str(size - 1)]) == 0
    assert "removed 1 answers" in capsys.readouterr().out
    assert main(["cache", "stats", str(tmp_path / "nowhere.db")]) == 2


def test_the_file_of_another_version_is_refused(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.db")) as db:
        db.execute("PRAGMA user_version=7")
    with pytest.raises(TeacherError, match="has format 7, this version reads 1: move it away"):
        AnswerStore(tmp_path / "cache.db")


async def test_top_64_takes_392_bytes_a_token_on_disk(tmp_path):
    backend, want = FakeBackend(200), SignalSpec("topk", 1.0, 64)
    async with caching(tmp_path, backend) as (cached, _):
        await score_all(cached, make_rollouts(10, 200, length=100), want)
        ((_, _, count, size),) = (await cached.in_thread(cached._store.stats)).rows
    assert (2 + 4) * 64 + 8 == 392
    assert 392 * 1000 < size <= 392 * 1000 + 400 * count
