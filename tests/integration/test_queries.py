from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_process import DaemonProcess, answers, eventually, on_kafka, read_all, records
from tests.kafka import produce


def asking(settings: dict[str, str], broker: str, source: str) -> dict[str, str]:
    return on_kafka(settings, broker, source) | {
        "HOMEOSTAT_LABEL_QUERIES": f"kafka://{broker}/{source}.queries",
        "HOMEOSTAT_LABEL_BUDGET__SHARE": "0.02",
        "HOMEOSTAT_LABEL_BUDGET__WINDOW_ROWS": "150",
        "HOMEOSTAT_KAFKA__INSTANCE_ID": f"edge-{source}",
        "HOMEOSTAT_CHECKPOINT__EVERY_BATCHES": "2",
        "HOMEOSTAT_BATCH_ROWS": "64",
    }


def questions(broker: str, source: str) -> list[dict[str, Any]]:
    return [json.loads(found.value) for found in read_all(broker, f"{source}.queries")]


def finished(daemon: DaemonProcess) -> None:
    daemon.wait_until_ready()
    eventually("nothing is left to read", lambda: daemon.metrics()["homeostat_lag_records"] == 0)
    assert daemon.terminate() == 0


@pytest.mark.slow
def test_after_kills_the_very_same_records_are_asked_for_and_none_is_left_out(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    names = [str(number) for number in range(6_000)]
    calm, killed = topic(), topic()
    for source in (calm, killed):
        produce(kafka_broker, source, records(names))
    apart = {"HOMEOSTAT_STATE_DIR": str(tmp_path / "calm")}
    with DaemonProcess(asking(settings, kafka_broker, calm) | apart, tmp_path) as daemon:
        finished(daemon)
    streams = asking(settings, kafka_broker, killed)
    for least in (1, 1_500):
        with DaemonProcess(streams, tmp_path) as daemon:
            daemon.wait_for_kill("homeostat_records_out_total", least)
            daemon.kill()
    with DaemonProcess(streams, tmp_path) as daemon:
        finished(daemon)

    expected = questions(kafka_broker, calm)
    assert len(expected) == 40 * 3
    known = {answer["id"]: answer["y"] for answer in answers(kafka_broker, f"{calm}.answers")}
    for question in expected:
        assert question["partition"] == f"{calm}/0" and str(question["offset"]) == question["id"]
        assert question["prediction"] == known[question["id"]]
    # Asked twice where the worker went down after the question and before the checkpoint, but never otherwise.
    found = {(question["window"], question["id"]) for question in questions(kafka_broker, killed)}
    assert found == {(question["window"], question["id"]) for question in expected}


def test_questions_go_from_file_to_file_and_are_counted(settings: dict[str, str], tmp_path: Path) -> None:
    source, asked = tmp_path / "in.jsonl", tmp_path / "asked.jsonl"
    source.write_bytes(b"".join(line + b"\n" for line in records([str(number) for number in range(1_000)])))
    streams = settings | {
        "HOMEOSTAT_SOURCE": f"file:{source}?follow=true",
        "HOMEOSTAT_LABEL_QUERIES": f"file:{asked}",
        "HOMEOSTAT_LABEL_BUDGET__SHARE": "0.05",
    }
    with DaemonProcess(streams, tmp_path) as daemon:
        # Counted in last of all; counted out before its labels and its questions.
        daemon.wait_until_ready().wait_for("homeostat_records_in_total", 1_000)
        counted = [
            value for name, value in daemon.metrics().items() if name.startswith("homeostat_label_queries_total")
        ]
        assert sum(counted) == 50
        assert daemon.terminate() == 0
        assert "HOMEOSTAT_LABELS" in daemon.log
    lines = [json.loads(line) for line in asked.read_text().splitlines()]
    assert len(lines) == 50 and {line["partition"] for line in lines} == {f"file:{source}"}
