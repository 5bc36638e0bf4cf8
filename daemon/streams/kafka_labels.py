"""Late labels from a Kafka topic."""

from __future__ import annotations

from typing import Any

from kafka import KafkaConsumer
from kafka import errors as kafka_errors

from daemon.records import Labels, Positions
from daemon.settings import KafkaClient
from daemon.streams.answers import decode_label
from daemon.streams.kafka_client import Address, connect, existing_partitions, name_of


class KafkaLabels:
    """Reads every partition of a label topic, outside any group: each worker sees all labels and keeps its own."""

    def __init__(self, url: str, settings: KafkaClient, *, variable: str = "HOMEOSTAT_LABELS") -> None:
        self._address = Address.parse(url, variable)
        self._settings = settings
        self._consumer: Any = None
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
        )
        partitions = existing_partitions(self._consumer, self._address)
        self._consumer.assign(partitions)
        for partition in partitions:
            if (offset := (positions or {}).get(name_of(partition))) is not None:
                self._consumer.seek(partition, offset)
            else:
                self._consumer.seek_to_beginning(partition)
        self._positions: Positions = dict(positions or {})

    def poll(self, timeout_s: float = 0.0) -> Labels:
        """Labels that came; those that can't be read are counted in ``rejected``."""
        labels = Labels()
        try:
            records = self._consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=5_000)
        except kafka_errors.KafkaError as error:
            if not error.retriable:
                raise self._address.error(f"{type(error).__name__}: {error}") from None
            return labels
        for partition, rows in records.items():
            for row in rows:
                try:
                    name, y, time_s = decode_label(row.value)
                except ValueError as error:
                    self.rejected[str(error)] = self.rejected.get(str(error), 0) + 1
                    continue
                labels.ids.append(name)
                labels.y.append(y)
                labels.times_s.append(row.timestamp / 1000 if time_s is None else time_s)
            self._positions[name_of(partition)] = rows[-1].offset + 1
        return labels

    def at_end(self) -> bool:
        """Whether every label that the broker has told of has been returned."""
        for partition in self._consumer.assignment():
            highwater = self._consumer.highwater(partition)
            if highwater is None or (self._consumer.position(partition, timeout_ms=0) or 0) < highwater:
                return False
        return True

    def positions(self) -> Positions:
        """Next offset per partition."""
        return dict(self._positions)

    def close(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=2_000)
