"""A Kafka for the tests, and what they do with it.

``HOMEOSTAT_TEST_KAFKA=host:port`` names a broker that runs already; else one trial broker is started for the session.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError

from daemon.broker import TrialBroker
from daemon.broker_runtime import BrokerError, jars, java


def wait_for_port(address: str, timeout_s: float = 90) -> None:
    """Return once something listens on ``host:port``.

    To be called before any client is made: kafka-python's back-off otherwise adds 3 to 5 seconds.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing listens on {address} after {timeout_s} s: {error}") from error
            time.sleep(0.05)


def create_topic(address: str, name: str, partitions: int = 1, **config: str) -> None:
    """Make a topic and wait until each of its partitions has a leader. ``max_message_bytes="2000"``."""
    wait_for_port(address)
    with KafkaAdminClient(bootstrap_servers=address) as admin:
        configs = {key.replace("_", "."): value for key, value in config.items()}
        shape = {"num_partitions": partitions, "replication_factor": 1, "configs": configs}
        admin.create_topics({name: shape}, wait_for_metadata=True)


def produce(
    address: str,
    topic: str,
    values: Sequence[bytes | None],
    keys: Sequence[bytes | None] | None = None,
    partition: int | None = None,
    **producer: Any,
) -> None:
    """Send and see every acknowledgement; ``producer`` is kafka-python's, for example ``compression_type="zstd"``."""
    wait_for_port(address)
    with KafkaProducer(bootstrap_servers=address, **producer) as client:
        row_keys = keys if keys is not None else [None] * len(values)
        sent = [
            client.send(topic, value=value, key=key, partition=partition)
            for value, key in zip(values, row_keys, strict=True)
        ]
        client.flush(timeout=60)
        for future in sent:
            future.get(timeout=60)


def produce_to_new(
    address: str, topic: str, values: Sequence[bytes | None], partition: int, timeout_s: float = 90
) -> None:
    """To a partition that was just made: not every client is told of it at once. After an error it is sent again."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return produce(address, topic, values, partition=partition)
        except (KafkaError, ValueError):  # ValueError: kafka-python knows no such partition
            if time.monotonic() > deadline:
                raise


def consume_all(address: str, topic: str, count: int, timeout_s: float = 90, **consumer: Any) -> list[Any]:
    """The first ``count`` records of all partitions, as kafka-python's ``ConsumerRecord``.

    Within a partition they are in order. Raises TimeoutError when fewer come within ``timeout_s``.
    """
    wait_for_port(address)
    records: list[Any] = []
    deadline = time.monotonic() + timeout_s
    with KafkaConsumer(bootstrap_servers=address, enable_auto_commit=False, **consumer) as client:
        parts = [TopicPartition(topic, number) for number in client.partitions_for_topic(topic) or ()]
        client.assign(parts)
        client.seek_to_beginning(*parts)
        while len(records) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(records)} of {count} records of {topic} came within {timeout_s} s")
            for polled in client.poll(timeout_ms=200, max_records=count - len(records)).values():
                records.extend(polled)
    return records


def consume_committed(address: str, topic: str, timeout_s: float = 90) -> list[Any]:
    """Every record that a reader of committed answers sees in the topic now, whatever lies between them."""
    wait_for_port(address)
    records: list[Any] = []
    deadline = time.monotonic() + timeout_s
    with KafkaConsumer(bootstrap_servers=address, enable_auto_commit=False, isolation_level="read_committed") as client:
        parts = [TopicPartition(topic, number) for number in client.partitions_for_topic(topic) or ()]
        client.assign(parts)
        client.seek_to_beginning(*parts)
        ends = client.end_offsets(parts)
        while any(client.position(part) < ends[part] for part in parts):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{topic} not read to its end {ends} within {timeout_s} s: {len(records)} records")
            for polled in client.poll(timeout_ms=200).values():
                records.extend(polled)
    return records


@pytest.fixture(scope="session")
def trial_kafka() -> None:
    """Java and Kafka's jars are on this machine; skips, with the reason, where they can't be had."""
    try:
        java()
        jars()
    except BrokerError as error:
        pytest.skip(f"no broker: {error}")


@pytest.fixture(scope="session")
def kafka_broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address, ``host:port``, of a broker that lives as long as the session."""
    given = os.environ.get("HOMEOSTAT_TEST_KAFKA")
    if given:
        wait_for_port(given)
        yield given
        return
    request.getfixturevalue("trial_kafka")
    with TrialBroker(tmp_path_factory.mktemp("kafka"), port=0) as broker:
        yield broker.address


@pytest.fixture
def topic(kafka_broker: str) -> Callable[..., str]:
    """``topic(partitions=1, prefix="t")`` makes an empty topic that no other test has, and gives its name."""

    def make(partitions: int = 1, prefix: str = "t") -> str:
        name = f"{prefix}-{uuid.uuid4().hex[:12]}"
        create_topic(kafka_broker, name, partitions)
        return name

    return make
