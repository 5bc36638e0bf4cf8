"""Producing many rows at once through kafka-python's producer, past its `send`, which costs 18 µs of Python a row.

`KafkaProducer.send` puts one record into the newest batch of its partition; a thread, the sender, takes the batches,
gives them their sequence numbers and sees to acknowledgements, retries and transactions. `BulkProducer` fills the same
batches, many records in one pass, under the same locks, and leaves everything after that to the sender.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from kafka import errors as kafka_errors
from kafka.producer.producer_batch import ProducerBatch
from kafka.record.memory_records import MemoryRecordsBuilder
from kafka.structs import TopicPartition

from daemon.streams.bulk.write_check import unfit, usable
from daemon.streams.bulk.write_encode import Headers, Rows, encode_headers, fill
from daemon.streams.bulk.write_partitions import choose
from daemon.streams.bulk.write_rows import Room, SentRows

__all__ = ["BulkProducer", "Room", "SentRows", "usable"]

_SLICE = 1024
"""Rows handed over at once: the sender starts with the first while the next are encoded."""

_TIME_LIMIT = 2**62  # so that the difference of two times is an int64


class _Stopped(Exception):
    """A slice was taken only up to a row."""

    def __init__(self, error: Any, rows: int, futures: list[Any]) -> None:
        super().__init__(error)
        self.error, self.rows, self.futures = error, rows, futures


class BulkProducer:
    """Hands rows to a producer, and waits where they would take more memory than they may.

    One thread sends. Where kafka-python is not what this was written for, rows go one by one through its `send`, with
    the same results; ``reason`` says why.

    Args:
        producer: kafka-python's KafkaProducer; `close` remains the caller's.
        buffer_bytes: what unacknowledged rows may hold.
        bulk: False: always through `send`.
    """

    def __init__(self, producer: Any, *, buffer_bytes: int = 32 * 2**20, bulk: bool = True) -> None:
        self._producer = producer
        self._room = Room(buffer_bytes)
        self.reason: str | None = (usable() or unfit(producer)) if bulk else "not wanted"
        """Why rows go one by one; None: they don't."""
        if self.reason is None:
            self._watch_splits()

    @property
    def held_bytes(self) -> int:
        """Bytes of rows that are not acknowledged yet."""
        return self._room.used

    def send_many(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        timestamp_ms: int | Sequence[int] | None = None,
        headers: Sequence[Headers | None] | None = None,
        partition: int | None = None,
    ) -> list[Any]:
        """Hand over rows, in order; they are not durable before their futures, or `flush`, say so.

        Args:
            topic: where to.
            keys: one a row; rows of one key stay in order. None: any partition.
            values: one a row; None: a tombstone, which needs a key.
            timestamp_ms: milliseconds since 1970, for all rows or one a row; None: now.
            headers: one list of (name, value) a row.
            partition: of all rows; None: by their keys.

        Returns:
            Futures (``is_done``, ``failed()``, ``exception``) that together cover all rows.

        Raises:
            KafkaTimeoutError: no metadata, or no room, within the producer's ``max_block_ms``.
            MessageSizeTooLargeError: a row is larger than the producer's ``max_request_size``.
            KafkaError: the transaction has failed, the producer is closed.
                Each of these has ``accepted``, how many leading rows were taken, and ``futures``, theirs: send the
                rest again, or not.
            TypeError, ValueError: what was given is no row; nothing was taken.
        """
        rows = _checked(topic, keys, values, timestamp_ms, headers)
        futures: list[Any] = []
        accepted, deadline = 0, time.monotonic() + self._producer.config["max_block_ms"] / 1000
        send = self._send_slice if self.reason is None else self._send_singly
        try:
            if self._producer._closed:
                raise kafka_errors.IllegalStateError("KafkaProducer already closed!")
            while accepted < len(values):
                part = rows.part(accepted, accepted + _SLICE)
                costs = part.costs()
                count = self._room.take(costs)
                if not count:
                    self._wait_for_room(costs[0], deadline, f"topic {topic}: {accepted} of {len(values)} rows taken")
                    continue
                futures += send(topic, part.part(0, count), costs[:count], accepted, headers, partition)
                accepted += count
        except _Stopped as stop:
            stop.error.accepted, stop.error.futures = accepted + stop.rows, futures + stop.futures
            raise stop.error from None
        except kafka_errors.KafkaError as error:
            error.accepted, error.futures = accepted, futures
            raise
        return futures

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until each row is acknowledged or refused; the futures say which.

        Unlike kafka-python's own, the time is for all batches together, and a batch that is cut in two is waited for.

        Raises:
            KafkaTimeoutError: not yet; nothing is lost, call again.
        """
        self._push(lambda: self._room.wait_empty(timeout_s), f"not all rows are acknowledged within {timeout_s} s")

    def _wait_for_room(self, size: int, deadline: float, text: str) -> None:
        text += f"; {self._room.used} of the buffer's {self._room.limit} bytes wait for the broker to acknowledge them"
        self._push(lambda: self._room.wait(size, max(deadline - time.monotonic(), 0)), text)

    def _push(self, wait: Any, text: str) -> None:
        """Wait while everything that the producer holds goes out at once, without its linger."""
        accumulator = self._producer._accumulator
        accumulator.begin_flush()
        try:
            self._producer._sender.wakeup()
            if not wait():
                raise kafka_errors.KafkaTimeoutError(text)
        finally:
            accumulator._flushes_in_progress.decrement()

    def _send_slice(
        self, topic: str, rows: Rows, costs: list[int], at: int, _: object, to: int | None
    ) -> list[SentRows]:
        """Put rows, for which there is room, into the batches of their partitions: all of them, or none."""
        written = 0
        futures: list[SentRows] = []
        try:
            partitions = self._partitions(topic, rows.keys, to)
            rows, refusal = self._without_too_large(topic, rows, costs, at)
            groups: dict[int, list[int]] = {}
            for row, partition in enumerate(partitions[: len(rows.values)]):
                groups.setdefault(partition, []).append(row)
            self._join_transaction(topic, groups)
            for partition, places in groups.items():
                some = rows if len(groups) == 1 else rows.pick(places)
                for future, size in self._append(TopicPartition(topic, partition), some):
                    written += size
                    futures.append(future)
        finally:
            self._room.give(sum(costs) - written)
        if refusal is not None:
            raise _Stopped(refusal, len(rows.values), futures)
        return futures

    def _partitions(self, topic: str, keys: Sequence[bytes | None], to: int | None) -> list[int]:
        metadata = self._producer._metadata
        if metadata.partitions_for_topic(topic) is None:
            self._producer._wait_on_metadata(topic, self._producer.config["max_block_ms"])
        every = sorted(metadata.partitions_for_topic(topic) or ())
        if not every:
            raise kafka_errors.KafkaTimeoutError(f"topic {topic} has no partitions, or was deleted")
        if to is not None:
            if to not in every:
                raise ValueError(f"topic {topic} has no partition {to}")
            return [to] * len(keys)
        return choose(keys, every, sorted(metadata.available_partitions_for_topic(topic) or ()))

    def _without_too_large(self, topic: str, rows: Rows, costs: list[int], at: int) -> tuple[Rows, Any]:
        """The rows before the first that no request may hold, and the error for that one, or None."""
        limit = self._producer.config["max_request_size"]
        # 61 bytes of a batch's header and 21 of a record's are what kafka-python's own estimate adds.
        for row, cost in enumerate(costs) if max(costs) + 82 > limit else ():
            if cost + 82 > limit:
                size = self._producer._estimate_size_in_bytes(rows.keys[row], rows.values[row], [])
                size += 0 if rows.headers is None else len(rows.headers[row]) - 1
                if size > limit:
                    text = f"topic {topic}, row {at + row}: {size} bytes, of which max_request_size allows {limit}"
                    return rows.part(0, row), kafka_errors.MessageSizeTooLargeError(text)
        return rows, None

    def _join_transaction(self, topic: str, partitions: Iterable[int]) -> None:
        manager = self._producer._transaction_manager
        if manager is not None and manager.is_transactional():
            for partition in partitions:
                manager.maybe_add_partition_to_transaction(TopicPartition(topic, partition))

    def _append(self, partition: Any, rows: Rows) -> list[tuple[SentRows, int]]:
        """Fill the partition's newest batch and as many new ones as are needed."""
        accumulator = self._producer._accumulator
        config = accumulator.config
        done: list[tuple[SentRows, int]] = []
        start, now = 0, time.monotonic()
        accumulator._appends_in_progress.increment()
        try:
            while start < len(rows.values):
                with accumulator._tp_lock(partition):
                    if accumulator._closed:
                        raise kafka_errors.IllegalStateError("RecordAccumulator is closed")
                    batches = accumulator._batches[partition]
                    fresh = False
                    count = size = largest = 0
                    if batches:
                        batch = batches[-1]
                        count, size, largest = fill(batch.records, rows, start)
                    if not count:
                        fresh = True
                        records = MemoryRecordsBuilder(2, config["compression_attrs"], config["batch_size"])
                        batch = ProducerBatch(partition, records, now=now)
                        count, size, largest = fill(records, rows, start)
                    future = SentRows(partition, count)
                    future.holds(self._room, size)
                    future.bind(batch.produce_future, batch.records.next_offset() - count)
                    batch._record_futures.extend([future] * count)
                    batch.last_append = now
                    batch.max_record_size = max(batch.max_record_size, largest)
                    if fresh:
                        batches.append(batch)
                        accumulator._incomplete.add(batch)
                done.append((future, size))
                start += count
                if fresh:
                    self._producer._sender.wakeup()
        finally:
            accumulator._appends_in_progress.decrement()
        return done

    def _watch_splits(self) -> None:
        """Let kafka-python's own `flush`, when it waits for a batch that is cut in two, end as it does for its rows."""
        accumulator = self._producer._accumulator
        split = accumulator.split_and_reenqueue

        def watched(batch: Any, now: float | None = None) -> Any:
            count = split(batch, now=now)
            batch.produce_future._latch.set()
            return count

        accumulator.split_and_reenqueue = watched

    def _send_singly(
        self, topic: str, rows: Rows, costs: list[int], at: int, headers: Any, to: int | None
    ) -> list[Any]:
        """Hand over rows through the producer's own `send`."""
        futures: list[Any] = []
        times, given = rows.timestamps, 0
        try:
            for row, (key, value) in enumerate(zip(rows.keys, rows.values, strict=True)):
                own = None if headers is None else list(headers[at + row] or ())
                moment = times if isinstance(times, int) else times[row]
                future = self._producer.send(topic, value, key, own, to, moment)
                given += costs[row]
                future.add_both(lambda size, _: self._room.give(size), costs[row])
                futures.append(future)
        except kafka_errors.KafkaError as error:
            raise _Stopped(error, len(futures), futures) from None
        finally:
            self._room.give(sum(costs) - given)
        return futures


