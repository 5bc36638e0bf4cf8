"""SIGKILL at random moments, counted from outside: every record answered, and in exactly-once none twice.

``HOMEOSTAT_LONG=1`` kills a hundred times.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.streams.simulator import AgeingArray
from tests.daemon_process import ROOT, DaemonProcess, committed, eventually, on_kafka
from tests.kafka import consume_committed, produce

LONG = os.environ.get("HOMEOSTAT_LONG") == "1"
KILLS = 100 if LONG else 10
RECORDS = KILLS * 400
"""So many that the stream does not end before the last kill, unless the machine pauses."""
BATCH = 32
DEADLINE_S = 1_200 if LONG else 120
"""For a run through all records."""


@pytest.fixture(scope="module")
def labelled(kafka_broker: str) -> str:
    """A topic of labelled records from an array of sensors that ages."""
    name = f"kills-{os.getpid()}"
    x, y = AgeingArray(7).rows(0, RECORDS)
    rows = zip(range(RECORDS), x.tolist(), y.tolist(), strict=True)
    values = [json.dumps({"id": str(row), "x": x, "y": y, "ts": 1000 + row}).encode() for row, x, y in rows]
    produce(kafka_broker, name, values)
    return name


@pytest.fixture
def worker(settings: dict[str, str], kafka_broker: str, labelled: str) -> Callable[..., dict[str, str]]:
    """``worker(folder, delivery)``: the environment of a worker with its state in that folder."""

    def make(folder: Path, delivery: str) -> dict[str, str]:
        return on_kafka(settings, kafka_broker, labelled) | {
            "HOMEOSTAT_SINK": f"kafka://{kafka_broker}/{labelled}.{folder.name}.{delivery}",
            "HOMEOSTAT_KAFKA__GROUP": f"g-{labelled}-{folder.name}-{delivery}",
            "HOMEOSTAT_STATE_DIR": str(folder / "state"),
            "HOMEOSTAT_DELIVERY": delivery,
            "HOMEOSTAT_KAFKA__TRANSACTION_MS": "20",
            "HOMEOSTAT_BATCH_ROWS": str(BATCH),
            "HOMEOSTAT_CHECKPOINT__EVERY_BATCHES": "7",
            "HOMEOSTAT_SLOW__INLINE": "true",
            "HOMEOSTAT_SLOW__STEPS": "10",
        }

    return make


def final_state(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint holds, without what no two runs share."""
    command = [sys.executable, "-m", "daemon.cli", "inspect", "--json", str(folder / "state" / "checkpoints")]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    return {name: found[name] for name in ("positions", "state", "gain", "version", "tally", "digests")}


def answered(address: str, settings: dict[str, str]) -> Counter[str]:
    """How often each record was answered, by a reader that sees committed answers alone."""
    topic = settings["HOMEOSTAT_SINK"].rpartition("/")[2]
    return Counter(json.loads(record.value)["id"] for record in consume_committed(address, topic))


@pytest.mark.timeout(6_000 if LONG else 600)
@pytest.mark.parametrize("delivery", ["exactly-once", "at-least-once"])
def test_a_worker_that_is_killed_again_and_again_ends_where_an_undisturbed_one_does(
    worker: Callable[..., dict[str, str]],
    kafka_broker: str,
    tmp_path: Path,
    delivery: str,
) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    chance = random.Random(seed)
    through = worker(tmp_path / "through", delivery)
    with DaemonProcess(through, tmp_path / "through", "--max-records", str(RECORDS)) as daemon:
        assert daemon.wait(DEADLINE_S) == 0
    hurt = worker(tmp_path / "hurt", delivery)
    group = hurt["HOMEOSTAT_KAFKA__GROUP"]
    topic = hurt["HOMEOSTAT_SOURCE"].rpartition("/")[2]
    kills = KILLS * 6 // 10 if delivery == "exactly-once" else KILLS * 4 // 10
    for _ in range(kills):
        with DaemonProcess(hurt, tmp_path / "hurt") as daemon:
            daemon.wait_for_kill("homeostat_records_in_total", chance.randint(1, 350))
            daemon.kill()
    with DaemonProcess(hurt, tmp_path / "hurt") as daemon:
        daemon.wait_until_ready()  # it may have nothing left to do, and takes a SIGTERM from here on
        eventually("all is committed", lambda: committed(kafka_broker, group, topic) >= RECORDS, DEADLINE_S)
        assert daemon.terminate() == 0
    counts = answered(kafka_broker, hurt)
    said = f"kills by seed {seed}"
    assert len(counts) == RECORDS, f"{RECORDS - len(counts)} unanswered; {said}"
    twice = sum(counts.values()) - RECORDS
    print(f"{delivery}: {kills} kills, {twice} of {RECORDS} records answered more than once; {said}")
    if delivery == "exactly-once":
        assert twice == 0, said
    assert final_state(tmp_path / "hurt") == final_state(tmp_path / "through"), said
