"""Bulk decoding on a real broker: what `poll` returns in chunks is what it returns in records."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from daemon.streams.bulk.chunk import Chunk
from daemon.streams.bulk.install import install
from daemon.streams.bulk.wire import codecs
from tests.kafka import produce

NAMES = {0: None, 1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}


def read(address: str, topic: str, bulk: bool, *, rows: int, end: int, **config: Any) -> dict[int, list[Any]]:
    """All records of a topic by partition, up to the offset ``end`` of each; a poll returns at most ``rows``."""
    found: dict[int, list[Any]] = {}
    options = {"enable_auto_commit": False, "auto_offset_reset": "earliest", "metrics_enabled": False} | config
    with KafkaConsumer(bootstrap_servers=address, **options) as consumer:
        if bulk:
            assert install(consumer) is None
        parts = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
        consumer.assign(parts)
        deadline = time.monotonic() + 30
        while any(consumer.position(part) < end for part in parts):
            assert time.monotonic() < deadline, f"at {[consumer.position(part) for part in parts]} of {end}"
            polled = consumer.poll(timeout_ms=200, max_records=rows)
            assert sum(len(chunk) if bulk else 1 for some in polled.values() for chunk in some) <= rows
            for part, some in polled.items():
                assert not bulk or all(isinstance(chunk, Chunk) for chunk in some)
                records = [row for chunk in some for row in chunk.records()] if bulk else some
                found.setdefault(part.partition, []).extend(records)
    return found


def both(address: str, topic: str, *, end: int, **config: Any) -> dict[int, list[Any]]:
    public = read(address, topic, False, rows=10_000, end=end, **config)
    for rows in (7, 10_000):
        assert read(address, topic, True, rows=rows, end=end, **config) == public
    return public


@pytest.mark.parametrize("codec", codecs())
def test_every_compression_is_read(kafka_broker: str, topic: Callable[..., str], codec: int) -> None:
    name = topic(partitions=1)
    values = [None if at % 50 == 0 else b"%d" % at * (at % 90) for at in range(300)]
    keys = [None if at % 3 and values[at] is not None else b"key %d" % at for at in range(300)]
    produce(kafka_broker, name, values, keys, compression_type=NAMES[codec], linger_ms=20)
    found = both(kafka_broker, name, end=300)[0]
    assert [(row.offset, row.key, row.value) for row in found] == list(zip(range(300), keys, values, strict=True))


def test_headers_and_both_kinds_of_time_come_through(kafka_broker: str, topic: Callable[..., str]) -> None:
    name = topic(partitions=2)
    with KafkaProducer(bootstrap_servers=kafka_broker, linger_ms=20) as producer:
        for at in range(60):
            headers = [("trace", b"%d" % at), ("empty", b"")] if at % 5 == 0 else None
            producer.send(name, b"v%d" % at, partition=at % 2, timestamp_ms=1_000 + at, headers=headers)
        producer.flush()
    found = both(kafka_broker, name, end=30)
    rows = sorted(found[0] + found[1], key=lambda row: row.timestamp)
    assert [row.timestamp for row in rows] == [1_000 + at for at in range(60)]
    assert rows[5].headers == [("trace", b"5"), ("empty", b"")] and rows[6].headers == []


def test_an_aborted_transaction_is_left_out_and_the_position_passes_it(
    kafka_broker: str, topic: Callable[..., str]
) -> None:
    name = topic(partitions=1)
    with KafkaProducer(bootstrap_servers=kafka_broker, transactional_id=name, linger_ms=5) as producer:
        producer.init_transactions()
        for number in range(6):
            producer.begin_transaction()
            for at in range(25):
                producer.send(name, b"%d of %d" % (at, number), partition=0)
            producer.flush()  # what is not sent yet an abort only throws away
            if number % 2:
                producer.abort_transaction()
            else:
                producer.commit_transaction()
    # A transaction is 25 records and its marker; the last one was aborted, and the position has to end behind it.
    committed = both(kafka_broker, name, end=6 * 26, isolation_level="read_committed")[0]
    assert [row.value for row in committed] == [b"%d of %d" % (at, number) for number in (0, 2, 4) for at in range(25)]
    everything = both(kafka_broker, name, end=6 * 26, isolation_level="read_uncommitted")[0]
    assert len(everything) == 150


def test_a_seek_into_a_batch_and_a_pause_are_honoured(kafka_broker: str, topic: Callable[..., str]) -> None:
    name = topic(partitions=1)
    produce(kafka_broker, name, [b"%d" % at for at in range(200)], linger_ms=50)
    part = TopicPartition(name, 0)
    with KafkaConsumer(bootstrap_servers=kafka_broker, enable_auto_commit=False, metrics_enabled=False) as consumer:
        assert install(consumer) is None
        consumer.assign([part])

        def take(rows: int) -> list[int]:
            deadline = time.monotonic() + 30
            while not (polled := consumer.poll(timeout_ms=200, max_records=rows)):
                assert time.monotonic() < deadline, "nothing came"
            return [offset for chunk in polled[part] for offset in chunk.offsets.tolist()]

        consumer.seek(part, 150)
        assert take(20) == list(range(150, 170)) and consumer.position(part) == 170
        consumer.pause(part)
        assert consumer.poll(timeout_ms=100, max_records=20) == {} and consumer.position(part) == 170
        consumer.resume(part)
        assert take(5) == list(range(170, 175))
        consumer.seek(part, 10)
        assert take(3) == [10, 11, 12]
