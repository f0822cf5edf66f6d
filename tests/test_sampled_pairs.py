"""What a policy gradient asks of a teacher and of the sampling that it is the gradient of, and which pairs are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from bbopd.config import ObjectiveConfig, RunConfig, ServeConfig, TeacherConfig
from bbopd.errors import ConfigError, TeacherError
from bbopd.objectives import check_offer, make_objective, signal_for
from bbopd.types import Offer, SignalSpec, TeacherInfo


def config(**options: object) -> ObjectiveConfig:
    return ObjectiveConfig(name="policy_gradient", **{"temperature": 1.0, **options})


def served(**options: object) -> TeacherConfig:
    return TeacherConfig(serve=ServeConfig(model="tiny"), **options)


def test_it_asks_about_rollouts_alone() -> None:
    objective = make_objective(config(temperature=0.7))
    assert signal_for(objective, served(signal="sampled")) == SignalSpec("sampled", 0.7, rollouts_only=True)
    assert signal_for(objective, served(signal="full")) == SignalSpec("full", rollouts_only=True)
    assert signal_for(objective, served(topk=8)) == SignalSpec("topk", 0.7, 8, rollouts_only=True)


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy_gradient cannot use teacher.signal sampled: .*signal to full or candidates or topk"):
        signal_for(make_objective(config(baseline="kl")), served(signal="sampled"))
    with pytest.raises(ConfigError, match=r"reverse_kl cannot use teacher.signal sampled: .*objective.name to policy_gradient"):
        signal_for(make_objective(ObjectiveConfig(name="reverse_kl")), served(signal="sampled"))
    want, text_only = SignalSpec("sampled", 1.0), TeacherInfo("tiny", 9, (Offer("full"),))
    with pytest.raises(
        TeacherError, match=r"policy_gradient asks for the sampled signal, but teacher tiny offers full.*fits: full for .*policy_gradient"
    ):
        check_offer(make_objective(config()), text_only, want)
    with pytest.raises(TeacherError, match=r"forward_kl asks for the full signal.*what fits: sampled for policy_gradient$"):
        check_offer(make_objective(ObjectiveConfig()), TeacherInfo("tiny", 9, (Offer("sampled"),)), SignalSpec("full"))


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("rollouts", {"top_p": 0.9}, "rollouts.top_p 0.9 and top_k 0.*set top_p=1 and top_k=0"),
        ("rollouts", {"top_k": 50}, "top_p 1.0 and top_k 50"),
        ("rollouts", {"temperature": 0.8}, "objective.temperature 1.0 with rollouts.temperature 0.8.*set both to the same"),
        ("objective", {"temperature": 2.0}, "objective.temperature 2.0 with rollouts.temperature 1.0"),
        ("rollouts", {"on_policy_fraction": 0.0}, "learns from rollouts alone: set rollouts.on_policy_fraction above 0"),
        ("objective", {"baseline": "kl"}, "objective.baseline kl with teacher.signal sampled.*set teacher.signal=full"),
        ("objective", {"clip": 1.5}, "clip"),
        ("objective", {"discount": 1.1}, "discount"),
    ],
)
def test_sampling_that_its_gradient_is_not_of_is_refused(section: str, options: dict[str, object], message: str) -> None:
    run: dict[str, Any] = {
        "student": {"model": "tiny"},
        "teacher": {"serve": {"model": "tiny"}, "signal": "sampled"},
        "objective": {"name": "policy_gradient", "temperature": 1.0},
        "data": {"prompts": [{"text": "corpus.txt"}]},
        "rollouts": {},
    }
    RunConfig.model_validate(run)
    run[section] = {**run[section], **options}
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(run)


def test_a_clip_may_have_one_number_two_or_none() -> None:
    assert [config(clip=clip).clip_range for clip in (0.1, (0.1, 0.3), None)] == [(0.1, 0.1), (0.1, 0.3), None]
    assert ObjectiveConfig().clip_range == (0.2, 0.2)
