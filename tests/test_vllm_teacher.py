"""vLLM as a teacher: how its answers are read, and the real engine behind a real server (`make test-vllm`) beside transformers."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import pytest_asyncio

from bbopd.cli.main import main
from bbopd.config import ServeConfig
from bbopd.errors import ConfigError, ModelError, TeacherError
from bbopd.rpc.limits import check_want
from bbopd.rpc.signals import check_signal, signal_from_logits
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.process import TeacherProcess
from bbopd.teachers.remote import RemoteTeacher
from bbopd.teachers.vllm import VLLMBackend, read_scores, tail_of
from bbopd.teachers.vllm_engine import LoadedEngine
from bbopd.types import Completion, Offer, Prompt, Rollout, Sampling, SignalSpec, TeacherInfo
from tests.cli_runs import WORDS, bbopd, steps, write_config
from tests.faults import make_rollouts, score_all, stream
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

VOCAB = 262
TOPK, SAMPLED = SignalSpec("topk", 1.0, 16), SignalSpec("sampled")
INFO = TeacherInfo("m", VOCAB, (Offer("topk", 64, tail="derived"), Offer("sampled"), Offer("candidates", 8, tail="derived")))

# ---------------------------------------------------------------- how its answers are read


def flat_logprobs(logits: np.ndarray, ids: tuple[int, ...], width: int) -> SimpleNamespace:
    """What vLLM's `FlatLogprobs` holds for a prompt of these ids: for each but the first the token itself, then the best ``width``."""
    logprobs = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :width]
    chosen = np.concatenate([np.array(ids[1:])[:, None], order], axis=1)
    found = np.take_along_axis(logprobs, chosen, axis=1).astype(np.float32)
    return SimpleNamespace(token_ids=chosen.ravel().tolist(), logprobs=found.ravel().tolist())


