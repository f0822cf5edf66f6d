"""From a configuration to everything that a run turns: models, teacher, engine, prompts, trainer; and back to rest again."""

from __future__ import annotations

import asyncio
import shutil
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from bbopd.config import RunConfig
from bbopd.data.prompts import PromptSet
from bbopd.data.text_checks import text_checks
from bbopd.errors import CheckpointError, TeacherError
from bbopd.modeling import compute_dtype, is_adapted, load_tokenizer, merge_lora, save_adapter, used_vocabulary
from bbopd.modeling.load import quiet
from bbopd.objectives import check_offer, make_objective, signal_for
from bbopd.pipeline.adversary import Adversary, open_adversary
from bbopd.pipeline.checkpoints import RunCheckpoints, open_store
from bbopd.pipeline.engine import agreement_check, candidate_chooser, count_of, open_engine, sleep_of
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.gate import open_gate
from bbopd.pipeline.named_teachers import NamedTeachers, open_named_teachers
from bbopd.pipeline.parts import Parts, Scores, at_once, in_executor
from bbopd.pipeline.plugged import open_plugged_teacher, record_of
from bbopd.pipeline.preflight import check_candidates, check_lengths, check_vocabulary
from bbopd.pipeline.progress import Progress
from bbopd.pipeline.referenced import ReferencedScores
from bbopd.pipeline.state import RunState
from bbopd.pipeline.student import bytes_beside, check_positions, end_of_answer_ids, end_of_text, load_student, trained_share
from bbopd.pipeline.teacher import (
    aligning_teacher,
    compare_replicas,
    load_teacher_tokenizer,
    open_api,
    open_budget,
    open_judge,
    own_teacher,
    remembering,
    start_teacher,
    text_teacher,
    writing_teacher,
)
from bbopd.pipeline.texts import check_labels, open_stream, read_prompts
from bbopd.pipeline.trackers import require_trackers
from bbopd.teachers.cache import CachedTeacher
from bbopd.teachers.fitted import fitted
from bbopd.teachers.remote import RemoteTeacher
from bbopd.teachers.routed import RoutedTeacher
from bbopd.teachers.written import WritingTeacher
from bbopd.trainer.average import WeightAverage
from bbopd.trainer.checkpoint import latest_checkpoint, require_space
from bbopd.trainer.reference_policy import ReferencePolicy
from bbopd.trainer.step import Trainer
from bbopd.types import Teacher, TeacherInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bbopd.teachers.openai import OpenAITeacher
    from bbopd.trainer.ranks import Ranks


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
    teacher_info: TeacherInfo | None = None
    """Who teaches, by its own account."""
    adversary: Adversary | None = None
    judge: Teacher | None = None
    """Who compares the student's answers with the teacher's."""

    def write_model(self, folder: Path) -> None:
        """The student as it is now (of adapters these alone, in PEFT's format), and its tokenizer. Raises OSError or SafetensorError."""
        with quiet():
            if is_adapted(self.model):
                save_adapter(self.model, folder)
            else:
                self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def save_model(self) -> Path:
        """Write the student in Hugging Face format, tokenizer included, as the run's result; it appears whole or not at all.

        Adapters are written too, in PEFT's format, and then merged into the student, which is trained no more.
        """
        if self.parts.ranks > 1:
            deque(self.parts.trainer.weights(), 0)  # they go into the student here
        if is_adapted(self.model):
            self._write("adapter", partial(save_adapter, self.model))
            merge_lora(self.model)
        return self._write("model", self.model.save_pretrained)

    def _write(self, name: str, save: Callable[[Path], None]) -> Path:
        folder, unfinished = self.folder.root / name, self.folder.root / f"{name}.tmp"
        try:
            for old in (unfinished, folder):
                shutil.rmtree(old, ignore_errors=True)
            with quiet():
                save(unfinished)
                self.tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the trained model to {folder}: {error}; the same command tries again") from error
        return folder


