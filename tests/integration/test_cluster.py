"""The cluster that the chaos tests stand on does what they ask of it."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

import pytest
from kafka import KafkaProducer

from daemon.broker_runtime import BrokerError
from tests.cluster import Cluster
from tests.daemon_process import DEADLINE_S
from tests.kafka import consume_all

LONG = os.environ.get("HOMEOSTAT_LONG") == "1"
"""Also start a killed node again, and shut one down in order."""


@pytest.mark.slow
# kafka-python leaves the sockets of refused connections to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.usefixtures("trial_kafka")
def test_leaders_that_hang_or_die_are_replaced_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # What it logs holds the errors, and these their sockets, until the test is over.
    caplog.set_level(logging.CRITICAL + 1, logger="kafka")
    answering = _kill_and_pause_leaders(tmp_path / "cluster")
    gc.collect()  # while the warning is ignored
    assert answering == [b"before", b"between", b"after"]


def _kill_and_pause_leaders(folder: Path) -> list[bytes]:
    """What the topic holds after its leader was stopped in its tracks, and the next one killed."""
    # Shorter than chaos tests want it: nothing here hangs on a node that is only slow.
    with Cluster(folder, properties={"broker.session.timeout.ms": "3000"}) as cluster:
        assert cluster.known() == {1, 2, 3}
        cluster.create_topic("t")
        first = cluster.leader("t")
        with KafkaProducer(bootstrap_servers=cluster.address.split(","), acks="all", linger_ms=0) as producer:
            producer.send("t", b"before").get(timeout=DEADLINE_S)
            cluster.pause(first)
            second = cluster.wait_for_leader("t", 0, but=first)
            assert second != first and cluster.alive(first)
            cluster.resume(first)
            cluster.wait_for_isr("t", 3)
            cluster.kill(second)
            assert not cluster.alive(second)
            # Sent to a dead leader: acknowledged once there is another.
            between = producer.send("t", b"between")
            third = cluster.wait_for_leader("t", 0, but=second)
            between.get(timeout=DEADLINE_S)
            if LONG:
                cluster.start_node(second)
                cluster.wait_for_isr("t", 3)
                cluster.stop_node(third)
                third = cluster.wait_for_leader("t", 0, but=third)
            producer.send("t", b"after").get(timeout=DEADLINE_S)
        found = [record.value for record in consume_all(cluster.address_of(third), "t", 3)]
        cluster.stop(timeout_s=10)
        assert not any(cluster.alive(node) for node in cluster.nodes)
        with pytest.raises(BrokerError, match="every node is dead"):
            cluster.known()
    return found


def test_a_cluster_takes_ports_that_nobody_has(tmp_path: Path) -> None:
    one, other = Cluster(tmp_path / "one"), Cluster(tmp_path / "other")
    assert len(one.address.split(",")) == 3 and len(set(one.address.split(","))) == 3
    assert one.address_of(2) in one.address and not one.alive(1)
    assert other.folder != one.folder
