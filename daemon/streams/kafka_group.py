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

_JOIN_MS = 500
"""Time that a poll has, at the least, while the group is being joined."""


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


def next_records(consumer: Any, rows: int, timeout_ms: int) -> Any:
    """What a poll gives: at most ``rows`` records, by partition; and a rebalance that is under way gets through.

    kafka-python 3.0.12 loses a join of the group that a poll leaves in the middle: one that is done before the next
    poll is begun anew, and one that was begun because the topic's partitions had changed is forgotten. Then no
    heartbeat is sent, every commit is refused, and the group evicts the member. No records come meanwhile anyway.
    """
    coordinator: Any = getattr(consumer, "_coordinator", None)
    if coordinator is not None and (coordinator.rejoining or coordinator.need_rejoin()):
        timeout_ms = max(timeout_ms, _JOIN_MS)
        with coordinator._lock:  # it may be through by now
            if coordinator.rejoining:
                coordinator.request_rejoin()
    return consumer.poll(timeout_ms=timeout_ms, max_records=rows)


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
