"""The pages of runs in a real browser: whole at every width, in both schemes and in print, with nothing fetched."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from bbopd.report.comparison import render_comparison
from bbopd.report.html import render
from bbopd.report.load import load_runs
from bbopd.report.models import render_models
from bbopd.report.standings import read_standings
from tests.browser import chromium, complaints, overflow, resize, wear
from tests.test_report_models import comparison, results
from tests.test_report_runs import a_run_with_tasks

pytestmark = pytest.mark.browser

CONTRAST = """
const channel = (value) => { const c = value / 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(channel);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const colours = [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector(arguments[0])).color];
const [one, other] = colours.map(luminance);
return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
"""


def a_page(kind: str, folder: Path) -> str:
    if kind == "models":
        return render_models([read_standings(results(folder / "results.json")), read_standings(comparison(folder / "arms"))])
    folders = [a_run_with_tasks(folder / f"run-{number}", gain=0.05, parameters=10**8 - number * 10**7) for number in range(3)]
    runs = load_runs(folders)
    return render(runs[0]) if kind == "run" else render_comparison(runs)


@pytest.mark.parametrize("kind", ["run", "runs", "models"])
def test_page_at_every_width_in_both_schemes_and_in_print(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(a_page(kind, tmp_path), encoding="utf-8")
    with chromium(tmp_path / "profile", tmp_path / "saved") as driver:
        driver.get(path.as_uri())
        for width in (320, 390, 768, 1400):
            resize(driver, width)
            assert overflow(driver) == 0, f"wider than {width} pixels"
        for scheme in ("light", "dark"):
            wear(driver, scheme)
            for selector in ("body", ".quiet", "nav a"):
                assert driver.execute_script(CONTRAST, selector) >= 4.5, f"{selector} is hard to read in {scheme}"
        wear(driver, "dark", "print")
        assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        printed = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
        assert printed.startswith(b"%PDF")
        wear(driver, "light")
        drawings = driver.execute_script("return [...document.querySelectorAll('svg')].map((svg) => svg.getBoundingClientRect().height)")
        assert len(drawings) > 5
        assert min(drawings) > 50
        driver.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert overflow(driver) == 0
        assert complaints(driver) == []
