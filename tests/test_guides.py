"""Every guide of the documentation, followed to the letter on tiny models: its files are read, its commands run."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
import yaml

from bbopd.cli.main import build_parser
from bbopd.config import RunConfig, ServeConfig
from bbopd.config_compare import CompareConfig
from bbopd.config_file import parse_config, read_yaml
from tests.guides import GUIDES, Guide, blocks_of

NAMES = sorted(path.stem for path in GUIDES.glob("*.md"))
QUICK = ("kernels", "top_logprobs")  # the others take half a minute each: make test-slow


@pytest.fixture
def guide(request, tmp_path, monkeypatch) -> Guide:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return Guide(request.param, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_on_the_page_is_right_as_it_stands(name):
    """With the page's own models and budgets: files are what they say, commands have these options."""
    model = {"compare.yaml": CompareConfig, "teacher.yaml": ServeConfig}
    blocks = blocks_of((GUIDES / f"{name}.md").read_text())
    assert any(block.language == "sh" for block in blocks)
    for block in blocks:
        if block.file is not None and block.language == "yaml":
            path = Path(block.file)
            parse_config(yaml.safe_load(block.text), [], model.get(path.name, RunConfig), path.name)
        for line in block.text.splitlines() if block.language == "sh" else ():
            if line.startswith("bbopd "):
                build_parser().parse_args(line.split("#")[0].rstrip("& ").split()[1:])


@pytest.mark.parametrize("guide", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES], indirect=True)
def test_a_guide_can_be_followed(guide):
    guide.write_files()
    with contextlib.ExitStack() as stack:
        if guide.needs_api:
            guide.serve_api(stack)
        assert guide.run(stack)
    for config in guide.folder.glob("*.yaml"):
        output = guide.folder / read_yaml(config).get("output", "")
        if config.name == "compare.yaml":
            assert json.loads((output / "compare.json").read_text())["failures"] == []
        elif output != guide.folder:
            assert json.loads((output / "summary.json").read_text())["status"] == "finished"
