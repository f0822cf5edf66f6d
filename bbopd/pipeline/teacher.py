"""The teacher of a run as the loop asks it: started or found out about, what it costs counted, its answers kept, replicas compared."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bbopd.config import CacheConfig, RunConfig, SelfConfig, TeacherConfig
from bbopd.data.prompts import PromptSet
from bbopd.errors import ConfigError, TeacherError
from bbopd.modeling import load_tokenizer, tokenizer_sha256
from bbopd.modeling.spelling import Speller
from bbopd.pipeline.answer_scores import grades, own_score, student_logprob
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.parts import Blocking, Scores
from bbopd.pipeline.preflight import check_teacher_tokenizer
from bbopd.pipeline.progress import Progress
from bbopd.pipeline.rewards import GroupRewards
from bbopd.pipeline.texts import texts_to_compare
from bbopd.rollouts.candidates import CandidateChooser
from bbopd.rpc.security import ClientAccess
from bbopd.teachers.aligned import AligningTeacher
from bbopd.teachers.answer_store import AnswerStore
from bbopd.teachers.budget import Budget, Prices
from bbopd.teachers.cache import CachedTeacher
from bbopd.teachers.chosen import ChoosingTeacher, teacher_logprob
from bbopd.teachers.fitted import fitted
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.teachers.paid import PaidTeacher
from bbopd.teachers.privileged import Context, PrivilegedTeacher
from bbopd.teachers.process import TeacherProcess
from bbopd.teachers.remote import RemoteTeacher
from bbopd.teachers.verbal import VerbalJudge
from bbopd.teachers.written import WritingTeacher
from bbopd.types import Judge, Level, Sampling, SignalSpec, Teacher

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bbopd.teachers.openai import OpenAITeacher

_SIGNALS: tuple[Level, ...] = ("full", "candidates", "topk", "sampled")


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


async def open_api(
    config: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    budget: Budget | None,
    stack: AsyncExitStack,
    progress: Progress,
) -> OpenAITeacher:
    """An OpenAI-compatible endpoint, asked about tokens of ``tokenizer``, of which there are ``vocab_size``."""
    try:
        from bbopd.teachers.openai import OpenAITeacher
    except ModuleNotFoundError as error:
        if error.name != "httpx2":
            raise
        raise ConfigError(f"teacher.target {config.targets[0]} needs httpx2, which is not installed: pip install 'bbopd[openai]'") from None
    progress.activity("loading", f"what {config.targets[0]} offers")
    teacher = await OpenAITeacher.connect(config, tokenizer=tokenizer, vocab_size=vocab_size, budget=budget)
    stack.push_async_callback(teacher.close)
    for note in teacher.notes:
        progress.note(f"{teacher.target} does not score by {note}")
    return teacher


def own_teacher(
    config: SelfConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    compute_dtype: torch.dtype,
    run: Blocking,
) -> PrivilegedTeacher:
    """``model``, the student or its average, as a teacher that reads ``config.context``; ``run`` keeps its calls apart from training."""
    backend = HFBackend(model, tokenizer, levels=_SIGNALS, name="the student", compute_dtype=compute_dtype)
    return PrivilegedTeacher(LocalTeacher(backend, run=run), Context(config.context, tokenizer))


async def open_judge(
    config: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    folder: RunFolder,
    stack: AsyncExitStack,
    progress: Progress,
) -> Teacher:
    """Who compares answers in evaluations. Its replies are kept, so that it is asked about the same two answers once."""
    remote, _ = await start_teacher(config, folder, stack, progress)
    teacher = remote or await open_api(config, tokenizer, vocab_size, None, stack, progress)
    if not teacher.info.takes_text:
        raise TeacherError(f"judge {teacher.info.model} takes no messages: set eval.judge.target to one with a chat template")
    cache = config.cache or CacheConfig(path=str(folder.root / "judge_answers.db"))
    kept = remembering(teacher, None, config.model_copy(update={"cache": cache}), folder, stack)
    assert kept is not None, "there is a judge"
    return kept


def open_budget(config: TeacherConfig, teacher: Teacher | None, folder: RunFolder, stack: AsyncExitStack) -> Budget | None:
    """Where what the teacher costs is counted; None where it costs nothing that is known."""
    if config.prices is not None:
        prices = Prices(config.prices.prompt, config.prices.answer, config.prices.currency)
    elif teacher is not None and teacher.info.price_per_million_tokens:
        price = teacher.info.price_per_million_tokens
        prices = Prices(price, price, teacher.info.currency or "USD")
    elif config.budget is not None:
        raise ConfigError("teacher.budget is set, but not what the teacher costs: set teacher.prices (prompt, answer: per million tokens)")
    else:
        return None
    limits = config.budget
    path = folder.root / "spending.db" if limits is None or limits.path is None else limits.path
    budget = Budget(path, prices, None if limits is None else limits.limit)
    stack.callback(budget.close)
    return budget


def remembering(
    teacher: Teacher | None, budget: Budget | None, config: TeacherConfig, folder: RunFolder, stack: AsyncExitStack
) -> Teacher | None:
    """The teacher; behind a budget, where it is paid and does not see to that itself; and behind the answers of it that are kept.

    What is paid for is kept in any case: in the run's folder, where the configuration names no place.
    """
    asked: Teacher | None = teacher
    if asked is not None and budget is not None and not config.is_api:
        asked = PaidTeacher(asked, budget)
    cache = config.cache
    if cache is None and budget is not None:
        cache = CacheConfig(path=str(folder.root / "answers.db"))
    if asked is None or cache is None:
        return asked
    cached = CachedTeacher(asked, AnswerStore(cache.path, max_bytes=cache.max_bytes), on_full=cache.on_full)
    stack.push_async_callback(cached.close)
    return cached


def writing_teacher(config: RunConfig, teacher: Teacher, tokenizer: PreTrainedTokenizerBase, *, shares_ids: bool) -> WritingTeacher:
    """``teacher`` as it is heard at level ``text``. Raises `TeacherError` where it can be asked in no tokens but its own."""
    if teacher.info.offer("text") is None:
        raise TeacherError(f"teacher {teacher.info.model} does not offer text, so it writes no labels: set teacher.writes_labels=false")
    return WritingTeacher(teacher, tokenizer, _sampling(config), max_seq_len=config.train.max_seq_len, shares_ids=shares_ids)


def _sampling(config: RunConfig) -> Sampling:
    answers = config.teacher.answers
    return Sampling(
        answers.max_new_tokens, temperature=answers.temperature, top_p=answers.top_p, top_k=answers.top_k, seed=config.train.seed
    )


@dataclass(frozen=True, slots=True)
class TextTeacher:
    """A teacher as it is heard at level ``text``, and ``counters`` of what became of its replies."""

    scores: Scores
    counters: Mapping[str, int]


def text_teacher(
    config: RunConfig,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shares_ids: bool,
    model: PreTrainedModel,
    compute_dtype: torch.dtype,
    vocab_size: int | None,
) -> TextTeacher:
    """``teacher`` as the objective hears its text.

    Parameters
    ----------
    shares_ids : teacher and student number the same tokens alike.
    model, compute_dtype, vocab_size : the student, which may be asked what it thinks of the teacher's answers.

    Raises
    ------
    ConfigError : `teacher.answers.best_by` names no function.
    TeacherError : it can be asked in no tokens but its own, or takes no messages where it shall grade.
    """
    answers, grading = config.teacher.answers, config.teacher.grading
    judge = None if grading is None else VerbalJudge(teacher, tokenizer, grading, _sampling(config))
    if judge is not None and config.objective.judges_groups:
        return TextTeacher(group_rewards(config, judge), judge.counters)
    writing = writing_teacher(config, teacher, tokenizer, shares_ids=shares_ids)
    if answers.best_by is None:
        return TextTeacher(writing, {})
    if judge is not None:
        scores = grades(judge)
    elif answers.best_by == "teacher":
        scores = teacher_logprob
    elif answers.best_by == "student":
        scores = student_logprob(model, compute_dtype=compute_dtype, vocab_size=vocab_size)
    else:
        scores = own_score(answers.best_by)
    choosing = ChoosingTeacher(writing, scores, samples=answers.samples, min_score=answers.min_score)
    return TextTeacher(choosing, choosing.counters if judge is None else ChainMap(choosing.counters, judge.counters))


def group_rewards(config: RunConfig, judge: Judge) -> GroupRewards:
    """``judge`` in the teacher's place."""
    return GroupRewards(judge, divide_by_std=config.objective.divide_by_std, inflight_tokens=config.teacher.inflight_tokens)


