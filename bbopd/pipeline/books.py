"""The books of a run: every sequence that was drawn is trained (and perhaps rolled back), rejected with a reason, or pending.

These add up, and are checked with every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bbopd.errors import TrainingError
from bbopd.pipeline.parts import Gate, Prompts
from bbopd.pipeline.state import RunState
from bbopd.types import Prompt


@dataclass(frozen=True, slots=True)
class Draw:
    """What one cycle begins: prompts to answer (each as often as it shall be) and labelled ones.

    Its sequences are numbered from ``first``: the rollouts, in the order of ``rollouts``, then the labelled ones.
    """

    rollouts: tuple[Prompt, ...]
    labelled: tuple[Prompt, ...]
    first: int
    again: int  # those among them that an earlier checkpoint left pending
    position: dict[str, Any]  # of the prompt stream after it

    def __len__(self) -> int:
        return len(self.rollouts) + len(self.labelled)

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self))


class Books:
    """Draws from ``prompts`` and keeps count in ``state``. A draw counts once it is booked: until then it may be dropped.

    What a checkpoint left pending is drawn before anything new.
    """

    def __init__(self, state: RunState, prompts: Prompts, gate: Gate, *, samples_per_prompt: int) -> None:
        self._state, self._prompts, self._gate = state, prompts, gate
        self._samples = samples_per_prompt
        self._left = [_from_json(entry) for entry in state.pending]
        self._under_way: dict[int, tuple[Prompt, bool]] = {}  # sequence -> its prompt, and whether it is labelled
        self._next = state.drawn

    def draw(self, rollouts: int, labelled: int) -> Draw:
        """``rollouts`` prompts to answer, each ``samples_per_prompt`` times in a row (the last one fewer where it must); labelled ones."""
        self._prompts.position = self._state.position or self._prompts.position  # a draw that was not booked is drawn again
        asked = [prompt for prompt, is_labelled in self._left if not is_labelled][:rollouts]
        known = [prompt for prompt, is_labelled in self._left if is_labelled][:labelled]
        again = len(asked) + len(known)
        distinct = self._prompts.next_prompts(-(-(rollouts - len(asked)) // self._samples))
        asked = [*asked, *(prompt for prompt in distinct for _ in range(self._samples))][:rollouts]
        known += self._prompts.next_labelled(labelled - len(known))
        return Draw(tuple(asked), tuple(known), self._next, again, self._prompts.position)

    def book(self, draw: Draw) -> None:
        """From here on its sequences are pending until `train` or `reject` is told of them."""
        state = self._state
        rollouts, labelled = len(draw.rollouts), len(draw.labelled)
        left: list[tuple[Prompt, bool]] = []
        for prompt, is_labelled in self._left:
            rollouts, labelled = rollouts - (not is_labelled), labelled - is_labelled
            if (labelled if is_labelled else rollouts) < 0:
                left.append((prompt, is_labelled))
        self._left = left
        prompts = [*((prompt, False) for prompt in draw.rollouts), *((prompt, True) for prompt in draw.labelled)]
        self._under_way.update(zip(draw.numbers, prompts, strict=True))
        self._next = draw.first + len(draw)
        state.drawn += len(draw) - draw.again
        state.position = draw.position
        state.cycle += 1

    def train(self, numbers: Iterable[int]) -> None:
        """These sequences have been trained on."""
        for number in numbers:
            del self._under_way[number]
            self._state.trained += 1

    def reject(self, numbers: Iterable[int]) -> None:
        """These will not be, and the gate has counted why."""
        for number in numbers:
            del self._under_way[number]
        self._state.rejected = dict(self._gate.counts)

    def put_back(self) -> None:
        """What is under way will be drawn again, before anything new."""
        self._left = [*self._left, *self._under_way.values()]
        self._under_way.clear()

    def close(self) -> None:
        """Bring ``state`` up to date, to be saved. Raises `TrainingError` where the books do not balance."""
        state = self._state
        state.pending = [_to_json(*entry) for entry in (*self._left, *self._under_way.values())]
        rejected = sum(state.rejected.values())
        if state.drawn != state.trained + state.rolled_back + rejected + len(state.pending):
            raise TrainingError(
                f"{state.drawn} sequences were drawn, but {state.trained} trained, {state.rolled_back} rolled back, {rejected} rejected "
                f"and {len(state.pending)} pending: some were lost or counted twice, so nothing was saved at step {state.step}; the last "
                "checkpoint stands. This is a fault of bbopd, or of a rollout engine or teacher that did not answer each question once: "
                "please report it"
            )


def _to_json(prompt: Prompt, is_labelled: bool) -> dict[str, Any]:
    return {**asdict(prompt), "is_labelled": is_labelled}


def _from_json(entry: dict[str, Any]) -> tuple[Prompt, bool]:
    known = {name: _as_tuples(value) for name, value in entry.items()}
    is_labelled = known.pop("is_labelled")
    return Prompt(**known), is_labelled


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
