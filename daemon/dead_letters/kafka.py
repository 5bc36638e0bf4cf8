"""Dead letters on a Kafka topic, and a topic to which records are sent again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors
from kafka.structs import OffsetAndMetadata

from daemon.dead_letters.progress import Progress
from daemon.dead_letters.replaying import Found
from daemon.errors import DeliveryError
from daemon.stream_settings import KafkaClient
from daemon.streams.dead_letters import StoredLetter, from_kafka, partition_of
from daemon.streams.kafka_client import Address, connect, existing_partitions, name_of

SILENCE_S = 30.0
"""Longest wait for the broker's next word."""

_ASK_MS = 10_000
_LETTERS = 200
_NOT_OURS = "not a dead letter of homeostat"
_TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)


class KafkaLetters:
    """A topic of dead letters. The progress is the group's offsets, with what was left in their metadata.

    One call at a time: the group has no members that could share the work, and the last commit wins.
    """

    def __init__(self, url: str, settings: KafkaClient, *, variable: str) -> None:
        self.url = url
        self.group = f"{settings.group}.replay-dlq"
        self.progress: dict[str, Progress] = {}
        self._address = Address.parse(url, variable)
        self._settings = settings
        self._consumer: Any = None
        self._ends: dict[TopicPartition, int] = {}

    def open(self, *, again: bool) -> None:
        """Stand where the last call ended.

        Raises:
            StreamError: no broker, or no topic.
        """
        self._consumer = consumer = connect(
            KafkaConsumer,
            self._address,
            self._settings,
            metrics_enabled=False,
            group_id=self.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            allow_auto_create_topics=False,
            isolation_level="read_committed",
        )
        partitions = existing_partitions(consumer, self._address)
        try:
            begins = consumer.beginning_offsets(partitions, timeout_ms=_ASK_MS)
            self._ends = consumer.end_offsets(partitions, timeout_ms=_ASK_MS)
            for partition in partitions:
                noted = None if again else consumer.committed(partition, metadata=True, timeout_ms=_ASK_MS)
                progress = Progress.read(noted.offset, noted.metadata or "") if noted is not None else Progress()
                if progress.next > self._ends[partition]:
                    progress = Progress()  # a topic that was deleted and made anew
                progress.begin_at(begins[partition])
                self.progress[name_of(partition)] = progress
            self._ends = {part: end for part, end in self._ends.items() if self.progress[name_of(part)].first < end}
            consumer.assign(list(self._ends))
            for partition in self._ends:
                consumer.seek(partition, self.progress[name_of(partition)].first)
        except kafka_errors.KafkaError as error:
            raise self._address.error(f"{type(error).__name__}: {error}") from None

    def read(self) -> Iterator[list[Found]]:
        """Letters up to the topic's end as it was at `open`: one that dies again meanwhile is for the next call.

        Raises:
            StreamError: the broker falls silent.
        """
        consumer, heard, left = self._consumer, time.monotonic(), dict(self._ends)
        while left:
            try:
                polled = consumer.poll(timeout_ms=200, max_records=_LETTERS)
            except kafka_errors.KafkaError as error:
                if not error.retriable:
                    raise self._address.error(f"{type(error).__name__}: {error}") from None
                polled = {}
            found = [
                Found(name_of(partition), row.offset, _letter(row))
                for partition, rows in polled.items()
                for row in rows
                if row.offset < self._ends[partition] and self.progress[name_of(partition)].wants(row.offset)
            ]
            if found:
                yield found
            for partition in list(left):
                # The position moves on over what is no record: transaction marks, compacted offsets.
                if (consumer.position(partition, timeout_ms=0) or 0) >= left[partition]:
                    consumer.pause(partition)
                    del left[partition]
                    heard = time.monotonic()
            if polled:
                heard = time.monotonic()
            if time.monotonic() - heard > SILENCE_S:
                where = ", ".join(f"{name_of(part)} before offset {end}" for part, end in left.items())
                raise self._address.error(f"the broker gives nothing more of {where} for {SILENCE_S:g} s")

    def save(self) -> None:
        """Commit to the group.

        Raises:
            StreamError: the broker did not take it.
        """
        offsets = {}
        for partition in self._ends:
            progress = self.progress[name_of(partition)]
            offsets[partition] = OffsetAndMetadata(progress.first, progress.note(), -1)
        try:
            self._consumer.commit(offsets, timeout_ms=_ASK_MS)
        except kafka_errors.KafkaError as error:
            raise self._address.error(
                f"progress not committed to the group {self.group!r}: {type(error).__name__}: {error}; the letters "
                "that were sent last are sent again by the next call"
            ) from None

    def close(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=2_000)


