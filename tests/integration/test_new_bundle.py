"""A new bundle, given to a running daemon: every record is answered once, and a kill afterwards changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from daemon.streams.simulator import AgeingArray
from tests.daemon_process import DaemonProcess, committed, eventually, on_kafka
from tests.kafka import consume_committed, produce

PORTION = 500
"""Records sent at a time."""


def another(bundle: Path, folder: Path) -> Path:
    """The same model with other calibrations: another bundle by its hash."""
    path = Path(shutil.copytree(bundle, folder))
    calibration = json.loads((path / "calibration.json").read_text())
    (path / "calibration.json").write_text(json.dumps(calibration | {"note": "packed again"}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["calibration.json"] = hashlib.sha256((path / "calibration.json").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.slow
def test_a_bundle_takes_over_on_a_stream_without_a_record_missed_or_answered_twice(
    settings: dict[str, str], bundle: Path, kafka_broker: str, tmp_path: Path
) -> None:
    topic = f"bundles-{os.getpid()}"
    stream, sent = AgeingArray(7, ageing=False), 0

    def send(count: int) -> None:
        nonlocal sent
        x, y = stream.rows(sent, count)
        rows = zip(range(sent, sent + count), x.tolist(), y.tolist(), strict=True)
        produce(kafka_broker, topic, [json.dumps({"id": str(n), "x": v, "y": k}).encode() for n, v, k in rows])
        sent += count

    file, given = tmp_path / "homeostat.env", on_kafka(settings, kafka_broker, topic)
    given |= {
        "HOMEOSTAT_SINK": f"kafka://{kafka_broker}/{topic}.answers",
        "HOMEOSTAT_DELIVERY": "exactly-once",
        "HOMEOSTAT_BUNDLE_ROWS": "1500",
        "HOMEOSTAT_BATCH_ROWS": "64",
        "HOMEOSTAT_ENV_FILE": str(file),
    }
    file.write_text(f"HOMEOSTAT_BUNDLE={given.pop('HOMEOSTAT_BUNDLE')}\n")
    group = given["HOMEOSTAT_KAFKA__GROUP"]
    send(4_000)
    with DaemonProcess(given, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_in_total", 100)
        before = build(daemon)
        file.write_text(f"HOMEOSTAT_BUNDLE={another(bundle, tmp_path / 'next')}\n")
        daemon.process.send_signal(signal.SIGHUP)
        eventually("it is being loaded", lambda: "is being loaded" in daemon.log)
        taken = 'homeostat_bundle_changes_total{result="taken"}'

        def takes_over() -> bool:
            # It is measured on records that come once it is loaded, whenever that is.
            send(PORTION)
            return daemon.metrics()[taken] == 1

        eventually("it takes over", takes_over)
        assert build(daemon) != before
        daemon.kill()
    with DaemonProcess(given, tmp_path) as daemon:
        daemon.wait_until_ready()
        send(4_000)
        eventually("all is committed", lambda: committed(kafka_broker, group, topic) >= sent, 120)
        assert "starts afresh" not in daemon.log
        assert daemon.terminate() == 0
    counts = Counter(json.loads(one.value)["id"] for one in consume_committed(kafka_broker, f"{topic}.answers"))
    assert counts == Counter(str(row) for row in range(sent))


def build(daemon: DaemonProcess) -> str:
    return next(name for name in daemon.metrics() if name.startswith("homeostat_build_info"))