def load_teacher_tokenizer(config: RunConfig) -> tuple[PreTrainedTokenizerBase, str] | None:
    """The teacher's tokenizer and where it is from, for an objective that lays its tokens beside the student's. Raises `ModelError`."""
    if config.objective.name != "aligned":
        return None
    teacher = config.teacher
    named = teacher.tokenizer or (teacher.serve.model if teacher.serve is not None else "")
    revision = teacher.serve.revision if teacher.serve is not None and teacher.tokenizer is None else None
    return load_tokenizer(named, revision=revision), named


def aligning_teacher(
    teacher: Teacher,
    theirs: tuple[PreTrainedTokenizerBase, str],
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    note: Callable[[str], None],
) -> AligningTeacher:
    """``teacher`` in the tokens of the student, whose head has ``rows``; ``note`` hears how far the two go together.

    Raises `TeacherError` where ``theirs`` is not the tokenizer of that teacher, `ModelError` where one of the two does not spell its texts.
    """
    their_tokenizer, named = theirs
    used = check_teacher_tokenizer(teacher.info, their_tokenizer, named)
    if teacher.info.tokenizer_sha256 and teacher.info.tokenizer_sha256 != tokenizer_sha256(their_tokenizer):
        note(f"teacher {teacher.info.model} has the tokens of {named}, but may cut texts into them otherwise: its files differ")
    aligning = AligningTeacher(
        fitted(teacher, used),
        Speller(their_tokenizer, used, named=named),
        Speller(tokenizer, rows, named="of the student"),
        their_tokenizer,
    )
    note(f"teacher {teacher.info.model} has tokens of its own: {aligning.common_ids:,} of its {used:,} are the student's too")
    return aligning


async def compare_replicas(
    teacher: Teacher,
    config: RunConfig,
    prompts: PromptSet,
    want: SignalSpec,
    progress: Progress,
    choose: CandidateChooser | None,
    aligning: AligningTeacher | None = None,
) -> None:
    """Let all replicas score the same few texts, where there is more than one; in their own tokens, where ``aligning`` has them.

    Raises `TeacherError` where they differ too much.
    """
    if len(config.teacher.targets) < 2 or not isinstance(teacher, RemoteTeacher):
        return
    rollouts = texts_to_compare(prompts, teacher.info, choose)
    if aligning is not None:
        rollouts = [aligning.align(rollout).question for rollout in rollouts]
    progress.activity("scoring", f"the same text with {len(config.teacher.targets)} replicas of the teacher")
    limit = config.teacher.max_replica_difference
    difference = await teacher.compare_replicas(rollouts, want, limit=limit)
    progress.note(f"replicas of the teacher differ by at most {difference:.2g} of a token's probability ({limit:g} allowed)")
