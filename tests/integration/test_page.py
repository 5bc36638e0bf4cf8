"""The page in a browser while the daemon runs the simulator: what it shows, what an operator does, who can read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from daemon.streams.simbundle import FACTORY
from tests.browser.chromium import browser, issues, opened, shot
from tests.daemon_process import DaemonProcess, eventually

__all__ = ["browser"]

TOKEN = "an-operators-token-of-a-plant"
WAIT_MS = 90_000


def simulating(bundle: Path, folder: Path, *, rate: int, token: bool) -> DaemonProcess:
    settings = {
        "HOMEOSTAT_BUNDLE": str(bundle),
        "HOMEOSTAT_FACTORY": FACTORY,
        "HOMEOSTAT_STATE_DIR": str(folder / "state"),
        "HOMEOSTAT_SOURCE": f"sim://ageing?rate={rate}",
        "HOMEOSTAT_CHECKPOINT": str(folder / "checkpoints"),
    }
    if token:
        (folder / "token").write_text(TOKEN)
        settings["HOMEOSTAT_OPERATOR__TOKEN_FILE"] = str(folder / "token")
    return DaemonProcess(settings, folder)


@pytest.fixture(scope="module")
def ageing(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that has met drift and promoted a version, for those who only look."""
    with simulating(bundle, tmp_path_factory.mktemp("ageing"), rate=1_000, token=True) as daemon:
        ready(daemon)
        name = 'homeostat_slow_bursts_total{result="promoted"}'
        eventually("a version is promoted", lambda: daemon.metrics()[name] >= 1, WAIT_MS / 1000)
        yield daemon


def ready(daemon: DaemonProcess) -> None:
    """The browser takes its share of a small machine, so a start gets more time here than elsewhere."""
    eventually("/readyz says 200", lambda: daemon.get("/readyz")[0] == 200, WAIT_MS / 1000)


def url(daemon: DaemonProcess) -> str:
    return f"http://127.0.0.1:{daemon.port}/"


def live(page: Page) -> Page:
    expect(page.locator("#link")).to_have_text("Live")
    return page


@pytest.mark.slow
def test_an_operator_sees_a_drift_and_acts_with_the_token_alone(browser: Browser, bundle: Path, tmp_path: Path) -> None:
    with simulating(bundle, tmp_path, rate=500, token=True) as daemon:
        ready(daemon)
        with opened(browser, url(daemon)) as page:
            live(page)
            before = page.locator("#versions li").count()
            drift = page.locator("#chart .drift").first
            drift.wait_for(state="attached", timeout=WAIT_MS)
            expect(page.locator("#decisions li", has_text="Drift: ").first).to_be_attached()
            page.locator("#chart .s2").first.wait_for(state="attached")
            expect(page.locator("#states .fast .share")).not_to_have_text("0 %", timeout=WAIT_MS)
            shot(page, "page-drift", tmp_path)
            page.locator("#versions li").nth(before).wait_for(state="attached", timeout=WAIT_MS)
            expect(page.locator("#chart .flag").first).to_be_attached()

            answer, freeze = page.locator("#answer"), page.get_by_role("button", name="Freeze")
            freeze.click()
            expect(answer).to_have_text("Type the operator's token first.")
            page.get_by_label("Operator's token").fill("somebody-elses-token-entirely")
            freeze.click()
            expect(answer).to_have_text("Not done: no token, or a wrong one")
            assert daemon.metrics()["homeostat_frozen"] == 0
            page.get_by_label("Operator's token").fill(TOKEN)
            freeze.click()
            expect(answer).to_contain_text("Done: frozen: version")
            expect(page.locator("#verdict")).to_contain_text("Frozen by an operator since")
            assert daemon.metrics()["homeostat_frozen"] == 1
            shot(page, "page-frozen", tmp_path)
            page.get_by_role("button", name="Resume").click()
            expect(answer).to_contain_text("Done: resumed")
            expect(page.locator("#verdict")).not_to_contain_text("Frozen by an operator")

            page.get_by_label("Version", exact=True).select_option("0")
            page.get_by_label("hold it").check()
            page.get_by_role("button", name="Roll back…").click()
            expect(page.get_by_role("dialog")).to_contain_text("the frozen model answers. Nothing is promoted")
            assert issues(page) == []
            shot(page, "page-asks", tmp_path)
            page.get_by_role("button", name="Cancel").click()
            expect(page.get_by_role("dialog")).to_be_hidden()
            assert daemon.metrics()["homeostat_version"] > 0
            page.get_by_role("button", name="Roll back…").click()
            page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
            expect(answer).to_contain_text("Done: version 0 answers")
            assert daemon.metrics()["homeostat_version"] == 0
            expect(page.locator("#versions li").last).to_contain_text("answers now")

            kept = page.evaluate(
                "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
            )
            assert TOKEN not in kept and TOKEN not in daemon.log

            served = page.locator("#frozen").inner_text()
            daemon.kill()
            expect(page.locator("#verdict")).to_contain_text("The daemon has not answered since")
            expect(page.locator("#link")).to_contain_text("No answer since")
            assert served and page.locator("#frozen").inner_text() != "–", "the last values stay"
            assert page.evaluate("document.body.dataset.link") == "lost"
            assert issues(page) == []
            shot(page, "page-no-answer", tmp_path)


def test_without_a_token_s_file_there_is_nothing_to_press(browser: Browser, bundle: Path, tmp_path: Path) -> None:
    with simulating(bundle, tmp_path, rate=100, token=False) as daemon:
        ready(daemon)
        with opened(browser, url(daemon)) as page:
            live(page)
            expect(page.locator("#operator")).to_contain_text("HOMEOSTAT_OPERATOR__TOKEN_FILE")
            assert page.locator("button, input, select").count() == 0


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("light", 1280, False), ("dark", 1280, True), ("phone", 360, False), ("night", 360, True)],
)
def test_nobody_is_shut_out(
    browser: Browser, ageing: DaemonProcess, tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    with opened(browser, url(ageing), width=width, height=740, dark=dark) as page:
        live(page)
        expect(page.locator("#versions li").nth(1)).to_be_attached()
        assert issues(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out at the side"
        page.locator("details.table summary").click()
        page.locator("#versions details summary").first.click()
        expect(page.locator("#chart-rows tr").nth(3)).to_be_attached()
        assert issues(page) == []
        shot(page, f"page-{name}", tmp_path)


def test_nothing_jumps_while_it_lives(browser: Browser, ageing: DaemonProcess) -> None:
    with opened(browser, url(ageing)) as page:
        live(page)
        read = page.locator("#rate-note").inner_text()
        for _ in range(3):
            expect(page.locator("#rate-note")).not_to_have_text(read)
            read = page.locator("#rate-note").inner_text()
        assert page.evaluate("window.shifted") < 0.05


def test_the_keyboard_reaches_everything_and_the_skip_link_is_first(browser: Browser, ageing: DaemonProcess) -> None:
    with opened(browser, url(ageing)) as page:
        live(page)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.dataset.action || document.activeElement.id"))
        assert {"token", "freeze", "resume", "reset", "checkpoint", "version", "hold", "rollback", "drain"} <= reached
