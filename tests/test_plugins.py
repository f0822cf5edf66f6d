"""Plug-ins of other packages: found by their entry points, refused in clear words, and five at once in a run that trains."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bbopd.cli.main import main
from bbopd.config import ObjectiveConfig, RunConfig
from bbopd.config_file import parse_config
from bbopd.errors import ConfigError
from bbopd.modeling import load_model
from bbopd.objectives import FACTS, OBJECTIVES, make_objective
from bbopd.output_head import OutputHead
from bbopd.pipeline.trackers import TRACKERS
from bbopd.plugins import GROUPS, find, installed
from bbopd.types import DistillBatch, FullTeacher
from tests.cli_runs import steps, write_config
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

WORKSHOP = Path(__file__).parent / "third_party"
PLUGGED = {
    "teacher": {"serve": None, "plugin": "in_process", "timeout": 60},
    "rollouts": {"engine": "copying"},
    "objective": {"name": "jeffreys", "options": {"balance": 0.7}, "alpha": 0.0, "ramp": 0},
    "train": {"cold_start_tokens": 0, "lr": 1e-2, "warmup": 0},
    "data": {"filters": {"plugins": {"banned": {"words": ["the"]}}}},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which pip has installed the package of ``tests/third_party``."""
    folder = tmp_path_factory.mktemp("site")
    source = shutil.copytree(WORKSHOP, folder / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(folder / "site"),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def workshop(site, monkeypatch) -> None:
    monkeypatch.syspath_prepend(site)
    yield
    for name in [name for name in sys.modules if name.startswith("bbopd_workshop")]:
        del sys.modules[name]


def package(folder: Path, name: str, version: str, group: str, plugin: str, code: str) -> None:
    """A package as pip would leave it in ``folder``: one module, with a class ``Plugin`` that is registered as ``plugin``."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[bbopd.{group}]\n{plugin} = {module}:Plugin\n")


def run_config(*settings: str) -> RunConfig:
    data = {"student": {"model": "x"}, "teacher": {"target": "grpc://localhost:1"}, "rollouts": {"max_new_tokens": 8}}
    return parse_config(data, settings, RunConfig, "run.yaml")


def test_the_librarys_own_names_are_those_of_its_tables():
    assert set(GROUPS["objectives"].built_in) == set(OBJECTIVES) == set(FACTS)
    assert set(GROUPS["trackers"].built_in) == set(TRACKERS)


@pytest.mark.usefixtures("as_in_a_process_of_its_own", "workshop")
def test_five_plugins_train_and_are_on_record(tmp_path, text, capsys):
    model = save_folder(tmp_path / "model", tiny_llama(vocab_size=262, layers=4), tiny_tokenizer())
    sections = {**PLUGGED, "teacher": {**PLUGGED["teacher"], "options": {"model": str(model)}}}
    config = write_config(tmp_path, model, text, **sections)
    settings = ["--set", "track=[csv]", "--set", "track_options.csv.file=kept.csv"]
    assert main(["doctor", str(config), *settings]) == 0
    assert main(["plan", str(config), *settings]) == 0
    assert "of copying, in the compute dtype (its cache: not known)" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["distill", str(config), *settings, "--json"]) == 0
    run = tmp_path / "run"
    assert json.loads(capsys.readouterr().out) == json.loads((run / "summary.json").read_text())
    lines = steps(run)
    assert lines[-1]["kd"] < 0.8 * lines[0]["kd"]
    student, before = load_model(run / "model"), load_model(model, keep_layers=[0, 3])
    assert any(not torch.equal(one, other) for one, other in zip(student.parameters(), before.parameters(), strict=True))
    rejected = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    assert {line["detail"] for line in rejected if line["reason"] == "banned"} == {"it says the"}
    assert json.loads((run / "summary.json").read_text())["rejected"]["banned"] > 0
    with (run / "kept.csv").open() as file:
        losses = {int(step): float(value) for step, name, value in csv.reader(file) if name == "train/loss"}
    assert losses == {line["step"]: line["loss"] for line in lines}
    on_record = json.loads((run / "run.json").read_text())["plugins"]
    assert {(one["group"], one["name"]) for one in on_record} == {
        *(("teachers", "in_process"), ("engines", "copying"), ("objectives", "jeffreys"), ("filters", "banned"), ("trackers", "csv"))
    }
    assert {(one["package"], one["version"]) for one in on_record} == {("bbopd-workshop", "1.2.0")}


@pytest.mark.usefixtures("workshop")
@pytest.mark.parametrize(("balance", "twin"), [(1.0, "forward_kl"), (0.0, "reverse_kl")])
def test_an_objective_gets_its_options_and_the_runs(balance, twin):
    generator = torch.Generator().manual_seed(3)
    N, D, V = 5, 8, 11
    hidden, weight, logits = (torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D), (N, V)))
    rows = torch.arange(N)
    batch = DistillBatch(
        *(rows, rows, torch.tensor([0, N], dtype=torch.int32), rows, rows, torch.full((N,), -100), torch.ones(N)),
        *(FullTeacher(logits=logits), N, N),
    )
    losses = []
    for config in (ObjectiveConfig(name="jeffreys", options={"balance": balance}), ObjectiveConfig(name=twin)):
        objective = make_objective(config)
        losses.append(objective.loss(hidden, OutputHead(weight), batch, ce_weight=0.0, kd_weight=1.0, normalizer=None).loss)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


@pytest.mark.usefixtures("workshop")
def test_they_are_listed_with_their_package(capsys):
    assert main(["plugins", "--json"]) == 0
    rows = {(row["group"], row["name"]): row for row in json.loads(capsys.readouterr().out)["plugins"]}
    assert rows["engines", "vllm"]["package"] == "bbopd"
    ours = rows["objectives", "jeffreys"]
    assert (ours["package"], ours["version"], ours["error"]) == ("bbopd-workshop", "1.2.0", "")
    assert main(["objectives", "--json", "--vocab", "1000"]) == 0
    objectives = {row["name"]: row for row in json.loads(capsys.readouterr().out)["objectives"]}
    assert objectives["jeffreys"]["needs"] == ["full"]
    assert objectives["jeffreys"]["bytes_per_token"] == {"full": 2000}
    assert objectives["jeffreys"]["package"] == "bbopd-workshop 1.2.0"
    assert main(["objectives"]) == 0
    assert "jeffreys  [of bbopd-workshop 1.2.0]" in capsys.readouterr().out


def test_a_plugin_that_does_not_work_breaks_no_list(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "broken-one", "0.1", "objectives", "broken", "import a_library_that_is_not_there")
    package(tmp_path, "thief-one", "0.3", "objectives", "forward_kl", "class Plugin: pass")
    assert main(["plugins"]) == 0
    out = capsys.readouterr().out
    assert "broken  (broken-one 0.1)\n    does not work: plug-in broken of broken-one 0.1 cannot be imported from broken_one:Plugin" in out
    assert "No module named 'a_library_that_is_not_there'" in out
    assert "plug-in forward_kl of thief-one 0.3 takes a name that is bbopd's own in objective.name" in out
    assert "rollouts.engine" in out
    assert main(["objectives"]) == 0
    printed = capsys.readouterr()
    assert "forward_kl\n" in printed.out
    assert "left out: plug-in broken of broken-one 0.1" in printed.err
    assert run_config("objective.name=forward_kl").plugins == ()


def test_names_that_nobody_or_two_packages_register(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"objective\.name: there is no forward_kll: did you mean forward_kl\?"):
        run_config("objective.name=forward_kll")
    with pytest.raises(ConfigError, match=r"track\.0: there is no wand: did you mean wandb\?"):
        run_config("track=[wand]")
    monkeypatch.syspath_prepend(tmp_path)
    for name, version in (("first-one", "1.0"), ("second-one", "2.0")):
        package(tmp_path, name, version, "engines", "twin", "class Plugin: pass")
    with pytest.raises(ConfigError, match=r"twin is registered in bbopd\.engines by first-one 1\.0 and second-one 2\.0: uninstall all but"):
        run_config("rollouts.engine=twin")


@pytest.mark.parametrize(
    ("group", "code", "message"),
    [
        (
            "engines",
            "class Plugin:\n    def generate(self): ...",
            "wrong_one:Plugin has no load_weights, as every plug-in of bbopd.engines has",
        ),
        ("engines", "Plugin = 3", "is no class: wrong_one:Plugin is 3"),
        ("trackers", "class Plugin:\n    log = close = Options = 1", "Options is 1, and no pydantic model"),
        ("objectives", "class Plugin:\n    FACTS = signal = loss = 1", "FACTS is 1, and no bbopd.objectives.Facts"),
        (
            "objectives",
            "from bbopd.objectives import Facts\nclass Plugin:\n    FACTS = Facts(('text',), '', '')\n    signal = loss = 1",
            "FACTS.needs is ('text',); a plug-in hears the teacher's signals on tokens",
        ),
    ],
)
def test_a_class_that_does_not_fit_its_group_is_refused(tmp_path, monkeypatch, capsys, group, code, message):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wrong_one", raising=False)
    package(tmp_path, "wrong-one", "0.2", group, "wrong", code)
    assert main(["plugins"]) == 0
    out = capsys.readouterr().out
    assert "plug-in wrong of wrong-one 0.2" in out
    assert message in out


@pytest.mark.usefixtures("workshop")
def test_options_are_held_to_the_plugins_own_model():
    config = run_config("objective.name=jeffreys", "objective.options={balance: 2, balanse: 1}")
    with pytest.raises(ConfigError) as caught:
        config.plugins[0].check()
    assert "plug-in jeffreys of bbopd-workshop 1.2.0 does not take these options; it knows balance" in str(caught.value)
    assert "objective.options.balance: Input should be less than or equal to 1 (got 2)" in str(caught.value)
    assert "objective.options.balanse: Extra inputs are not permitted" in str(caught.value)
    for settings, message in (
        (["objective.options={x: 1}"], "options belong to a plug-in, and forward_kl is none"),
        (["rollouts.options={x: 1}"], "options belong to an engine that is a plug-in, and hf is none"),
        (["teacher.options={x: 1}"], "options belong to a teacher that is a plug-in"),
        (["teacher.plugin=in_process"], "give exactly one of target"),
        (["track=[csv]", "track_options.cvs={}"], "track_options.cvs: options are for trackers in track that are plug-ins, which are csv"),
        (["data.filters.plugins.bannd={}"], "there is no bannd: did you mean banned?"),
    ):
        with pytest.raises(ConfigError) as caught:
            run_config(*settings)
        assert message in str(caught.value)


@pytest.mark.usefixtures("workshop")
def test_nothing_is_imported_before_a_run_needs_it():
    assert [plugin.name for plugin in installed("engines")] == ["copying"]
    assert find("objectives", "jeffreys").version == "1.2.0"
    run_config("rollouts.engine=copying", "objective.name=jeffreys", "track=[csv]")
    assert not [name for name in sys.modules if name.startswith("bbopd_workshop")]
