"""The documentation site: what the code writes of itself is complete, and a link that leads nowhere is found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from bbopd.config_base import Section
from website.commands import arguments_of, commands_page, parsers
from website.links import broken_links
from website.options import FILES, default_in_words, options_of, options_page, sections_of, type_in_words
from website.staging import stage

PROJECT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("file", FILES, ids=[file.page for file in FILES])
def test_every_option_has_a_meaning(file):
    missing = [f"{model.__name__}.{one.name}" for _, model in sections_of(file.model) for one in options_of(model) if not one.meaning]
    assert not missing, f"options without a docstring below them: {missing}"
    undescribed = [model.__name__ for _, model in sections_of(file.model) if not model.__doc__ or model.__doc__ == Section.__doc__]
    assert not undescribed, f"sections without a docstring: {undescribed}"


def test_every_argument_of_a_command_has_help():
    missing = [(name, action.dest) for name, parser in parsers() for action in arguments_of(parser) if not action.help]
    assert not missing, f"arguments without help: {missing}"


class Inner(Section):
    """An inner section."""

    size: Annotated[int, Field(gt=0, le=8)] = 3
    """How large."""


class Outer(Section):
    """The whole."""

    inner: Inner = Inner(size=4)
    """What is inside."""
    again: Inner | None = None
    """Another."""
    kind: Literal["a", "b"]
    """Which."""
    span: tuple[Annotated[float, Field(ge=0)], float] | None = (0.5, 1.0)
    """From, to."""


def test_options_are_told_in_words():
    options = {one.name: one for one in options_of(Outer)}
    places = {model: key for key, model in sections_of(Outer)}
    assert places == {Outer: "", Inner: "inner"}  # once, where it is met first
    words = {name: (type_in_words(one.field, places), default_in_words(one.field), one.meaning) for name, one in options.items()}
    assert words["inner"] == ("[section](#inner)", 'by default `{"size": 4}`', "What is inside.")
    assert words["again"] == ("[section](#inner) or none", "by default none", "Another.")
    assert words["kind"] == ("`a` or `b`", "**has to be given**", "Which.")
    assert words["span"] == ("[number ≥ 0, number] or none", "by default `[0.5, 1.0]`", "From, to.")
    (size,) = options_of(Inner)
    assert type_in_words(size.field, places) == "whole number > 0, ≤ 8"


def test_generated_pages_hold_what_is_there():
    run = options_page(FILES[0])
    assert "### `train.lr` { #train-lr }\n\nnumber > 0 · by default `2e-05`" in run
    assert "## `data.prompts[]` { #data-prompts }" in run
    page = commands_page()
    assert all(f"`{name}`" in page for name, _ in parsers())
    assert "`--set KEY=VALUE`\n:   " in page


def test_the_pages_of_the_project_can_be_put_together(tmp_path):
    """Every relative link of ``docs/``, as GitHub shows it, leads to a file; links to sources become pages."""
    stage(PROJECT, tmp_path / "site")
    reproduce = (tmp_path / "site" / "reproduce.md").read_text()
    assert "](files/configs/recipe_yaml.md)" in reproduce
    assert "``` yaml\n" in (tmp_path / "site" / "files" / "configs" / "recipe_yaml.md").read_text()
    notebook = (tmp_path / "site" / "files" / "examples" / "distill_ipynb.md").read_text()
    assert notebook.startswith("# On-policy distillation")
    assert "``` python\nfrom bbopd.cli.demo import" in notebook
    nav = (PROJECT / "zensical.toml").read_text()
    unlisted = [path.name for path in (PROJECT / "docs").rglob("*.md") if str(path.relative_to(PROJECT / "docs")) not in nav]
    assert not unlisted, f"pages that zensical.toml does not list: {unlisted}"


def test_a_page_that_links_nowhere_is_named(tmp_path):
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("# A page\n")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("# A page\n\n[here](#a-page) [out](https://example.com) [there](../CHANGELOG.md#a-page)\n\n```\n[code](gone.md)\n```\n")
    stage(tmp_path, tmp_path / "site")
    assert "[there](changelog.md#a-page)" in (tmp_path / "site" / "page.md").read_text()
    page.write_text("# A page\n\n[gone](../configs/gone.yaml)\n")
    with pytest.raises(ValueError, match=r"docs/page\.md:3: the link to \.\./configs/gone\.yaml leads nowhere"):
        stage(tmp_path, tmp_path / "site")


def test_broken_links_of_a_built_site_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.html").write_text('<h1 id="there">x</h1><a href="../index.html#top">up</a>')
    index = '<h1 id="top">x</h1><a href="sub/other.html#there">a</a><a href="#top">b</a><a href="https://example.com">c</a>'
    (tmp_path / "index.html").write_text(index)
    assert broken_links(tmp_path) == []
    bad = '<a href="gone.html">d</a><a href="sub/other.html#gone">e</a><a href="../outside.html">f</a>'
    (tmp_path / "index.html").write_text(index + bad + '<script src="https://cdn.example.com/x.js"></script><img src="gone.png">')
    (tmp_path.parent / "outside.html").write_text("")
    assert broken_links(tmp_path) == [
        "index.html: loads https://cdn.example.com/x.js from another host",
        "index.html: gone.html leads nowhere",
        "index.html: sub/other.html#gone names an anchor that sub/other.html does not have",
        "index.html: ../outside.html leads nowhere",
        "index.html: gone.png leads nowhere",
    ]
