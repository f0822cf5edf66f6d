"""From a configuration to everything that a run turns: models, teacher, engine, prompts, trainer; and back to rest again."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError

from bbopd.config import FiltersConfig, RunConfig, StudentConfig, TeacherConfig
from bbopd.data.draws import PromptStream
from bbopd.data.filters import RolloutFilter
from bbopd.data.near_duplicates import AcceptedAnswers
from bbopd.data.prompts import PromptSet, load_prompts
from bbopd.data.rejected import RejectedLog
from bbopd.data.text_checks import text_checks
from bbopd.errors import CheckpointError, ConfigError, DataError, TeacherError
from bbopd.modeling import compute_dtype, load_model, load_tokenizer, max_positions, resolve_device, used_vocabulary
from bbopd.modeling.load import quiet
from bbopd.objectives import make_objective
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.gate import RolloutGate
from bbopd.pipeline.parts import Parts, at_once, in_executor
from bbopd.pipeline.preflight import check_lengths, check_vocabulary
from bbopd.pipeline.progress import Progress
from bbopd.pipeline.state import RunState
from bbopd.pipeline.teacher import open_api, open_budget, remembering
from bbopd.rollouts.agreement import AgreementCheck
from bbopd.rollouts.hf import HFEngine
from bbopd.rpc.security import ClientAccess
from bbopd.teachers.cache import CachedTeacher
from bbopd.teachers.fitted import fitted
from bbopd.teachers.process import TeacherProcess
from bbopd.teachers.remote import RemoteTeacher
from bbopd.teachers.written import WritingTeacher
from bbopd.trainer.checkpoint import latest_checkpoint, load_checkpoint, require_space, save_checkpoint
from bbopd.trainer.step import Trainer
from bbopd.types import Prompt, Rollout, RolloutEngine, Sampling, SignalSpec, Teacher, TeacherInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bbopd.teachers.openai import OpenAITeacher

_COMPARED_PROMPTS = 4  # by which replicas are compared
_COMPARED_TOKENS = 64  # of each


@dataclass(frozen=True, slots=True)
class Session:
    """An open run. ``parts`` is what the loop turns; the rest is for evaluation and for the end of the run."""

    config: RunConfig
    folder: RunFolder
    parts: Parts
    state: RunState
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher | None
    """Who scores the student's tokens, for measures; None where nobody can."""
    prompts: PromptSet
    compute_dtype: torch.dtype
    vocab_size: int
    """Ids that are tokens; what the student's head has beyond them is padding."""

    def save_model(self) -> Path:
        """Write the student in Hugging Face format, tokenizer included, as the run's result; it appears whole or not at all."""
        folder, unfinished = self.folder.root / "model", self.folder.root / "model.tmp"
        try:
            for old in (unfinished, folder):
                shutil.rmtree(old, ignore_errors=True)
            with quiet():
                self.model.save_pretrained(unfinished)
                self.tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the trained model to {folder}: {error}; the same command tries again") from error
        return folder


