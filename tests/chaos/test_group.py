"""Workers that come, go, stop and share a name, counted from outside by a reader that sees committed answers alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, committed, eventually, on_kafka, records
from tests.kafka import consume_committed, produce

SESSION_MS = 6_000


@pytest.fixture
def worker(settings: dict[str, str], kafka_broker: str, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """``worker(topic, name, delivery)``: the environment of a worker of that name, with its own state."""

    def make(topic: str, name: str, delivery: str = "exactly-once", **more: str) -> dict[str, str]:
        return on_kafka(settings, kafka_broker, topic) | {
            "HOMEOSTAT_STATE_DIR": str(tmp_path / name),
            "HOMEOSTAT_DELIVERY": delivery,
            "HOMEOSTAT_KAFKA__SESSION_TIMEOUT_MS": str(SESSION_MS),
            "HOMEOSTAT_SLOW__ENABLED": "false",
            **more,
        }

    return make


def answered(address: str, topic: str) -> Counter[str]:
    return Counter(json.loads(record.value)["id"] for record in consume_committed(address, f"{topic}.answers"))


def feed(address: str, topic: str, first: int, count: int, partitions: int) -> None:
    """Records ``first`` to ``first + count``, spread over the partitions."""
    for partition in range(partitions):
        names = [str(row) for row in range(first, first + count) if row % partitions == partition]
        produce(address, topic, records(names), partition=partition)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("delivery", ["exactly-once", "at-least-once"])
def test_from_one_worker_to_four_and_back_nothing_stays_unanswered(
    worker: Callable[..., dict[str, str]],
    kafka_broker: str,
    topic: Callable[..., str],
    tmp_path: Path,
    delivery: str,
) -> None:
    name = topic(8)
    with contextlib.ExitStack() as all_of_them:

        def start(number: int) -> DaemonProcess:
            # Without a static id a worker that leaves gives its partitions away at once.
            made = worker(name, f"w{number}", delivery, HOMEOSTAT_KAFKA__INSTANCE_ID="")
            return all_of_them.enter_context(DaemonProcess(made, tmp_path / f"w{number}"))

        first = start(0).wait_until_ready()
        feed(kafka_broker, name, 0, 600, 8)
        others = [start(number) for number in (1, 2, 3)]
        for other in others:
            other.wait_until_ready()
        feed(kafka_broker, name, 600, 600, 8)
        for other in others:
            assert other.terminate() == 0
        feed(kafka_broker, name, 1_200, 600, 8)
        eventually("all is committed", lambda: committed(kafka_broker, f"g-{name}", name) >= 1_800, 90)
        assert first.terminate() == 0
    counts = answered(kafka_broker, name)
    assert set(counts) == {str(row) for row in range(1_800)}
    if delivery == "exactly-once":
        assert set(counts.values()) == {1}


@pytest.mark.timeout(600)
def test_a_worker_that_was_stopped_too_long_answers_nothing_twice(
    worker: Callable[..., dict[str, str]], kafka_broker: str, topic: Callable[..., str], tmp_path: Path
) -> None:
    """SIGSTOP beyond the session: another one takes over; the first wakes as a zombie, and its answers are refused."""
    name = topic()
    stopped = worker(name, "a", HOMEOSTAT_KAFKA__TRANSACTION_MS="60000")
    with DaemonProcess(stopped, tmp_path / "a") as first:
        first.wait_until_ready()
        feed(kafka_broker, name, 0, 200, 1)
        first.wait_for("homeostat_records_out_total", 200)  # sent, and in an open transaction
        first.process.send_signal(signal.SIGSTOP)
        with DaemonProcess(worker(name, "b"), tmp_path / "b") as second:
            eventually("the other one answers", lambda: committed(kafka_broker, f"g-{name}", name) >= 200, 120)
            first.process.send_signal(signal.SIGCONT)
            feed(kafka_broker, name, 200, 200, 1)
            eventually("all is committed", lambda: committed(kafka_broker, f"g-{name}", name) >= 400, 90)
            assert first.terminate() in (0, 2, 3)
            assert second.terminate() == 0
    counts = answered(kafka_broker, name)
    assert counts == {str(row): 1 for row in range(400)}


@pytest.mark.timeout(600)
def test_of_two_workers_of_one_name_the_older_one_ends_and_says_why(
    worker: Callable[..., dict[str, str]], kafka_broker: str, topic: Callable[..., str], tmp_path: Path
) -> None:
    name, one = (
        topic(),
        {"HOMEOSTAT_KAFKA__INSTANCE_ID": f"same-{os.getpid()}", "HOMEOSTAT_CHECKPOINT__EVERY_S": "1"},
    )
    with DaemonProcess(worker(name, "a", "at-least-once", **one), tmp_path / "a") as first:
        first.wait_until_ready()
        with DaemonProcess(worker(name, "b", "at-least-once", **one), tmp_path / "b") as second:
            second.wait_until_ready()
            feed(kafka_broker, name, 0, 50, 1)
            assert first.wait(60) == 2
            assert "HOMEOSTAT_KAFKA__INSTANCE_ID" in first.log and "Traceback" not in first.log
            eventually("the younger one answers", lambda: committed(kafka_broker, f"g-{name}", name) >= 50, 60)
            assert second.terminate() == 0


def test_a_folder_of_state_belongs_to_one_worker(
    worker: Callable[..., dict[str, str]], kafka_broker: str, topic: Callable[..., str], tmp_path: Path
) -> None:
    name = topic()
    with DaemonProcess(worker(name, "a"), tmp_path / "a") as first:
        first.wait_until_ready()
        with DaemonProcess(worker(name, "a"), tmp_path / "b") as second:
            assert second.wait(60) == 2
            assert f"in use by another homeostat (process {first.process.pid})" in second.log
