"""An OpenAI-compatible endpoint as a teacher: what it is found to offer, what it says of tokens, what it writes, and what it costs."""

from __future__ import annotations

import contextlib
import json
import logging
import ssl
from collections.abc import AsyncIterator

import numpy as np
import pytest

from bbopd.config import ApiConfig, ClientTlsConfig, ObjectiveConfig, TeacherConfig
from bbopd.errors import ConfigError, TeacherError
from bbopd.objectives import check_offer, make_objective
from bbopd.teachers.budget import Budget
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.openai import OpenAITeacher
from bbopd.types import Offer, Prompt, Sampling, SignalSpec
from tests.certificates import make_certificates
from tests.faults import assert_nothing_lost, make_rollouts, score_all, stream
from tests.openai_server import CHAT, ECHO, SGLANG, VLLM, OpenAIServer
from tests.tiny_models import save_folder, tiny_tokenizer
from tests.waiting import PATIENCE

pytestmark = pytest.mark.timeout(600)

VOCAB = 320
TOKENIZER = tiny_tokenizer()
KEY = "sk-0123456789abcdef"


def serve(backend: FakeBackend | None = None, **options) -> OpenAIServer:
    return OpenAIServer(
        backend or FakeBackend(VOCAB), **{"decode": TOKENIZER.decode, "encode": lambda text: TOKENIZER(text)["input_ids"]} | options
    )


@contextlib.asynccontextmanager
async def connected(server: OpenAIServer, *, budget: Budget | None = None, **options) -> AsyncIterator[OpenAITeacher]:
    """A teacher over a running server, with 8 ids a token unless told."""
    async with server.serving() as port:
        config = TeacherConfig(**{"target": f"openai://127.0.0.1:{port}/v1", "topk": 8, "timeout": PATIENCE} | options)
        teacher = await OpenAITeacher.connect(config, tokenizer=TOKENIZER, vocab_size=VOCAB, budget=budget)
        try:
            yield teacher
        finally:
            await teacher.close()


# ---------------------------------------------------------------- scoring


@pytest.mark.parametrize("way", [VLLM, SGLANG, ECHO])
@pytest.mark.parametrize("want", [SignalSpec("topk", top_k=8), SignalSpec("topk", top_k=1), SignalSpec("sampled")], ids=str)
async def test_every_way_of_scoring_gives_the_models_own_distribution(way, want):
    backend = FakeBackend(VOCAB)
    rollouts = make_rollouts(20, VOCAB)
    async with connected(serve(backend, ways=[way])) as teacher:
        scored = await score_all(teacher, rollouts, want)
    assert_nothing_lost(backend, rollouts, scored, want)
    for item in scored if want.level == "topk" else ():
        z = backend.logits(item.rollout).astype(np.float64)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        tail = 1.0 - np.sort(p, axis=1)[:, -want.top_k :].sum(axis=1)
        np.testing.assert_allclose(np.exp(item.signal.log_tail), tail, atol=2e-6)


async def test_what_it_offers_is_found_out():
    async with connected(serve(max_top_k=5), topk=64) as teacher:
        assert teacher.info.offers == (
            Offer("topk", 5, 1.0, 1.0, "derived"),
            Offer("sampled", 0, 1.0, 1.0, "none"),
            Offer("text", 0, 0.01, 2.0, "none"),
        )
        assert teacher.info.max_sequence_tokens == 4095
        objective = make_objective(ObjectiveConfig(name="forward_kl", temperature=1.0))
        with pytest.raises(TeacherError, match=r"asks for the top 64 ids a token, .* gives at most 5: set teacher.topk=5"):
            check_offer(objective, teacher.info, SignalSpec("topk", top_k=64))
        with pytest.raises(TeacherError, match=r"asks for temperature 2.0, .* applies 1.0 to 1.0"):
            check_offer(objective, teacher.info, SignalSpec("topk", 2.0, 5))
        with pytest.raises(TeacherError, match=r"offers topk, sampled, text: .* what fits: topk for forward_kl, jsd"):
            check_offer(objective, teacher.info, SignalSpec("full"))


