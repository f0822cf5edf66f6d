"""Heads padded by other numbers of rows than their tokenizer has tokens: the run is that of heads without any padding."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from bbopd.config import RunConfig
from bbopd.data.assemble import assemble, split_into_steps
from bbopd.data.streams import each
from bbopd.errors import TeacherError
from bbopd.modeling import load_tokenizer, used_vocabulary, vocabulary_sha256
from bbopd.pipeline.cycle import as_labelled
from bbopd.pipeline.preflight import check_vocabulary
from bbopd.pipeline.session import open_session
from bbopd.rpc.server import start_server
from bbopd.teachers.fitted import FittedTeacher, without_padding
from bbopd.teachers.hf import HFBackend
from bbopd.types import Sampling, TeacherInfo, TeacherSignal
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

TOKENS = 262
TEXT = "the thing in the theory begins within this thin line and nothing other than the inner end of it "
pytestmark = pytest.mark.timeout(600)


def padded(model, rows: int):
    """The same model with ``rows`` in embedding and head; the new ones would take most of the mass, were they not left out."""
    for name, layer in (("embed_tokens", model.model.embed_tokens), ("lm_head", model.lm_head)):
        weight = torch.cat([layer.weight.detach(), 3.0 * torch.randn(rows - TOKENS, layer.weight.shape[1])])
        holder = model.model if name == "embed_tokens" else model
        getattr(holder, name).weight = nn.Parameter(weight)
    model.config.vocab_size = rows
    return model


def untold(backend: HFBackend, tokenizer) -> HFBackend:
    """A server of another make: it knows its vocabulary's hash, and gives every row of its head."""
    backend.info = dataclasses.replace(backend.info, vocab_sha256=vocabulary_sha256(tokenizer, backend.info.vocab_size))
    return backend


class Silent:
    def activity(self, name, detail=""): ...
    def advance(self, metrics, budget): ...
    def evaluated(self, result): ...
    def note(self, text): ...


@contextlib.asynccontextmanager
async def session_of(folder, student_rows, backend, **sections):
    torch.manual_seed(7)
    student = tiny_llama(TOKENS, seed=1, tied=False, max_positions=64)
    save_folder(folder / "student", padded(student, student_rows) if student_rows > TOKENS else student)
    (folder / "corpus.txt").write_text("\n\n\n".join(f"{number} " + TEXT * 2 for number in range(12)))
    server = await start_server(backend)
    config = {
        "student": {"model": str(folder / "student"), "dtype": "float32"},
        "teacher": {"target": f"grpc://127.0.0.1:{server.port}"},
        "rollouts": {"per_update": 4, "max_new_tokens": 12, "max_staleness": 0},
        "objective": {"ramp": 0},
        "train": {"batch_tokens": 64, "max_seq_len": 64, "on_policy_tokens": 500, "lr": 1e-3, "warmup": 0},
        "data": {"prompts": [{"text": str(folder / "corpus.txt")}], "prompt_tokens": 12, "response_tokens": 16},
        "eval": {"max_new_tokens": 12},
        "output": str(folder / "run"),
    }
    for name, values in sections.items():
        config[name] = {**config[name], **values}
    try:
        async with open_session(RunConfig.model_validate(config), command="test", progress=Silent()) as session:
            yield session
    finally:
        await server.stop(0)


async def updates(session) -> list[tuple]:
    """What two cycles write and how they train."""
    parts, config, found = session.parts, session.config, []
    for cycle in range(2):
        await parts.engine.load_weights(parts.trainer.weights(), cycle)
        prompts, labelled = parts.prompts.next_prompts(2), parts.prompts.next_labelled(2)
        rollouts = [rollout async for rollout in parts.engine.generate(each(prompts), Sampling(12, seed=cycle))]
        rollouts += [as_labelled(prompt, draw=2 + number) for number, prompt in enumerate(labelled)]
        items = [scored async for scored in parts.teacher.score(each(rollouts), parts.want)]
        items.sort(key=lambda scored: scored.rollout.draw)
        found.append([scored.rollout.token_ids for scored in items])
        for step in split_into_steps(items, config.train.batch_tokens, 4096, config.train.max_seq_len):
            metrics = parts.trainer.train_step([assemble(batch, parts.want) for batch in step])
            found.append((metrics.ce, metrics.kd, metrics.loss, metrics.grad_norm))
    return found


def teacher(rows: int):
    torch.manual_seed(11)
    model = tiny_llama(TOKENS, seed=2, tied=False)
    return padded(model, rows) if rows > TOKENS else model


