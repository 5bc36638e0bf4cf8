"""What happens to a member of a consumer group, and rows as its client gives them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from kafka import TopicPartition
from kafka import errors as kafka_errors
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.structs import OffsetAndMetadata

from daemon.records import Positions, RawBatch
from daemon.stream_settings import KafkaClient
from daemon.streams.kafka_client import name_of


class Rebalance(ConsumerRebalanceListener):  # type: ignore[misc]
    """Notes what the network thread saw; nothing here may block."""

    def __init__(self, pause: Callable[[TopicPartition], None]) -> None:
        self._pause = pause
        self.assigned: list[TopicPartition] = []
        self.revoked: list[TopicPartition] = []
        self.lost: list[TopicPartition] = []

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Nothing flows from them before it is settled where they begin."""
        for partition in assigned:
            self._pause(partition)
            self.assigned.append(partition)

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """They are ours to commit until the next poll."""
        self.revoked.extend(revoked)

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        """Somebody else may have them already."""
        self.lost.extend(lost)


def said(error: Exception, settings: KafkaClient) -> str:
    """What ended this member's reading, in words where we have better ones than the client."""
    if isinstance(error, kafka_errors.FencedInstanceIdError):
        name = f"HOMEOSTAT_KAFKA__INSTANCE_ID={settings.instance_id}"
        return f"another worker of the group {settings.group!r} took over its name, {name}: each needs its own"
    return f"{type(error).__name__}: {error}"


def offsets_of(
    positions: Positions, note: str, own: Iterable[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """What to commit for those of ``positions`` that are in ``own``."""
    by_name = {name_of(partition): partition for partition in own}
    return {by_name[name]: OffsetAndMetadata(offset, note, -1) for name, offset in positions.items() if name in by_name}


def add_rows(raw: RawBatch, name: str, rows: list[Any], *, packed: bool) -> None:
    """Add what a poll gave of partition ``name``: chunks where it is read in bulk, else kafka-python's records."""
    if packed:
        for chunk in rows:
            raw.append(name, chunk)
        return
    times = [row.timestamp / 1000 for row in rows]
    if min(times) < 0:  # -1: the producer gave none
        now = time.time()
        times = [now if given < 0 else given for given in times]
    raw.values += [row.value for row in rows]
    raw.keys += [row.key for row in rows]
    raw.times_s += times
    raw.offsets += [row.offset for row in rows]
    raw.partitions += [name] * len(rows)
    raw.headers |= {(name, row.offset): row.headers for row in rows if row.headers}
