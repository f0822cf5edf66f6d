"""Runs that mix what the teacher writes with what the student writes, in shares that change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from bbopd.config import RunConfig
from bbopd.config_file import load_config
from bbopd.errors import TeacherError
from bbopd.objectives import make_objective, signal_for
from bbopd.pipeline.teacher import writing_teacher
from bbopd.rollouts.fake import FakeEngine
from bbopd.teachers.fake import FakeBackend, FakeTeacher
from bbopd.teachers.written import WritingTeacher
from bbopd.types import Sampling, SignalSpec
from tests.loop_rig import VOCAB, Rig, prompts, run_config
from tests.tiny_models import tiny_tokenizer

FRACTION = [0.25, 0.75]


def mixed_config(output, **sections) -> RunConfig:
    base = {
        "objective": {"name": "mixed", "rollouts": {"name": "skew_reverse_kl", "weight": [1.0, 1.5]}},
        "rollouts": {"max_staleness": 0, "on_policy_fraction": FRACTION},
        "teacher": {"writes_labels": True, "topk": 20, "answers": {"max_new_tokens": 6}},
    }
    return run_config(output, **{name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}})


class CountingEngine(FakeEngine):
    """Keeps how many rollouts each cycle asked for."""

    def __init__(self) -> None:
        super().__init__(VOCAB, eos_token_id=2)
        self.asked: list[int] = []

    async def generate(self, prompts, sampling):
        self.asked.append(0)

        async def counted():
            async for prompt in prompts:
                self.asked[-1] += 1
                yield prompt

        async for rollout in super().generate(counted(), sampling):
            yield rollout


class Listening(FakeTeacher):
    """Keeps what it has scored."""

    def __init__(self) -> None:
        super().__init__(FakeBackend(VOCAB))
        self.heard = []

    async def score(self, rollouts, want):
        async for scored in super().score(rollouts, want):
            self.heard.append(scored.rollout)
            yield scored


class MixedRig(Rig):
    def __init__(self, config, **options) -> None:
        self.scorer = Listening()
        super().__init__(config, engine=CountingEngine(), teacher=self.scorer, **options)
        writer = WritingTeacher(FakeTeacher(FakeBackend(VOCAB)), tiny_tokenizer(), Sampling(6, seed=1), max_seq_len=64, shares_ids=True)
        self.loop._parts = replace(self.parts, write_labels=writer)


async def test_the_share_of_rollouts_rises_over_the_run(tmp_path):
    rig = MixedRig(mixed_config(tmp_path / "run", train={"on_policy_tokens": 400}))
    assert await rig.run() == "finished"
    counts = [count for count in rig.engine.asked if count]
    assert counts[0] == 2, "a quarter of 8"
    assert counts[-1] in (5, 6), "three quarters of 8, or just short of it: the last cycle begins before the budget is spent"
    assert counts == sorted(counts)
    lines = rig.folder.read_lines("metrics.jsonl")
    both = [line for line in lines if line["phase"] == "on_policy"]
    assert all({"kd_labelled", "kd_rollouts", "tail_share"} & set(line) for line in both)
    assert any({"kd_labelled", "kd_rollouts"} <= set(line) for line in both)


async def test_labelled_sequences_are_the_teachers_own_answers(tmp_path):
    rig = MixedRig(mixed_config(tmp_path / "run"))
    await rig.run()
    written = [rollout for rollout in rig.scorer.heard if rollout.is_labelled]
    known = {prompt.prompt_id: prompt.reference_ids for prompt in prompts()}
    assert len(written) > 8
    assert all(rollout.origin == "teacher" for rollout in written)
    assert not any(rollout.token_ids == known[rollout.prompt.prompt_id] for rollout in written)
    answers = {}
    for rollout in written:
        assert answers.setdefault(rollout.prompt.prompt_id, rollout.token_ids) == rollout.token_ids, "one prompt, one answer"
    assert {rollout.origin for rollout in rig.scorer.heard} == {"teacher", "student"}


async def test_a_stopped_run_goes_on_to_the_same_losses_and_shares(tmp_path):
    whole = MixedRig(mixed_config(tmp_path / "whole"))
    await whole.run()
    config = mixed_config(tmp_path / "parts")
    first = MixedRig(config, at_step=(6, lambda rig: rig.stop.set()))
    assert await first.run() == "stopped"
    second = MixedRig(config)
    assert await second.run() == "finished"
    assert second.losses() == whole.losses()
    assert [count for count in (*first.engine.asked, *second.engine.asked) if count] == [count for count in whole.engine.asked if count]


def test_a_configuration_says_how_many_rollouts_a_cycle_has(tmp_path):
    config = mixed_config(tmp_path)
    assert [config.rollouts_at(progress) for progress in (0.0, 0.5, 1.0, 1.7)] == [2, 4, 6, 6]
    assert (config.rollouts_per_cycle, config.most_labelled) == (4, 6)
    assert config.teacher_writes
    constant = run_config(tmp_path)
    assert {constant.rollouts_at(progress) for progress in (0.0, 0.3, 1.0)} == {4}
    assert not constant.teacher_writes
    from_none = mixed_config(tmp_path, rollouts={"on_policy_fraction": [0.0, 1.0]})
    assert [from_none.rollouts_at(progress) for progress in (0.0, 1.0)] == [1, 8], "one at least: the budget is of their tokens"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("rollouts", {"on_policy_fraction": [0.2, 1.2]}, "less than or equal to 1"),
        ("rollouts", {"on_policy_fraction": [0.0, 0.01]}, "is no rollout at all"),
        ("teacher", {"signal": "none", "topk": 64, "target": None}, "needs a teacher"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(tmp_path, section, values, message):
    with pytest.raises(ValidationError, match=message):
        mixed_config(tmp_path, **{section: values})


def test_a_teacher_that_does_not_write_is_refused(tmp_path):
    teacher = FakeTeacher(FakeBackend(VOCAB, levels=("full",)))
    with pytest.raises(TeacherError, match=r"does not offer text.*teacher\.writes_labels=false"):
        writing_teacher(mixed_config(tmp_path), teacher, tiny_tokenizer(), shares_ids=True)


def test_the_example_of_a_mixed_run_is_a_configuration():
    config = load_config(str(Path(__file__).parents[1] / "configs" / "mixed.yaml"))
    assert config.teacher_writes
    assert config.candidates == 64
    assert [config.rollouts_at(progress) for progress in (0.0, 1.0)] == [4, 12]
    assert signal_for(make_objective(config.objective), config.teacher) == SignalSpec("candidates", 1.0)
    assert RunConfig.model_validate(config.model_dump()) == config, "as a run's own record of it is read back"
