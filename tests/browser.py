"""A real Chromium for tests of the pages: headless, with a profile of its own, and no way to the network."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def chromium(profile: Path, downloads: Path) -> Iterator[Any]:
    """A selenium driver. A second one on the same ``profile`` remembers what the first one's pages kept."""
    from selenium import webdriver

    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        pytest.fail("chromium and chromedriver are needed: make test-browser installs Debian's")
    downloads.mkdir(exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = str(found[0])
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads), "download.prompt_for_download": False})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(found[1])))
    try:
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int, height: int = 900) -> None:
    """Set the page's own width, narrower than a window can be."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def wear(driver: Any, scheme: str, medium: str = "screen") -> None:
    """Show the page as to somebody who asks for ``light`` or ``dark``, on a screen or in print."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": features})


def overflow(driver: Any) -> int:
    """Pixels by which the page is wider than it may be."""
    return int(driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def complaints(driver: Any) -> list[str]:
    """What the browser's console has to say of the page, blocked requests included; all that it fetched."""
    fetched = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    return [line["message"] for line in driver.get_log("browser")] + [name for name in fetched if not name.startswith("blob:")]


def downloaded(folder: Path, *, seconds: float = 10.0) -> Any:
    """The JSON file that the page has just saved."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        files = list(folder.glob("*.json"))
        if files:
            return files[0].name, json.loads(files[0].read_text(encoding="utf-8"))
        time.sleep(0.05)
    raise AssertionError(f"nothing was saved into {folder} within {seconds} s")
