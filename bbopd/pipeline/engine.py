"""The engine of a run, as its configuration names it, and the check that it computes what the trainer does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import torch

from bbopd.config import RunConfig
from bbopd.data.prompts import PromptSet
from bbopd.modeling import is_adapted, max_positions
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.plugged import EngineSetting, open_plugged_engine
from bbopd.pipeline.progress import Progress
from bbopd.rollouts.agreement import AgreementCheck
from bbopd.rollouts.candidates import CandidateChooser
from bbopd.rollouts.hf import HFEngine
from bbopd.types import RolloutEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


async def open_engine(
    config: RunConfig,
    model: PreTrainedModel,
    dtype: torch.dtype,
    vocab_size: int,
    stop_token_ids: Sequence[int],
    prompts: PromptSet,
    folder: RunFolder,
    stack: AsyncExitStack,
    progress: Progress,
) -> RolloutEngine:
    """The engine that ``rollouts.engine`` names; its weights come from the loop. One that was started here is stopped with the run."""
    if config.rollouts.engine == "hf":
        return HFEngine(
            model,
            eos_token_ids=stop_token_ids,
            pad_token_id=stop_token_ids[0],
            vocab_size=vocab_size,
            compute_dtype=dtype,
            candidates=min(config.candidates, vocab_size),
        )
    longest = max(len(prompt.token_ids) for prompt in prompts.known)
    wanted = max(config.train.max_seq_len, longest + max(config.rollouts.max_new_tokens, config.eval.max_new_tokens))
    max_sequence_tokens = min(wanted, max_positions(model) or wanted)
    if (use := config.rollouts.plugin_use) is not None:
        setting = EngineSetting(model, dtype, vocab_size, tuple(stop_token_ids), max_sequence_tokens, folder.root)
        return await open_plugged_engine(use, setting, stack, progress)
    from bbopd.rollouts.vllm import VLLMEngine, VLLMOptions

    options = VLLMOptions(
        vocab_size=vocab_size,
        max_sequence_tokens=max_sequence_tokens,
        dtype=dtype,
        gpu_memory=config.rollouts.gpu_memory,
        timeout=config.rollouts.timeout,
        trust_remote_code=config.student.trust_remote_code,
        sleep_level=_sleep_level(model) if config.rollouts.sleep else 0,
    )
    rollouts = config.rollouts
    if not rollouts.is_elsewhere:
        progress.activity("loading", "vLLM, in its own process")
        engine = await VLLMEngine.start(model, options, eos_token_ids=stop_token_ids, folder=folder.root)
        stack.push_async_callback(engine.close)
        for note in engine.notes:
            progress.note(note)
        return engine
    from bbopd.rollouts.vllm_fleet import EngineFleet
    from bbopd.rollouts.vllm_remote import EngineServer
    from bbopd.rpc.security import ClientAccess

    access = ClientAccess.read(rollouts.tls, rollouts.token_file, rollouts.token_env, "rollouts.")

    async def start(target: str) -> VLLMEngine:
        server = EngineServer(target, access)
        return await VLLMEngine.start(model, options, eos_token_ids=stop_token_ids, folder=folder.root, server=server)

    progress.activity("loading", f"vLLM, at {rollouts.target or f'the addresses in {rollouts.targets_file}'}")
    if rollouts.target is not None:
        engine = await start(rollouts.target)
        stack.push_async_callback(engine.close)
        return engine
    assert rollouts.targets_file is not None, "one of the two is set"
    fleet = await EngineFleet.open(rollouts.targets_file, start, dtype=dtype, timeout=rollouts.timeout, note=progress.note)
    stack.push_async_callback(fleet.close)
    return fleet


def count_of(engine: RolloutEngine) -> Callable[[], int] | None:
    """How many write now, where ``engine`` is several."""
    from bbopd.rollouts.vllm_fleet import EngineFleet

    return (lambda: engine.size) if isinstance(engine, EngineFleet) else None


def sleep_of(config: RunConfig, engine: RolloutEngine) -> Callable[[], Awaitable[None]] | None:
    """What has ``engine`` give its memory to the trainer, where it shares a GPU with it and the run wants that."""
    if not config.rollouts.sleep:
        return None
    from bbopd.rollouts.vllm import VLLMEngine

    assert isinstance(engine, VLLMEngine), "the configuration allows no other to sleep"
    return engine.sleep


def _sleep_level(model: PreTrainedModel) -> int:
    """What an engine that sleeps may forget: all its weights, where every push gives all of them."""
    return 1 if is_adapted(model) else 2


def agreement_check(config: RunConfig, model: PreTrainedModel, dtype: torch.dtype, vocab_size: int) -> AgreementCheck | None:
    """The check of an engine that has weights of its own; it compares whole distributions, not what top-k and top-p leave of them."""
    rollouts = config.rollouts
    agreement = rollouts.agreement
    if rollouts.engine == "hf" or not agreement.tokens or rollouts.top_k or rollouts.top_p < 1.0:
        return None
    return AgreementCheck(model, compute_dtype=dtype, tokens=agreement.tokens, limit=agreement.limit, vocab_size=vocab_size)


def candidate_chooser(config: RunConfig, model: PreTrainedModel, dtype: torch.dtype, vocab_size: int) -> CandidateChooser | None:
    """What has the student choose ids for its teacher, where the run's signal is of such."""
    if not config.candidates:
        return None
    return CandidateChooser(model, count=config.candidates, compute_dtype=dtype, vocab_size=vocab_size)