@asynccontextmanager
async def open_session(config: RunConfig, *, command: str, progress: Progress) -> AsyncIterator[Session]:
    """Build a run, or the rest of one that was interrupted, and take it down again.

    Raises `BbopdError` for whatever cannot work, before anything is sampled. A teacher that was started here is stopped with it.
    """
    async with AsyncExitStack() as stack:
        student = config.student
        checks = text_checks(config.data.filters)
        progress.activity("loading", "tokenizer and text")
        tokenizer = load_tokenizer(student.model, revision=student.revision, trust_remote_code=student.trust_remote_code)
        prompts = await asyncio.to_thread(read_prompts, config, tokenizer)
        check_labels(config, prompts)
        if prompts.skipped:
            progress.note(f"left out of the data: {', '.join(f'{reason} {count}' for reason, count in sorted(prompts.skipped.items()))}")
        folder, changes = RunFolder.open(config, command=command, data_fingerprint=prompts.fingerprint)
        stack.enter_context(folder.lock())
        for change in changes:
            progress.note(f"going on with another configuration: {change}")
        starting = asyncio.create_task(start_teacher(config.teacher, folder, stack, progress))
        try:
            model = await asyncio.to_thread(load_student, student, config.train.seed, config.train.deterministic)
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            raise
        remote, process = await starting
        budget = open_budget(config.teacher, remote, folder, stack)
        teacher: RemoteTeacher | OpenAITeacher | None = remote
        if config.teacher.is_api:
            teacher = await open_api(config.teacher, model, tokenizer, budget, stack, progress)
        dtype = compute_dtype(student.dtype, model.device)
        check_positions(config, model, prompts)
        require_space(folder.checkpoints, model=model, keep=config.train.keep_checkpoints)

        objective = make_objective(config.objective)
        want = objective.signal(config.teacher) if teacher is not None else None
        rows = model.get_input_embeddings().weight.shape[0]
        vocab_size = used_vocabulary(tokenizer, rows)
        measured = asked = kept = None
        if teacher is not None:
            if want is not None:
                objective.check(teacher.info, want)
            measured = asked = kept = remembering(teacher, budget, config.teacher, folder, stack)
            assert asked is not None, "there is a teacher"
            try:
                named = config.teacher.serve.model if config.teacher.serve is not None else None
                vocab_size = check_vocabulary(teacher.info, tokenizer, rows, named=named)
            except TeacherError:
                if want is None or want.level != "text":
                    raise
                progress.note(f"teacher {teacher.info.model} has other tokens than the student: how far they agree is not measured")
                measured = None
            else:
                measured = asked = fitted(asked, vocab_size)
                longest = max(config.rollouts.max_new_tokens, config.eval.max_new_tokens)
                check_lengths(teacher.info, (*prompts.train, *prompts.held_out), max_new_tokens=longest)
            if want is not None and want.level == "text":
                asked = writing_teacher(config, asked, tokenizer, shares_ids=measured is not None)
            elif want is not None:
                await compare_replicas(teacher, config, prompts, want, progress)

        trainer = Trainer(
            model,
            objective,
            train=config.train,
            objective_config=config.objective,
            planned_steps=config.planned_steps,
            compute_dtype=dtype,
            vocab_size=vocab_size,
            activation_checkpointing=student.activation_checkpointing,
        )
        state = RunState()
        checkpoint = latest_checkpoint(folder.checkpoints)
        if checkpoint is not None:
            progress.activity("loading", str(checkpoint))
            state = RunState.from_json(await asyncio.to_thread(load_checkpoint, checkpoint, model=model, optimizer=trainer.optimizer))
            trainer.steps_done = state.step
            progress.note(f"going on from {checkpoint}: step {state.step}, {state.trained_tokens:,} tokens trained")

        stop_token_ids = end_of_answer_ids(model, tokenizer)
        engine = await _open_engine(config, model, dtype, vocab_size, stop_token_ids, prompts, folder, stack, progress)
        folder.keep_lines("rejected.jsonl", sum(state.rejected.values()))  # those after the checkpoint will be made again
        filters = config.data.filters
        log = stack.enter_context(RejectedLog(folder.rejected, tokenizer.decode, filters.quarantine_bytes))
        accepted = _accepted_answers(filters, folder, state, stack)
        judge = RolloutFilter(filters, stop_token_ids, decode=tokenizer.decode, text_checks=checks, accepted=accepted)
        gate = RolloutGate(judge, log, state.rejected)

        overlaps = config.rollouts.engine != "hf" and config.rollouts.max_staleness > 0  # hf writes with the trainer's own weights
        executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="bbopd-trainer")) if overlaps else None
        retries_before = state.teacher_retries

        def save(now: RunState) -> None:
            if teacher is not None:
                now.teacher_retries = retries_before + teacher.counters["retries"]
            save_checkpoint(
                folder.checkpoints,
                now.step,
                model=model,
                tokenizer=tokenizer,
                optimizer=trainer.optimizer,
                state=now.to_json(),
                keep=config.train.keep_checkpoints,
            )

        session = Session(
            config=config,
            folder=folder,
            parts=Parts(
                trainer=trainer,
                engine=engine,
                prompts=PromptStream(
                    prompts_to_label(config, prompts, end_of_text(tokenizer)),
                    config.train.seed,
                    shares=prompts.shares,
                    rank=config.data.rank,
                    world_size=config.data.world_size,
                ),
                gate=gate,
                teacher=asked,
                want=want,
                save=save,
                agreement=_agreement(config, model, dtype),
                spending=None if budget is None else budget.spending,
                cache_counts=kept.counters if isinstance(kept, CachedTeacher) else None,
                overlaps=overlaps,
                run_blocking=at_once if executor is None else in_executor(executor),
            ),
            state=state,
            model=model,
            tokenizer=tokenizer,
            teacher=measured,
            prompts=prompts,
            compute_dtype=dtype,
            vocab_size=vocab_size,
        )
        try:
            yield session
        except TeacherError as error:
            if process is None or process.alive:
                raise
            raise TeacherError(
                f"{error}; its process has ended, and the last it wrote to {folder.teacher_log} is:\n{process.last_lines()}"
            ) from error