@pytest.mark.parametrize("largest", [0, 1, 3, 6, 19, 20, 33, 64])
async def test_the_largest_number_of_ids_is_found_exactly(largest):
    async with connected(serve(max_top_k=largest), topk=64) as teacher:
        offer = teacher.info.offer("topk")
        assert (0 if offer is None else offer.max_top_k) == largest


async def test_an_endpoint_that_scores_nothing_only_writes():
    async with connected(serve(ways=[CHAT], decode=None)) as teacher:
        assert [offer.level for offer in teacher.info.offers] == ["text"]
        assert teacher.notes


# ---------------------------------------------------------------- the vocabulary


async def test_ids_that_mean_something_else_are_refused_by_name():
    def exchanged(*pair: int):
        return lambda ids: TOKENIZER.decode([{pair[0]: pair[1], pair[1]: pair[0]}.get(token, token) for token in ids])

    a, b = TOKENIZER.convert_tokens_to_ids(["a", "b"])
    with pytest.raises(TeacherError, match=rf"does not number tokens as the student does: id {a} is 'b' there and 'a' here"):
        async with connected(serve(decode=exchanged(a, b))):
            pass
    pieces = TOKENIZER("é€", add_special_tokens=False)["input_ids"]  # bytes, which have no text of their own
    with pytest.raises(TeacherError, match=r"among the \d+ ids .* are such as make 'another text' there"):
        async with connected(serve(decode=exchanged(pieces[1], pieces[-1]))):
            pass


async def test_ids_that_mean_nobody_knows_what_are_refused(tmp_path):
    with pytest.raises(TeacherError, match=r"does not tell what its token ids stand for .* set teacher.tokenizer"):
        async with connected(serve(decode=None)):
            pass
    save_folder(tmp_path)
    async with connected(serve(decode=None), tokenizer=str(tmp_path)) as teacher:
        named = teacher.info.vocab_sha256
    async with connected(serve()) as teacher:
        assert teacher.info.vocab_sha256 == named


async def test_models_are_chosen_by_name():
    async with connected(serve(), model=f"fake-{VOCAB}-0") as teacher:
        assert teacher.info.model == f"fake-{VOCAB}-0"
    with pytest.raises(ConfigError, match=rf"teacher.model 'other' is not at .*, which has fake-{VOCAB}-0"):
        async with connected(serve(), model="other"):
            pass


# ---------------------------------------------------------------- writing


async def test_it_writes_from_token_ids():
    backend = FakeBackend(VOCAB)
    prompts = [Prompt(f"p{number}", (3, 5, number)) for number in range(5)]
    sampling = Sampling(7, temperature=0.7, seed=11, stop_token_ids=(9,))
    async with connected(serve(backend)) as teacher:
        written = {answer.prompt.prompt_id: answer async for answer in teacher.complete(stream(prompts), sampling)}
    for prompt, expected in zip(prompts, backend.generate(prompts, sampling), strict=True):
        answer = written[prompt.prompt_id]
        assert (answer.token_ids, answer.text, answer.finish_reason) == (expected.token_ids, expected.text, expected.finish_reason)


async def test_it_writes_from_the_message_in_a_prompt():
    server = serve(ways=[CHAT])
    ids = TOKENIZER.apply_chat_template([{"role": "user", "content": "the thin thing"}], add_generation_prompt=True, return_dict=False)
    prompts = [Prompt("chat", tuple(ids)), Prompt("text", tuple(TOKENIZER("no chat")["input_ids"]))]
    async with connected(server, api=ApiConfig(scoring="none")) as teacher:
        written = [answer async for answer in teacher.complete(stream(prompts), Sampling(30, top_k=1))]
        twice = Prompt("twice", tuple(ids) + tuple(ids))
        with pytest.raises(TeacherError, match="prompt twice is a conversation of several messages"):
            [answer async for answer in teacher.complete(stream([twice]), Sampling(5))]
    asked = sorted(body["messages"][0]["content"] for path, body in server.requests if path.endswith("chat/completions"))
    assert asked == ["no chat", "the thin thing"]
    for answer in written:  # ids of the student's own
        assert answer.text.startswith(TOKENIZER.decode(answer.token_ids, skip_special_tokens=True))
        assert 0 < len(answer.token_ids) <= 30


