"""Held-out text: bits per byte, by which models with different tokenizers can be compared, and perplexity per token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bbopd.config_task import TaskConfig
from bbopd.errors import DataError
from bbopd.evaluate.bits_per_byte import document_windows
from bbopd.evaluate.scores import Scores, weighted_ratio
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.tasks.base import Measured, Room, TaskInfo
from bbopd.evaluate.tasks.rows import Row, Template, unique_clusters

_LONGEST_WINDOW = 2048


class HeldOutText:
    """Every token of every text once, in windows that overlap by half; the first one given the token that begins a text.

    Raises `DataError` for an empty text.
    """

    def __init__(self, info: TaskInfo, config: TaskConfig, rows: Sequence[Row]) -> None:
        assert config.text is not None, "held-out text has text"
        self.info = info
        self._window = config.window
        self._names = tuple(row.name for row in rows)
        self._clusters = unique_clusters(config.cluster, rows)
        text = Template(config.text, "text")
        self._texts = [text.text(row) for row in rows]
        if "" in self._texts:
            raise DataError(f"{rows[self._texts.index('')].where}: the text is empty: leave the row out")

    def check_room(self, subject: Subject) -> Room:
        """Windows always fit; what is longest is a text."""
        tokens = [len(subject.tokenizer.encode(text, add_special_tokens=False, verbose=False)) for text in self._texts]
        return Room(max(tokens), subject.positions, 0)

    async def measure(self, subject: Subject, services: Services) -> Measured:
        """``bits_per_byte`` over the UTF-8 bytes of the texts, ``perplexity`` per token. Raises what `Subject.likelihoods` raises."""
        window = min(self._window or _LONGEST_WINDOW, subject.positions)
        windows = [
            prompt
            for name, text in zip(self._names, self._texts, strict=True)
            for prompt in document_windows(
                name,
                subject.tokenizer.encode(text, add_special_tokens=False, verbose=False),
                window=window,
                stride=max(1, window // 2),
                start_token_id=subject.start_token,
            )
        ]
        found = subject.likelihoods([(prompt.token_ids, prompt.reference_ids or ()) for prompt in windows])
        place = {name: index for index, name in enumerate(self._names)}
        nats, tokens = np.zeros(len(place)), np.zeros(len(place))
        for prompt, likelihood in zip(windows, found, strict=True):
            nats[place[prompt.prompt_id]] -= likelihood.nats
            tokens[place[prompt.prompt_id]] += likelihood.tokens
        sizes = np.array([len(text.encode()) for text in self._texts], np.float64)
        return Measured(
            {
                "bits_per_byte": Scores(
                    self._names, np.column_stack([nats / math.log(2), sizes]), clusters=self._clusters, higher_is_better=False
                ),
                "perplexity": Scores(
                    self._names,
                    np.column_stack([nats, tokens]),
                    _perplexity,
                    self._clusters,
                    higher_is_better=False,
                    is_comparable=False,
                ),
            },
            notes={"window": window},
        )


def _perplexity(table_IC: np.ndarray, weight_I: np.ndarray) -> float:
    return math.exp(weighted_ratio(table_IC, weight_I))
