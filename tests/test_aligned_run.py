"""Whole runs with a teacher of another tokenizer, behind gRPC; and what is refused before anything is spent."""

from __future__ import annotations

import dataclasses
import math

import pytest
from pydantic import ValidationError

from bbopd.cli.execute import execute
from bbopd.cli.main import main
from bbopd.config import RunConfig
from bbopd.data.assemble import assemble
from bbopd.data.streams import each
from bbopd.errors import ModelError, TeacherError
from bbopd.pipeline.cycle import as_labelled
from bbopd.pipeline.preflight import check_teacher_tokenizer
from bbopd.rpc.server import start_server
from bbopd.teachers.aligned import AligningTeacher
from bbopd.teachers.hf import HFBackend
from bbopd.types import TeacherInfo
from tests.cli_runs import WORDS, steps, write_config
from tests.openai_runs import run_config, served
from tests.openai_server import OpenAIServer
from tests.test_any_vocabulary import session_of, updates
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer
from tests.two_tokenizers import byte_level_tokenizer, folding_tokenizer, sentencepiece_tokenizer

pytestmark = pytest.mark.timeout(600)
ALIGNED = {"name": "aligned", "temperature": 1.0}


def backend_of(tokenizer, **options) -> HFBackend:
    return HFBackend(tiny_llama(len(tokenizer) + 7, seed=3, max_positions=options.pop("positions", 256)), tokenizer, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_bbopd_distill_from_a_teacher_of_another_family(tmp_path, capsys):
    student = save_folder(tmp_path / "student", tiny_llama(vocab_size=262, layers=4), tiny_tokenizer())
    tokenizer = sentencepiece_tokenizer()
    teacher = save_folder(tmp_path / "teacher", tiny_llama(len(tokenizer), seed=3), tokenizer)
    text = tmp_path / "corpus.txt"
    text.write_text("\n\n\n".join(" ".join(WORDS[(i + j * (i % 5 + 1)) % len(WORDS)] for j in range(80)) for i in range(40)))
    sections = {"teacher": {"serve": {"model": str(teacher)}, "topk": 16}, "objective": {"ramp": 0.2, **ALIGNED}}
    path = write_config(tmp_path, student, text, train={"cold_start_tokens": 60, "on_policy_tokens": 200}, **sections)
    assert main(["distill", str(path)]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "has tokens of its own" in said
    assert "how far they agree is not measured" in said
    lines = steps(tmp_path / "run")
    assert lines
    assert all(math.isfinite(line["loss"]) and line["kd"] != 0 for line in lines)
    assert all(0 < line["aligned_share"] < 1 for line in lines)
    assert lines[-1]["on_policy_tokens"] >= 200


async def test_a_teacher_with_padding_and_a_tokenizer_that_is_named(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path / "theirs")
    backend = backend_of(tokenizer)
    backend.info = dataclasses.replace(backend.info, vocab_size=len(tokenizer) + 7)  # a server that gives every row of its head
    teacher = {"topk": 16, "tokenizer": str(tmp_path / "theirs")}
    async with session_of(tmp_path, 262, backend, objective={"ramp": 0, **ALIGNED}, teacher=teacher) as session:
        assert isinstance(session.parts.teacher, AligningTeacher)
        assert session.teacher is None, "how far the two agree cannot be measured"
        found = await updates(session)
    assert all(math.isfinite(number) for one in found if isinstance(one[0], float) for number in one)


async def test_with_the_students_own_tokenizer_the_run_is_that_of_forward_kl(tmp_path):
    """But for what the student writes in other tokens than its tokenizer would, so labelled text alone is trained on."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "theirs")
    losses = []
    for name, teacher in (("aligned", {"tokenizer": str(tmp_path / "theirs")}), ("forward_kl", {})):
        folder = tmp_path / name
        folder.mkdir()
        backend = HFBackend(tiny_llama(262, seed=2, tied=False), tokenizer)
        objective = {"ramp": 0, "name": name, "temperature": 1.0}
        async with session_of(folder, 262, backend, objective=objective, teacher={"topk": 16, **teacher}) as session:
            parts = session.parts
            prompts = parts.prompts.next_labelled(3)
            rollouts = [as_labelled(prompt, draw=number) for number, prompt in enumerate(prompts)]
            items = sorted([one async for one in parts.teacher.score(each(rollouts), parts.want)], key=lambda one: one.rollout.draw)
            metrics = parts.trainer.train_step([assemble(items, parts.want)])
            losses.append((metrics.ce, metrics.kd, metrics.loss, metrics.grad_norm))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_an_openai_endpoint_is_asked_in_its_own_tokens(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path / "theirs")
    server = OpenAIServer(HFBackend(tiny_llama(len(tokenizer), seed=1), tokenizer, name="tiny"), decode=tokenizer.decode)
    with served(server) as port:
        teacher = {"topk": 8, "tokenizer": str(tmp_path / "theirs"), "api": {"scoring": "prompt_logprobs"}}
        config = run_config(tmp_path, port, teacher=teacher, objective=ALIGNED, train={"on_policy_tokens": 40})
        assert execute(config, plain=True) == 0
    assert all(0 < line["aligned_share"] <= 1 for line in steps(tmp_path / "run"))


# ---------------------------------------------------------------- what is refused


def config_of(**sections) -> dict:
    base = {
        "student": {"model": "student"},
        "teacher": {"target": "grpc://127.0.0.1:7070", "topk": 8, "tokenizer": "theirs"},
        "objective": ALIGNED,
        "data": {"prompts": [{"text": "corpus.txt"}]},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {"tokenizer": None}}, "set teacher.tokenizer to the Hub id, or a folder"),
        ({"objective": {"name": "forward_kl"}}, "teacher.tokenizer is for an OpenAI-compatible target, or for objective.name=aligned"),
        ({"rollouts": {"temperature": 0.7}}, "set rollouts.temperature to the same, top_p=1 and top_k=0, or objective.span_weight=0"),
        ({"rollouts": {"top_p": 0.9}}, "top_p 0.9, top_k 0"),
        ({"objective": {"temperature": 2.0}}, "set objective.temperature=1"),
        ({"teacher": {"signal": "text"}}, "set objective.name=seqkd with teacher.signal=text"),
    ],
)
def test_options_that_do_not_go_together(sections, message):
    RunConfig.model_validate(config_of())
    RunConfig.model_validate(config_of(rollouts={"temperature": 0.7}, objective={"span_weight": 0}))
    RunConfig.model_validate(config_of(teacher={"tokenizer": None, "target": None, "serve": {"model": "teacher"}}))
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(config_of(**sections))


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ("other", TeacherError, r"teacher.tokenizer .*other is not the tokenizer of teacher LlamaForCausalLM: SHA-256 over the vocabulary"),
        ("missing", ModelError, "missing"),
        ("folding", ModelError, r"changes text: .* learn from what the teacher writes"),
    ],
)
async def test_a_tokenizer_that_is_not_the_teachers_or_cannot_be_aligned(tmp_path, named, error, message):
    theirs = folding_tokenizer() if named == "folding" else byte_level_tokenizer()
    sentencepiece_tokenizer().save_pretrained(tmp_path / "other")
    theirs.save_pretrained(tmp_path / "folding")
    teacher = {"topk": 8, "tokenizer": str(tmp_path / named)}
    with pytest.raises(error, match=message):
        async with session_of(tmp_path, 262, backend_of(theirs), objective={"ramp": 0, **ALIGNED}, teacher=teacher):
            pass


async def test_prompts_that_are_too_long_for_the_teacher(tmp_path):
    theirs = sentencepiece_tokenizer()
    theirs.save_pretrained(tmp_path / "theirs")
    teacher = {"topk": 8, "tokenizer": str(tmp_path / "theirs")}
    with pytest.raises(TeacherError, match=r"of the teacher's tokens, and teacher LlamaForCausalLM takes 8, the answer included"):
        async with session_of(tmp_path, 262, backend_of(theirs, positions=8), objective={"ramp": 0, **ALIGNED}, teacher=teacher):
            pass


async def test_other_tokens_without_the_objective_are_refused_with_it_as_a_way_out(tmp_path):
    with pytest.raises(TeacherError, match=r"objective.name=aligned with teacher.topk and teacher.tokenizer"):
        async with session_of(tmp_path, 262, backend_of(byte_level_tokenizer())):
            pass


def test_a_teacher_that_does_not_say_which_tokens_it_has_must_at_least_have_as_many():
    tokenizer = byte_level_tokenizer()
    assert check_teacher_tokenizer(TeacherInfo("one", len(tokenizer) + 5, ()), tokenizer, "named") == len(tokenizer)
    with pytest.raises(TeacherError, match=r"teacher.tokenizer named has \d+ tokens, teacher one 5"):
        check_teacher_tokenizer(TeacherInfo("one", 5, ()), tokenizer, "named")


async def test_replicas_are_compared_in_their_own_tokens(tmp_path):
    theirs = byte_level_tokenizer()
    theirs.save_pretrained(tmp_path / "theirs")
    other = await start_server(backend_of(theirs))
    first = await start_server(backend_of(theirs))
    targets = [f"grpc://127.0.0.1:{server.port}" for server in (first, other)]
    teacher = {"topk": 8, "tokenizer": str(tmp_path / "theirs"), "target": targets}
    try:
        async with session_of(tmp_path, 262, backend_of(theirs), objective={"ramp": 0, **ALIGNED}, teacher=teacher) as session:
            assert isinstance(session.parts.teacher, AligningTeacher)
    finally:
        for server in (first, other):
            await server.stop(0)
