"""Brokers that die, hang and come back under load, counted from outside by a reader of committed answers."""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.feeding import Feeder
from tests.cluster import Cluster
from tests.daemon_process import DaemonProcess, committed, eventually, on_kafka
from tests.kafka import consume_committed

LONG = os.environ.get("HOMEOSTAT_LONG") == "1"
"""Both deliveries, and more turns."""
DELIVERIES = ["exactly-once", "at-least-once"] if LONG else ["exactly-once"]
SETTLED_S = 120.0

# kafka-python leaves the sockets of refused connections to the garbage collector, and logs each of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.usefixtures("trial_kafka"),
    pytest.mark.timeout(900),
]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, logger="kafka")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; a test leaves each of them alive."""
    with Cluster(tmp_path_factory.mktemp("three")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A single node; a test leaves it alive."""
    with Cluster(tmp_path_factory.mktemp("one"), nodes=1) as cluster:
        yield cluster


def worker(settings: dict[str, str], cluster: Cluster, topic: str, delivery: str) -> dict[str, str]:
    """Topics, made here, and the environment of a worker on them."""
    for name in (topic, f"{topic}.answers"):
        cluster.create_topic(name, partitions=3)
    return on_kafka(settings, cluster.address, topic) | {
        "HOMEOSTAT_DELIVERY": delivery,
        "HOMEOSTAT_CHECKPOINT__EVERY_S": "2",
        "HOMEOSTAT_SLOW__ENABLED": "false",
    }


def further(daemon: DaemonProcess, count: int) -> None:
    """Until ``count`` more records are answered, by the worker's own account."""
    name = "homeostat_records_out_total"
    wanted = daemon.metrics()[name] + count
    eventually(f"{count} more answers", lambda: daemon.metrics()[name] >= wanted, SETTLED_S)


def check(cluster: Cluster, topic: str, count: int, delivery: str) -> None:
    """Everything was answered, and with exactly-once nothing twice."""
    address = cluster.address_of(cluster.leader(f"{topic}.answers"))
    counts = Counter(json.loads(found.value)["id"] for found in consume_committed(address, f"{topic}.answers"))
    assert set(counts) == {str(row) for row in range(count)}
    twice = sum(counts.values()) - count
    print(f"{delivery}: {count} records, {twice} answered more than once")
    if delivery == "exactly-once":
        assert twice == 0


def hurt_while_fed(
    settings: dict[str, str], cluster: Cluster, folder: Path, delivery: str, hurt: Callable[[str, DaemonProcess], None]
) -> DaemonProcess:
    """A worker under a steady load while ``hurt(topic, worker)`` runs; all is counted after it."""
    topic = f"t-{uuid.uuid4().hex[:8]}"
    made = worker(settings, cluster, topic, delivery)
    with Feeder(cluster.address, topic, partitions=3) as feeder, DaemonProcess(made, folder) as daemon:
        daemon.wait_until_ready()
        further(daemon, 300)
        hurt(topic, daemon)
        further(daemon, 300)
        count = feeder.stop()
        group = f"g-{topic}"
        eventually("all is committed", lambda: committed(cluster.address, group, topic) >= count, SETTLED_S)
        assert daemon.get("/healthz")[0] == 200
        assert daemon.terminate() == 0
        check(cluster, topic, count, delivery)
    assert "Traceback" not in daemon.log
    return daemon


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_leaders_that_die_or_hang_leave_nothing_unanswered(
    three: Cluster, settings: dict[str, str], tmp_path: Path, delivery: str
) -> None:
    def hurt(topic: str, daemon: DaemonProcess) -> None:
        for _ in range(3 if LONG else 1):
            dead = three.leader(topic)
            three.kill(dead)
            three.wait_for_leader(topic, 0, but=dead)
            further(daemon, 300)
            three.start_node(dead)
            three.wait_for_isr(topic, 3)
            hung = three.leader(f"{topic}.answers")
            three.pause(hung)
            three.wait_for_leader(f"{topic}.answers", 0, but=hung)
            further(daemon, 300)
            three.resume(hung)
            three.wait_for_isr(topic, 3)

    hurt_while_fed(settings, three, tmp_path, delivery, hurt)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_the_only_broker_dies_and_comes_back(
    one: Cluster, settings: dict[str, str], tmp_path: Path, delivery: str
) -> None:
    def hurt(topic: str, daemon: DaemonProcess) -> None:
        for _ in range(3 if LONG else 1):
            one.kill(1)
            eventually("the worker says so", lambda: daemon.get("/readyz")[0] == 503, SETTLED_S)
            assert daemon.get("/healthz")[0] == 200
            one.start_node(1)
            further(daemon, 300)

    hurt_while_fed(settings, one, tmp_path, delivery, hurt)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_broker_that_hangs_again_and_again_evicts_nobody(
    one: Cluster, settings: dict[str, str], tmp_path: Path, delivery: str
) -> None:
    """A slow one: of each second it works for a quarter."""

    def hurt(topic: str, daemon: DaemonProcess) -> None:
        clock = threading.Event()
        for _ in range(60 if LONG else 15):
            one.pause(1)
            clock.wait(0.75)
            one.resume(1)
            clock.wait(0.25)
            assert daemon.get("/healthz")[0] == 200

    daemon = hurt_while_fed(settings, one, tmp_path, delivery, hurt)
    assert "partitions given up" not in daemon.log