def _checked(
    topic: str,
    keys: Sequence[bytes | None],
    values: Sequence[bytes | None],
    timestamp_ms: int | Sequence[int] | None,
    headers: Sequence[Headers | None] | None,
) -> Rows:
    """The rows as they will be encoded; raises for what `send` would refuse, before anything is taken."""
    times = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
    count = len(values)
    for name, column in (("keys", keys), ("timestamps", times), ("headers", headers)):
        if isinstance(column, Sequence) and len(column) != count:
            raise ValueError(f"topic {topic}: {count} values, but {len(column)} {name}")
    for name, column in (("key", keys), ("value", values)):
        if wrong := set(map(type, column)) - {bytes, type(None)}:
            raise TypeError(f"topic {topic}: a {name} is bytes or None, not {wrong.pop().__name__}")
    if None in values and any(key is None for key, value in zip(keys, values, strict=True) if value is None):
        raise ValueError(f"topic {topic}: a row has neither key nor value")
    if wrong_times := [at for at in ([times] if isinstance(times, int) else times) if not -1 <= at < _TIME_LIMIT]:
        raise ValueError(f"topic {topic}: {wrong_times[0]} is no time in milliseconds")
    for header in headers or ():
        for item in header or ():
            if not (len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], bytes)):
                raise TypeError(f"topic {topic}: a header is (str, bytes), not {item!r}")
    return Rows(keys, values, times, None if headers is None else [encode_headers(header) for header in headers])