@pytest.mark.parametrize("way", [VLLM, CHAT])
async def test_it_writes_from_text_whatever_its_tokens_are(way):
    """What it thinks of the student's ids is of no matter to a run that reads its text alone; nor are ids ever sent to it."""
    server = serve(ways=[way], decode=lambda ids: "other words")
    text = Prompt("text", (), text="the thin thing")
    chat = Prompt("chat", (), messages=(("system", "be brief"), ("user", "why?")))
    async with connected(server, signal="text", topk=8) as teacher:
        assert [offer.level for offer in teacher.info.offers] == ["text"]
        assert (teacher.info.vocab_size, teacher.info.takes_text) == (0, True)
        probes = len(server.requests)
        written = {answer.prompt.prompt_id: answer async for answer in teacher.complete(stream([text, chat]), Sampling(9, seed=4))}
        with pytest.raises(TeacherError, match="outside teacher"):
            [answer async for answer in teacher.complete(stream([Prompt("ids", (3, 4))]), Sampling(9))]
    assert all(answer.text for answer in written.values())
    asked = {json.dumps(body.get("messages", body.get("prompt"))) for _, body in server.requests[probes:]}
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    alone = [{"role": "user", "content": text.text}]
    assert asked == {json.dumps(messages), json.dumps(text.text if way == VLLM else alone)}


# ---------------------------------------------------------------- who may ask, and how


async def test_a_key_is_sent_and_shown_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    async with connected(serve(key=KEY), token_env="TEACHER_KEY") as teacher:
        assert len(await score_all(teacher, make_rollouts(3, VOCAB), SignalSpec("sampled"))) == 3
        shown = repr(vars(teacher)) + repr(vars(teacher._client)) + repr(teacher._client.address)
    with pytest.raises(TeacherError, match=r"HTTP 401: Incorrect API key provided: \[token\]: check teacher.token_file") as wrong:
        async with connected(serve(key="another-key-0123456"), token_env="TEACHER_KEY"):
            pass
    assert KEY not in shown + str(wrong.value) + caplog.text


async def test_it_is_reached_over_tls_and_not_in_plain_text_from_afar(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    make_certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    tls = ClientTlsConfig(ca=str(tmp_path / "ca.pem"))
    async with serve(key=KEY).serving(tls=context) as port:
        config = TeacherConfig(target=f"https://localhost:{port}/v1", topk=8, tls=tls, token_env="TEACHER_KEY")
        teacher = await OpenAITeacher.connect(config, tokenizer=TOKENIZER, vocab_size=VOCAB)
        assert teacher.info.offer("topk") is not None
        await teacher.close()
    far = TeacherConfig(target="openai://teacher.example:8000/v1", topk=8)
    with pytest.raises(ConfigError, match="leaves this machine, which needs TLS: use https://"):
        await OpenAITeacher.connect(far, tokenizer=TOKENIZER, vocab_size=VOCAB)


def test_targets_that_cannot_be():
    for wrong, message in (
        ({"target": "http://localhost:8000/v1"}, "is not an address this version speaks"),
        ({"target": ("openai://localhost:1/v1", "openai://localhost:2/v1")}, "cannot be one of several targets"),
        ({"target": "grpc://localhost:1", "model": "x"}, "belong to an OpenAI-compatible target"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherConfig(**wrong)
