"""Whether the tasks of a run (``eval.tasks``) can be asked: files, fields, libraries, and room for the longest item."""

from __future__ import annotations

import asyncio

from bbopd.doctor.findings import SetUp, Verdict, passed, warned
from bbopd.errors import DataError
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.tasks.base import Task
from bbopd.evaluate.training_tasks import load_run_tasks
from bbopd.modeling import used_vocabulary
from bbopd.pipeline.student import end_of_answer_ids
from bbopd.rollouts.hf import HFEngine

__all__ = ["check_tasks"]


async def check_tasks(setup: SetUp) -> Verdict:
    """Every task is read with its data, as the run reads it, and its items measured in the student's own tokens."""
    evaluation = setup.config.eval
    tasks = await asyncio.to_thread(load_run_tasks, evaluation.tasks, evaluation.keep_best)
    if not tasks:
        return passed("none are asked (eval.tasks)")
    known = [f"{task.info.name} ({task.info.kind.replace('_', ' ')}, {task.info.items:,} items)" for task in tasks]
    if setup.model is None or setup.tokenizer is None:
        return passed(f"{', '.join(known)}; whether their items have room needs the student")
    return await asyncio.to_thread(_measure, tasks, known, _subject(setup))


def _measure(tasks: list[Task], known: list[str], subject: Subject) -> Verdict:
    said, cut, unknown = [], [], []
    for task, about in zip(tasks, known, strict=True):
        try:
            found = task.check_room(subject)
        except DataError as error:
            raise DataError(f"task {task.info.name}: {error}") from error
        if found is None:
            unknown.append(task.info.name)
            said.append(about)
            continue
        said.append(f"{about[:-1]} of up to {found.longest:,} tokens)")
        if found.too_long:
            cut.append(f"{found.too_long:,} of {task.info.items:,} items of {task.info.name}, which has {found.room:,}")
    more = f"; how long those of {', '.join(unknown)} are is known when they are asked" if unknown else ""
    if cut:
        return warned(
            f"{', '.join(said)}{more}; too long for the student: {'; '.join(cut)}: they lose the beginning of their prompts; shorten these "
            "by the task's template, or lower its max_new_tokens"
        )
    return passed(f"{', '.join(said)}{more}")


def _subject(setup: SetUp) -> Subject:
    """The student, as the run asks it."""
    model, tokenizer, config = setup.model, setup.tokenizer, setup.config
    assert model is not None
    assert tokenizer is not None
    vocab_size = used_vocabulary(tokenizer, model.get_output_embeddings().weight.shape[0])
    end_ids = end_of_answer_ids(model, tokenizer)
    return Subject(
        "the student",
        model,
        tokenizer,
        engine=HFEngine(model, eos_token_ids=end_ids, pad_token_id=end_ids[0], vocab_size=vocab_size),
        vocab_size=vocab_size,
        engine_tokens=None if config.rollouts.engine == "hf" else config.train.max_seq_len,
    )