@pytest.mark.parametrize("objective", [{}, {"name": "reverse_kl"}, {"name": "jsd", "temperature": 1.0}])
@pytest.mark.parametrize("makes", ["bbopd", "another"])
async def test_padding_on_both_sides_changes_nothing(tmp_path, objective, makes):
    tokenizer = tiny_tokenizer()
    signal = {"topk": 16} if objective.get("name") == "jsd" else {}
    if signal and makes == "another":
        signal = {}
    losses = {}
    for name, student_rows, teacher_rows in (("unpadded", TOKENS, TOKENS), ("padded", 270, 300)):
        folder = tmp_path / name
        folder.mkdir()
        backend = HFBackend(teacher(teacher_rows), tokenizer if makes == "bbopd" else None)
        if makes == "another":
            backend = untold(backend, tokenizer)
            assert backend.info.vocab_size == teacher_rows
        address = {"teacher": signal} if signal else {}
        async with session_of(folder, student_rows, backend, objective={"ramp": 0, **objective}, **address) as session:
            assert session.vocab_size == TOKENS
            assert isinstance(session.teacher, FittedTeacher) == (makes == "another" and name == "padded")
            losses[name] = await updates(session)
            if name == "padded":
                weight = session.model.lm_head.weight
                assert weight.shape[0] == student_rows
    for ours, plain in zip(losses["padded"], losses["unpadded"], strict=True):
        assert ours == (pytest.approx(plain, rel=2e-4) if isinstance(plain, tuple) else plain)


def test_what_the_best_ids_hold_of_padding_leaves_them():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((5, 40)) * 2
    z[:, 30:] += 2.0
    logprobs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1)[:, :20]
    chosen = np.take_along_axis(logprobs, order, 1)
    tail = np.log1p(-np.exp(chosen).sum(axis=1))
    signal = TeacherSignal("topk", ids=order.astype(np.int32), logprobs=chosen, log_tail=tail, sampled=logprobs[:, 3])
    found = without_padding(signal, 30)
    assert found.ids is not None
    assert (found.ids < 30).all()
    is_padding = order >= 30
    assert is_padding.any(axis=1).all()
    left = np.log(np.exp(np.where(is_padding, -np.inf, chosen)).sum(axis=1) + np.exp(tail))
    np.testing.assert_allclose(found.logprobs, np.where(is_padding, -np.inf, chosen - left[:, None]), rtol=1e-5)
    np.testing.assert_allclose(np.exp(found.logprobs).sum(axis=1) + np.exp(found.log_tail), 1.0, rtol=1e-6)
    np.testing.assert_allclose(found.sampled, logprobs[:, 3] - left, rtol=1e-5)
    only = TeacherSignal(
        "topk",
        ids=np.array([[35, 36]], np.int32),
        logprobs=np.log(np.array([[0.5, 0.5]])),
        log_tail=np.array([-np.inf]),
        sampled=np.array([-1.0]),
    )
    with pytest.raises(ValueError, match="all its mass"):
        without_padding(only, 30)


def test_vocabularies_are_compared_by_content(tmp_path):
    tokenizer = tiny_tokenizer()
    other = tiny_tokenizer((("o", "u"), ("ou", "t"), ("i", "n")))
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    assert used_vocabulary(tokenizer, 320) == TOKENS

    def info(**fields):
        return TeacherInfo(model="teacher", offers=(), **fields)

    sha, foreign = vocabulary_sha256(tokenizer, 320), vocabulary_sha256(load_tokenizer(tmp_path / "other"), 300)
    for size in (TOKENS, 300, 320, 400):
        assert check_vocabulary(info(vocab_size=size, vocab_sha256=sha), tokenizer, 320) == TOKENS
    assert check_vocabulary(info(vocab_size=320), tokenizer, 320) == TOKENS
    with pytest.raises(TeacherError, match="vocabulary of 300 entries, the student of 320, and does not say of which tokens"):
        check_vocabulary(info(vocab_size=300), tokenizer, 320)
    with pytest.raises(TeacherError, match="both have 320 tokens, but not the same ones"):
        check_vocabulary(info(vocab_size=320, vocab_sha256=foreign), tokenizer, 320)
    with pytest.raises(
        TeacherError, match=r"do not have the same tokens.* of 262 ids 2 differ, first: 259 is 'ou' there and 'th' here, 260 is"
    ):
        check_vocabulary(info(vocab_size=300, vocab_sha256=foreign), tokenizer, 320, named=str(tmp_path / "other"))
    with pytest.raises(TeacherError) as caught:  # a tokenizer that is not proven to be the teacher's names nothing
        check_vocabulary(info(vocab_size=300, vocab_sha256="0" * 64), tokenizer, 320, named=str(tmp_path / "other"))
    assert "first:" not in str(caught.value)