@pytest.mark.parametrize("want", [TOPK, SAMPLED, SignalSpec("topk", 1.0, VOCAB)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_rows_are_those_of_the_response_and_make_a_distribution(want, scale):
    random = np.random.default_rng(3)
    for rollout in make_rollouts(20, VOCAB, seed=5):
        first, count = len(rollout.prompt.token_ids), len(rollout.all_ids)
        logits = scale * random.standard_normal((count - 1, VOCAB))
        signal = read_scores(SimpleNamespace(prompt_logprobs=flat_logprobs(logits, rollout.all_ids, want.top_k)), rollout, want)
        check_signal(signal, want, np.array(rollout.token_ids), VOCAB)
        expected = signal_from_logits(logits[first - 1 :], rollout, want)
        np.testing.assert_allclose(signal.sampled, expected.sampled, atol=1e-5)
        if want.level == "topk":
            np.testing.assert_array_equal(signal.ids, expected.ids)
            np.testing.assert_allclose(signal.logprobs, expected.logprobs, atol=1e-5)
            np.testing.assert_allclose(np.exp(signal.log_tail), np.exp(expected.log_tail), atol=1e-6)


def test_candidates_keep_their_empty_slots():
    rollout = Rollout("r", Prompt("p", (1, 2)), (3, 4), candidate_ids=np.array([[5, -1, 7], [0, 3, -1]]))
    logprobs = np.log([[0.2, 1e-30, 0.3], [0.5, 0.25, 1e-30]])
    logprobs[rollout.candidate_ids < 0] = -np.inf
    output = SimpleNamespace(
        prompt_logprobs=SimpleNamespace(token_ids=[2, 3, 4], logprobs=[-1.0, -2.0, -3.0]), prompt_token_id_logprobs=logprobs
    )
    signal = read_scores(output, rollout, SignalSpec("candidates"))
    check_signal(signal, SignalSpec("candidates"), np.array(rollout.token_ids), VOCAB)
    np.testing.assert_allclose(np.exp(signal.log_tail), [0.5, 0.25], rtol=1e-6)
    np.testing.assert_array_equal(signal.sampled, np.float32([-2.0, -3.0]))


def test_a_tail_too_small_to_be_told_from_none_is_no_negative_number():
    certain = np.log(np.float32([[0.7, 0.3], [1.0, 1e-9], [0.5, 0.25]]))
    certain[0] += 1e-7  # the sum is above 1
    assert np.isfinite(tail_of(certain)).all()
    np.testing.assert_allclose(np.exp(tail_of(certain)), [2.0**-23, 2.0**-23, 0.25], rtol=1e-5)


def test_rows_that_are_missing_are_an_error():
    rollout = Rollout("r", Prompt("p", (1, 2)), (3, 4))
    short = SimpleNamespace(prompt_logprobs=SimpleNamespace(token_ids=[2, 3], logprobs=[-1.0, -1.0]))
    for output, count in ((short, 2), (SimpleNamespace(prompt_logprobs=None), 0)):
        with pytest.raises(ModelError, match=f"rollout r: vLLM gave {count} logprobs for 4 tokens"):
            read_scores(output, rollout, SAMPLED)


@dataclass
class Engine:
    """As much of an engine as is driven: the oldest request is finished at every step."""

    fails_at: int = -1
    running: list[tuple[str, list[int]]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    most: int = 0
    steps: int = 0

    def add_request(self, number: str, prompt: dict[str, list[int]], parameters: object) -> None:
        self.running.append((number, prompt["prompt_token_ids"]))

    def step(self) -> list[SimpleNamespace]:
        self.most = max(self.most, len(self.running))
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("out of memory")
        number, ids = self.running.pop(0)
        return [SimpleNamespace(request_id=number, finished=True, ids=ids)]

    def abort_request(self, numbers: list[str]) -> None:
        self.aborted += numbers


def test_what_vllm_holds_at_a_time_is_bounded_and_a_failure_leaves_nothing_behind():
    engine, found = Engine(), {}
    backend = VLLMBackend(LoadedEngine(engine, tiny_tokenizer(), (2,), INFO))
    asked = [((number,), None, 2**21) for number in range(10)] + [((10,), None, 2**30)]
    backend._run(asked, lambda place, output: found.__setitem__(place, output.ids))
    assert found == {number: [number] for number in range(11)}
    assert engine.most == 4, "2**23 entries, and the last one alone"
    engine = Engine(fails_at=3)
    backend = VLLMBackend(LoadedEngine(engine, tiny_tokenizer(), (2,), INFO))
    with pytest.raises(RuntimeError, match="out of memory"):
        backend._run([((number,), None, 1) for number in range(5)], lambda place, output: None)
    assert engine.aborted == ["2", "3", "4"]


def test_another_temperature_is_refused_and_named():
    with pytest.raises(TeacherError, match=r"temperature 2.0 is outside 1.0..1.0, what teacher m applies exactly"):
        check_want(SignalSpec("topk", 2.0, 8), INFO)


def test_levels_that_it_does_not_have_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"levels \['full'\]: engine vllm gives candidates, topk, sampled, text here.*or engine=hf"):
        VLLMBackend.from_config(ServeConfig(model="there/is-none", engine="vllm", levels=("full",)))


HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_the_way_to_it_is_named(capsys):
    assert main(["serve", "--model", "there/is-none", "--set", "engine=vllm"]) == 6
    assert "engine is vllm, but vLLM is not installed here: pip install 'bbopd[vllm]'" in capsys.readouterr().err


# ---------------------------------------------------------------- the real engine

real = [pytest.mark.vllm, pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make vllm")]


def marked(test):
    for mark in real:
        test = mark(test)
    return pytest.mark.asyncio(loop_scope="module")(test)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("teacher")
    padded = tiny_llama(vocab_size=VOCAB + 58, layers=4, hidden=128)  # entries that no token has
    save_folder(place / "model", padded, tiny_tokenizer())
    texts = [" ".join(WORDS[(i + j * (i % 5 + 1)) % len(WORDS)] for j in range(80)) for i in range(20)]
    (place / "corpus.txt").write_text("\n\n\n".join(texts))
    return place


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(folder):
    """``bbopd serve`` with vLLM, as a run starts it, and the same model in transformers."""
    config = ServeConfig(model=str(folder / "model"), engine="vllm", dtype="float32")
    process = await TeacherProcess.start(config, folder / "teacher.log", timeout=240)
    teacher = await RemoteTeacher.connect(process.target)
    yield process, teacher, HFBackend.from_config(config)
    await teacher.close()
    process.stop()


@marked
async def test_its_limits_are_its_offers(served):
    process, teacher, reference = served
    assert {offer.level: offer for offer in teacher.info.offers} == {
        "topk": Offer("topk", VOCAB, 1.0, 1.0, "derived"),
        "sampled": Offer("sampled"),
        "text": Offer("text", 0, 0.01, 100.0),
    }
    assert (teacher.info.vocab_size, teacher.info.vocab_sha256) == (VOCAB, reference.info.vocab_sha256)
    assert teacher.info.max_sequence_tokens == 255
    assert "offers topk, sampled, text" in process.log_path.read_text()
    with pytest.raises(TeacherError, match=r"temperature 2.0 is outside 1.0..1.0"):
        await score_all(teacher, make_rollouts(1, VOCAB), SignalSpec("topk", 2.0, 8))
    with pytest.raises(TeacherError, match="does not offer level 'full'; it offers topk, sampled, text"):
        await score_all(teacher, make_rollouts(1, VOCAB), SignalSpec("full"))


@marked
@pytest.mark.parametrize("want", [TOPK, SAMPLED, SignalSpec("topk", 1.0, 64), SignalSpec("topk", 1.0, VOCAB)], ids=str)
async def test_it_says_what_transformers_says(served, want):
    _, teacher, reference = served
    rollouts = [*make_rollouts(24, VOCAB, seed=2), *make_rollouts(3, VOCAB, seed=3, length=240)]
    scored = await score_all(teacher, rollouts, want)
    expected = {
        rollout.rollout_id + str(len(rollout)): signal for rollout, signal in zip(rollouts, reference.score(rollouts, want), strict=True)
    }
    assert len(scored) == len(rollouts)
    for one in scored:
        signal, known = one.signal, expected[one.rollout.rollout_id + str(len(one.rollout))]
        np.testing.assert_allclose(signal.sampled, known.sampled, atol=1e-3)
        if want.level == "topk":
            wire = np.spacing(np.abs(known.logprobs).astype(np.float16)).astype(np.float32)  # float16, whose mass is then made 1
            assert (np.abs(signal.logprobs - known.logprobs) <= 1e-3 + 2e-3 + wire).all()
            np.testing.assert_allclose(np.exp(signal.log_tail), np.exp(known.log_tail), atol=1e-3)
            same = (signal.ids[:, :, None] == known.ids[:, None, :]).any(axis=2)
            assert same.mean() > 0.99, "a tie at the end of the list may fall either way"


@marked
async def test_it_writes_what_transformers_writes(served):
    _, teacher, reference = served
    prompts = [Prompt(f"p{number}", tuple(np.random.default_rng(number).integers(3, VOCAB, 6).tolist())) for number in range(8)]

    async def write(sampling: Sampling) -> list[Completion]:
        written = [one async for one in teacher.complete(stream(prompts), sampling)]
        return sorted(written, key=lambda one: one.prompt.prompt_id)

    greedy = Sampling(12, top_k=1)
    mine, theirs = await write(greedy), reference.generate(prompts, greedy)
    same = [a == replace(b, logprobs=()) for a, b in zip(mine, theirs, strict=True)]  # vLLM tells no logprobs of what it wrote
    assert sum(same) >= len(prompts) - 1, "a tie may fall either way"
    sampled = await write(Sampling(12, seed=4))
    assert sampled == await write(Sampling(12, seed=4)) != await write(Sampling(12, seed=5))
    (of_text,) = [one async for one in teacher.complete(stream([Prompt("t", (), text="the thin")]), greedy)]
    assert of_text.token_ids == reference.generate([Prompt("t", reference.encode(Prompt("t", (), text="the thin")))], greedy)[0].token_ids
    stop = mine[0].token_ids[3]
    stopped = (await write(Sampling(12, top_k=1, stop_token_ids=(stop,))))[0]
    assert (stopped.token_ids[-1], stopped.finish_reason) == (stop, "stop")
    assert len(stopped.token_ids) <= 4


@marked
async def test_it_passes_the_conformance_test(served):
    process, _, _ = served
    result = bbopd("check-teacher", process.target, "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, report["fail"]) == (0, 0), [check for check in report["checks"] if check["status"] == "fail"]
    assert report["pass"] >= 19
    assert "the tail derived as 1 minus the sum" in report["checks"][0]["detail"]


@marked
async def test_a_run_learns_from_its_top_k(served, folder):
    process, _, _ = served
    path = write_config(
        folder,
        folder / "model",
        folder / "corpus.txt",
        student={"dtype": "float32"},
        objective={"temperature": 1.0},
        train={"cold_start_tokens": 0, "total_steps": 4},
    )
    text = path.read_text().replace(f"serve:\n    model: {folder / 'model'}\n", f"target: {process.target}\n  topk: 32\n")
    path.write_text(text)
    result = bbopd("distill", str(path))
    assert result.returncode == 0, result.stderr
    lines = steps(folder / "run")
    assert len(lines) >= 2
    assert sum(line["rollout_tokens"] for line in lines) > 0
    assert all(np.isfinite(line["kd"]) for line in lines)
    assert any(line["kd"] > 0 for line in lines)
