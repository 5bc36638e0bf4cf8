from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon_process import DaemonProcess, answers, committed, eventually, on_kafka, read_all, records
from tests.dashboard import DASHBOARD
from tests.docs import RULES
from tests.kafka import produce

COUNTERS = {
    "homeostat_records_in",
    "homeostat_records_out",
    "homeostat_records_invalid",
    "homeostat_records_rebuilt",
    "homeostat_records_skipped",
    "homeostat_labels",
    "homeostat_drifts",
    "homeostat_slow_bursts",
    "homeostat_guard_trips",
    "homeostat_state_seconds",
    "homeostat_checkpoint_failures",
}
GAUGES = {
    "homeostat_lag_records",
    "homeostat_state",
    "homeostat_gain_ratio",
    "homeostat_signal",
    "homeostat_version",
    "homeostat_error_ratio",
    "homeostat_checkpoint_timestamp_seconds",
    "homeostat_progress_timestamp_seconds",
    "homeostat_ready",
}
HISTOGRAMS = {
    "homeostat_batch_rows",
    "homeostat_batch_seconds",
    "homeostat_end_to_end_seconds",
    "homeostat_checkpoint_seconds",
}


def test_a_live_scrape_agrees_with_what_the_topics_hold(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source, labels = topic(), topic(prefix="labels")
    names = [str(number) for number in range(1_000)]
    produce(kafka_broker, source, [*records(names), *[b"not json"] * 7])
    produce(kafka_broker, labels, [json.dumps({"id": name, "y": 1}).encode() for name in names[:300]])
    streams = on_kafka(settings, kafka_broker, source) | {
        "HOMEOSTAT_LABELS": f"kafka://{kafka_broker}/{labels}",
        "HOMEOSTAT_CHECKPOINT__EVERY_S": "0.2",
    }
    with DaemonProcess(streams, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_in_total", 1_007)
        daemon.wait_for('homeostat_labels_total{result="joined"}', 300)
        eventually("all is committed", lambda: committed(kafka_broker, f"g-{source}", source) == 1_007)
        # Asked for now and then, not with every batch.
        eventually("no lag is known", lambda: daemon.metrics()["homeostat_lag_records"] == 0)
        status, text = daemon.get("/metrics")
        scraped = daemon.metrics()
        assert status == 200
        # Read while the daemon runs: answers are flushed before the checkpoint whose offsets are committed.
        assert scraped["homeostat_records_out_total"] == len(answers(kafka_broker, f"{source}.answers")) == 1_000
        dead = len(read_all(kafka_broker, f"{source}.dead-letters"))
        assert scraped['homeostat_records_invalid_total{reason="undecodable"}'] == dead == 7
        assert scraped["homeostat_end_to_end_seconds_count"] == scraped["homeostat_records_in_total"] == 1_007
        assert scraped["homeostat_batch_rows_sum"] == 1_007
        assert scraped["homeostat_lag_records"] == 0
        assert scraped["homeostat_ready"] == 1
        states = [value for name, value in scraped.items() if name.startswith("homeostat_state{")]
        assert sorted(states) == [0.0] * (len(states) - 1) + [1.0]
        assert daemon.terminate() == 0

    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(name.startswith("homeostat_") for name in families)
    kinds = dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(HISTOGRAMS, "histogram")
    assert {name: family.type for name, family in families.items() if name in kinds} == kinds
    assert all(family.documentation for family in families.values())


def test_a_live_scrape_has_every_metric_that_rules_and_dashboard_ask_for(
    settings: dict[str, str], tmp_path: Path
) -> None:
    with DaemonProcess(settings | {"HOMEOSTAT_SOURCE": "sim://ageing?rate=500"}, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_in_total", 1)
        _, text = daemon.get("/metrics")
    there = set(re.findall(r"^(homeostat_\w+)", text, re.MULTILINE))
    asked = set(re.findall(r"\bhomeostat_\w+", RULES.read_text() + DASHBOARD.read_text()))
    assert asked and not asked - there


def test_promtool_finds_nothing_wrong_with_a_live_scrape(settings: dict[str, str], tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    with DaemonProcess(settings | {"HOMEOSTAT_SOURCE": "-"}, tmp_path, stdin=subprocess.PIPE) as daemon:
        daemon.wait_until_ready()
        _, text = daemon.get("/metrics")
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
