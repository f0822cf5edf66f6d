"""Questions, summaries and whatever else is written: greedy answers, scored against those accepted."""

from __future__ import annotations

from collections.abc import Sequence

from bbopd.config_task import TaskConfig
from bbopd.errors import ModelError
from bbopd.evaluate.scores import Scores
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.tasks.base import Measured, Room, TaskInfo
from bbopd.evaluate.tasks.rows import Row, Template, unique_clusters
from bbopd.evaluate.text_metrics import check_libraries, score_texts

_SHOWN = 3


class Generation:
    """An answer a row, stripped of white space. Raises `DataError` for a row that does not fit, `ConfigError` without a library."""

    def __init__(self, info: TaskInfo, config: TaskConfig, rows: Sequence[Row]) -> None:
        assert config.prompt is not None, "generation has a prompt"
        assert config.answer is not None, "generation has an answer"
        check_libraries(config.metrics, info.source)
        self.info = info
        self._config = config
        self._names = [row.name for row in rows]
        self._clusters = unique_clusters(config.cluster, rows)
        prompt, answer = Template(config.prompt, "prompt"), Template(config.answer, "answer")
        self._prompts = [prompt.text(row) for row in rows]
        self._accepted = [answer.texts(row) for row in rows]

    def check_room(self, subject: Subject) -> Room:
        return subject_room(subject, self._prompts, self._config)

    async def measure(self, subject: Subject, services: Services) -> Measured:
        """Raises `ModelError` where every answer is empty."""
        written = await answers(subject, self._prompts, self._config, self.info.name)
        scores: dict[str, Scores] = {
            name: score_texts(name, self._names, written, self._accepted, self._clusters) for name in self._config.metrics
        }
        samples = [
            {"item": name, "answer": text, "accepted": list(accepted)}
            for name, text, accepted in zip(self._names[:_SHOWN], written, self._accepted, strict=False)
        ]
        return Measured(scores, notes={"empty_answers": written.count(""), "samples": samples})


def subject_room(subject: Subject, prompts: Sequence[str], config: TaskConfig) -> Room:
    """Of prompts and their longest answers. Raises `DataError` for answers that leave no room, or a prompt that cannot be a chat."""
    new = config.max_new_tokens
    return Room.of((length + new for length in subject.prompt_lengths(prompts, chat=config.chat)), subject.prompt_room(new) + new)


async def answers(subject: Subject, prompts: Sequence[str], config: TaskConfig, task: str) -> list[str]:
    """What ``subject`` writes as ``config`` says, stripped. Raises `ModelError` where it writes nothing at all."""
    texts = await subject.write(prompts, max_new_tokens=config.max_new_tokens, stop=config.stop, chat=config.chat)
    written = [text.strip() for text in texts]
    if not any(written):
        raise ModelError(
            f"task {task}: {subject.name} answered none of {len(prompts)} prompts, the first being {prompts[0][-200:]!r}: an answer ends "
            f"at the model's end of text{''.join(f' or {end!r}' for end in config.stop)}; look at prompt, stop and chat of the task"
        )
    return written
