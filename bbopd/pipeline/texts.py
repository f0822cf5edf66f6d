"""The texts of a run: its prompts, read and held to what the run wants of them, and a few to compare teachers by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from bbopd.config import RunConfig
from bbopd.data.draws import PromptStream, as_it_is
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
        max_seq_len=config.train.max_seq_len,
        eos_token_id=end_of_text(tokenizer),
        max_new_tokens=config.rollouts.max_new_tokens,
    )


def place_for_label(config: RunConfig, eos_token_id: int) -> Callable[[Prompt], Prompt]:
    """What gives a prompt a place for an answer, known or not, where the teacher writes all labels; elsewhere it leaves prompts alone."""

    def with_place(prompt: Prompt) -> Prompt:
        return replace(prompt, reference_ids=(eos_token_id,))

    return with_place if config.teacher_writes else as_it_is


def open_stream(config: RunConfig, prompts: PromptSet, eos_token_id: int) -> PromptStream:
    """Draws from ``prompts``, as the run's seed and rank say."""
    return PromptStream(
        prompts.train,
        config.train.seed,
        shares=prompts.shares,
        rank=config.data.rank,
        world_size=config.data.world_size,
        prepare=place_for_label(config, eos_token_id),
    )


def check_labels(config: RunConfig, prompts: PromptSet) -> None:
    if config.teacher_writes:
        return
    if (config.most_labelled or config.train.cold_start_tokens) and not any(prompt.reference_ids for prompt in prompts.to_train):
        raise DataError(
            f"rollouts.on_policy_fraction {config.rollouts.on_policy_fraction} and train.cold_start_tokens "
            f"{config.train.cold_start_tokens} ask for labelled sequences, but no prompt has a known continuation: "
            "add text, or responses, to data.prompts, or set rollouts.on_policy_fraction=1 and train.cold_start_tokens=0"
        )


def texts_to_compare(prompts: PromptSet, info: TeacherInfo, choose: CandidateChooser | None) -> list[Rollout]:
    """A few short texts of the run's own, each cut in half, for a teacher to score; with the ids to ask about where ``choose`` is given."""
    longest = min(_COMPARED_TOKENS, info.max_sequence_tokens or _COMPARED_TOKENS)
    rollouts = []
    for prompt in (*prompts.held_out, *prompts.to_train)[:_COMPARED_PROMPTS]:
        ids = (*prompt.token_ids, *(prompt.reference_ids or ()))[:longest]
        if len(ids) > 1:
            rollouts.append(Rollout(prompt.prompt_id, Prompt(prompt.prompt_id, ids[: len(ids) // 2]), ids[len(ids) // 2 :]))
    return rollouts if choose is None else choose(rollouts)


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """``text`` as what a user says, ready to be answered; as it is where the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        return list(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
