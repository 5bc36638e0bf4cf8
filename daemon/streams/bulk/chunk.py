"""Rows of a fetched partition in columns, as views of the fetched bytes: no Python object for a row until asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from kafka import TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from numpy.typing import NDArray

I64 = NDArray[np.int64]
Headers = list[tuple[str, bytes | None]]

NO_TIMESTAMP = -1
_NO_TYPE = -1
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1


@dataclass(slots=True)
class Block:
    """Decoded rows of one or more record batches. All arrays are (rows,) but those that say otherwise."""

    data: bytes
    """What the spans below point into."""
    offsets: I64
    timestamps_ms: I64
    """Milliseconds since the epoch, `NO_TIMESTAMP` where the record has none."""
    sizes: I64
    """Bytes of each record on the wire without its length prefix, as the client's fairness counts them."""
    key_at: I64
    key_sizes: I64
    """-1: no key."""
    value_at: I64
    value_sizes: I64
    """-1: no value, a tombstone."""
    batch_of: I64
    """Each row's batch: an index into the two below."""
    epochs: list[int]
    """(batches,) leader epoch."""
    kinds: list[int]
    """(batches,) timestamp type: 0 the producer's, 1 the broker's, -1 none."""
    headers: dict[int, Headers] = field(default_factory=dict)
    """Rows that have headers."""
    first: int = 0
    """Rows before this one lie before the offset that was asked for."""

    def __len__(self) -> int:
        return len(self.offsets)

    def epoch(self, row: int) -> int:
        """Leader epoch of that row's batch."""
        return self.epochs[int(self.batch_of[row])]

    @classmethod
    def of(cls, records: Sequence[Any], epoch: int) -> Block:
        """Pack records of one batch that kafka-python decoded itself. Numbers are clamped to 64 bits."""
        parts: list[bytes] = []
        sizes: list[int] = []
        for record in records:
            for content in (record.key, record.value):
                if content is None:
                    sizes.append(-1)
                else:
                    parts.append(content)
                    sizes.append(len(content))
        lengths = np.array(sizes, np.int64)
        taken = np.maximum(lengths, 0)
        at = taken.cumsum() - taken
        stamps = [NO_TIMESTAMP if record.timestamp is None else record.timestamp for record in records]
        kind = records[0].timestamp_type
        return cls(
            data=b"".join(parts),
            offsets=_clamped([record.offset for record in records]),
            timestamps_ms=_clamped(stamps),
            sizes=_clamped([record.size_in_bytes for record in records]),
            key_at=at[::2],
            key_sizes=lengths[::2],
            value_at=at[1::2],
            value_sizes=lengths[1::2],
            batch_of=np.zeros(len(records), np.int64),
            epochs=[epoch],
            kinds=[_NO_TYPE if kind is None else kind],
            headers={row: record.headers for row, record in enumerate(records) if record.headers},
        )


class Chunk:
    """Rows of one partition, in order. It holds on to the fetched bytes for as long as it lives."""

    def __init__(self, topic_partition: TopicPartition, block: Block, start: int, stop: int) -> None:
        self.topic_partition = topic_partition
        self._block = block
        self._start = start
        self._rows = slice(start, stop)
        self.offsets: I64 = block.offsets[self._rows]
        self.timestamps_ms: I64 = block.timestamps_ms[self._rows]
        """Milliseconds since the epoch; -1: the record has none."""

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def keys(self) -> list[bytes | None]:
        """One key per row, made at the first use."""
        return _pieces(self._block.data, self._block.key_at[self._rows], self._block.key_sizes[self._rows])

    @cached_property
    def values(self) -> list[bytes | None]:
        """One value per row, made at the first use."""
        return _pieces(self._block.data, self._block.value_at[self._rows], self._block.value_sizes[self._rows])

    @cached_property
    def headers(self) -> dict[int, Headers]:
        """Rows that have headers, by row of this chunk."""
        rows = self._block.headers
        return {row - self._start: rows[row] for row in range(*self._rows.indices(len(self._block))) if row in rows}

    @property
    def key_sizes(self) -> I64:
        """Bytes of each key, -1 without one."""
        return self._block.key_sizes[self._rows]

    @property
    def value_sizes(self) -> I64:
        """Bytes of each value, -1 for a tombstone."""
        return self._block.value_sizes[self._rows]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows on the wire, keys and headers with them."""
        return int(self._block.sizes[self._rows].sum())

    def fixed(self, length: int) -> NDArray[np.uint8] | None:
        """The values as (rows, length) bytes, a copy; None where one of them has another length or is a tombstone."""
        if not (self.value_sizes == length).all():
            return None
        at = self._block.value_at[self._rows]
        return _gather(self._block.data, at, length).view(np.uint8).reshape(len(at), length)

    def records(self) -> list[Any]:
        """The rows as kafka-python's ``ConsumerRecord``; an old format's checksum is not kept."""
        block, tp, found = self._block, self.topic_partition, []
        columns = zip(self.offsets.tolist(), self.timestamps_ms.tolist(), self.keys, self.values, strict=True)
        for row, (offset, stamp, key, value) in enumerate(columns):
            kind = block.kinds[block.batch_of[self._start + row]]
            headers = self.headers.get(row, [])
            header_size = sum(len(name.encode()) + len(content or b"") for name, content in headers) if headers else -1
            found.append(
                ConsumerRecord(
                    topic=tp.topic,
                    partition=tp.partition,
                    leader_epoch=block.epoch(self._start + row),
                    offset=offset,
                    timestamp=None if kind == _NO_TYPE else stamp,
                    timestamp_type=None if kind == _NO_TYPE else kind,
                    key=key,
                    value=value,
                    headers=headers,
                    checksum=None,
                    serialized_key_size=-1 if key is None else len(key),
                    serialized_value_size=-1 if value is None else len(value),
                    serialized_header_size=header_size,
                )
            )
        return found


class Taken:
    """What a partition gave at once: iterates over chunks, but is as long as their rows.

    ``KafkaConsumer.poll`` extends a list by the one and counts ``max_records`` by the other.
    """

    def __init__(self, chunks: list[Chunk]) -> None:
        self._chunks = chunks
        self._rows = sum(map(len, chunks))

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks)


def _clamped(numbers: list[int]) -> I64:
    try:
        return np.array(numbers, np.int64)
    except OverflowError:
        return np.array([min(max(number, _LOWEST), _HIGHEST) for number in numbers], np.int64)


def _gather(data: bytes, at: I64, length: int) -> NDArray[np.void]:
    """(rows,) items of ``length`` bytes, copied from where each begins."""
    if not length or not len(at):
        return np.zeros(len(at), np.dtype((np.void, length)))
    # A window at every byte: an item is copied as one block, wherever it begins.
    windows: NDArray[np.void] = np.ndarray(
        len(data) - length + 1, np.dtype((np.void, length)), buffer=data, strides=(1,)
    )
    return windows[at]


def _pieces(data: bytes, at: I64, sizes: I64) -> list[bytes | None]:
    if not len(at):
        return []
    shortest, longest = int(sizes.min()), int(sizes.max())
    if longest < 0:
        return [None] * len(at)
    if shortest == longest > 0:
        pieces: list[bytes | None] = _gather(data, at, longest).tolist()
        return pieces
    spans = zip(at.tolist(), (at + sizes).tolist(), strict=True)
    if shortest >= 0:
        return [data[start:end] for start, end in spans]
    return [data[start:end] if end >= start else None for start, end in spans]
