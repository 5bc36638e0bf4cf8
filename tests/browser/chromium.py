"""A headless Chromium for the tests: the machine's own, driven by Playwright; and what axe-core says of a page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

WAIT_MS = 40_000
# A page's own time-out does not hold for assertions, which would give up after 5 s.
expect.set_options(timeout=WAIT_MS)

# Counts how far things jump after the first answer is drawn; what a person brings about does not count.
_SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
}).observe({type: "layout-shift", buffered: true});
"""


def binary() -> str:
    """Path of Chromium; skips, with the reason, where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no browser: Chromium is not installed (apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = binary()
    with sync_playwright() as playwright:
        # Without a sandbox: CI is root in a container, and the only page is our own.
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@contextmanager
def opened(browser: Browser, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """A page in a session of its own; AssertionError when it asked anybody else, or something went wrong in it."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        timezone_id="Europe/Zurich",
    )
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.add_init_script(_SHIFTS)
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    try:
        page.goto(url)
        yield page
        assert wrong == []
        assert [one for one in asked if not one.startswith((url, "data:"))] == []
    finally:
        context.close()


def issues(page: Page) -> list[str]:
    """What axe-core finds that shuts people out: impact serious or critical."""
    found: list[dict[str, Any]] = Axe().run(page).response["violations"]
    return [
        f"{one['id']} ({one['impact']}): {node['target']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def shot(page: Page, name: str, folder: Path) -> Path:
    """A picture of the whole page, in HOMEOSTAT_TEST_OUTPUT where that is set, else in ``folder``."""
    place = Path(os.environ.get("HOMEOSTAT_TEST_OUTPUT") or folder)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path
