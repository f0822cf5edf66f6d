"""The texts of a run: its prompts, read and held to what the run wants of them, and a few to compare teachers by."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bbopd.config import RunConfig
from bbopd.data.prompts import PromptSet, load_prompts
from bbopd.errors import DataError
from bbopd.pipeline.student import end_of_text
from bbopd.rollouts.candidates import CandidateChooser
from bbopd.types import Prompt, Rollout, TeacherInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_COMPARED_PROMPTS = 4  # by which replicas are compared
_COMPARED_TOKENS = 64  # of each


def read_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """The prompts of a run. Raises `DataError` for those that cannot be read or do not fit, `ConfigError` without an end of text."""
    return load_prompts(
        config.data,
        tokenizer,
        seed=config.train.seed,
        max_seq_len=config.train.max_seq_len,
        eos_token_id=end_of_text(tokenizer),
        max_new_tokens=config.rollouts.max_new_tokens,
    )


def prompts_to_label(config: RunConfig, prompts: PromptSet, eos_token_id: int) -> list[Prompt]:
    """The prompts to train on; where the teacher writes all labels, each has a place for one, whether or not an answer is known."""
    if not config.teacher_writes:
        return prompts.train
    return [replace(prompt, reference_ids=(eos_token_id,)) for prompt in prompts.train]


def check_labels(config: RunConfig, prompts: PromptSet) -> None:
    if config.teacher_writes:
        return
    if (config.most_labelled or config.train.cold_start_tokens) and not any(prompt.reference_ids for prompt in prompts.train):
        raise DataError(
            f"rollouts.on_policy_fraction {config.rollouts.on_policy_fraction} and train.cold_start_tokens "
            f"{config.train.cold_start_tokens} ask for labelled sequences, but no prompt has a known continuation: "
            "add text, or responses, to data.prompts, or set rollouts.on_policy_fraction=1 and train.cold_start_tokens=0"
        )


def texts_to_compare(prompts: PromptSet, info: TeacherInfo, choose: CandidateChooser | None) -> list[Rollout]:
    """A few short texts of the run's own, each cut in half, for a teacher to score; with the ids to ask about where ``choose`` is given."""
    longest = min(_COMPARED_TOKENS, info.max_sequence_tokens or _COMPARED_TOKENS)
    rollouts = []
    for prompt in (*prompts.held_out, *prompts.train)[:_COMPARED_PROMPTS]:
        ids = (*prompt.token_ids, *(prompt.reference_ids or ()))[:longest]
        if len(ids) > 1:
            rollouts.append(Rollout(prompt.prompt_id, Prompt(prompt.prompt_id, ids[: len(ids) // 2]), ids[len(ids) // 2 :]))
    return rollouts if choose is None else choose(rollouts)
