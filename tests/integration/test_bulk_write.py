"""Rows produced in bulk, as an independent consumer of a real broker finds them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka import errors as kafka_errors
from kafka.partitioner.default import murmur2

from daemon.broker import TrialBroker
from daemon.streams.bulk.write import BulkProducer
from tests.kafka import consume_all, consume_committed, create_topic

KILLS = 10 if os.environ.get("HOMEOSTAT_LONG") == "1" else 1


@contextmanager
def bulk(address: str, buffer_bytes: int = 32 * 2**20, **config: Any) -> Iterator[BulkProducer]:
    """A bulk producer that must not have fallen back."""
    with KafkaProducer(bootstrap_servers=address, metrics_enabled=False, batch_size=65_536, **config) as producer:
        many = BulkProducer(producer, buffer_bytes=buffer_bytes)
        assert many.reason is None
        yield many


def send_all(many: BulkProducer, topic: str, keys: list[bytes | None], values: list[bytes], timeout_s: float) -> Any:
    """Send, going on after each refusal for want of room; how often that was, and the futures."""
    sent, waits, futures = 0, 0, []
    deadline = time.monotonic() + timeout_s
    while sent < len(values):
        try:
            futures += many.send_many(topic, keys[sent:], values[sent:])
            break
        except kafka_errors.KafkaTimeoutError as error:
            assert time.monotonic() < deadline, f"{sent} of {len(values)} rows sent within {timeout_s} s"
            sent += error.accepted
            futures += error.futures
            waits += 1
    many.flush(max(deadline - time.monotonic(), 0))
    return waits, futures


def by_partition(records: list[Any]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for record in records:
        found.setdefault(record.partition, []).append(record)
    return found


@pytest.mark.parametrize("codec", [None, "gzip", "snappy", "lz4", "zstd"])
def test_every_row_arrives_once_and_in_order(codec: str | None, kafka_broker: str, topic: Callable[..., str]) -> None:
    name, count = topic(partitions=3), 5_000
    keys: list[bytes | None] = [b"sensor-%d" % (row % 50) for row in range(count)]
    values = [b"%06d" % row + b"v" * (row % 200) for row in range(count)]
    heads = [[("row", b"%d" % row)] if row % 100 == 0 else None for row in range(count)]
    times = [1_700_000_000_000 + row * 3 for row in range(count)]
    with bulk(kafka_broker, linger_ms=5, compression_type=codec) as many:
        futures = many.send_many(name, keys, values, times, heads)
        many.flush(60)
    assert all(future.succeeded() for future in futures)
    found = by_partition(consume_all(kafka_broker, name, count))
    for partition, records in found.items():
        wanted = [row for row in range(count) if (murmur2(keys[row]) & 0x7FFFFFFF) % 3 == partition]
        assert [record.value for record in records] == [values[row] for row in wanted]
        assert [record.key for record in records] == [keys[row] for row in wanted]
        assert [record.timestamp for record in records] == [times[row] for row in wanted]
        assert [record.headers for record in records] == [list(heads[row] or ()) for row in wanted]
    assert sum(map(len, found.values())) == count


def test_rows_sent_both_ways_share_batches_and_keep_their_order(kafka_broker: str, topic: Callable[..., str]) -> None:
    name = topic()
    wanted: list[bytes] = []
    with bulk(kafka_broker, linger_ms=20) as many:
        for turn in range(100):
            values = [b"%d-%d" % (turn, row) for row in range(7)]
            many.send_many(name, [None] * 7, values)
            many._producer.send(name, b"%d-single" % turn)
            wanted += [*values, b"%d-single" % turn]
        many._producer.flush(30)
    assert [record.value for record in consume_all(kafka_broker, name, len(wanted))] == wanted


def test_a_transaction_is_seen_whole_or_not_at_all(kafka_broker: str, topic: Callable[..., str]) -> None:
    name = topic(partitions=2)
    with bulk(kafka_broker, transactional_id=f"id-{name}", retry_backoff_ms=20) as many:
        producer = many._producer
        producer.init_transactions()
        with pytest.raises(kafka_errors.IllegalStateError):
            many.send_many(name, [b"0"], [b"outside"])
        for turn, end in enumerate(["commit", "abort", "commit", "abort unsent"]):
            producer.begin_transaction()
            keys: list[bytes | None] = [b"%d" % row for row in range(1_000)]
            futures = many.send_many(name, keys, [b"%d-%d" % (turn, row) for row in range(1_000)])
            if end != "abort unsent":
                many.flush(30)
            if end == "commit":
                producer.commit_transaction()
            else:
                producer.abort_transaction()
            many.flush(30)
            assert end == "abort unsent" or all(future.succeeded() for future in futures)
            assert many.held_bytes == 0
    records = consume_all(kafka_broker, name, 2_000, isolation_level="read_committed")
    assert sorted(record.value for record in records) == sorted(
        b"%d-%d" % (turn, row) for turn in (0, 2) for row in range(1_000)
    )
    assert len(consume_committed(kafka_broker, name)) == 2_000, "and nothing after them"


def test_a_full_buffer_holds_the_caller_back_and_loses_nothing(kafka_broker: str, topic: Callable[..., str]) -> None:
    name, count = topic(), 2_000
    values = [b"%06d" % row + b"v" * 500 for row in range(count)]
    with bulk(kafka_broker, buffer_bytes=20_000, linger_ms=1_000, max_block_ms=20) as many:
        waits, futures = send_all(many, name, [None] * count, values, 60)
    assert waits > 0 and all(future.succeeded() for future in futures)
    assert [record.value for record in consume_all(kafka_broker, name, count)] == values


def test_a_row_larger_than_a_request_leaves_those_before_it(kafka_broker: str, topic: Callable[..., str]) -> None:
    name = topic()
    with bulk(kafka_broker, max_request_size=10_000) as many:
        with pytest.raises(kafka_errors.MessageSizeTooLargeError, match=f"topic {name}, row 1") as caught:
            many.send_many(name, [None] * 3, [b"before", b"x" * 20_000, b"after"])
        assert caught.value.accepted == 1
        many.send_many(name, [None], [b"later"])
        many.flush(30)
    assert [record.value for record in consume_all(kafka_broker, name, 2)] == [b"before", b"later"]


def test_batches_too_large_for_the_topic_are_cut_and_a_row_that_is_fails_alone(
    kafka_broker: str, topic: Callable[..., str]
) -> None:
    name, count = f"{topic()}-small", 400
    create_topic(kafka_broker, name, max_message_bytes="2000")
    values = [b"%06d" % row + b"v" * 50 for row in range(count)]
    with bulk(kafka_broker, linger_ms=5, retry_backoff_ms=10) as many:
        futures = many.send_many(name, [None] * count, values)
        many.flush(30)
        assert all(future.succeeded() for future in futures)
        (future,) = many.send_many(name, [None], [b"x" * 5_000])
        many.flush(30)
        assert future.failed() and isinstance(future.exception, kafka_errors.MessageSizeTooLargeError)
    assert [record.value for record in consume_all(kafka_broker, name, count)] == values


def test_a_missing_topic_is_waited_for_and_takes_nothing(kafka_broker: str) -> None:
    with bulk(kafka_broker, max_block_ms=200, allow_auto_create_topics=False) as many:
        with pytest.raises(kafka_errors.KafkaTimeoutError) as caught:
            many.send_many("there-is-none", [None], [b"v"])
        assert caught.value.accepted == 0 and many.held_bytes == 0
        many.flush(0)


@pytest.mark.slow
# kafka-python leaves the sockets of refused connections to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("trial_kafka")
def test_a_broker_killed_and_restarted_costs_no_row_and_doubles_none(tmp_path: Path) -> None:
    with TrialBroker(tmp_path, port=0) as broker:
        create_topic(broker.address, "t", 2)
        futures: list[Any] = []
        count = 0
        with bulk(
            broker.address,
            buffer_bytes=200_000,
            max_block_ms=50,
            delivery_timeout_ms=2**31 - 1,
            retry_backoff_ms=50,
            reconnect_backoff_max_ms=200,
        ) as many:

            def send(size: int) -> bool:
                """Send the next rows; whether there was room for all of them."""
                nonlocal count
                rows = [b"%d" % row for row in range(count, count + size)]
                try:
                    futures.extend(many.send_many("t", list(rows), [row + b"v" * 100 for row in rows]))
                except kafka_errors.KafkaTimeoutError as error:
                    futures.extend(error.futures)
                    count += error.accepted
                    return False
                count += size
                return True

            for _ in range(KILLS):
                deadline, first = time.monotonic() + 180, len(futures)
                while not any(future.is_done for future in futures[first:]):
                    send(250)
                    assert time.monotonic() < deadline
                broker.kill()  # requests are on their way
                while send(250):
                    assert time.monotonic() < deadline
                assert many.held_bytes > 150_000
                broker.start()
                while not send(250):
                    assert time.monotonic() < deadline, f"{many.held_bytes} bytes still held 180 s after the kill"
            many.flush(60)
        assert all(future.succeeded() for future in futures)
        assert sum(future.rows for future in futures) == count
        records = consume_committed(broker.address, "t")
        assert sorted(int(record.key) for record in records) == list(range(count))
        for partition in by_partition(records).values():
            order = [int(record.key) for record in partition]
            assert order == sorted(order)
        gc.collect()
