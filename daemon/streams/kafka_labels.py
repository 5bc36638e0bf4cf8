"""Late labels from a Kafka topic."""

from __future__ import annotations

import time
from typing import Any

import structlog
from kafka import KafkaConsumer
from kafka import errors as kafka_errors

from daemon.records import Labels, Positions
from daemon.stream_settings import KafkaClient
from daemon.streams.answers import decode_label
from daemon.streams.kafka_client import Address, connect, existing_partitions, name_of
from daemon.streams.kafka_mending import mend_consumer
from daemon.streams.topic_watch import StableEnds, TopicWatch

log = structlog.get_logger("homeostat.kafka")


class KafkaLabels:
    """Reads every partition of a label topic, outside any group: each worker sees all labels and keeps its own.

    Partitions that are added are read from their beginning, and so is a topic that was deleted and made anew. While
    there is none, or its broker is away, no labels come and answers go on.
    """

    def __init__(self, url: str, settings: KafkaClient, *, variable: str = "HOMEOSTAT_LABELS") -> None:
        self._address = Address.parse(url, variable)
        self._settings = settings
        self._consumer: Any = None
        self._topic = TopicWatch(self._address)
        self._ends = StableEnds()
        self.rejected: dict[str, int] = {}

    def check(self) -> None:
        """Reach the broker and the topic.

        Raises:
            StreamError: when either can't be had.
        """
        self.open(None)
        self.close()

    def open(self, positions: Positions | None) -> None:
        """Go on from ``positions``; partitions that are not in it start at their beginning."""
        self._consumer = connect(
            KafkaConsumer,
            self._address,
            self._settings,
            metrics_enabled=False,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            allow_auto_create_topics=False,
            isolation_level="read_committed",
            fetch_max_wait_ms=100,
            metadata_max_age_ms=self._settings.metadata_max_age_ms,
        )
        mend_consumer(self._consumer)
        partitions = existing_partitions(self._consumer, self._address)
        self._topic = TopicWatch(self._address)
        self._topic.open(self._consumer, partitions)
        self._consumer.assign(partitions)
        for partition in partitions:
            if (offset := (positions or {}).get(name_of(partition))) is not None:
                self._consumer.seek(partition, offset)
            else:
                self._consumer.seek_to_beginning(partition)
        self._positions: Positions = dict(positions or {})

    def _follow_topic(self) -> bool:
        """Read what was added to the topic, and all of one that took its place; returns whether one did."""
        assigned = set(self._consumer.assignment())
        if another := self._topic.look():
            log.error("label topic was deleted and made anew: read from its beginning", topic=self._address.topic)
            self._positions.clear()
            self._consumer.seek_to_beginning(*assigned)
        if added := self._topic.added(assigned):
            log.info("label topic has new partitions", partitions=[name_of(partition) for partition in added])
            self._consumer.assign([*assigned, *added])
            self._consumer.seek_to_beginning(*added)
        return another

    def poll(self, timeout_s: float = 0.0) -> Labels:
        """Labels that came; those that can't be read are counted in ``rejected``."""
        labels = Labels()
        try:
            records = self._consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=5_000)
        except kafka_errors.KafkaError as error:
            if not error.retriable:
                raise self._address.error(f"{type(error).__name__}: {error}") from None
            return labels
        if self._follow_topic():
            return labels  # what came is read again, with what lies before it
        if records:
            self._ends.heard()
        for partition, rows in records.items():
            for row in rows:
                try:
                    name, y, time_s = decode_label(row.value)
                except ValueError as error:
                    self.rejected[str(error)] = self.rejected.get(str(error), 0) + 1
                    continue
                labels.ids.append(name)
                labels.y.append(y)
                if time_s is None:
                    # -1: the producer gave none, so that it counts from now on.
                    time_s = row.timestamp / 1000 if row.timestamp >= 0 else time.time()
                labels.times_s.append(time_s)
            self._positions[name_of(partition)] = rows[-1].offset + 1
        return labels

    def at_end(self) -> bool:
        """Whether every label that the broker has told of, and gives out, has been returned."""
        return self._ends.lag(self._consumer, self._consumer.assignment()) == 0

    def positions(self) -> Positions:
        """Next offset per partition."""
        return dict(self._positions)

    def close(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=2_000)
