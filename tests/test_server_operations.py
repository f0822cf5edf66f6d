"""What an operator sees and does: metrics, logs without secrets, draining, and the conformance test, all on real processes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.cli.main import main
from bbopd.config import ServeConfig
from bbopd.errors import ConfigError
from bbopd.rpc.codec import encode_item
from bbopd.rpc.conformance import check_teacher
from bbopd.rpc.observe import JsonFormatter, Observer
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.hf import HFBackend
from bbopd.types import Offer, Prompt, Rollout, SignalSpec, TeacherSignal
from tests.test_server import VOCAB, WANT, next_answer, open_stream, rollout, running
from tests.test_server_limits import next_answer_or_status, prompts
from tests.tiny_models import tiny_llama, tiny_tokenizer
from tests.waiting import PATIENCE, open_calls, until, unused_port, wait_until

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- metrics and logs


async def test_metrics_count_what_happened():
    backend = FakeBackend(VOCAB, nan_ids={"r3"})
    async with running(backend) as (server, _, stub):
        call = await open_stream(stub)
        for number in range(4):
            await call.write(encode_item(number, rollout(number), WANT))
        await call.write(encode_item(9, rollout(9, length=5000), WANT))
        for _ in range(5):
            await next_answer(call)
        async for _ in stub.Generate(prompts(2, max_new_tokens=4)):
            pass
        stop = server.observer.serve_metrics("127.0.0.1", unused_port())
        stop()
        port = unused_port()
        stop = server.observer.serve_metrics("127.0.0.1", port)
        try:
            address = f"http://127.0.0.1:{port}/metrics"
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(address, timeout=PATIENCE).read().decode())
            with pytest.raises(ConfigError, match=rf"cannot serve metrics on 127.0.0.1:{port} .*set metrics_port"):
                Observer().serve_metrics("127.0.0.1", port)
        finally:
            stop()
        call.cancel()
    for line in (
        'bbopd_requests_total{level="topk",outcome="ok"} 3.0',
        'bbopd_requests_total{level="topk",outcome="bad_signal"} 1.0',
        'bbopd_requests_total{level="topk",outcome="too_long"} 1.0',
        'bbopd_requests_total{level="text",outcome="ok"} 2.0',
        'bbopd_tokens_total{level="topk"} 18.0',
        'bbopd_prompt_tokens_total{level="topk"} 9.0',
        'bbopd_tokens_total{level="text"} 8.0',
        'bbopd_answer_bytes_total{level="topk"} 432.0',  # 18 rows of 4 ids as uint16, 4 logprobs as float16, and 8 bytes
        'bbopd_refusals_total{reason="too_long"} 1.0',
        "bbopd_queued_items 0.0",
        "bbopd_inflight_answer_bytes 0.0",
        'bbopd_open_calls{kind="score"} 1.0',
        "bbopd_clients 1.0",
        "bbopd_batch_tokens_sum 48.0",
        'bbopd_request_seconds_count{level="topk"} 3.0',
        'bbopd_queue_seconds_count{level="topk"} 4.0',
    ):
        assert line in text.splitlines(), f"{line}\n{text}"


async def test_logs_are_lines_of_json_without_prompts_or_texts(caplog):
    caplog.set_level(logging.INFO)
    secret_ids = (41, 43, 47, 41, 43)
    async with running(FakeBackend(VOCAB)) as (server, _, stub):
        call = await open_stream(stub)
        item = Rollout("my-rollout", Prompt("p", secret_ids), (42, 44, 46))
        await call.write(encode_item(5, item, WANT))
        await next_answer(call)
        request = prompts(1)
        texts = [response.completion.text async for response in stub.Generate(request)]
        call.cancel()
        await until(lambda: open_calls(server, "score") == 0)
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("bbopd")]
    events = [json.loads(line) for line in lines]
    (scored,) = (event for event in events if event["message"] == "item" and event["level"] == "topk")
    assert {key: scored[key] for key in ("outcome", "request", "name", "prompt_tokens", "tokens")} == {
        "outcome": "ok",
        "request": 5,
        "name": "rollout my-rollout",
        "prompt_tokens": 5,
        "tokens": 3,
    }
    assert 0 < scored["seconds"] < PATIENCE
    clients = {event["client"] for event in events if "client" in event}
    assert len(clients) == 1
    assert len(clients.pop()) == 12
    assert {event["message"] for event in events} == {"call opened", "item", "batch", "call closed"}
    everything = "\n".join(lines)
    assert not any(str(list(ids))[1:-1] in everything for ids in (secret_ids, item.token_ids))
    assert "127.0.0.1" not in everything
    assert texts[0] not in everything


# ---------------------------------------------------------------- processes


class Served:
    """A python process that serves, with its log; killed at the end whatever happens."""

    def __init__(self, tmp_path: Path, *command: str) -> None:
        self.ready, self.log = tmp_path / "ready", (tmp_path / "log").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, *command, "--ready-file", str(self.ready)], stdout=self.log, stderr=subprocess.STDOUT, cwd=ROOT
        )

    def __enter__(self) -> Served:
        wait_until(lambda: self.ready.exists() or self.process.poll() is not None, 2 * PATIENCE)
        assert self.ready.exists(), self.output()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()

    @property
    def target(self) -> str:
        return self.ready.read_text().strip()

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()


def test_the_example_of_a_teacher_of_ones_own_passes_the_conformance_test(tmp_path, capsys):
    with Served(tmp_path, "examples/my_teacher.py", "README.md", "--port", "0") as served:
        assert main(["check-teacher", served.target.removeprefix("grpc://")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f"25 passed, 0 failed, 0 skipped: {served.target}"
        assert all(line.startswith("PASS  ") for line in lines[:-1])
        assert main(["check-teacher", served.target, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["pass"], report["fail"], len(report["checks"])) == (25, 0, 25)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(PATIENCE) == 0
        assert not served.ready.exists()


_SLOW = """
import sys, time
from pathlib import Path
from bbopd.config import ServeConfig
from bbopd.rpc.run_server import serve, set_up_logs
from bbopd.teachers.fake import FakeBackend

