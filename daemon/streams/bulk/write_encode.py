"""Records of Kafka's format v2, written many at a time into one of kafka-python's batch builders.

A record is ``length | 0 | timestamp delta | offset delta | key | value | headers``, where every number is a zigzag
varint and key and value are preceded by their length, -1 for none (KIP-98; the Kafka protocol guide, "Record").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

Headers = Sequence[tuple[str, bytes | None]]

OVERHEAD = 36
"""Bytes that a record takes beyond key, value and headers, at most: five varints, of which the timestamp has 10 bytes,
one byte of attributes, one of the headers' count."""

_NONE = b"\x01"  # the varint of -1
_NO_HEADERS = b"\x00"


def varint(number: int) -> bytes:
    """A number of at most 64 bits, signed, as a zigzag varint: 1 to 10 bytes."""
    left = (number << 1) ^ (number >> 63)
    out = bytearray()
    while left > 0x7F:
        out.append(0x80 | (left & 0x7F))
        left >>= 7
    out.append(left)
    return bytes(out)


class _Varints(dict[int, bytes]):
    """The varints of 0 to 8191, the one- and two-byte ones; others are made when asked for."""

    def __missing__(self, number: int) -> bytes:
        return varint(number)


_VARINT = _Varints({number: varint(number) for number in range(8192)})


class Rows(NamedTuple):
    """Records of one partition, in order.

    Attributes:
        keys: one a record; None: no key.
        values: one a record; None: a tombstone.
        timestamps: milliseconds since 1970, one for all or one a record.
        headers: the encoded headers with their count, one a record; None: no record has any.
    """

    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    timestamps: int | Sequence[int]
    headers: Sequence[bytes] | None

    def pick(self, at: Sequence[int]) -> Rows:
        """The records at these places, in this order."""
        times, headers = self.timestamps, self.headers
        return Rows(
            [self.keys[row] for row in at],
            [self.values[row] for row in at],
            times if isinstance(times, int) else [times[row] for row in at],
            None if headers is None else [headers[row] for row in at],
        )

    def part(self, start: int, stop: int) -> Rows:
        """The records from ``start`` to before ``stop``."""
        if start == 0 and stop >= len(self.values):
            return self
        times, headers = self.timestamps, self.headers
        return Rows(
            self.keys[start:stop],
            self.values[start:stop],
            times if isinstance(times, int) else times[start:stop],
            None if headers is None else headers[start:stop],
        )

    def costs(self) -> list[int]:
        """Bytes that each record takes in a batch, at most."""
        sizes = [
            OVERHEAD + (len(key) if key else 0) + (len(value) if value else 0)
            for key, value in zip(self.keys, self.values, strict=True)
        ]
        if self.headers is None:
            return sizes
        return [size + len(header) for size, header in zip(sizes, self.headers, strict=True)]


def encode_headers(headers: Headers | None) -> bytes:
    """A record's headers with their count."""
    if not headers:
        return _NO_HEADERS
    pieces = [_VARINT[len(headers)]]
    for name, value in headers:
        text = name.encode("utf-8")
        pieces += (_VARINT[len(text)], text)
        pieces += (_NONE,) if value is None else (_VARINT[len(value)], value)
    return b"".join(pieces)


def fill(records: Any, rows: Rows, start: int) -> tuple[int, int, int]:
    """Write records into a batch until it is full.

    Args:
        records: kafka-python's ``MemoryRecordsBuilder`` of format 2; a closed one takes nothing, an empty one takes at
            least one record, whatever its size.
        rows: the records.
        start: the first of them to write.

    Returns:
        How many records were written, their bytes, and the bytes of the largest.
    """
    builder = records._builder
    if builder is None:  # it is on its way to the broker, or was, and is sent again as it stands
        return 0, 0, 0
    buffer = builder._buffer
    times, base = rows.timestamps, builder._first_timestamp
    empty = base is None
    if base is None:
        base = times if isinstance(times, int) else times[start]
    room = builder._batch_size - len(buffer)
    # More than this many can't fit: a record has at least 7 bytes. It bounds what the slices below copy.
    stop = start + max(room // 7, 0) + 1
    heads: Iterable[bytes]
    if isinstance(times, int):
        heads = repeat(b"\x00" + varint(times - base))
    else:
        heads = [b"\x00" + varint(time - base) for time in times[start:stop]]
    tails = repeat(_NO_HEADERS) if rows.headers is None else rows.headers[start:stop]
    offset = first = records._next_offset
    written = largest = 0
    pieces: list[bytes] = []
    numbers = _VARINT
    for head, key, value, tail in zip(heads, rows.keys[start:stop], rows.values[start:stop], tails, strict=False):
        body = head + numbers[offset]
        body += _NONE if key is None else numbers[len(key)] + key
        if value is None:
            body += _NONE
            value = b""
        else:
            body += numbers[len(value)]
        length = len(body) + len(value) + len(tail)
        prefix = numbers[length]
        size = length + len(prefix)
        if written + size > room and not (empty and offset == first):
            break
        pieces += (prefix, body, value, tail)
        written += size
        offset += 1
        if size > largest:
            largest = size
    taken = offset - first
    if taken:
        builder._buffer = bytearray().join((buffer, *pieces))  # one copy, where appending to the old one makes two
        latest = times if isinstance(times, int) else max(times[start : start + taken])
        builder._first_timestamp = base
        builder._max_timestamp = latest if empty else max(latest, builder._max_timestamp)
        builder._num_records += taken
        builder._last_offset = offset - 1
        records._next_offset = offset
    return taken, written, largest
