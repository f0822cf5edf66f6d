"""Several teachers in one run: who is asked about what, how much it counts, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bbopd.config import DataConfig, ObjectiveConfig, RunConfig
from bbopd.config_file import parse_config
from bbopd.data.assemble import assemble
from bbopd.data.prompts import load_prompts
from bbopd.data.streams import each
from bbopd.errors import ConfigError, TeacherError
from bbopd.objectives import make_objective
from bbopd.output_head import OutputHead
from bbopd.pipeline.progress import Silent
from bbopd.pipeline.session import open_session
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend, FakeTeacher
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.routed import RoutedTeacher
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer
from tests.waiting import until

V = 50
TEXT = "the thing in the theory begins within this thin line and nothing other than the inner end of it "
NAMES = ("own", "code", "law")


def fakes(**options) -> dict[str, FakeTeacher]:
    return {name: FakeTeacher(FakeBackend(V, seed, **options)) for seed, name in enumerate(NAMES)}


def rollouts(*teachers: dict[str, float], seed: int = 0) -> list[Rollout]:
    """One for each of what is asked, in order."""
    draw = np.random.default_rng(seed)
    return [
        Rollout(
            f"r{index}",
            Prompt(f"p{index}", (1, 2, 3), teachers=tuple(asked.items())),
            tuple(int(token) for token in draw.integers(0, V, 4 + index)),
            logprobs=-draw.random(4 + index).astype(np.float32),
            draw=index,
        )
        for index, asked in enumerate(teachers)
    ]


async def scored_by(teacher, some, want):
    found = [scored async for scored in teacher.score(each(some), want)]
    return sorted(found, key=lambda scored: scored.rollout.draw)


def routed(teachers) -> RoutedTeacher:
    return RoutedTeacher(teachers["own"], {name: one for name, one in teachers.items() if name != "own"})


async def test_every_rollout_goes_to_the_teacher_that_its_prompt_names():
    teachers, want = fakes(), SignalSpec("topk", top_k=5)
    some = rollouts({}, {"code": 1.5}, {"law": 0.25}, {"own": 2.0}, {"code": 1.5}, {})
    found = await scored_by(routed(teachers), some, want)
    assert [scored.weight for scored in found] == [1.0, 1.5, 0.25, 2.0, 1.5, 1.0]
    for rollout, scored in zip(some, found, strict=True):
        name = next(iter(dict(rollout.prompt.teachers)), "own")
        (alone,) = await scored_by(teachers[name], [rollout], want)
        np.testing.assert_array_equal(scored.signal.logprobs, alone.signal.logprobs)
    assert assemble(found, want).token_weight.tolist() == [
        w for r, w in zip(some, (1, 1.5, 0.25, 2, 1.5, 1), strict=True) for _ in r.token_ids
    ]
    asked = [Prompt("a", (1, 2)), Prompt("b", (3,), teachers=(("law", 1.0), ("own", 2.0)))]
    answers = {answer.prompt.prompt_id: answer.token_ids async for answer in routed(teachers).complete(each(asked), Sampling(6, top_k=1))}
    for prompt, name in zip(asked, ("own", "law"), strict=True):
        (alone,) = [answer async for answer in teachers[name].complete(each([prompt]), Sampling(6, top_k=1))]
        assert answers[prompt.prompt_id] == alone.token_ids


def loss_of(items, want, hidden, weight) -> torch.Tensor:
    objective = make_objective(ObjectiveConfig(name="policy_gradient", temperature=1.0, clip=None, discount=0.5))
    batch = assemble(items, want)
    return objective.loss(hidden, OutputHead(weight), batch, ce_weight=0.0, kd_weight=1.0, normalizer=(1.0, 10.0)).loss


async def test_teachers_of_one_prompt_give_the_weighted_sum_of_their_losses():
    teachers, want = fakes(), SignalSpec("sampled", rollouts_only=True)
    shares = {"own": 0.5, "law": 1.25}
    some = rollouts(shares, shares)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 6, generator=generator).requires_grad_() for n in (sum(map(len, some)), V))
    blended = loss_of(await scored_by(routed(teachers), some, want), want, hidden, weight)
    each_alone = [
        share * loss_of(await scored_by(teachers[name], some, want), want, hidden, weight).double() for name, share in shares.items()
    ]
    assert blended.item() == pytest.approx(sum(one.item() for one in each_alone), rel=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(blended, (hidden, weight)), torch.autograd.grad(sum(each_alone), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


async def test_what_one_teacher_raises_ends_all_and_an_early_end_closes_them():
    teachers = {**fakes(), "law": FakeTeacher(FakeBackend(V, 2, die_after=0))}
    with pytest.raises(TeacherError, match="die"):
        await scored_by(routed(teachers), rollouts({"own": 1.0}, {"law": 1.0}), SignalSpec("sampled"))
    before = asyncio.all_tasks()
    async with contextlib.aclosing(
        routed(fakes(delay=0.01)).score(each(rollouts({}, {"code": 1.0}, {})), SignalSpec("sampled"))
    ) as answers:
        async for _ in answers:
            break
    await until(lambda: asyncio.all_tasks() == before)


def run_of(**sections) -> dict:
    base = {
        "student": {"model": "tiny"},
        "teacher": {"target": "grpc://localhost:1", "topk": 8},
        "teachers": {"code": {"target": "grpc://localhost:2"}},
        "objective": {"name": "forward_kl", "temperature": 1.0},
        "data": {"prompts": [{"text": "a.txt", "teachers": {"code": 2.0}}, {"text": "b.txt"}]},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}


def test_a_named_teacher_is_asked_for_the_same_signal():
    config = RunConfig.model_validate(run_of())
    assert (config.teachers["code"].signal, config.teachers["code"].topk) == ("topk", 8)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    sources = [{"demo": True, "teachers": {"own": 1, "code": 2}}]
    blend = run_of(teacher={"signal": "sampled"}, objective={"name": "policy_gradient"}, data={"prompts": sources})
    assert RunConfig.model_validate(blend).names_teachers
    with pytest.raises(ConfigError, match=r"unknown key teachers\.code\.taget.*did you mean teachers\.code\.target"):
        parse_config(run_of(teachers={"code": {"taget": "x"}}), [], RunConfig, "run.yaml")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"prompts": [{"demo": True, "teachers": {"cod": 1}}]}}, "names teacher cod, which is none of own, code"),
        ({"data": {"prompts": [{"demo": True}]}}, "teachers.code is asked about nothing"),
        ({"data": {"prompts": [{"demo": True, "teachers": {"code": 0}}]}}, "greater than 0"),
        ({"data": {"prompts": [{"demo": True, "teachers": {"code": 1, "own": 1}}]}}, "names 2 teachers: .*policy_gradient.*sampled"),
        ({"teachers": {"code": {"target": "grpc://localhost:2", "topk": 9}}}, r"asked for topk \(topk 9\), teacher for topk \(topk 8\)"),
        ({"teachers": {"code": {"target": ["grpc://localhost:2", "grpc://localhost:3"]}}}, "teachers.code has 2 targets"),
        ({"teachers": {"code": {"serve": {"model": "x"}}}}, "teachers.code.serve: only teacher has that"),
        ({"teachers": {"code": {"target": "grpc://localhost:2", "prices": {"prompt": 1}}}}, "teachers.code.prices"),
        ({"teacher": {"signal": "text"}, "objective": {"name": "seqkd"}, "train": {"labelled_tokens": 9}}, "several teachers with objec"),
    ],
)  # fmt: skip
def test_teachers_that_do_not_go_together_are_refused(sections, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(run_of(**sections))


def test_prompts_to_train_on_carry_the_teachers_of_their_source(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n\n\n".join(f"{name} {number} " + TEXT * 2 for number in range(6)))
    sources = [{"text": str(tmp_path / "a.txt"), "teachers": {"code": 2.0}}, {"text": str(tmp_path / "b.txt")}]
    config = DataConfig.model_validate({"prompts": sources, "prompt_tokens": 12, "response_tokens": 16})
    found = load_prompts(config, tiny_tokenizer(), max_seq_len=64, eos_token_id=2, max_new_tokens=12)
    named = (
        {prompt.teachers for prompt in found.train if "a.txt" in prompt.source},
        {p.teachers for p in found.train if "b.txt" in p.source},
    )
    assert named == ({(("code", 2.0),)}, {()})
    assert not any(prompt.teachers for prompt in found.held_out)


async def test_a_run_asks_each_of_its_teachers(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    save_folder(tmp_path / "student", tiny_llama(rows, seed=1, max_positions=64))
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n\n\n".join(f"{name} {number} " + TEXT * 2 for number in range(6)))
    backends = [HFBackend(tiny_llama(rows, seed=seed), tokenizer) for seed in (2, 3)]
    other = tiny_tokenizer((("o", "u"), ("ou", "t"), ("i", "n")))
    servers = [await start_server(backend) for backend in (*backends, HFBackend(tiny_llama(rows, seed=4), other))]
    config = {
        "student": {"model": str(tmp_path / "student"), "dtype": "float32"},
        "teacher": {"target": servers[0].target, "topk": 8},
        "teachers": {"code": {"target": servers[1].target}},
        "rollouts": {"per_update": 8, "max_new_tokens": 8, "max_staleness": 0},
        "objective": {"name": "forward_kl", "temperature": 1.0, "ramp": 0},
        "train": {"batch_tokens": 64, "max_seq_len": 64, "on_policy_tokens": 100, "warmup": 0},
        "data": {
            "prompts": [{"text": str(tmp_path / "a.txt"), "teachers": {"code": 0.5}}, {"text": str(tmp_path / "b.txt")}],
            "prompt_tokens": 12,
            "response_tokens": 16,
        },
        "eval": {"max_new_tokens": 8},
        "output": str(tmp_path / "run"),
    }
    try:
        async with open_session(RunConfig.model_validate(config), command="test", progress=Silent()) as session:
            parts = session.parts
            asked = [replace(rollout, rollout_id=f"r{n}") for n, rollout in enumerate(_answers(parts.prompts.next_prompts(6)))]
            assert {len(rollout.prompt.teachers) for rollout in asked} == {0, 1}
            for rollout, scored in zip(asked, await scored_by(parts.teacher, asked, parts.want), strict=True):
                (expected,) = backends[len(rollout.prompt.teachers)].score([rollout], parts.want)
                np.testing.assert_allclose(scored.signal.sampled, expected.sampled, atol=2e-3)
                assert scored.weight == (0.5 if rollout.prompt.teachers else 1.0)
        config["teachers"]["code"]["target"], config["output"] = servers[2].target, str(tmp_path / "other")
        with pytest.raises(TeacherError, match=r"teachers\.code: .*do not have the same tokens|teachers\.code: .*not the same ones"):
            async with open_session(RunConfig.model_validate(config), command="test", progress=Silent()):
                pass
    finally:
        for server in servers:
            await server.stop(0)


def _answers(prompts: list[Prompt]) -> list[Rollout]:
    return [Rollout(prompt.prompt_id, prompt, (5, 6, 7, 2), draw=draw) for draw, prompt in enumerate(prompts)]
