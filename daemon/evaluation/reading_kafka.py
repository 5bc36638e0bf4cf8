"""A range of a Kafka topic, read outside any group: nothing is committed, no running daemon is disturbed."""

from __future__ import annotations

import time
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors

from daemon.records import RawBatch
from daemon.settings import Settings
from daemon.streams.codecs import Codec
from daemon.streams.kafka_client import Address, connect, existing_partitions, name_of

_SILENCE_S = 30.0


def read_range(
    settings: Settings, codec: Codec, *, first: int | None = None, stop: int | None = None, last: int | None = None
) -> list[RawBatch]:
    """Records of HOMEOSTAT_SOURCE, partitions merged by their time stamps, each partition's own order kept.

    Args:
        settings: where the topic is, and how to reach it.
        codec: how long a record may be.
        first: offset in each partition to begin at; None: its first.
        stop: offset in each partition to end before; None: its present end.
        last: of each partition no more than the newest so many.

    Raises:
        StreamError: no broker, no topic, no record in the range, or the broker falls silent.
    """
    address = Address.parse(settings.source, "HOMEOSTAT_SOURCE")
    consumer = connect(
        KafkaConsumer,
        address,
        settings.kafka,
        metrics_enabled=False,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="none",
        allow_auto_create_topics=False,
        isolation_level="read_committed",
        max_partition_fetch_bytes=max(1 << 20, 2 * codec.max_bytes),
    )
    try:
        partitions = existing_partitions(consumer, address)
        consumer.assign(partitions)
        ends = _ends(consumer, partitions, first, stop, last)
        if not ends:
            begins, now = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
            there = ", ".join(f"{name_of(part)} has {begins[part]} to {now[part]}" for part in partitions)
            raise address.error(
                f"no records from offset {first or 0} to {'the end' if stop is None else stop}; {there}"
            )
        records = _read(consumer, ends, address)
    finally:
        consumer.close(autocommit=False)
    # Stable: of one partition's records none overtakes another, as their own stamps may go backwards.
    places: list[tuple[float, Any]] = []
    for rows in records.values():
        latest = float("-inf")
        for row in rows:
            latest = max(latest, row.timestamp / 1000)
            places.append((latest, row))
    places.sort(key=lambda place: place[0])
    rows = [row for _, row in places]
    return [
        RawBatch(
            values=[row.value for row in rows],
            keys=[row.key for row in rows],
            times_s=[row.timestamp / 1000 for row in rows],
            partitions=[f"{row.topic}/{row.partition}" for row in rows],
            offsets=[row.offset for row in rows],
        )
    ]


def _ends(
    consumer: Any, partitions: list[TopicPartition], first: int | None, stop: int | None, last: int | None
) -> dict[TopicPartition, int]:
    """Seek each partition to its begin; the offsets to end before, of those that have anything."""
    begins, ends = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    wanted = {}
    for part in partitions:
        end = ends[part] if stop is None else min(stop, ends[part])
        begin = max(begins[part], first or 0)
        if last is not None:
            begin = max(begin, end - last)
        if begin < end:
            consumer.seek(part, begin)
            wanted[part] = end
        else:
            consumer.pause(part)
    return wanted


def _read(consumer: Any, ends: dict[TopicPartition, int], address: Address) -> dict[TopicPartition, list[Any]]:
    found: dict[TopicPartition, list[Any]] = {part: [] for part in ends}
    left, heard = dict(ends), time.monotonic()
    while left:
        try:
            polled = consumer.poll(timeout_ms=200, max_records=5_000)
        except kafka_errors.KafkaError as error:
            if not error.retriable:
                raise address.error(f"{type(error).__name__}: {error}") from None
            polled = {}
        for part, rows in polled.items():
            if part in found:
                found[part] += [row for row in rows if row.offset < ends[part]]
            heard = time.monotonic()
        for part in list(left):
            # The position moves on over what is no record: transaction marks, compacted offsets.
            if (consumer.position(part, timeout_ms=0) or 0) >= left[part]:
                consumer.pause(part)
                del left[part]
                heard = time.monotonic()
        if time.monotonic() - heard > _SILENCE_S:
            where = ", ".join(f"{name_of(part)} before offset {end}" for part, end in left.items())
            raise address.error(f"the broker gives nothing more of {where} for {_SILENCE_S:g} s")
    return found
