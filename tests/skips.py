"""No skip is silent: each is listed with its reason, and ``HOMEOSTAT_REQUIRE_ALL=1`` makes it a failure."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TypeVar

import pytest
from _pytest.terminal import TerminalReporter

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def judged(report: Report) -> Report:
    expected_failure = hasattr(report, "wasxfail")
    if report.skipped and not expected_failure and os.environ.get("HOMEOSTAT_REQUIRE_ALL") == "1":
        report.longrepr = f"HOMEOSTAT_REQUIRE_ALL=1, but this was skipped: {reason(report)}"
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return judged((yield))


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    if skipped:
        terminalreporter.section("not run, and why:")
    for report in skipped:
        terminalreporter.line(f"{report.nodeid}: {reason(report)}")
