"""Which answers belong together, and when all of them are here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from bbopd.types import Group, Prompt, Rollout


@dataclass(slots=True)
class _Members:
    number: int
    awaited: int
    here: list[Rollout] = field(default_factory=list)


class PromptGroups:
    """Holds answers back until every one to the same prompt of one draw has been accepted or rejected, then gives them all at once.

    Parameters
    ----------
    prompts : in the order of drawing; a group is one prompt, as often as it comes in a row.
    first : the draw of the first one.
    by_group : whether they are held back at all: else each goes on at once, in no group.
    """

    def __init__(self, prompts: Sequence[Prompt], *, first: int = 0, by_group: bool) -> None:
        self._members: dict[int, _Members] = {}
        if not by_group:
            return
        number = first
        for _, repeated in groupby(prompts, key=lambda prompt: prompt.prompt_id):
            size = len(list(repeated))
            members = _Members(number, size)
            self._members.update(dict.fromkeys(range(number, number + size), members))
            number += size

    def accept(self, rollout: Rollout) -> list[Rollout]:
        """Those that may go on now."""
        members = self._members.get(rollout.draw)
        if members is None:
            return [rollout]
        members.here.append(rollout)
        return self._without(rollout.draw)

    def reject(self, draw: int) -> list[Rollout]:
        """Those that may go on now that this one will not come."""
        return self._without(draw) if draw in self._members else []

    def _without(self, draw: int) -> list[Rollout]:
        members = self._members.pop(draw)
        members.awaited -= 1
        if members.awaited:
            return []
        group = Group(members.number, len(members.here))
        return [replace(rollout, group=group) for rollout in sorted(members.here, key=lambda rollout: rollout.draw)]
