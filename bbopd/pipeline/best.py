"""The student of the best evaluation so far, kept beside a run's checkpoints: what a run ends with need not be the best it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bbopd.errors import CheckpointError, ConfigError

_HIGHER_IS_BETTER = ("top1_rollouts", "top1_held_out", "win_rate")


class BestModel:
    """``best/`` in a run's folder: a model as `save` writes it, and ``evaluation.json``, the measure that it was chosen by.

    Parameters
    ----------
    measure : a figure of an evaluation; none of a reward, which the student is trained to raise.
    save : writes the student as it is now into a folder.
    """

    def __init__(self, root: Path, measure: str, save: Callable[[Path], None]) -> None:
        self._folder = root / "best"
        self._measure = measure
        self._save = save

    def offer(self, result: Mapping[str, Any]) -> bool:
        """Keep the student where ``result``, a line of evals.jsonl, is better than all before. Whether it was.

        Raises
        ------
        ConfigError : the evaluation does not tell the measure.
        CheckpointError : it cannot be written.
        """
        value = result.get(self._measure)
        if value is None:
            raise ConfigError(
                f"eval.keep_best is {self._measure}, which this run's evaluations do not tell: choose one of "
                f"{', '.join(sorted(name for name in result if isinstance(result[name], float) and name != 'seconds')) or 'nothing'}"
            )
        known = self._known()
        is_higher_better = self._measure in _HIGHER_IS_BETTER or "." in self._measure  # of a task's metric
        sign = 1.0 if is_higher_better and self._measure not in result.get("lower_is_better", ()) else -1.0
        if known is not None and sign * value <= sign * known:
            return False
        unfinished, old = self._folder.with_suffix(".tmp"), self._folder.with_suffix(".old")
        try:
            for folder in (unfinished, old):
                shutil.rmtree(folder, ignore_errors=True)
            self._save(unfinished)
            about = {"measure": self._measure, "value": value, "stage": result["stage"], "step": result["step"]}
            (unfinished / "evaluation.json").write_text(json.dumps(about, indent=1))
            if self._folder.exists():
                self._folder.rename(old)
            unfinished.rename(self._folder)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the best model to {self._folder}: {error}; the same command goes on") from error
        return True

    def _known(self) -> float | None:
        """The value of the model that is kept, where it was chosen by this measure."""
        try:
            about = json.loads((self._folder / "evaluation.json").read_text())
            return float(about["value"]) if about["measure"] == self._measure else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._folder}/evaluation.json cannot be read ({error}): remove {self._folder}") from error
