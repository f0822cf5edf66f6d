"""A whole run from the command line whose student writes in vLLM, and what is said where vLLM is not there."""

import importlib.util
import json

import pytest

from bbopd.errors import EngineError
from bbopd.vllm_setup import require_vllm
from tests.cli_runs import WORDS, bbopd, steps, write_config
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    save_folder(place / "model", tiny_llama(vocab_size=262, layers=4, hidden=128), tiny_tokenizer())
    texts = [" ".join(WORDS[(i + j * (i % 5 + 1)) % len(WORDS)] for j in range(80)) for i in range(40)]
    (place / "corpus.txt").write_text("\n\n\n".join(texts))
    return place


@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make vllm")
def test_a_run_with_vllm_end_to_end(folder):
    rollouts = {"engine": "vllm", "agreement": {"tokens": 64}}
    path = write_config(folder, folder / "model", folder / "corpus.txt", rollouts=rollouts, student={"dtype": "float32"})
    result = bbopd("distill", str(path))
    assert result.returncode == 0, result.stderr
    lines = [line for line in steps(folder / "run") if line["phase"] == "on_policy"]
    assert sum(line["rollout_tokens"] for line in lines) >= 400
    measured = [line for line in lines if "engine_difference_mean" in line]
    assert measured
    assert max(line["engine_difference_max"] for line in measured) < 1e-3
    assert len({line["cycle"] for line in lines if "push_seconds" in line}) > 2
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["tokens"]["sampled"] > 0


@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make vllm")
def test_cycles_overlap_with_vllm(folder):
    rollouts = {"engine": "vllm", "agreement": {"tokens": 64}, "max_staleness": 1}
    (folder / "overlapping").mkdir()
    path = write_config(folder / "overlapping", folder / "model", folder / "corpus.txt", rollouts=rollouts, student={"dtype": "float32"})
    result = bbopd("distill", str(path))
    assert result.returncode == 0, result.stderr
    run = folder / "overlapping" / "run"
    lines = [line for line in steps(run) if line["phase"] == "on_policy"]
    assert sum(line["rollout_tokens"] for line in lines) >= 400
    assert {line["staleness_max"] for line in lines} <= {0, 1}
    measured = [line["engine_difference_max"] for line in lines if "engine_difference_max" in line]
    assert 0 < max(measured) < 1e-3
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    trained = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["ph"] == "X" and event["name"] == "training"]
    begun = [event["ts"] for event in events if event["ph"] == "b" and event["cat"] == "sampling"]
    assert any(start < moment < end for moment in begun for start, end in trained), "nothing was written while the trainer trained"
    state = json.loads((run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "state.json").read_text())["state"]
    assert state["drawn"] == state["trained"] + sum(state["rejected"].values()) + len(state["pending"])


@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make vllm")
def test_an_engine_that_disagrees_stops_the_run(folder):
    rollouts = {"engine": "vllm", "agreement": {"tokens": 64, "limit": 1e-12}}
    (folder / "other").mkdir()
    path = write_config(folder / "other", folder / "model", folder / "corpus.txt", rollouts=rollouts)
    result = bbopd("distill", str(path))
    assert result.returncode == EngineError.exit_code
    assert "nats on average and" in result.stderr
    assert "rollouts.agreement.limit" in result.stderr


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_the_way_to_it_is_named():
    with pytest.raises(EngineError, match=r"^rollouts.engine is vllm, but .*pip install 'bbopd\[vllm\]'.*; or set rollouts.engine=hf$"):
        require_vllm("rollouts.engine is vllm", "set rollouts.engine=hf")
    result = bbopd("sample-server", "--port", "0")
    assert result.returncode == EngineError.exit_code
    assert "bbopd sample-server needs vLLM, but vLLM is not installed here" in result.stderr
    assert "rollouts.engine" not in result.stderr


@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make vllm")
def test_tasks_answered_by_vllm(folder, tmp_path):
    """The same greedy answers as the hf engine writes, hence the same scores."""
    (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps({"prompt": f"{' '.join(WORDS[:9])} {n}", "answer": "the"}) for n in range(4)))
    found = []
    for engine in ("hf", "vllm"):
        output = tmp_path / f"{engine}.json"
        arguments = ("--tasks", str(tmp_path / "qa.jsonl"), "--engine", engine, "--dtype", "float32", "--output", str(output))
        result = bbopd("eval", str(folder / "model"), *arguments)
        assert result.returncode == 0, result.stderr
        found.append(json.loads(output.read_text())["rows"][0])
    assert found[0]["samples"] == found[1]["samples"]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["tokens"] == found[1]["tokens"]
