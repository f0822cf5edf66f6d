"""The page that people rate on, driven with its keys in a real browser: rate, close, go on, export, collect."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbopd.evaluate.human.comparisons import read_key, shuffled_comparisons
from bbopd.evaluate.human.page import PageFiles, write_page
from bbopd.evaluate.human.ratings import read_ratings
from bbopd.evaluate.human.results import collect
from tests.browser import chromium, complaints, downloaded, overflow, resize, wear

pytestmark = pytest.mark.browser

LONG = "A line that is long enough to wrap on a phone, with unbreakable_" + "x" * 120 + "\n\nand a second paragraph.\n" * 8
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"> & <b>bold</b>"


@pytest.fixture
def files(tmp_path: Path) -> PageFiles:
    answers = {
        "Which?": {"org/first": "this one", "org/second": "that one"},
        HOSTILE: {"org/first": HOSTILE, "org/second": LONG},
        "Why?": {"org/first": "because", "org/second": "therefore"},
    }
    return write_page(tmp_path / "page.html", shuffled_comparisons(answers, 0))


def test_rate_with_keys_close_go_on_and_export(files: PageFiles, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        ActionChains(driver).send_keys(*keys).perform()

    def text(element: str) -> str:
        return str(driver.find_element(By.ID, element).text)

    key = read_key(files.key)
    with chromium(tmp_path / "profile", tmp_path / "saved") as driver:
        driver.get(files.page.as_uri())
        press("ann")  # the name's field has the focus
        press(Keys.ENTER)
        assert text("place") == "Pair 1"
        press(*"5432a", Keys.ENTER)  # A: fluency 5, correctness 4; B: 3, 2; A is better
        assert text("place") == "Pair 2"
        press("1", Keys.ENTER)
        assert text("place") == "Pair 2", "a pair with open questions is not passed by Enter"
        assert text("rated") == "1 of 3 rated"

    with chromium(tmp_path / "profile", tmp_path / "saved") as driver:  # another day
        driver.get(files.page.as_uri())
        press(Keys.ENTER)
        assert text("place") == "Pair 2"
        assert driver.find_element(By.CSS_SELECTOR, '#scales-A [aria-pressed="true"]').text == "1"
        press(*"234t", Keys.ENTER)
        press("9", Keys.ARROW_UP, "5")  # no score; the last question, and from there a digit means nothing
        assert not driver.find_elements(By.CSS_SELECTOR, '[aria-pressed="true"]')
        press(Keys.ARROW_DOWN, *"2222b", Keys.ENTER)
        assert text("verdict").startswith("All pairs are rated")
        press(Keys.ARROW_LEFT, "a")  # a second thought
        driver.find_element(By.ID, "export").click()
        name, content = downloaded(tmp_path / "saved")
        assert driver.title == "Compare two answers", "an answer ran as a script"
        assert complaints(driver) == []

    assert name.startswith("ratings-ann-")
    ratings = read_ratings([next((tmp_path / "saved").glob("*.json"))], key)
    assert [rating.item_id for rating in ratings] == [item["item"] for item in content["ratings"]] == list(key.models)
    assert [rating.preference for rating in ratings] == [1.0, 0.5, 1.0]
    assert [dict(rating.scores) for rating in ratings] == [
        {"fluency": (5, 3), "correctness": (4, 2)},
        {"fluency": (1, 3), "correctness": (2, 4)},
        {"fluency": (2, 2), "correctness": (2, 2)},
    ]
    sides = [key.models[rating.item_id] for rating in ratings]
    preferred = [1.0 if models[0] == "org/first" else 0.0 for models in (sides[0], sides[2])]
    assert collect(ratings, key).win_rates[0].rate.value == pytest.approx((sum(preferred) + 0.5) / 3)


def test_every_width_and_both_schemes_show_the_whole_page(files: PageFiles, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    with chromium(tmp_path / "profile", tmp_path / "saved") as driver:
        driver.get(files.page.as_uri())
        resize(driver, 390)
        assert overflow(driver) == 0
        driver.find_element(By.ID, "rater").send_keys("bob", Keys.ENTER)
        grounds = set()
        for _ in range(3):
            for width in (320, 390, 1400):
                resize(driver, width)
                assert overflow(driver) == 0, f"wider than {width} pixels"
            for scheme in ("light", "dark"):
                wear(driver, scheme)
                grounds.add(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
            for selector in ('#scales-A [data-value="3"]', '#scales-B [data-value="4"]'):  # with a pointer this time
                for button in driver.find_elements(By.CSS_SELECTOR, selector):
                    button.click()
            driver.find_element(By.CSS_SELECTOR, '[data-value="tie"]').click()
            driver.find_element(By.ID, "next").click()
        assert len(grounds) == 2
        assert driver.find_element(By.ID, "verdict").text.startswith("All pairs")
        assert complaints(driver) == []