@asynccontextmanager
async def open_session(config: RunConfig, *, command: str, progress: Progress, ranks: Ranks | None = None) -> AsyncIterator[Session]:
    """Build a run, or the rest of one that was interrupted, and take it down again.

    ``ranks`` train together, of which this process is the first; the session's model is then a copy, which takes pushed weights.
    Raises `BbopdError` for whatever cannot work, before anything is sampled. A teacher that was started here is stopped with it.
    """
    async with AsyncExitStack() as stack:
        student = config.student
        checks = text_checks(config.data.filters)
        require_trackers(config.track)
        plugins = record_of(config)
        progress.activity("loading", "tokenizer and text")
        tokenizer = load_tokenizer(student.model, revision=student.revision, trust_remote_code=student.trust_remote_code)
        prompts = await asyncio.to_thread(read_prompts, config, tokenizer)
        check_labels(config, prompts)
        if prompts.skipped:
            progress.note(f"left out of the data: {', '.join(f'{reason} {count}' for reason, count in sorted(prompts.skipped.items()))}")
        store = await asyncio.to_thread(open_store, config, progress.note)
        folder, changes = RunFolder.open(config, command=command, data_fingerprint=prompts.fingerprint, plugins=plugins)
        stack.enter_context(folder.lock())
        for change in changes:
            progress.note(f"going on with another configuration: {change}")
        theirs = load_teacher_tokenizer(config)
        starting = asyncio.create_task(start_teacher(config.teacher, folder, stack, progress))
        try:
            model = await asyncio.to_thread(load_student, student, config.train.seed, config.train.deterministic, ranks is not None)
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            raise
        if is_adapted(model):
            progress.note(trained_share(model, config.train.optimizer))
        remote, process = await starting
        counted: RemoteTeacher | OpenAITeacher | None = remote
        teacher: Teacher | None = remote
        rows = model.get_input_embeddings().weight.shape[0]
        spoken, count = (tokenizer, rows) if theirs is None else (theirs[0], len(theirs[0]))
        if config.teacher.plugin is not None:
            teacher = await open_plugged_teacher(config.teacher, spoken, count, stack, progress)
        budget = open_budget(config.teacher, teacher, folder, stack)
        if config.teacher.is_api:
            teacher = counted = await open_api(config.teacher, spoken, count, budget, stack, progress)
        if ranks is not None and config.train.parallel.whole_on == "device":
            model.to(ranks.device)
        dtype = compute_dtype(student.dtype, model.device if ranks is None else ranks.device)
        check_positions(config, model, prompts)
        plays, own = config.objective.name == "gad", config.teacher.self
        require_space(folder.checkpoints, model=model, keep=config.train.keep_checkpoints, beside=bytes_beside(config, model))
        overlaps = config.rollouts.engine != "hf" and config.rollouts.max_staleness > 0  # hf writes with the trainer's own weights
        executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="bbopd-trainer")) if overlaps else None
        run_blocking = at_once if executor is None else in_executor(executor)
        average = None
        if own is not None:
            average = WeightAverage(model, own.ema_decay) if own.weights == "ema" else None
            asked_model = model if average is None else average.model
            teacher = privileged = own_teacher(own, asked_model, tokenizer, compute_dtype=dtype, run=run_blocking)
            longest = max(config.rollouts.max_new_tokens, config.eval.max_new_tokens)
            privileged.check_prompts(prompts.known, max_new_tokens=longest)

        objective = make_objective(config.objective)
        want = signal_for(objective, config.teacher) if teacher is not None else None
        vocab_size = used_vocabulary(tokenizer, rows)
        measured = asked = kept = choose = write_labels = aligning = None
        scores: Scores | None = None
        named_teachers = NamedTeachers({}, ())
        answer_counts: Mapping[str, int] = {}
        if teacher is not None:
            if want is not None:
                check_offer(objective, teacher.info, want)
                check_candidates(teacher.info, config.candidates)
            kept = remembering(teacher, budget, config.teacher, folder, stack)
            assert kept is not None, "there is a teacher"
            measured = asked = kept
            try:
                named = config.teacher.serve.model if config.teacher.serve is not None else None
                vocab_size = check_vocabulary(teacher.info, tokenizer, rows, named=named)
            except TeacherError:
                if theirs is None and (want is None or want.level != "text"):
                    raise
                progress.note(f"teacher {teacher.info.model} has other tokens than the student: how far they agree is not measured")
                measured = None
            else:
                measured = asked = fitted(kept, vocab_size)
                longest = max(config.rollouts.max_new_tokens, config.eval.max_new_tokens)
                check_lengths(teacher.info, prompts.known, max_new_tokens=longest)
            if theirs is not None:
                asked = aligning = aligning_teacher(kept, theirs, tokenizer, rows, progress.note)
                aligning.check_prompts(prompts.known)
            if config.names_teachers and want is not None:
                named_teachers = await open_named_teachers(
                    config, objective, want, tokenizer, rows, prompts.to_train, folder, stack, progress
                )
                asked = RoutedTeacher(asked, named_teachers.asked)
            scores = asked
            if want is not None and want.level == "text":
                heard = text_teacher(
                    config,
                    asked,
                    tokenizer,
                    shares_ids=measured is not None,
                    model=model,
                    compute_dtype=dtype,
                    vocab_size=vocab_size,
                )
                scores, answer_counts = heard.scores, heard.counters
                if config.objective.kl_weight:  # before a checkpoint is loaded: the same in every session of the run
                    micro_batch_tokens = config.train.micro_batch_tokens
                    reference = ReferencePolicy(model, compute_dtype=dtype, vocab_size=vocab_size, micro_batch_tokens=micro_batch_tokens)
                    scores = ReferencedScores(scores, reference)
            elif want is not None:
                choose = candidate_chooser(config, model, dtype, vocab_size)
                await compare_replicas(teacher, config, prompts, want, progress, choose, aligning)
                if config.teacher_writes:
                    write_labels = writing_teacher(config, asked, tokenizer, shares_ids=aligning is None)

        checkpoint = latest_checkpoint(folder.checkpoints)
        trainer: Trainer
        ranked = None
        if ranks is not None:
            from bbopd.pipeline.ranked import checkpoints_ended, drive

            trainer = ranked = await asyncio.to_thread(drive, config, ranks, model, objective, vocab_size, checkpoint)
            stack.enter_context(checkpoints_ended(ranked))
        else:
            trainer = Trainer(
                model,
                objective,
                train=config.train,
                objective_config=config.objective,
                planned_steps=config.planned_steps,
                compute_dtype=dtype,
                vocab_size=vocab_size,
                activation_checkpointing=student.activation_checkpointing,
                average=average,
            )
        adversary = judge_of_answers = None
        if config.eval.judge is not None:
            judge_of_answers = await open_judge(config.eval.judge, tokenizer, vocab_size, folder, stack, progress)
        if plays:
            assert isinstance(scores, WritingTeacher), "gad asks for text, and one answer to a prompt"
            adversary = open_adversary(config, model, scores, dtype, vocab_size, progress)
        checkpoints = RunCheckpoints(
            folder,
            trainer=trainer,
            ranked=ranked,
            model=model,
            tokenizer=tokenizer,
            adversary=adversary,
            average=average,
            keep=config.train.keep_checkpoints,
            retries=lambda: (0 if counted is None else counted.counters["retries"]) + named_teachers.retries,
            store=store,
            note=progress.note,
        )
        stack.enter_context(checkpoints.copied())
        if checkpoint is not None:
            progress.activity("loading", str(checkpoint))
        state = await asyncio.to_thread(checkpoints.begin, checkpoint)
        if checkpoint is not None:
            progress.note(f"going on from {checkpoint}: step {state.step}, {state.trained_tokens:,} tokens trained")

        stop_token_ids = end_of_answer_ids(model, tokenizer)
        engine = await open_engine(config, model, dtype, vocab_size, stop_token_ids, prompts, folder, stack, progress)
        for name, lines in (("rejected.jsonl", sum(state.rejected.values())), ("rolled_back.jsonl", state.rolled_back_updates)):
            folder.keep_lines(name, lines)  # those after the checkpoint will be made again
        gate = open_gate(config.data.filters, folder, state, stack, checks=checks, stop_token_ids=stop_token_ids, decode=tokenizer.decode)
        stream = open_stream(config, prompts, end_of_text(tokenizer))
        stack.callback(stream.close)

        session = Session(
            config=config,
            folder=folder,
            parts=Parts(
                trainer=trainer,
                engine=engine,
                prompts=stream,
                gate=gate,
                teacher=adversary or scores,
                want=want,
                save=checkpoints.save,
                roll_back=checkpoints.roll_back,
                is_saved=checkpoints.can_roll_back_to(checkpoint),
                agreement=agreement_check(config, model, dtype, vocab_size),
                sleep=sleep_of(config, engine),
                choose=choose,
                write_labels=write_labels,
                spending=None if budget is None else budget.spending,
                cache_counts=kept.counters if isinstance(kept, CachedTeacher) else None,
                answer_counts=answer_counts,
                engine_count=count_of(engine),
                by_group=config.objective.judges_groups,
                opponent=adversary,
                overlaps=overlaps,
                shares_weights=config.rollouts.engine == "hf" and ranks is None,
                run_blocking=run_blocking,
                ranks=1 if ranks is None else ranks.size,
            ),
            state=state,
            model=model,
            tokenizer=tokenizer,
            teacher=measured,
            prompts=prompts,
            compute_dtype=dtype,
            vocab_size=vocab_size,
            teacher_info=None if teacher is None else teacher.info,
            adversary=adversary,
            judge=judge_of_answers,
        )
        try:
            yield session
        except TeacherError as error:
            if process is None or process.alive:
                raise
            raise TeacherError(
                f"{error}; its process has ended, and the last it wrote to {folder.teacher_log} is:\n{process.last_lines()}"
            ) from error