class Slow(FakeBackend):  # answers one call; the others wait until a file is there
    def _begin(self, count):
        super()._begin(count)
        while len(self.calls) > 1 and not Path(sys.argv[2]).exists():
            time.sleep(0.01)

set_up_logs("json")
config = ServeConfig(model="slow", port=0, batch_tokens=20, drain_seconds=float(sys.argv[1]))
serve(Slow(50), config, ready_file=Path(sys.argv[4]))
"""


@pytest.mark.parametrize("grace", [2 * PATIENCE, 0.5], ids=["enough", "too little"])
async def test_sigterm_finishes_what_was_taken_and_refuses_what_is_new(tmp_path, grace):
    go_on = tmp_path / "go on"
    with Served(tmp_path, "-c", _SLOW, str(grace), str(go_on)) as served:
        async with grpc.aio.insecure_channel(served.target.removeprefix("grpc://")) as channel:
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            call = await open_stream(stub)
            for number in range(12):  # 6 batches
                await call.write(encode_item(number, rollout(number), WANT))
            await call.write(encode_item(99, rollout(99, length=5000), WANT))
            answered = set()
            while (message := await next_answer(call)).WhichOneof("kind") == "chunk":
                answered.add(message.chunk.request_id)
            assert message.failure.request_id == 99, "which came last: all of them have been taken"
            served.process.send_signal(signal.SIGTERM)
            if grace > 1:
                code, details = await refusal_of_what_is_new(stub)
                assert code is grpc.StatusCode.UNAVAILABLE
                assert details == "the teacher is shutting down"
                go_on.touch()
            while not isinstance(message := await next_answer_or_status(call), grpc.StatusCode):
                answered.add(message.chunk.request_id)
            assert message is grpc.StatusCode.UNAVAILABLE
        go_on.touch()
        assert served.process.wait(PATIENCE) == 0
        events = [json.loads(line) for line in served.output().splitlines()]
        assert events[-1]["message"] == "stopped"
        if grace > 1:
            assert answered == set(range(12)), "all that was taken"
        else:
            assert len(answered) < 12
            assert any("requests unanswered after 0.5 s" in event["message"] for event in events)


async def refusal_of_what_is_new(stub):
    """The status with which a server that has been told to stop refuses a call, once it has heard of it."""
    while True:
        call = stub.Score()
        await call.write(pb.ScoreRequest(open=pb.StreamOpen(protocol_version=1, answer_credit_bytes=1)))
        try:
            await asyncio.wait_for(call.read(), PATIENCE)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details()
        call.cancel()
        await asyncio.sleep(0.01)


async def test_a_hugging_face_model_passes_the_conformance_test():
    assert await failed_checks(HFBackend(tiny_llama(vocab_size=322), tiny_tokenizer())) == {}


# ---------------------------------------------------------------- teachers that do not conform


class Wrong(FakeBackend):
    """A teacher that is wrong in one way, and whose server does not notice."""

    def __init__(self, how: str, **options) -> None:
        super().__init__(VOCAB, **options)
        self.how = how

    def logits(self, item):
        logits = super().logits(item)
        if self.how == "bidirectional":
            return logits + 3.0 * (item.token_ids[-1] % 2) * (self._table_RV[5] > 0)
        return logits

    def score(self, rollouts, want):
        if self.how == "company" and len(rollouts) > 1:
            return [FakeBackend(VOCAB, seed=1).score([one], want)[0] for one in rollouts]
        if self.how == "temperature":
            want_then = SignalSpec(want.level, 1.0, want.top_k)
            return [TeacherSignal(*_at(signal, want)) for signal in super().score(rollouts, want_then)]
        return super().score(rollouts, want)


def _at(signal, want):
    temperature = 1.0 if want.level == "full" else want.temperature
    return want.level, temperature, signal.logits, signal.ids, signal.logprobs, signal.log_tail, signal.sampled


async def failed_checks(backend):
    server = await start_server(backend)
    try:
        return {result.name: result.detail async for result in check_teacher(server.target, timeout=PATIENCE) if result.status == "fail"}
    finally:
        await server.stop(0.2)


@pytest.mark.parametrize(
    ("how", "check"),
    [("bidirectional", "rows are causal"), ("company", "company does not matter"), ("temperature", "levels agree")],
)
async def test_a_teacher_that_is_wrong_is_found_out(how, check):
    failed = await failed_checks(Wrong(how, levels=("full", "topk", "sampled")))
    assert check in failed, failed


async def test_a_teacher_that_says_nonsense_of_itself_is_found_out():
    backend = FakeBackend(VOCAB, levels=("sampled",))
    twice = Offer("sampled", 3)
    object.__setattr__(backend.info, "offers", (twice, twice))
    failed = await failed_checks(backend)
    assert failed["info"] == "a level is offered twice: sampled, sampled"


def test_the_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    missing = [name for name in ServeConfig.model_fields if name not in shown]
    assert missing == ["trust_remote_code"], "which is not for everyone"


def test_nobody_there_and_something_else_there_are_said(capsys):
    port = unused_port()
    assert main(["check-teacher", f"localhost:{port}", "--timeout", "0.3"]) == 3
    assert f"cannot reach a teacher at grpc://localhost:{port}" in capsys.readouterr().err
    assert main(["check-teacher", "localhost:1", "--token-file", os.devnull]) == 2
    assert "--token_file /dev/null holds no token" in capsys.readouterr().err
