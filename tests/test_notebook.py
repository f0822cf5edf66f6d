"""The notebook, from first cell to last, on a tiny model."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "distill.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the notebook's own machinery
@pytest.mark.skipif(importlib.util.find_spec("nbclient") is None, reason="nbclient is not installed: pip install 'bbopd[examples]'")
def test_the_notebook_runs_from_first_to_last(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    save_folder(tmp_path / "model", tiny_llama(vocab_size=262, layers=4), tiny_tokenizer())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    small = {"MODEL": "'model'", "KEEP_LAYERS": "'0,3'", "COLD_START_TOKENS": "400", "ON_POLICY_TOKENS": "200"}
    parameters.source = "\n".join([*(f"{name} = {value}" for name, value in small.items()), "OUTPUT = 'run'"])
    for cell in notebook.cells:
        cell.source = cell.source.replace('"max_new_tokens": 48', '"max_new_tokens": 8')
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "PASS  vocabulary" in said
    assert "FAIL" not in said
    assert re.search(r"Forward KL, own rollouts: [\d.]+ -> [\d.]+ -> [\d.]+ nats/token", said)
    assert float(re.search(r"KL to itself: (\S+) nats", said)[1]) < 1e-5
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert (tmp_path / "run" / "report.html").is_file()