def _accepted_answers(filters: FiltersConfig, folder: RunFolder, state: RunState, stack: AsyncExitStack) -> AcceptedAnswers | None:
    """Answers accepted before the checkpoint, where near-duplicates are turned away."""
    if filters.near_duplicates is None:
        return None
    folder.rewind("accepted.jsonl", state.step - 1, key="weights_version")
    pending = [entry["prompt_id"] for entry in state.pending if not entry["is_labelled"]]
    accepted = AcceptedAnswers(folder.root / "accepted.jsonl", filters.near_duplicates, filters.near_duplicates_kept, pending)
    stack.callback(accepted.close)
    return accepted


async def _open_engine(
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
        return HFEngine(model, eos_token_ids=stop_token_ids, pad_token_id=stop_token_ids[0], vocab_size=vocab_size, compute_dtype=dtype)
    from bbopd.rollouts.vllm import VLLMEngine, VLLMOptions

    progress.activity("loading", "vLLM, in its own process")
    longest = max(len(prompt.token_ids) for prompt in (*prompts.train, *prompts.held_out))
    wanted = max(config.train.max_seq_len, longest + max(config.rollouts.max_new_tokens, config.eval.max_new_tokens))
    options = VLLMOptions(
        vocab_size=vocab_size,
        max_sequence_tokens=min(wanted, max_positions(model) or wanted),
        dtype=dtype,
        gpu_memory=config.rollouts.gpu_memory,
        timeout=config.rollouts.timeout,
        trust_remote_code=config.student.trust_remote_code,
    )
    engine = await VLLMEngine.start(model, options, eos_token_ids=stop_token_ids, folder=folder.root)
    stack.push_async_callback(engine.close)
    for note in engine.notes:
        progress.note(note)
    return engine


def _agreement(config: RunConfig, model: PreTrainedModel, dtype: torch.dtype) -> AgreementCheck | None:
    """The check of an engine that has weights of its own; it compares whole distributions, not what top-k and top-p leave of them."""
    rollouts = config.rollouts
    if rollouts.engine == "hf" or not rollouts.agreement.tokens or rollouts.top_k or rollouts.top_p < 1.0:
        return None
    return AgreementCheck(model, compute_dtype=dtype, tokens=rollouts.agreement.tokens, limit=rollouts.agreement.limit)


def end_of_answer_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's end of sequence, and what the model's generation settings add to it."""
    declared: Sequence[int] | int | None = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [declared] if isinstance(declared, int) else list(declared or ())
    return tuple(dict.fromkeys([end_of_text(tokenizer), *ids]))


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError("the student's tokenizer names no token that ends a text (eos_token): its rollouts would never end")
    return int(tokenizer.eos_token_id)


async def start_teacher(
    config: TeacherConfig, folder: RunFolder, stack: AsyncExitStack, progress: Progress
) -> tuple[RemoteTeacher | None, TeacherProcess | None]:
    """The teacher, where the run has one, and its process, where that was started here."""
    targets, process = () if config.is_api else config.targets, None
    if config.serve is not None:
        progress.activity("loading", "student, and teacher in its own process")
        process = await TeacherProcess.start(config.serve, log_path=folder.teacher_log, timeout=config.start_timeout)
        stack.callback(process.stop)
        targets = (process.target,)
    if not targets:
        return None, None

    def is_alive() -> bool:
        return process is None or process.alive

    teacher = await RemoteTeacher.connect(
        targets,
        access=ClientAccess.from_config(config),
        timeout=config.timeout,
        inflight_tokens=config.inflight_tokens,
        connect_timeout=min(30.0, config.start_timeout),
        is_alive=is_alive,
    )
    stack.push_async_callback(teacher.close)
    return teacher, process


def writing_teacher(config: RunConfig, teacher: Teacher, tokenizer: PreTrainedTokenizerBase, *, shares_ids: bool) -> WritingTeacher:
    """``teacher`` as it is heard at level ``text``. Raises `TeacherError` where it can be asked in no tokens but its own."""
    answers = config.teacher.answers
    sampling = Sampling(
        answers.max_new_tokens, temperature=answers.temperature, top_p=answers.top_p, top_k=answers.top_k, seed=config.train.seed
    )
    return WritingTeacher(teacher, tokenizer, sampling, max_seq_len=config.train.max_seq_len, shares_ids=shares_ids)


def prompts_to_label(config: RunConfig, prompts: PromptSet, eos_token_id: int) -> list[Prompt]:
    """The prompts to train on; where the teacher writes all labels, each has a place for one, whether or not an answer is known."""
    if config.objective.name != "seqkd":
        return prompts.train
    return [replace(prompt, reference_ids=(eos_token_id,)) for prompt in prompts.train]


async def compare_replicas(
    teacher: RemoteTeacher | OpenAITeacher, config: RunConfig, prompts: PromptSet, want: SignalSpec, progress: Progress
) -> None:
    """Let all replicas score the same few texts, where there is more than one. Raises `TeacherError` where they differ too much."""
    if len(config.teacher.targets) < 2 or not isinstance(teacher, RemoteTeacher):
        return
    rollouts = texts_to_compare(prompts, teacher.info)
    progress.activity("scoring", f"the same text with {len(config.teacher.targets)} replicas of the teacher")
    limit = config.teacher.max_replica_difference
    difference = await teacher.compare_replicas(rollouts, want, limit=limit)
    progress.note(f"replicas of the teacher differ by at most {difference:.2g} of a token's probability ({limit:g} allowed)")


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


def texts_to_compare(prompts: PromptSet, info: TeacherInfo) -> list[Rollout]:
    """A few short texts of the run's own, each cut in half, for a teacher to score."""
    longest = min(_COMPARED_TOKENS, info.max_sequence_tokens or _COMPARED_TOKENS)
    rollouts = []
    for prompt in (*prompts.held_out, *prompts.train)[:_COMPARED_PROMPTS]:
        ids = (*prompt.token_ids, *(prompt.reference_ids or ()))[:longest]
        if len(ids) > 1:
            rollouts.append(Rollout(prompt.prompt_id, Prompt(prompt.prompt_id, ids[: len(ids) // 2]), ids[len(ids) // 2 :]))
    return rollouts


def load_student(config: StudentConfig, seed: int, deterministic: bool) -> PreTrainedModel:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    return load_model(
        config.model,
        device=str(resolve_device(config.device)),
        attention=config.attention,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        keep_layers=config.init.keep_layers,
    )


def check_labels(config: RunConfig, prompts: PromptSet) -> None:
    if config.objective.name == "seqkd":
        return
    labelled = config.rollouts.per_update - config.rollouts_per_cycle
    if (labelled or config.train.cold_start_tokens) and not any(prompt.reference_ids for prompt in prompts.train):
        raise DataError(
            f"rollouts.on_policy_fraction {config.rollouts.on_policy_fraction} and train.cold_start_tokens "
            f"{config.train.cold_start_tokens} ask for labelled sequences, but no prompt has a known continuation: "
            "add text, or responses, to data.prompts, or set rollouts.on_policy_fraction=1 and train.cold_start_tokens=0"
        )


def check_positions(config: RunConfig, model: PreTrainedModel, prompts: PromptSet) -> None:
    """Refuse a run whose longest sequence has no place among the model's positions. Raises `ConfigError`."""
    positions = max_positions(model)
    if positions is None:
        return
    if config.train.max_seq_len > positions:
        raise ConfigError(
            f"train.max_seq_len is {config.train.max_seq_len}, but {config.student.model} has {positions} positions: "
            f"set it to {positions} or less"
        )
    longest = max(len(prompt.token_ids) for prompt in (*prompts.train, *prompts.held_out))
    if longest + config.eval.max_new_tokens > positions:
        raise ConfigError(
            f"the longest prompt has {longest} tokens, with eval.max_new_tokens {config.eval.max_new_tokens} that is more than the "
            f"{positions} positions of {config.student.model}: set eval.max_new_tokens to {positions - longest} or less"
        )
