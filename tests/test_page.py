"""The report page in a real browser: it renders, sorts, filters, and shows what two models answered."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import items, page, report
from harness.sweep import Sweep
from tests.test_report import FakeCell, FakeTask, sweep_of, write_errors, write_items

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"> & <b>bold</b>"


def three_rows(folder: Path) -> Sweep:
    """Uncompressed, REAP and EAN on six problems each of two tasks, one answer trying to break out of the page."""
    tasks = (FakeTask("sums"), FakeTask("code", "code"))
    cells = [FakeCell("uncompressed", 0.0, 0, tasks), *(FakeCell(label, 0.5, 0, tasks) for label in ("REAP", "EAN"))]
    sweep = sweep_of(folder, cells)
    worth = {"uncompressed": [1, 1, 1, 1, 1, 0], "REAP": [1, 1, 0, 0, 1, 1], "EAN": [0] * 6}
    for cell in cells:
        for task in tasks:
            write_items(sweep.store, cell, task, worth[cell.label], f"{cell.label} {HOSTILE}")
        if cell.compresses:
            write_errors(sweep.store, cell, 0.1, 0.2)
    return sweep


def written(folder: Path) -> Path:
    sweep = three_rows(folder)
    file = folder / "page.html"
    arguments = ["sweep=toy", "store=somewhere"]
    tidy, read = report.frame(sweep), items.read(sweep)
    file.write_text(page.page(sweep, tidy, read, *report.summary(tidy, items.values(read)), {}, arguments))
    return file


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    text = written(tmp_path).read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", re.sub(r"<script type=.*?</script>", "", text))
    assert "./bench run sweep=toy store=somewhere" in text and "commit abc" in text
    assert text.count("data:image/png;base64,") >= 3


def test_texts_are_kept_once(tmp_path: Path) -> None:
    found = json.loads(page.problems(items.read(three_rows(tmp_path)))["json"])  # type: ignore[index]
    assert len(found["texts"]) == len(set(found["texts"]))
    assert found["models"] == ["toy uncompressed", "toy REAP 50 % on tiny", "toy EAN 50 % on tiny"]
    assert [len(task["items"]) for task in found["tasks"]] == [6, 6]


@pytest.fixture
def browser_page(tmp_path: Path) -> Iterator[object]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        view = browser.new_page(viewport={"width": 1280, "height": 900})
        view.errors = []
        view.on("pageerror", lambda error: view.errors.append(str(error)))
        view.on(
            "request", lambda request: request.url.startswith(("file:", "data:")) or view.errors.append(request.url)
        )
        view.goto(written(tmp_path).as_uri())
        yield view
        browser.close()


def test_in_a_browser_it_renders_sorts_filters_and_shows_answers(browser_page, tmp_path: Path) -> None:
    view = browser_page
    rows = view.locator("#scores-1 tbody tr")
    assert [row.split("\t")[1] for row in rows.all_inner_texts()] == ["uncompressed", "REAP", "EAN"]
    assert all(view.evaluate("[...document.images].map(image => image.naturalWidth > 100)"))

    header = view.locator("#scores-1 th", has_text="sums acc")
    header.click()
    assert [row.split("\t")[1] for row in rows.all_inner_texts()] == ["EAN", "REAP", "uncompressed"]
    header.click()
    assert rows.first.inner_text().split("\t")[1] == "uncompressed"
    assert header.get_attribute("aria-sort") == "descending"

    view.fill("[data-filter=scores-1]", "reap")
    assert view.locator("#scores-1 tbody tr:visible").count() == 1

    assert "2 lost, 1 won of 6 by acc; 2 listed." in view.inner_text("#count")
    shown = view.locator("#items .item")
    assert shown.count() == 2 and "problem 2" in shown.first.inner_text()
    assert HOSTILE in shown.first.inner_text(), "answers are text, whatever they hold"
    view.select_option("#show", "won")
    assert shown.count() == 1 and "problem 5" in shown.first.inner_text()
    view.select_option("#second", label="toy EAN 50 % on tiny")
    view.select_option("#show", "lost")
    assert shown.count() == 5
    view.fill("#containing", "problem 3")
    assert shown.count() == 1
    view.select_option("#task", label="code")
    assert "5 lost" in view.inner_text("#count")
    assert view.errors == [] and view.title() == "MoE compression bench: toy"
    view.screenshot(path=tmp_path / "page.png", full_page=True)
