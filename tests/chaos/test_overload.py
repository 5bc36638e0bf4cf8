"""Records that come faster than they can be answered, where skipping is allowed: what is left out is counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.feeding import Feeder
from tests.daemon_process import DaemonProcess, committed, eventually, on_kafka
from tests.kafka import consume_committed


@pytest.mark.timeout(600)
@pytest.mark.parametrize("delivery", ["exactly-once", "at-least-once"])
def test_what_overload_leaves_out_is_counted_and_the_rest_is_answered_once(
    settings: dict[str, str], kafka_broker: str, topic: Callable[..., str], tmp_path: Path, delivery: str
) -> None:
    name = topic()
    made = on_kafka(settings, kafka_broker, name) | {
        "HOMEOSTAT_DELIVERY": delivery,
        "HOMEOSTAT_SLOW__ENABLED": "false",
        # Row by row, so that a small stream is too much.
        "HOMEOSTAT_BATCH_ROWS": "1",
        "HOMEOSTAT_OVERLOAD__MAX_ROWS": "1",
        "HOMEOSTAT_OVERLOAD__LAG_S": "0.3",
        "HOMEOSTAT_OVERLOAD__PATIENCE_S": "0",
        "HOMEOSTAT_SHED": "2",
    }
    shed = "homeostat_records_shed_total"
    with DaemonProcess(made, tmp_path) as daemon:
        daemon.wait_until_ready()
        with Feeder(kafka_broker, name, rate=3_000) as feeder:
            eventually("records are skipped", lambda: daemon.metrics()[shed] > 1_000, 120)
            assert daemon.metrics()["homeostat_overload_step"] == 4
            count = feeder.stop()
        eventually("all is committed", lambda: committed(kafka_broker, f"g-{name}", name) >= count, 120)
        found = daemon.metrics()
        assert daemon.terminate() == 0
    assert "oldest records skipped unanswered (HOMEOSTAT_SHED)" in daemon.log and "Traceback" not in daemon.log
    counts = Counter(json.loads(answer.value)["id"] for answer in consume_committed(kafka_broker, f"{name}.answers"))
    assert set(counts.values()) == {1}
    assert len(counts) + found[shed] == count
    assert found["homeostat_records_out_total"] == len(counts)
