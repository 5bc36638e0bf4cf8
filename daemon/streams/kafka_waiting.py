"""What a group member does between two polls: stay one while nothing can be taken, or leave records out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import structlog
from kafka import TopicPartition
from kafka import errors as kafka_errors

from daemon.streams.kafka_client import name_of
from daemon.streams.kafka_mending import next_records

log = structlog.get_logger("homeostat.kafka")

KEEP_ALIVE_S = 3.0
"""Seconds between two signs of life: few, against the 300 s after which the broker gives the partitions away."""
HOLD_S = 150.0
"""Longest wait for the commit of what was revoked, half of those 300 s: the next poll lets others have it."""
_POLL_MS = 200
"""Time for one sign of life, in which a rebalance gets on."""


class KeepAlive:
    """Signs of life of a member that can't take records now."""

    def __init__(
        self,
        every_s: float = KEEP_ALIVE_S,
        hold_s: float = HOLD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every_s, self._hold_s, self._clock = every_s, hold_s, clock
        self._last = -every_s
        self._held: tuple[float, frozenset[TopicPartition]] | None = None

    def step(
        self,
        consumer: Any,
        placed: Iterable[TopicPartition],
        leaving: Iterable[TopicPartition],
        touched: Callable[[], set[TopicPartition]],
    ) -> bool:
        """Poll without taking a record, if it is time to; whether it did.

        A poll after a revocation rejoins the group, and others read on from the last commit: while there is something
        to finish, it waits, for as long as the group can be kept waiting.

        Args:
            consumer: kafka-python's.
            placed: partitions whose records flow.
            leaving: partitions that were revoked, and are not committed yet.
            touched: those that a rebalance gave or took, and nobody has acted on so far; they stay as they are.
        """
        now, leaving = self._clock(), frozenset(leaving)
        if leaving:
            if self._held is None or self._held[1] != leaving:
                self._held = (now, leaving)
            if now - self._held[0] < self._hold_s:
                return False
            log.warning("revoked partitions not committed in time: others answer from the last commit on")
        self._held = None
        if now - self._last < self._every_s:
            return False
        self._last = now
        flowing = set(placed) & consumer.assignment() - consumer.paused() - touched()
        try:
            consumer.pause(*flowing)
            for partition, rows in next_records(consumer, 1, _POLL_MS).items():
                consumer.seek(partition, rows[0].offset)  # handed out before the pause was seen
        except kafka_errors.KafkaError as error:
            # The next regular poll meets the same, and acts on it.
            log.debug("sign of life failed", error=f"{type(error).__name__}: {error}")
        finally:
            _each(consumer.resume, flowing & consumer.assignment() - touched())
        return True


def skip(consumer: Any, placed: Iterable[TopicPartition], rows: int) -> dict[str, tuple[int, int]]:
    """Leave out the oldest ``rows`` waiting records, of each partition in proportion to what waits there.

    Counted in offsets: of a compacted topic, or one written in transactions, that is more than the records.

    Returns the next offset of each partition before and after.
    """
    waiting: dict[TopicPartition, tuple[int, int]] = {}
    for partition in placed:
        try:
            highwater, position = consumer.highwater(partition), consumer.position(partition, timeout_ms=0)
        except kafka_errors.KafkaError:
            continue  # taken away meanwhile
        if highwater is not None and position is not None and highwater > position:
            waiting[partition] = (position, highwater)
    total = sum(highwater - position for position, highwater in waiting.values())
    share = min(1.0, rows / total) if total else 0.0
    skipped = {}
    for partition, (position, highwater) in waiting.items():
        if (count := int((highwater - position) * share)) > 0:
            try:
                consumer.seek(partition, position + count)
            except kafka_errors.KafkaError:
                continue
            skipped[name_of(partition)] = (position, position + count)
    return skipped


def _each(act: Callable[[TopicPartition], None], partitions: Iterable[TopicPartition]) -> None:
    for partition in partitions:
        try:
            act(partition)
        except kafka_errors.IllegalStateError:
            continue  # taken away between two lines
