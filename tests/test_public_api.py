"""Nothing that somebody relies on changes unannounced: the public surface is the one in ``public_api.txt``."""

from __future__ import annotations

import difflib

from tests.public_api import FILE, lines


def test_the_public_surface_is_the_one_on_record():
    recorded, found = FILE.read_text(encoding="utf-8").splitlines(), list(lines())
    changes = [
        line for line in difflib.unified_diff(recorded, found, lineterm="", n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert not changes, (
        "the public surface has changed: take it back, or run `python -m tests.public_api` and say in CHANGELOG.md what changes for "
        "whom (of what is gone or means something else: under Changed or Removed)\n" + "\n".join(changes)
    )


def test_it_holds_what_people_rely_on():
    found = set(lines())
    assert "python bbopd.TopKTeacher.log_tail: Tensor" in found
    assert any(line.startswith("python bbopd.linear_distill(hidden: ") and "divergence: " in line for line in found)
    assert "option run: train.lr: number > 0, by default `2e-05`" in found
    assert "command bbopd distill --set value" in found
    assert "exit status 7: BudgetSpentError" in found
    assert "measure kl_rollouts" in found
    assert len(found) == len(list(lines())), "every line once"
