"""Kafka as a source, on kafka-python's public consumer.

Two traits of kafka-python 3 shape this module. Rebalance listeners run on the client's own network thread, where a
blocking call would stop heartbeats: ours only note what happened (and pause what is new), and `poll` acts on it in the
caller's thread. With cooperative-sticky assignment a worker rejoins on its next poll, so what was revoked is committed
before anybody else reads it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import structlog
from kafka import KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import OffsetAndMetadata

from daemon.records import Positions, RawBatch
from daemon.settings import KafkaClient
from daemon.streams.kafka_client import Address, connect, existing_partitions, name_of, reachable
from daemon.streams.resume import Start, resume

log = structlog.get_logger("homeostat.kafka")

_NO_RECORDS: dict[Any, list[Any]] = {}
_ASK_MS = 10_000
"""Longest wait for one answer of the broker, well under the time after which liveness fails."""


class _Rebalance(ConsumerRebalanceListener):  # type: ignore[misc]
    """Notes what the network thread saw; nothing here may block."""

    def __init__(self, pause: Callable[[TopicPartition], None]) -> None:
        self._pause = pause
        self.assigned: list[TopicPartition] = []
        self.revoked: list[TopicPartition] = []
        self.lost: list[TopicPartition] = []

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        for partition in assigned:
            self._pause(partition)
            self.assigned.append(partition)

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self.revoked.extend(revoked)

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self.lost.extend(lost)


class KafkaSource:
    """Reads a topic as a member of a consumer group.

    Offsets are committed by `commit` alone, never by the client. Where a partition starts is decided by
    ``daemon.streams.resume`` from the checkpoint's offset and the group's.
    """

    ended = False

    def __init__(self, url: str, settings: KafkaClient, *, variable: str = "HOMEOSTAT_SOURCE") -> None:
        self._address = Address.parse(url, variable)
        self._settings = settings
        self._consumer: Any = None
        self._file: Positions = {}
        self._placed: set[TopicPartition] = set()
        self._leaving: set[TopicPartition] = set()
        """Revoked, and still ours to commit until the next poll rejoins."""
        self._starts: dict[str, Start] = {}
        self.checkpoint_id = ""
        """Line of descent of the checkpoint that `open` gets its positions from."""
        self._broker_seen = time.monotonic()
        self._broker_up = True
        self._probe: threading.Thread | None = None

    def check(self) -> None:
        """Reach the broker and the topic; nothing is joined.

        Raises:
            StreamError: when either can't be had.
        """
        consumer = connect(KafkaConsumer, self._address, self._settings, allow_auto_create_topics=False)
        try:
            existing_partitions(consumer, self._address)
        finally:
            consumer.close()

    def open(self, positions: Positions | None) -> None:
        """Join the group. ``positions`` come from the newest checkpoint."""
        settings = self._settings
        self._file = dict(positions or {})
        self._consumer = connect(
            KafkaConsumer,
            self._address,
            settings,
            metrics_enabled=False,
            group_id=settings.group,
            group_instance_id=settings.instance_id or None,
            enable_auto_commit=False,
            # Never a silent jump: a missing or vanished offset comes back as an error and is decided here.
            auto_offset_reset="none",
            allow_auto_create_topics=False,
            session_timeout_ms=settings.session_timeout_ms,
            partition_assignment_strategy=(CooperativeStickyAssignor(),),
            isolation_level="read_committed",
            fetch_max_wait_ms=100,
        )
        existing_partitions(self._consumer, self._address)
        self._listener = _Rebalance(self._consumer.pause)
        self._consumer.subscribe([self._address.topic], listener=self._listener)

    def poll(self, max_rows: int, timeout_s: float) -> RawBatch:
        """At most ``max_rows`` records; empty when none came within ``timeout_s`` or the broker is away."""
        try:
            records = self._consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=max_rows)
        except kafka_errors.NoOffsetForPartitionError:
            records = _NO_RECORDS
        except kafka_errors.OffsetOutOfRangeError as error:
            self._out_of_range(error.args[0])
            records = _NO_RECORDS
        except kafka_errors.KafkaError as error:
            if not error.retriable:
                raise self._address.error(f"{type(error).__name__}: {error}") from None
            log.warning("broker not answering, trying again", error=str(error), topic=self._address.topic)
            time.sleep(min(timeout_s, 0.2))
            records = _NO_RECORDS
        # Only what was placed before this poll: records of a partition that is placed now are asked for again.
        placed = set(self._placed)
        if self._listener.assigned:
            self._place_all()
        raw = RawBatch(arrived=time.monotonic())
        for partition, rows in records.items():
            if partition not in placed:
                continue
            raw.values += [row.value for row in rows]
            raw.keys += [row.key for row in rows]
            raw.times_s += [row.timestamp / 1000 for row in rows]
            raw.offsets += [row.offset for row in rows]
            raw.partitions += [name_of(partition)] * len(rows)
        self._watch_broker(bool(records))
        return raw

    def _place_all(self) -> None:
        """Place what was assigned; where the broker goes away meanwhile, the next poll tries again."""
        try:
            self._place(self._listener.assigned)
        except kafka_errors.IllegalStateError:
            log.info("partition revoked while it was placed", topic=self._address.topic)
        except kafka_errors.KafkaError as error:
            if not error.retriable:
                raise self._address.error(f"{type(error).__name__}: {error}") from None
            log.warning("partition not placed yet, trying again", error=str(error), topic=self._address.topic)

    def _place(self, assigned: list[TopicPartition]) -> None:
        """Seek every newly assigned partition to where it has to go on, and let it flow."""
        consumer = self._consumer
        while assigned:
            partition = assigned[0]
            if partition in consumer.assignment():
                group = consumer.committed(partition, metadata=True, timeout_ms=_ASK_MS)
                first = consumer.beginning_offsets([partition], timeout_ms=_ASK_MS)[partition]
                end = consumer.end_offsets([partition], timeout_ms=_ASK_MS)[partition]
                start = resume(
                    name_of(partition),
                    file=self._file.get(name_of(partition)),
                    file_id=self.checkpoint_id,
                    group=None if group is None else group.offset,
                    note="" if group is None else group.metadata or "",
                    first=first,
                    end=end,
                    max_rebuild=self._settings.max_rebuild,
                    start=self._settings.start,
                    out_of_range=self._settings.out_of_range,
                )
                log.info("partition assigned", partition=name_of(partition), **start._asdict())
                self._starts[name_of(partition)] = start
                consumer.seek(partition, start.offset)
                consumer.resume(partition)
                self._placed.add(partition)
            assigned.pop(0)

    def _out_of_range(self, offsets: dict[TopicPartition, int]) -> None:
        """A reader that fell behind the topic's retention (or a truncated topic): jump only where that is allowed."""
        policy = self._settings.out_of_range
        for partition, offset in offsets.items():
            if policy == "fail":
                raise self._address.error(
                    f"offset {offset} of {name_of(partition)} is no longer on the broker: its records were deleted. "
                    "Set HOMEOSTAT_KAFKA__OUT_OF_RANGE=earliest (or latest) to go on without them"
                )
            bounds = self._consumer.beginning_offsets if policy == "earliest" else self._consumer.end_offsets
            target = bounds([partition])[partition]
            log.error("offset out of range: jumping", partition=name_of(partition), wanted=offset, start=target)
            self._starts[name_of(partition)] = Start(target, target, max(0, target - offset), "out of range")
            self._consumer.seek(partition, target)

    def take_revoked(self) -> tuple[set[str], set[str]]:
        """Partitions given up since the last call: (revoked: finish and commit them, lost: drop them)."""
        revoked, lost = set(map(name_of, self._listener.revoked)), set(map(name_of, self._listener.lost))
        self._placed -= {*self._listener.revoked, *self._listener.lost}
        self._leaving = set(self._listener.revoked)
        self._listener.revoked.clear()
        self._listener.lost.clear()
        return revoked, lost

    def take_starts(self) -> dict[str, Start]:
        """How partitions were started since the last call."""
        starts, self._starts = self._starts, {}
        return starts

    def at_end(self) -> bool:
        """Whether every record that the broker has told of has been returned by `poll`."""
        return self.lag() == 0

    def lag(self) -> int | None:
        """Records on the broker not yet returned by `poll`; None before the first answer, and without a partition.

        A worker that waits for its partitions is not at the end of its stream: it doesn't know where it stands.
        """
        if not self._placed:
            return None
        total = 0
        try:
            for partition in self._consumer.assignment():
                highwater = self._consumer.highwater(partition)
                if highwater is None or partition not in self._placed:
                    return None
                total += max(0, highwater - (self._consumer.position(partition, timeout_ms=0) or 0))
        except (kafka_errors.IllegalStateError, kafka_errors.KafkaTimeoutError):
            # Taken away by the network's thread between two lines, or to be asked of a broker that is away.
            return None
        return total

    def commit(self, positions: Positions, note: str) -> None:
        """Commit to the group. A commit that fails is repeated by the next checkpoint: the file is the truth."""
        offsets = {}
        for name, offset in positions.items():
            topic, _, number = name.rpartition("/")
            partition = TopicPartition(topic, int(number)) if topic == self._address.topic else None
            # A checkpoint remembers partitions that are another worker's by now: its offsets must not go backwards.
            if partition in self._placed or partition in self._leaving:
                offsets[partition] = OffsetAndMetadata(offset, note, -1)
        if not offsets:
            return
        # A partition that moves away and comes back goes on from here, not from the checkpoint of the start.
        self._file |= {name_of(partition): item.offset for partition, item in offsets.items()}
        try:
            self._consumer.commit(offsets, timeout_ms=5_000)
        except kafka_errors.KafkaError as error:
            log.warning("commit failed, the next checkpoint repeats it", error=f"{type(error).__name__}: {error}")

    def ready(self) -> bool:
        """Whether partitions are assigned and a broker answers. A worker without a partition is not ready."""
        return bool(self._placed) and self._broker_up

    def _watch_broker(self, answered: bool) -> None:
        now = time.monotonic()
        if answered:
            self._broker_seen, self._broker_up = now, True
        elif now - self._broker_seen > 2.0 and (self._probe is None or not self._probe.is_alive()):
            # An idle topic and a dead broker look the same from `poll`; a connection tells. In a thread of its own:
            # a host that swallows packets would hold the loop for the time-out.
            self._broker_seen = now
            self._probe = threading.Thread(target=self._try_broker, name="broker-probe", daemon=True)
            self._probe.start()

    def _try_broker(self) -> None:
        self._broker_up = reachable(self._address.servers)

    def close(self) -> None:
        """Leave the group."""
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=5_000)
