"""How near a model's distributions are to a teacher's, on answers that are given and on its own."""

from __future__ import annotations

from collections.abc import Sequence

from bbopd.config import EvalConfig
from bbopd.config_task import TaskConfig
from bbopd.errors import DataError
from bbopd.evaluate.bits_per_byte import token_byte_counts
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.suite import EvalSuite
from bbopd.evaluate.tasks.base import Measured, Room, TaskInfo
from bbopd.evaluate.tasks.rows import Row, Template
from bbopd.pipeline.preflight import check_lengths, check_vocabulary
from bbopd.teachers.fitted import fitted
from bbopd.types import Prompt


class TeacherAgreement:
    """What `EvalSuite` measures, over a task's rows: ``kl``, ``reverse_kl`` and ``top1`` on held-out answers and on rollouts, in nats a
    token at temperature 1, and bits per byte of the held-out ones."""

    def __init__(self, info: TaskInfo, config: TaskConfig, rows: Sequence[Row]) -> None:
        assert config.prompt is not None, "agreement has a prompt"
        assert config.answer is not None, "agreement has an answer"
        self.info = info
        self._config = config
        prompt, answer = Template(config.prompt, "prompt"), Template(config.answer, "answer")
        self._rows = [(row.name, prompt.text(row), answer.text(row)) for row in rows]
        if (place := next((index for index, row in enumerate(self._rows) if not row[2]), None)) is not None:
            raise DataError(f"{rows[place].where}: the answer is empty: leave the row out")

    def check_room(self, subject: Subject) -> Room:
        """Of the given answers, or of the model's own where those may be longer."""
        new = self._config.max_new_tokens
        return Room.of(
            (len(prompt.token_ids) + max(new, len(prompt.reference_ids or ())) for prompt in self._prompts(subject)), subject.positions
        )

    async def measure(self, subject: Subject, services: Services) -> Measured:
        """Raises `TeacherError` for a teacher of another vocabulary, or as it does."""
        config = self._config
        assert config.teacher is not None, "agreement is with a teacher"
        teacher = await services.teacher(config.teacher)
        head_rows = subject.model.get_output_embeddings().weight.shape[0]
        vocab_size = check_vocabulary(teacher.info, subject.tokenizer, head_rows)
        prompts = self._prompts(subject)
        check_lengths(teacher.info, prompts, max_new_tokens=config.max_new_tokens)
        suite = EvalSuite(
            prompts,
            EvalConfig(sequences=len(prompts), rollouts=config.rollouts, max_new_tokens=config.max_new_tokens),
            byte_counts_V=token_byte_counts(subject.tokenizer),
            engine=subject.engine,
            teacher=fitted(teacher, vocab_size),
            compute_dtype=subject.compute_dtype,
            vocab_size=vocab_size,
        )
        with subject.timed() as counts:
            found = await suite.measure(subject.model)
            counts.tokens += sum(len(prompt.token_ids) for prompt in prompts) + sum(found.tokens.values())
        return Measured(found.scores, notes={"teacher": teacher.info.model, "kl_is_bucketed": suite.is_bucketed})

    def _prompts(self, subject: Subject) -> list[Prompt]:
        chat, delimiter = self._config.chat, self._config.delimiter
        return [Prompt(name, *subject.exchange(prompt, answer, chat=chat, delimiter=delimiter)) for name, prompt, answer in self._rows]
