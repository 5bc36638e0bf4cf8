"""Puts bulk decoding into a consumer, where a check and a self-test say that it does what the public path does."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import kafka
from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.protocol.consumer import IsolationLevel
from kafka.record.memory_records import MemoryRecords

from daemon.streams.bulk import wire
from daemon.streams.bulk.read import BulkRecords

_TP = TopicPartition("self-test", 0)
_OPTIONS = (
    "fetch_offset tp records key_deserializer value_deserializer check_crcs isolation_level aborted_transactions "
    "metric_aggregator on_drain"
)


def install(consumer: Any) -> str | None:
    """Make ``consumer.poll`` return chunks; None when done, else why it returns records as before."""
    reason = usable()
    if reason is None and not isinstance(getattr(consumer, "_fetcher", None), Fetcher):
        reason = "the consumer has no fetcher of kafka-python's where one is expected"
    if reason is None and any(consumer.config[name] for name in ("key_deserializer", "value_deserializer")):
        reason = "the consumer has deserialisers, which work record by record"
    if reason is None:
        consumer._fetcher.PartitionRecords = BulkRecords
    return reason


@cache
def usable() -> str | None:
    """None where bulk decoding does what the public path does, else the reason. Tried once; takes milliseconds."""
    try:
        return _misfit() or _self_test()
    except Exception as error:
        return f"its self-test failed: {type(error).__name__}: {error}"


def _misfit() -> str | None:
    version = tuple(map(int, re.findall(r"\d+", kafka.__version__)[:3]))
    if not (3, 0, 12) <= version < (4,):
        return f"kafka-python is {kafka.__version__}; 3.0.12 or newer, but not 4, is known to this code"
    options = list(inspect.signature(Fetcher.PartitionRecords).parameters)
    if options != _OPTIONS.split():
        return f"kafka-python {kafka.__version__} makes PartitionRecords of {', '.join(options)}"
    if "PartitionRecords" not in Fetcher._parse_fetched_data.__code__.co_names:
        return f"kafka-python {kafka.__version__} does not read fetches by Fetcher.PartitionRecords"
    return None


def _self_test() -> str | None:
    """Decode batches of every kind by both paths; None when no field differs."""
    row = wire.Row
    rows = [
        row(3 * number, 1_000 + 40 * number, None if number % 3 else b"key" * number, bytes([number]) * 90, [])
        for number in range(25)
    ]
    odd = [row(0, 5, b"", b"", []), row(3, -7, b"k", None, [("a", None), ("ä", b"v")]), row(200, 9, None, b"x", [])]
    parts = [wire.batch(odd, last_delta=300, epoch=3)]
    offset = 301
    for codec in wire.codecs():
        for producer, chosen, append_ms in ((-1, rows, None), (7, rows, 99), (8, odd, None), (-1, rows[:1], None)):
            made: dict[str, Any] = {
                "codec": codec,
                "producer": producer,
                "transactional": producer > 0,
                "append_ms": append_ms,
            }
            parts.append(wire.batch(chosen, base_offset=offset, epoch=4, **made))
            offset += 1_000
        for producer in (7, 8):
            parts.append(wire.marker(offset, producer, abort=producer == 8, epoch=5))
            offset += 1
    aborted = [SimpleNamespace(producer_id=8, first_offset=2_301)]
    whole = b"".join(parts)
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    committed, uncommitted = IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED
    tries = (
        (whole, committed, 30),
        (whole, uncommitted, 10_000),
        (whole[:-20], uncommitted, 10_000),
        (bytes(damaged), committed, 10_000),
    )
    for data, level, take in tries:
        options = {"isolation_level": level, "aborted_transactions": aborted}
        public = history(Fetcher.PartitionRecords, data, take, 20, **options)
        bulk = history(BulkRecords, data, take, 20, **options)
        if public != bulk:
            at = next((at for at, (a, b) in enumerate(zip(public, bulk, strict=False)) if a != b), "the end")
            return f"its self-test found a difference at step {at} of {len(public)}, {take} rows a step"
    return _polled(whole)


def history(kind: Any, data: bytes, take: int | Sequence[int], fetch_offset: int = 0, **options: Any) -> list[Any]:
    """What a ``PartitionRecords`` class gives of a fetched partition, step by step, to its end or its first error.

    Args:
        kind: the class, ``Fetcher.PartitionRecords`` or `BulkRecords`.
        data: the partition's record batches.
        take: rows a step, or those of each step in turn.
        fetch_offset: where the fetch was to begin.
        options: of ``PartitionRecords``.

    Returns:
        Of each step the records (old formats without their checksum) or the error, and the state after it.
    """
    steps: list[Any] = []
    sizes = deque([take] if isinstance(take, int) else take)
    part: Any = None
    while part is None or part:
        found: Any
        try:
            if part is None:
                part = kind(fetch_offset, _TP, MemoryRecords(data), **options)
            found = part.take(sizes[0])
            sizes.rotate(-1)
            if kind is BulkRecords:
                found = [record for chunk in found for record in chunk.records()]
            found = [record._replace(checksum=None) for record in found]
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        state = None
        if part is not None:
            state = part.next_fetch_offset, part.leader_epoch, part.records_read, part.bytes_read
        ended = isinstance(found, str)
        steps.append((found, state, None if ended else bool(part)))
        if ended:
            break
    return steps


def _polled(data: bytes) -> str | None:
    """Whether the client's own bookkeeping takes chunks: it counts rows, and moves the position behind them."""
    position = SimpleNamespace(position=SimpleNamespace(offset=0), highwater=None)
    subscriptions = SimpleNamespace(is_assigned=lambda _: True, is_fetchable=lambda _: True, assignment={_TP: position})
    drained: dict[TopicPartition, list[Any]] = defaultdict(list)
    fetcher = SimpleNamespace(_subscriptions=subscriptions, _sensors=None)
    counted = Fetcher._append(fetcher, drained, BulkRecords(0, _TP, MemoryRecords(data)), 50, True)
    if not (
        counted == sum(map(len, drained[_TP])) == 50 and position.position.offset == drained[_TP][-1].offsets[-1] + 1
    ):
        return f"kafka-python {kafka.__version__} does not count the rows of a chunk"
    return None
