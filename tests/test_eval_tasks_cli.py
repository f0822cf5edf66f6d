"""``bbopd eval MODEL... --tasks``: what is printed and written, whatever becomes of a model, and options that do not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bbopd.cli.main import main
from bbopd.errors import ConfigError, ModelError
from tests.test_evaluate_cli import evaluate
from tests.test_tasks import ASKED, QUESTIONS, VOCAB, write_task
from tests.tiny_models import save_folder, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    for seed in (1, 2):
        save_folder(folder / f"model{seed}", tiny_llama(VOCAB, seed=seed))
    write_task(folder, QUESTIONS, task="choices", **ASKED)
    (folder / "qa.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {n}", "answer": str(n)}) for n in range(4)))
    (folder / "prose.txt").write_text("The thing in the café.\n")
    return folder


def test_two_models_on_three_tasks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(folder / "model1"), str(folder / "model2")]
    tasks = f"{folder}/choices.yaml,{folder}/qa.jsonl"
    output = tmp_path / "results" / "all.json"
    arguments = ["eval", *models, "--tasks", tasks, f"{folder}/prose.txt", "--dtype", "float32", "--limit", "9", "--output", str(output)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert [(row["model"], row["task"]) for row in found["rows"]] == [(m, t) for m in models for t in ("choices", "qa", "prose")]
    assert [task["items"] for task in found["tasks"]] == [9, 4, 1]
    assert all(len(task["sha256"]) == 64 for task in found["tasks"])
    weights = load_file(folder / "model1" / "model.safetensors")
    assert found["models"][0]["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert len({model["weights_sha256"] for model in found["models"]}) == 2
    assert {"torch", "transformers"} <= found["machine"]["versions"].keys()
    for row in found["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["latency_seconds"] > 0
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 50e6
    acc = [row["metrics"]["acc"] for row in found["rows"] if row["task"] == "choices"]
    line = next(line for line in found["comparisons"] if line["metric"] == "acc")
    assert line["difference"] == pytest.approx(acc[1]["value"] - acc[0]["value"])
    assert not [line for line in found["comparisons"] if line["metric"] == "perplexity"], "it is one of tokens"
    for title in ("Results", "Cost", "Differences"):
        assert title in shown
    assert f"{acc[0]['value']:.4g}" in shown


def test_what_was_measured_is_kept(folder: Path, tmp_path: Path) -> None:
    """The second model cannot be loaded: the first one's results are in the file, with no half-written one beside it."""
    output = tmp_path / "kept.json"
    with pytest.raises(ModelError, match="nowhere"):
        evaluate(folder / "model1", tmp_path / "nowhere", "--tasks", folder / "prose.txt", "--output", output)
    assert [row["task"] for row in json.loads(output.read_text())["rows"]] == ["prose"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_options_that_do_not_go_together(folder: Path, tmp_path: Path) -> None:
    prose = folder / "prose.txt"
    with pytest.raises(ConfigError, match=r"--window has no meaning beside --tasks: write window into the task file"):
        evaluate("model", "--tasks", prose, "--window", 8)
    with pytest.raises(ConfigError, match=r"several models .* are compared on --tasks"):
        evaluate("one", "two", "--text", prose)
    with pytest.raises(ConfigError, match="each once"):
        evaluate("one", "one", "--tasks", prose)
    with pytest.raises(ConfigError, match=r"is a folder: give the name of a file"):
        evaluate("one", "--tasks", prose, "--output", tmp_path)
