"""A real Prometheus scrapes the real daemon; its alerts fire into a real Alertmanager, somebody is told, and they end.

Files and what is shortened of them: tests/prometheus.py.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.daemon_process import DaemonProcess, eventually, records
from tests.prometheus import FOLDER, Webhook, binary, quick_rules, told, watched


def test_prometheus_and_alertmanager_take_their_files_as_they_are() -> None:
    said = told(binary("promtool", "prometheus"), "check", "config", str(FOLDER / "prometheus.yml"))
    rules = yaml.safe_load((FOLDER / "homeostat.rules.yml").read_text(encoding="utf-8"))
    count = sum(len(group["rules"]) for group in rules["groups"])
    assert "1 rule files found" in said and f"{count} rules found" in said
    said = told(binary("amtool", "prometheus-alertmanager"), "check-config", str(FOLDER / "alertmanager.yml"))
    assert "1 inhibit rules" in said and "1 receivers" in said


def test_only_the_time_that_an_alert_waits_is_shortened() -> None:
    quick, own = quick_rules(), yaml.safe_load((FOLDER / "homeostat.rules.yml").read_text())
    waits = [rule.pop("for", None) for rules in (quick, own) for group in rules["groups"] for rule in group["rules"]]
    assert quick == own
    pairs = set(zip(waits[: len(waits) // 2], waits[len(waits) // 2 :], strict=True))
    assert pairs == {(None, None), ("500ms", "1m"), ("1000ms", "2m"), ("2500ms", "5m"), ("5000ms", "10m")} | {
        ("15000ms", "30m"),
        ("60000ms", "2h"),
    }


@pytest.fixture
def saving(settings: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A worker that writes checkpoints often, so that the alert about missing ones is silent."""
    return settings | {
        "HOMEOSTAT_CHECKPOINT__DIR": str(tmp_path / "checkpoints"),
        "HOMEOSTAT_CHECKPOINT__EVERY_S": "0.3",
    }


def others(webhook: Webhook, ask: Callable[[str], float | None], *expected: str) -> set[str]:
    """Alerts that somebody was told of for no reason.

    A scrape has 250 ms here, and HomeostatDown waits for 1 s: a machine that pauses for longer raises it rightly.
    """
    missed = ask('min_over_time(up{job="homeostat"}[10m])') == 0
    return {notice[0] for notice in webhook.notices} - {*expected, *(["HomeostatDown"] if missed else [])}


@pytest.mark.slow
def test_a_worker_that_hangs_is_down_for_prometheus_and_up_again_when_it_goes_on(
    saving: dict[str, str], tmp_path: Path
) -> None:
    with DaemonProcess(saving | {"HOMEOSTAT_SOURCE": "sim://ageing?rate=200"}, tmp_path) as daemon:
        daemon.wait_until_ready()
        target = f"127.0.0.1:{daemon.port}"
        with watched(tmp_path / "watch", target) as (webhook, ask):
            eventually("Prometheus has scraped it", lambda: ask('up{job="homeostat"}') == 1)
            eventually("it reads records", lambda: (ask("homeostat:records:rate5m") or 0) > 0)
            assert not others(webhook, ask)
            daemon.process.send_signal(signal.SIGSTOP)
            try:
                assert webhook.wait_for("HomeostatDown", "firing") == (target, f"{target} does not answer Prometheus")
                eventually("it does not answer", lambda: ask('up{job="homeostat"}') == 0)
            finally:
                daemon.process.send_signal(signal.SIGCONT)
            assert webhook.wait_for("HomeostatDown", "resolved")[0] == target
            # One scrape that is missed makes it pending again, for a moment.
            eventually("the alert is gone", lambda: ask('ALERTS{alertname="HomeostatDown"}') is None)


@pytest.mark.slow
def test_bad_records_raise_an_alert_and_good_ones_end_it(saving: dict[str, str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    names = iter(range(1_000_000))

    def write(count: int, *more: bytes) -> None:
        lines = records([str(next(names)) for _ in range(count)])
        with open(rows, "ab") as file:
            file.write(b"".join(line + b"\n" for line in [*lines, *more]))

    write(100)
    source = {"HOMEOSTAT_SOURCE": f"file:{rows}?follow=true", "HOMEOSTAT_SINK": "null:"}
    with DaemonProcess(saving | source, tmp_path) as daemon:
        daemon.wait_until_ready()
        daemon.wait_for("homeostat_records_in_total", 100)
        with watched(tmp_path / "watch", f"127.0.0.1:{daemon.port}") as (webhook, ask):
            eventually("Prometheus has scraped it", lambda: ask("homeostat_records_in_total") == 100)
            write(80, *[b"not json"] * 20)
            _, summary = webhook.wait_for("HomeostatDeadLetters", "firing")
            assert summary.endswith(f"of the records of 127.0.0.1:{daemon.port} can't be answered")
            assert (ask("homeostat:records_invalid:ratio10m") or 0) > 0.01
            write(5_000)
            webhook.wait_for("HomeostatDeadLetters", "resolved")
            assert (ask("homeostat:records_invalid:ratio10m") or 0) < 0.01
            assert daemon.metrics()['homeostat_records_invalid_total{reason="undecodable"}'] == 20
            assert not others(webhook, ask, "HomeostatDeadLetters")