def _letter(row: Any) -> StoredLetter | str:
    try:
        return from_kafka(row.key, row.value, row.headers, row.timestamp)
    except ValueError:
        return _NOT_OURS


class KafkaTarget:
    """A topic that takes the records: key, value and headers as they were, and a count of the replays.

    What came from a partition goes to the one of that number, in its order.
    """

    def __init__(self, url: str, settings: KafkaClient, *, variable: str) -> None:
        self.url = url
        self._address = Address.parse(url, variable)
        self._settings = settings
        self._producer: Any = None
        self._partitions: list[int] = []

    def open(self) -> None:
        """Connect.

        Raises:
            StreamError: no broker, or no topic.
        """
        no_group = {"group_id": None, "enable_auto_commit": False, "metrics_enabled": False}
        consumer = connect(KafkaConsumer, self._address, self._settings, allow_auto_create_topics=False, **no_group)
        try:
            self._partitions = [part.partition for part in existing_partitions(consumer, self._address)]
        finally:
            consumer.close()
        compression = self._settings.compression
        self._producer = connect(
            KafkaProducer,
            self._address,
            self._settings,
            metrics_enabled=False,
            acks="all",
            # With idempotence, a record that the broker finds too large fails all that come after it. In flight one at
            # a time keeps the order; what is sent twice after a lost answer is what "at least once" allows.
            enable_idempotence=False,
            max_in_flight_requests_per_connection=1,
            compression_type=None if compression == "none" else compression,
            delivery_timeout_ms=int(SILENCE_S * 1000),
            max_block_ms=int(SILENCE_S * 1000),
            # The broker took the record once; it knows best what it takes.
            max_request_size=64 << 20,
        )

    def refuses(self, letter: StoredLetter) -> str | None:
        """A tombstone without a key deletes nothing, and the client doesn't send it."""
        return "a tombstone without a key can't be sent" if letter.key is None and letter.value is None else None

    def send(self, letters: list[StoredLetter]) -> dict[int, str]:
        """Send them; by index, those that the broker finds too large.

        Raises:
            DeliveryError: the broker did not acknowledge them.
        """
        topic, refused = self._address.topic, {}
        sent: list[tuple[int, Any]] = []
        try:
            for at, letter in enumerate(letters):
                to = partition_of(letter.partition, self._partitions)
                try:
                    future = self._producer.send(topic, letter.value, letter.key, headers=letter.again(), partition=to)
                except _TOO_LARGE as error:
                    refused[at] = f"refused: {type(error).__name__}"
                else:
                    sent.append((at, future))
            self._producer.flush(timeout=SILENCE_S)
        except kafka_errors.KafkaError as error:
            raise self._undelivered(error) from None
        for at, future in sent:
            if isinstance(future.exception, _TOO_LARGE):
                refused[at] = f"refused by the broker: {type(future.exception).__name__}"
            elif not future.succeeded():
                raise self._undelivered(future.exception or "no answer")
        return refused

    def _undelivered(self, problem: object) -> DeliveryError:
        text = f"{type(problem).__name__}: {problem}" if isinstance(problem, Exception) else str(problem)
        where = f"{self._address.variable}={self.url}"
        return DeliveryError(f"{where}: records not acknowledged: {text}; the next call sends them again")

    def close(self) -> None:
        """Disconnect."""
        if self._producer is not None:
            try:
                self._producer.close(timeout=2)
            except kafka_errors.KafkaError:
                return  # all that matters was acknowledged
