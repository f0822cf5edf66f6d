"""Endless draws from prompts: shuffled, mixed by weight, shared out among ranks, and taken up again exactly where they stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bbopd.data.flow import Flow, FlowReader
from bbopd.errors import DataError
from bbopd.types import Prompt

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: its multiples modulo 2^64 lie as evenly as can be
_WORD = 2**64
_COUNTED = 2**20  # draws counted at a time


@dataclass(frozen=True, slots=True)
class Share:
    """The next ``count`` of a list of prompts, or a ``flow``, drawn from as one: ``weight`` over the sum of weights is how often."""

    count: int
    weight: float
    flow: Flow | None = None


def as_it_is(prompt: Prompt) -> Prompt:
    return prompt


class PromptStream:
    """Endless draws from ``prompts``, epoch after epoch, each in an order that (seed, share, epoch) alone decides.

    With ``shares``, which cut ``prompts`` from its beginning to its end, each share has epochs of its own, and draws come from it by its
    weight: at any time within a few draws of its due. Without, every prompt is drawn once before any comes again.

    There is one global sequence of draws. Of every ``world_size`` of them in a row, ``rank`` gets the one of its number: ranks never
    get the same draw, and together they get what one alone would.

    Labelled prompts and prompts to answer are two independent sequences. ``position`` is how far each has been given out to all
    ranks; it is the same number on all that have drawn as often. Setting it on a new stream over the same prompts and seed goes on exactly
    there, with another ``world_size`` too. Of flows it has bookmarks besides, by which the place is found without reading all before it.

    ``prepare`` is done to every prompt before it is drawn.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        *,
        shares: Sequence[Share] = (),
        rank: int = 0,
        world_size: int = 1,
        prepare: Callable[[Prompt], Prompt] = as_it_is,
    ) -> None:
        parts: list[tuple[float, Sequence[Prompt] | Flow]] = []
        start = 0
        for share in shares or (Share(len(prompts), 1.0),):
            parts.append((share.weight, share.flow or [prepare(prompt) for prompt in prompts[start : start + share.count]]))
            start += share.count
        assert start == len(prompts), f"shares cover {start} of {len(prompts)} prompts"
        if not any(isinstance(part, Flow) or part for _, part in parts):
            raise DataError("there are no prompts to draw from")
        self._draws = {
            name: _Draws(parts, prepare, seed, stream, rank, world_size, labelled=name == "labelled")
            for stream, name in enumerate(("labelled", "prompts"))
        }

    def next_labelled(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts with a known continuation. Raises `DataError` where there is none at all."""
        return self._draws["labelled"].take(count)

    def next_prompts(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts for the student to answer, labelled or not."""
        return self._draws["prompts"].take(count)

    @property
    def position(self) -> dict[str, Any]:
        bookmarks = {name: draws.bookmarks for name, draws in self._draws.items()}
        places = {name: draws.position for name, draws in self._draws.items()}
        return {**places, "bookmarks": bookmarks} if any(bookmarks.values()) else places

    @position.setter
    def position(self, value: Mapping[str, Any]) -> None:
        for name, draws in self._draws.items():
            draws.position = value[name]
            draws.go_to(value.get("bookmarks", {}).get(name, {}))

    def close(self) -> None:
        """Read no further in what flows."""
        for draws in self._draws.values():
            draws.close()


def left_out(position: Mapping[str, Any]) -> dict[str, int]:
    """What drawing up to ``position`` has left out of data sets that flow, by reason, as often as it was read."""
    marks = [mark for draws in position.get("bookmarks", {}).values() for mark in draws.values()]
    return dict(sum((Counter(mark["left_out"]) for mark in marks), Counter[str]()))


class _Draws:
    """One global sequence, of which ``rank`` takes its part."""

    def __init__(
        self,
        parts: Sequence[tuple[float, Sequence[Prompt] | Flow]],
        prepare: Callable[[Prompt], Prompt],
        seed: int,
        stream: int,
        rank: int,
        world_size: int,
        *,
        labelled: bool,
    ) -> None:
        self.position = 0
        self._rank, self._world_size = rank, world_size
        self._sequences: dict[int, _Epochs | FlowReader] = {}
        for number, (_, part) in enumerate(parts):
            own = [seed % _WORD, stream, *([number] if number else [])]  # the first part is ordered as all are where there is but one
            if isinstance(part, Flow):
                if not labelled or any(prepare(sample).reference_ids for sample in part.samples):
                    self._sequences[number] = part.open(own, prepare, labelled=labelled)
            elif drawn := [prompt for prompt in part if prompt.reference_ids or not labelled]:
                self._sequences[number] = _Epochs(drawn, own)
        chosen = list(self._sequences)
        self._mixture = _Mixture([parts[number][0] for number in chosen], chosen, seed + stream) if chosen else None

    @property
    def _flows(self) -> dict[str, FlowReader]:
        return {str(number): sequence for number, sequence in self._sequences.items() if isinstance(sequence, FlowReader)}

    @property
    def bookmarks(self) -> dict[str, Any]:
        return {number: reader.bookmark for number, reader in self._flows.items()}

    def go_to(self, bookmarks: Mapping[str, Any]) -> None:
        for number, reader in self._flows.items():
            if number in bookmarks:
                reader.bookmark = bookmarks[number]

    def close(self) -> None:
        for reader in self._flows.values():
            reader.close()

    def take(self, count: int) -> list[Prompt]:
        if not count:
            return []
        if self._mixture is None:
            raise DataError(
                "no prompt has a known continuation: add text or responses to data.prompts, or set rollouts.on_policy_fraction=1"
            )
        taken = []
        for _ in range(count):
            part, place = self._mixture.at(self.position + self._rank)
            taken.append(self._sequences[part].at(place))
            self.position += self._world_size
        return taken


class _Epochs:
    """Prompts over and over, each epoch in an order of its own."""

    def __init__(self, prompts: Sequence[Prompt], seed: Sequence[int]) -> None:
        self._prompts, self._seed = prompts, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def at(self, place: int) -> Prompt:
        epoch, index = divmod(place, len(self._prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([*self._seed[:2], epoch, *self._seed[2:]]).permutation(len(self._prompts))
        return self._prompts[self._order[index]]


class _Mixture:
    """Which part every draw comes from, and how many came from that part before it.

    Draw ``i`` falls where ``i / golden ratio``, modulo 1, falls among the cumulated weights: a sequence of lowest discrepancy, in which
    every run of draws holds its parts about as often as their weights say, also the draws of one rank.
    """

    def __init__(self, weights: Sequence[float], parts: Sequence[int], seed: int) -> None:
        edges = np.cumsum(np.asarray(weights, dtype=np.float64)) / sum(weights)
        self._edges = np.array([min(_WORD - 1, int(edge * _WORD)) for edge in edges[:-1]], dtype=np.uint64)
        self._parts = parts
        self._offset = int(np.random.default_rng([seed % _WORD, 2]).integers(_WORD, dtype=np.uint64))
        self._counted, self._counts = 0, np.zeros(len(parts), dtype=np.int64)

    def at(self, draw: int) -> tuple[int, int]:
        """The part of ``draw``, and its place in that part's own sequence. Draws that only rise cost nothing; a lower one counts anew."""
        if len(self._parts) == 1:
            return self._parts[0], draw
        if draw < self._counted:
            self._counted, self._counts = 0, np.zeros(len(self._parts), dtype=np.int64)
        while self._counted < draw:
            end = min(draw, self._counted + _COUNTED)
            self._counts += np.bincount(self._chosen(self._counted, end), minlength=len(self._parts))
            self._counted = end
        chosen = int(self._chosen(draw, draw + 1)[0])
        return self._parts[chosen], int(self._counts[chosen])

    def _chosen(self, start: int, end: int) -> np.ndarray:
        draws = np.arange(start, end, dtype=np.uint64)
        points = draws * np.uint64(_GOLDEN) + np.uint64(self._offset)  # modulo 2^64, as unsigned numbers are
        return np.searchsorted(self._edges, points, side="right")
