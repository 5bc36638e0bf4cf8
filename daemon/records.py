"""What travels through the loop: raw records in columns, decoded batches, labels, dead letters."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bools = NDArray[np.bool_]

Header = tuple[str, bytes | None]
"""One header of a record: name and value."""

RowHeaders = Sequence[Sequence[tuple[str, bytes]] | None]
"""Headers of rows to be sent, one item a row; None: it has none."""

Positions = dict[str, int]
"""Next offset to read per partition, for example ``{"sensors/0": 4711}`` or ``{"file:/data/in.jsonl": 12}``."""


class Chunk(Protocol):
    """Rows of one partition as they were fetched: columns, and payloads that are cut out when asked for."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(rows,)."""

    @property
    def timestamps_ms(self) -> NDArray[np.int64]:
        """(rows,) milliseconds since the epoch; -1: none."""

    @property
    def keys(self) -> list[bytes | None]:
        """One per row."""

    @property
    def values(self) -> list[bytes | None]:
        """One per row."""

    @property
    def headers(self) -> Mapping[int, Sequence[Header]]:
        """Of the rows that have any."""

    def fixed(self, length: int) -> NDArray[np.uint8] | None:
        """The payloads as (rows, length) bytes, a copy; None where one has another length."""


@dataclass(slots=True)
class RawBatch:
    """Records as a source gave them, in columns; row ``i`` is record ``i``.

    The undecoded payloads are in ``values``, or still in ``chunks`` (`unpack` and `fixed` know both), or there are none
    (simulator, npz, CSV): ``batch`` is decoded already.
    """

    values: list[bytes | None] = field(default_factory=list)
    keys: list[bytes | None] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """Time of each record in seconds since the epoch, as the stream carries it."""
    partitions: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    headers: dict[tuple[str, int], Sequence[Header]] = field(default_factory=dict)
    """Headers by partition and offset, of those records that have any; a record that dies takes them along."""
    names_by_key: bool = True
    """Whether a record without an id is named by its key, and not by where it lies."""
    chunks: list[Chunk] = field(default_factory=list)
    """Rows whose payloads are not in ``values`` yet; `unpack` puts them there."""
    batch: Batch | None = None
    arrived: float = 0.0
    """``time.monotonic()`` at which the oldest row came in."""

    def __len__(self) -> int:
        return len(self.offsets)

    def append(self, partition: str, chunk: Chunk) -> None:
        """Add rows of one partition, their payloads still as they were fetched."""
        times_ms = chunk.timestamps_ms
        if (times_ms < 0).any():  # the producer gave none
            times_ms = np.where(times_ms < 0, time.time() * 1000, times_ms)
        self.chunks.append(chunk)
        self.keys += chunk.keys
        self.times_s += (times_ms / 1000).tolist()
        offsets = chunk.offsets.tolist()
        self.offsets += offsets
        self.partitions += [partition] * len(offsets)
        if chunk.headers:
            self.headers |= {(partition, offsets[row]): found for row, found in chunk.headers.items()}

    def unpack(self) -> list[bytes | None]:
        """``values``, complete."""
        for chunk in self.chunks:
            self.values += chunk.values
        self.chunks = []
        return self.values

    def fixed(self, length: int) -> NDArray[np.uint8] | None:
        """The payloads as (rows, length) bytes, writable; None unless all are packed and of that length."""
        if self.values or not self.chunks:
            return None
        parts = []
        for chunk in self.chunks:
            part = chunk.fixed(length)
            if part is None:
                return None
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def next_positions(self) -> Positions:
        """One past the last offset per partition (rows of a partition are in order)."""
        last = dict(zip(self.partitions, self.offsets, strict=True))
        return {partition: offset + 1 for partition, offset in last.items()}

    def dead_letter(self, row: int, reason: str, detail: str) -> DeadLetter:
        """Row ``row`` as a record that can't be answered."""
        origin = self.partitions[row], self.offsets[row]
        headers = self.headers.get(origin, ()) if self.headers else ()
        return DeadLetter(
            *origin, self.keys[row], self.unpack()[row], reason, detail, headers, float(self.times_s[row])
        )


@lru_cache(maxsize=65_536)
def _slot(key: bytes | None) -> int:
    return 0 if key is None else int.from_bytes(blake2b(key, digest_size=8).digest()) >> 1


def slots_of(keys: Sequence[bytes | None]) -> NDArray[np.int64]:
    """Return the slot of each record: a hash of its key, so that it is the same after a restart; 0 without a key."""
    return np.fromiter(map(_slot, keys), np.int64, len(keys))


@dataclass(slots=True)
class DeadLetter:
    """A record that can't be answered, with where it came from and why."""

    partition: str
    offset: int
    key: bytes | None
    value: bytes | None
    reason: str
    """One of ``codecs.REASONS``: the metric's label."""
    detail: str
    headers: Sequence[Header] = ()
    """The record's own, as it came."""
    time_s: float | None = None
    """Of the record, in seconds since the epoch."""


@dataclass(slots=True)
class Batch:
    """Decoded rows. ``x`` is (B, *input_shape) float32; row ``i`` of every column is the same record.

    ``rows[i]`` is the row's index in the ``RawBatch`` it came from. Rows with ``valid[i] == False`` have an id (so
    they are answered, as ``invalid_input``) and zeros in ``x``; ``invalid`` says why, by row.
    """

    ids: list[str]
    x: F32
    y: list[float | int | None]
    """A label that came inside the record, else None."""
    times_s: F64
    valid: Bools
    rows: list[int]
    invalid: dict[int, str] = field(default_factory=dict)
    dead: list[DeadLetter] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, other: Batch, offset: int) -> None:
        """Append ``other``, whose raw rows follow ``offset`` earlier ones."""
        self.invalid.update({len(self.ids) + row: reason for row, reason in other.invalid.items()})
        self.ids += other.ids
        self.x = np.concatenate((self.x, other.x))
        self.y += other.y
        self.times_s = np.concatenate((self.times_s, other.times_s))
        self.valid = np.concatenate((self.valid, other.valid))
        self.rows += [row + offset for row in other.rows]
        self.dead += other.dead


@dataclass(slots=True)
class Labels:
    """Late labels in columns, in the order in which they came."""

    ids: list[str] = field(default_factory=list)
    y: list[float | int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)
