"""What tests of plans share: a known model with few layers, a tiny student in a folder, and a machine to plan for."""

from __future__ import annotations

import json
from pathlib import Path

from bbopd.planning.machine import GIB, GPUS, Machine
from tests.tiny_models import save_folder, tiny_llama

CONFIGS = Path(__file__).parents[1] / "configs"


LAYERS = 4  # of the tiny student: enough for what is of no layer to be told from what is


def shape(folder: Path, name: str, layers: int) -> str:
    """A known model with few of its layers."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**json.loads((CONFIGS / "shapes" / path.name).read_text()), "num_hidden_layers": layers}))
    return str(path)


def student_folder(folder: Path, **sizes) -> Path:
    return save_folder(folder / "model", tiny_llama(layers=LAYERS, **sizes))


def h100(gpus: int = 1, **given) -> Machine:
    return Machine(gpus, 80 * GIB, GPUS["h100"], **given)
