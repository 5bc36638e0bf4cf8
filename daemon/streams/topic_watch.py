"""What becomes of a Kafka topic while it is read: it grows partitions, is deleted, or comes back as another.

The client notices the first two by itself and rebalances. That offsets begin again in a topic that was made anew it
does not notice where they happen to lie within the new one. A topic's id, given by brokers since 2.8, tells them apart.

Beside it what else a reader has to find out: where the end is, and whether the broker is still there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import structlog
from kafka import TopicPartition
from kafka import errors as kafka_errors

from daemon.records import Positions
from daemon.stream_settings import KafkaClient
from daemon.streams.kafka_client import Address, accepts, name_of

log = structlog.get_logger("homeostat.kafka")

_ASK_MS = 1_000
_QUIET_S = 0.02
"""Time without a record after which it is asked whether those that are told of can be had at all."""
_AGAIN_S = 0.25
_LEFT_OUT_S = 3.0
_JOINS = 5
_SILENT_S = 2.0
"""Time without a record after which the broker is tried."""


class TopicWatch:
    """Knows the topic as it was when it was opened, and what it has become."""

    def __init__(self, address: Address, topic_id: str = "") -> None:
        self._address = address
        self._consumer: Any = None
        self._at_open: set[int] = set()
        self.topic_id = topic_id
        """Of the topic that the positions belong to; empty: not known, as with brokers before 2.8."""
        self.gone = False
        """Whether the broker says that there is no such topic."""
        self._begins = ""
        self._back: float | None = None
        self._joins = 0

    def open(self, consumer: Any, partitions: Iterable[TopicPartition]) -> bool:
        """Take the topic as it is; returns whether it is another than the one that the positions belong to."""
        self._consumer, self.gone, self._begins = consumer, False, ""
        self._at_open = {partition.partition for partition in partitions}
        return self._is_another()

    def look(self) -> bool:
        """Whether the topic is another since the last look; says so once when it goes away and comes back."""
        cluster = getattr(self._consumer, "_cluster", None)
        if cluster is None:
            return False
        gone = cluster.partitions_for_topic(self._address.topic) is None
        if gone != self.gone:
            self.gone = gone
            if gone:
                log.error("topic does not exist any more: waiting for one of its name", topic=self._address.topic)
            else:
                log.warning("topic is there again", topic=self._address.topic)
                self._back, self._joins = time.monotonic(), 0
        return not gone and self._is_another()

    def left_out(self) -> bool:
        """Whether the group has to be joined again: the topic is back, and nobody gives out its partitions.

        Seen of kafka-python 3.0.12 where the topic comes back in the middle of the rebalance that its end had caused. A
        worker beyond the number of partitions has none rightly, so that it is tried a few times only.
        """
        if self._back is None or time.monotonic() - self._back < _LEFT_OUT_S:
            return False
        self._back, self._joins = time.monotonic(), self._joins + 1
        if self._consumer.assignment() or self._joins > _JOINS:
            self._back = None
        return self._back is not None

    def added(self, assigned: set[TopicPartition]) -> list[TopicPartition]:
        """Partitions that the topic has by now and that are not ``assigned``."""
        cluster = getattr(self._consumer, "_cluster", None)
        there = (cluster.partitions_for_topic(self._address.topic) if cluster is not None else None) or set()
        return [
            TopicPartition(self._address.topic, number)
            for number in sorted(there)
            if TopicPartition(self._address.topic, number) not in assigned
        ]

    def _is_another(self) -> bool:
        ask = getattr(getattr(self._consumer, "_cluster", None), "topic_id", None)
        found = None if ask is None else ask(self._address.topic)
        if found is None or not found.int:
            return False
        known, self.topic_id = self.topic_id, str(found)
        return known not in ("", self.topic_id)

    def recreated(self, policy: str) -> None:
        """What a topic that was deleted and made anew means: offsets of the old one lead nowhere in it.

        Raises:
            StreamError: the policy is ``fail``.
        """
        if policy == "fail":
            raise self._address.error(
                f"topic {self._address.topic!r} was deleted and made anew: its offsets begin again, and what was not "
                "read of the old one is lost. Set HOMEOSTAT_KAFKA__OUT_OF_RANGE=earliest (or latest) to go on with it"
            )
        self._begins = policy
        log.error("topic was deleted and made anew: its offsets begin again", topic=self._address.topic, start=policy)

    def begins(self, partition: TopicPartition, file: Positions, start: str) -> str:
        """Where a partition without any offset begins, when a new group would begin at ``start``."""
        if self._begins or start == "earliest":
            return self._begins or start
        return "earliest" if self._is_new(partition, file) else start

    def _is_new(self, partition: TopicPartition, file: Positions) -> bool:
        """Whether a partition without an offset was added to a topic that the group had begun to read.

        What was written to it before anybody noticed must not be skipped, wherever a new group would begin.
        """
        if partition.partition not in self._at_open:
            return True
        others = [TopicPartition(partition.topic, number) for number in self._at_open - {partition.partition}]
        if any(name_of(other) in file for other in others):
            return True
        return any(self._consumer.committed(other, timeout_ms=10 * _ASK_MS) is not None for other in others)


class StableEnds:
    """The end of what can be read: records of a transaction that is still open are there, and can't be had.

    The client tells of them (its high watermark counts them), so that a reader would seem to lag behind for as long as
    somebody's transaction stays open. The broker is asked, but only while nothing comes although something is there.
    """

    def __init__(self) -> None:
        self._known: dict[TopicPartition, tuple[int, int]] = {}
        self._heard = self._asked = float("-inf")

    def heard(self) -> None:
        """Records came."""
        self._heard = time.monotonic()

    def lag(self, consumer: Any, placed: set[TopicPartition]) -> int | None:
        """Records not yet read that can be; None before the broker's first answer, and while it is not known."""
        behind = {}
        try:
            for partition in consumer.assignment():
                highwater = consumer.highwater(partition)
                if highwater is None or partition not in placed:
                    return None
                if (position := consumer.position(partition, timeout_ms=0) or 0) < highwater:
                    behind[partition] = position, highwater
        except (kafka_errors.IllegalStateError, kafka_errors.KafkaTimeoutError):
            # Taken away by the network's thread between two lines, or to be asked of a broker that is away.
            return None
        return self._can_be_had(consumer, behind) if behind else 0

    def _can_be_had(self, consumer: Any, behind: dict[TopicPartition, tuple[int, int]]) -> int:
        """Of partitions with their position and high watermark."""
        now = time.monotonic()
        if now - self._heard > _QUIET_S and now - self._asked > _AGAIN_S:
            self._asked = now
            try:
                ends = consumer.end_offsets(list(behind), timeout_ms=_ASK_MS)
            except kafka_errors.KafkaError:
                ends = {}
            self._known = {partition: (behind[partition][1], end) for partition, end in ends.items()}
        total = 0
        for partition, (position, highwater) in behind.items():
            seen, end = self._known.get(partition, (-1, highwater))
            total += max(0, (min(end, highwater) if seen == highwater else highwater) - position)
        return total


class BrokerProbe:
    """Tells a dead broker from an idle topic, which look the same from `poll`: a connection shows it.

    In a thread of its own: a host that swallows packets would hold the loop for the time-out.
    """

    def __init__(self, address: Address, settings: KafkaClient) -> None:
        self._address, self._settings = address, settings
        self._seen = time.monotonic()
        self._thread: threading.Thread | None = None
        self.up = True

    def watch(self, answered: bool) -> None:
        """To be called after each poll; ``answered``: whether records came."""
        now = time.monotonic()
        if answered:
            self._seen, self.up = now, True
        elif now - self._seen > _SILENT_S and (self._thread is None or not self._thread.is_alive()):
            self._seen = now
            self._thread = threading.Thread(target=self._try, name="broker-probe", daemon=True)
            self._thread.start()

    def _try(self) -> None:
        self.up = accepts(self._address, self._settings)
