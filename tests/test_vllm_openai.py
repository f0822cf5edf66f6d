"""A real vLLM server, in its own process, as a teacher over OpenAI's protocol, against the trainer's own log-probabilities."""

import asyncio
import contextlib
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest

from bbopd.cli.demo import find_model
from bbopd.config import ApiConfig, TeacherConfig
from bbopd.errors import TeacherError
from bbopd.modeling import load_model, load_tokenizer
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.openai import OpenAITeacher
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec
from bbopd.vllm_setup import engine_environment
from tests.faults import score_all, stream
from tests.guides import GUIDES, Guide, questions
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]

WIDEST = 30  # --max-logprobs
LAYERS = (0, 1, 2, 3, 28, 29)
START_SECONDS = 600


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> HFBackend:
    """A few layers of the demo's model, with its whole vocabulary, in float32; the folder that vLLM serves is its name."""
    model, tokenizer = load_model(find_model(), keep_layers=LAYERS), load_tokenizer(find_model())
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return HFBackend(model, tokenizer, name=str(folder))


@pytest.fixture(scope="module")
def target(backend, tmp_path_factory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    options = {
        "model": backend.info.model,
        "served-model-name": "served",
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "max-model-len": 128,
        "max-logprobs": WIDEST,
        "max-num-seqs": 8,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = dict(engine_environment("cpu").variables) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_up(port):
            assert process.poll() is None, f"vLLM ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"vLLM did not start:\n{log.read_text()[-3000:]}"
            time.sleep(0.5)
        yield f"openai://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


async def connect(target: str, backend: HFBackend, **api) -> OpenAITeacher:
    config = TeacherConfig(target=target, topk=64, api=ApiConfig(**api), timeout=600, start_timeout=600)
    return await OpenAITeacher.connect(config, tokenizer=load_tokenizer(find_model()), vocab_size=backend.info.vocab_size)


def rollouts() -> list[Rollout]:
    """Of random tokens, of text, the shortest and the longest that fit."""
    random = np.random.default_rng(7)
    tokenizer = load_tokenizer(find_model())
    made = [([1], [2]), (tokenizer("Water boils at").input_ids, tokenizer(" a lower temperature on a mountain.").input_ids)]
    for prompt, answer in ((1, 126), (100, 27), *((random.integers(1, 9), random.integers(1, 60)) for _ in range(8))):
        made.append((random.integers(0, 49_000, prompt).tolist(), random.integers(0, 49_000, answer).tolist()))
    return [Rollout(f"r{number}", Prompt(f"p{number}", tuple(ids)), tuple(answer)) for number, (ids, answer) in enumerate(made)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scoring", ["auto", "echo"])
async def test_its_scores_are_the_trainers(target, backend, scoring):
    teacher = await connect(target, backend, scoring=scoring)
    offer = teacher.info.offer("topk")
    assert offer is not None
    assert (offer.max_top_k, offer.temperature_min, offer.temperature_max, offer.tail) == (WIDEST, 1.0, 1.0, "derived")
    assert teacher.info.max_sequence_tokens == 127
    asked = rollouts()
    for want in (SignalSpec("topk", top_k=WIDEST), SignalSpec("sampled")):
        scored = {item.rollout.rollout_id: item.signal for item in await score_all(teacher, asked, want)}
        assert set(scored) == {rollout.rollout_id for rollout in asked}
        for rollout, expected in zip(asked, backend.score(asked, want), strict=True):
            found = scored[rollout.rollout_id]
            np.testing.assert_allclose(found.sampled, expected.sampled, atol=1e-3)
            if want.level == "sampled":
                continue
            np.testing.assert_allclose(found.logprobs, np.asarray(expected.logprobs, np.float32), atol=1e-3)
            np.testing.assert_allclose(np.exp(found.log_tail), np.exp(expected.log_tail), atol=1e-3)
            _assert_same_ids(found.ids, expected.ids, np.asarray(expected.logprobs, np.float32))
    assert teacher.counters == {"retries": 0, "bad_answers": 0}
    await teacher.close()


def _assert_same_ids(found: np.ndarray, expected: np.ndarray, logprobs: np.ndarray) -> None:
    """Row by row the same ids, but for neighbours, and the last one, that rounding may exchange."""
    for row, column in zip(*np.nonzero(found != expected), strict=True):
        near = np.flatnonzero(np.abs(logprobs[row] - logprobs[row, column]) < 1e-3)
        assert found[row, column] in expected[row, near] or len(expected[row]) - 1 in near


@pytest.mark.timeout(900)
async def test_it_writes_what_the_model_writes(target, backend):
    teacher = await connect(target, backend)
    tokenizer = load_tokenizer(find_model())
    prompts = [Prompt(text, tuple(tokenizer(text).input_ids)) for text in ("The capital of France", "Once upon a time")]
    for sampling in (Sampling(12, top_k=1), Sampling(12, temperature=1.0, seed=3), Sampling(12, temperature=1.0, seed=3)):
        written = {answer.prompt.prompt_id: answer async for answer in teacher.complete(stream(prompts), sampling)}
        if sampling.top_k == 1:
            for answer in (answer for prompt in prompts for answer in backend.generate([prompt], sampling)):
                assert written[answer.prompt.prompt_id].token_ids == answer.token_ids
        else:
            drawn = {name: answer.token_ids for name, answer in written.items()}
    assert drawn == {name: answer.token_ids for name, answer in written.items()}, "the same seed draws the same"
    await teacher.close()


@pytest.mark.timeout(900)
async def test_it_writes_in_a_chat(target, backend):
    teacher = await connect(target, backend, scoring="none", writing="chat")
    tokenizer = load_tokenizer(find_model())
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=False)
    prompt = Prompt("chat", tuple(ids))
    (written,) = [answer async for answer in teacher.complete(stream([prompt]), Sampling(12, top_k=1))]
    (expected,) = backend.generate([prompt], Sampling(12, top_k=1))
    assert written.text == expected.text, "the server's chat template makes the same prompt of the message"
    await teacher.close()


@pytest.mark.timeout(900)
async def test_a_student_of_another_vocabulary_is_refused(target, backend, tmp_path):
    with pytest.raises(TeacherError, match="does not number tokens as the student does: id "):
        async with asyncio.timeout(300):
            await OpenAITeacher.connect(TeacherConfig(target=target, topk=8), tokenizer=tiny_tokenizer(), vocab_size=262)


def test_the_guide_of_text_alone_can_be_followed(target, tmp_path, monkeypatch):
    """`docs/guides/text_only.md`: a student of other tokens learns what vLLM writes."""
    monkeypatch.chdir(tmp_path)
    guide = Guide("text_only", tmp_path, api=target)
    guide.write_files()
    with contextlib.ExitStack() as stack:
        assert guide.run(stack, "seqkd.yaml") == ["bbopd doctor seqkd.yaml", "bbopd distill seqkd.yaml"]
    summary = json.loads((tmp_path / "runs" / "seqkd" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["tokens"]["trained"] >= 40


def test_the_example_of_text_alone_runs(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text("\n".join(questions(12)))
    student = save_folder(tmp_path / "student", tiny_llama(vocab_size=262), tiny_tokenizer())
    main = runpy.run_path(str(GUIDES.parents[1] / "examples" / "text_only.py"))["main"]
    asked = [target, "questions.jsonl", "--student", str(student), "--tokens", "60", "--prompt-tokens", "40", "--answer-tokens", "12"]
    assert main([*asked, "--dtype", "float32"]) == 0
    assert "0 the thin thing in" in capsys.readouterr().out
