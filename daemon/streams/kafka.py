"""Kafka as a source, on kafka-python's consumer.

Two traits of kafka-python 3 shape this module. Rebalance listeners run on the client's own network thread, where a
blocking call would stop heartbeats: ours only note what happened (and pause what is new), and `poll` acts on it. With
cooperative-sticky assignment a worker rejoins on its next poll, so what was revoked is committed before others read it.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import structlog
from kafka import KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import OffsetAndMetadata

from daemon.records import Positions, RawBatch
from daemon.stream_settings import KafkaClient
from daemon.streams.bulk.install import install
from daemon.streams.kafka_client import Address, connect, existing_partitions, name_of
from daemon.streams.kafka_group import Rebalance, add_rows, offsets_of, said
from daemon.streams.kafka_mending import mend_consumer, next_records
from daemon.streams.kafka_waiting import KeepAlive, skip
from daemon.streams.resume import Start, resume
from daemon.streams.topic_watch import BrokerProbe, StableEnds, TopicWatch

log = structlog.get_logger("homeostat.kafka")

_NO_RECORDS: dict[Any, list[Any]] = {}
_ASK_MS = 10_000
"""Longest wait for one answer of the broker, well under the time after which liveness fails."""


class KafkaSource:
    """Reads a topic as a member of a consumer group; offsets are committed by `commit` alone, never by the client."""

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
        self.topic = TopicWatch(self._address)
        """Set its ``topic_id`` before `open` to that of the topic which the positions belong to."""
        self._anew: set[TopicPartition] = set()
        """To be placed as in a topic that nobody has read: it was deleted and made again under us."""
        self._ends = StableEnds()
        self._alive = KeepAlive()
        self.uncommitted = False
        self._probe = BrokerProbe(self._address, settings)

    @property
    def topic_id(self) -> str:
        """Of the topic that is read; empty where the broker does not tell."""
        return self.topic.topic_id

    @topic_id.setter
    def topic_id(self, topic_id: str) -> None:
        self.topic.topic_id = topic_id

    def check(self) -> None:
        """Reach the broker and the topic; nothing is joined.

        Raises:
            StreamError: when either can't be had.
        """
        with closing(connect(KafkaConsumer, self._address, self._settings, allow_auto_create_topics=False)) as visitor:
            existing_partitions(visitor, self._address)

    def open(self, positions: Positions | None) -> None:
        """Join the group. ``positions`` come from the newest checkpoint."""
        settings = self._settings
        self._file = dict(positions or {})
        self._placed, self._leaving, self._starts = set(), set(), {}
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
            metadata_max_age_ms=settings.metadata_max_age_ms,
        )
        why = install(self._consumer) if settings.bulk == "auto" else "HOMEOSTAT_KAFKA__BULK=off"
        self._bulk = why is None
        if why is not None:
            log.info("records are read one by one", reason=why)
        self._anew = set()
        self._listener = Rebalance(self._consumer.pause)
        mend_consumer(self._consumer)
        # First of all: a client that knows the topic already joins as if that had no partitions, and then again.
        self._consumer.subscribe([self._address.topic], listener=self._listener)
        if self.topic.open(self._consumer, existing_partitions(self._consumer, self._address)):
            self._begin_anew()

    def poll(self, max_rows: int, timeout_s: float) -> RawBatch:
        """At most ``max_rows`` records; empty when none came within ``timeout_s`` or the broker is away."""
        try:
            records = next_records(self._consumer, max_rows, int(timeout_s * 1000))
        except kafka_errors.NoOffsetForPartitionError:
            records = _NO_RECORDS
        except kafka_errors.OffsetOutOfRangeError as error:
            self._out_of_range(error.args[0])
            records = _NO_RECORDS
        except kafka_errors.LogTruncationError as error:
            # Fewer records than were read: a leader that lacked some took over, or the topic was made anew.
            self._out_of_range({part: self._consumer.position(part) for part in error.divergent_offsets})
            records = _NO_RECORDS
        except kafka_errors.KafkaError as error:
            if not error.retriable:
                raise self._address.error(said(error, self._settings)) from None
            log.warning("broker not answering, trying again", error=str(error), topic=self._address.topic)
            time.sleep(min(timeout_s, 0.2))
            records = _NO_RECORDS
        # Only what was placed before this poll: records of a partition that is placed now are asked for again.
        placed = set(self._placed)
        if self.topic.look():
            self._begin_anew()
            records = _NO_RECORDS
        if self.topic.left_out():
            log.warning("topic is back and its partitions are not given out: joining again", topic=self._address.topic)
            self._consumer.unsubscribe()
            self._consumer.subscribe([self._address.topic], listener=self._listener)
        if records:
            self._ends.heard()
        # One that was lost and given back meanwhile is first given up by `take_revoked`.
        if self._listener.assigned and not (self._listener.revoked or self._listener.lost):
            self._place_all()
        raw = RawBatch(arrived=time.monotonic())
        for partition, rows in records.items():
            if partition in placed:
                add_rows(raw, name_of(partition), rows, packed=self._bulk)
        self._probe.watch(bool(records))
        return raw

    def _place_all(self) -> None:
        """Place what was assigned; where the broker goes away meanwhile, the next poll tries again."""
        try:
            self._place(self._listener.assigned)
        except kafka_errors.IllegalStateError:
            log.info("partition revoked while it was placed", topic=self._address.topic)
        except kafka_errors.KafkaError as error:
            if not error.retriable:
                raise self._address.error(said(error, self._settings)) from None
            log.warning("partition not placed yet, trying again", error=str(error), topic=self._address.topic)

    def _begin_anew(self) -> None:
        """The topic is another by now: place its partitions again, and not by offsets of the old one."""
        self.topic.recreated(self._settings.out_of_range)
        self._file, self._anew = {}, set(self._placed)
        if self._placed:
            again = sorted(self._placed - set(self._listener.assigned))
            self._consumer.pause(*again)
            self._placed.clear()
            self._listener.assigned += again

    def _place(self, assigned: list[TopicPartition]) -> None:
        """Seek every newly assigned partition to where it has to go on, and let it flow."""
        consumer = self._consumer
        while assigned:
            partition = assigned[0]
            if partition in consumer.assignment():
                name, start_at = name_of(partition), str(self._settings.start)
                group = consumer.committed(partition, metadata=True, timeout_ms=_ASK_MS)
                if partition in self._anew:
                    group = None  # the broker forgot it with the topic; what is there came too late from ourselves
                if group is None and name not in self._file:
                    start_at = self.topic.begins(partition, self._file, start_at)
                first = consumer.beginning_offsets([partition], timeout_ms=_ASK_MS)[partition]
                end = consumer.end_offsets([partition], timeout_ms=_ASK_MS)[partition]
                start = resume(
                    name,
                    file=self._file.get(name),
                    file_id=self.checkpoint_id,
                    group=None if group is None else group.offset,
                    note="" if group is None else group.metadata or "",
                    first=first,
                    end=end,
                    max_rebuild=self._settings.max_rebuild,
                    start=start_at,
                    out_of_range=self._settings.out_of_range,
                )
                log.info("partition assigned", partition=name, **start._asdict())
                self._starts[name] = start
                consumer.seek(partition, start.offset)
                consumer.resume(partition)
                self._placed.add(partition)
                self._anew.discard(partition)
            assigned.pop(0)

    def _out_of_range(self, offsets: dict[TopicPartition, int]) -> None:
        """A reader that fell behind the topic's retention (or a truncated topic): jump only where that is allowed."""
        policy = self._settings.out_of_range
        if self.topic.look():
            return self._begin_anew()
        for partition, offset in offsets.items():
            if policy == "fail":
                raise self._address.error(
                    f"offset {offset} of {name_of(partition)} is not on the broker: its records were deleted, or the "
                    "topic was. Set HOMEOSTAT_KAFKA__OUT_OF_RANGE=earliest (or latest) to go on without them"
                )
            bounds = self._consumer.beginning_offsets if policy == "earliest" else self._consumer.end_offsets
            try:
                target = bounds([partition], timeout_ms=_ASK_MS)[partition]
            except kafka_errors.KafkaError as error:
                # The next poll runs into the same offset.
                log.warning("offset out of range, and the broker does not say where to go on", error=str(error))
                return
            log.error("offset out of range: jumping", partition=name_of(partition), wanted=offset, start=target)
            self._starts[name_of(partition)] = Start(target, target, max(0, target - offset), "out of range")
            self._consumer.seek(partition, target)

    def keep_alive(self) -> None:
        """Stay a member without taking records; to be called again and again while nothing is polled."""
        seen = self._listener
        leaving = {*seen.revoked, *self._leaving}
        self._alive.step(self._consumer, self._placed, leaving, lambda: {*seen.assigned, *seen.revoked, *seen.lost})

    def skip(self, rows: int) -> dict[str, tuple[int, int]]:
        """Skip up to ``rows`` records not yet returned, the oldest of each partition; its offset before and after."""
        return skip(self._consumer, self._placed, rows)

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

    def can_fill(self, rows: int) -> bool:
        """Whether the broker has told of so many records that `poll` has not returned, or of none at all yet."""
        lag = self.lag()
        return lag is None or lag >= rows

    def lag(self) -> int | None:
        """Records on the broker not yet returned by `poll`; None before the first answer, and without a partition.

        A worker that waits for its partitions is not at the end of its stream: it doesn't know where it stands.
        """
        return self._ends.lag(self._consumer, self._placed) if self._placed else None

    def offsets(self, positions: Positions, note: str) -> dict[TopicPartition, OffsetAndMetadata]:
        """What is committed for those of ``positions`` that are this worker's."""
        # A checkpoint remembers partitions that are another worker's by now: its offsets must not go backwards.
        offsets = offsets_of(positions, note, self._placed | self._leaving)
        # A partition that moves away and comes back goes on from here, not from the checkpoint of the start.
        self._file |= {name_of(partition): item.offset for partition, item in offsets.items()}
        return offsets

    def group_metadata(self) -> Any:
        """This worker's membership, by which the broker refuses the transaction of one that is a member no more."""
        return self._consumer.group_metadata()

    def commit(self, positions: Positions, note: str) -> None:
        """Commit to the group. A commit that fails is repeated by the next checkpoint: the file is the truth."""
        offsets = self.offsets(positions, note)
        if not offsets:
            return
        try:
            self._consumer.commit(offsets, timeout_ms=5_000)
            self.uncommitted = False
        except kafka_errors.FencedInstanceIdError as error:
            raise self._address.error(said(error, self._settings)) from None  # the client tells nowhere else
        except kafka_errors.KafkaError as error:
            self.uncommitted = True
            log.warning("commit failed, the next checkpoint repeats it", error=f"{type(error).__name__}: {error}")

    def ready(self) -> bool:
        """Whether partitions are assigned and a broker answers. A worker without a partition is not ready."""
        return bool(self._placed) and self._probe.up and not self.topic.gone

    def close(self) -> None:
        """Leave the group."""
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=5_000)
