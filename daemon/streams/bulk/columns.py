"""Decodes the records of whole record batches (Kafka's message format 2) into columns, field by field for all rows.

A record is ``length attributes timestampDelta offsetDelta keyLength key valueLength value headersCount headers``; every
number but the attributes is a zigzag varint (KIP-98; the layout is in Kafka's documentation, "Record format"). Where a
record begins is known only after the one before it, so its length is read in a loop; all else is done by column.

What is not plainly well formed is refused, never guessed at: whoever asks then decodes it by the public path, which
fails, or succeeds, by its own rules.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from kafka.record.util import decode_varint
from numpy.typing import NDArray

from daemon.streams.bulk.chunk import I64, Block, Headers

LEAST_BYTES = 7
"""Of a record: each of its seven numbers takes one at least."""
_SIZE_BYTES = 5
"""Longest varint of a 32-bit number."""
_STAMP_BYTES = 8
"""Longest varint of a time difference that is read here: 56 bits, so that no sum leaves 64."""
_FAR = 1 << 62


class _RefusedError(Exception):
    """Not plainly well formed."""


class Span(NamedTuple):
    """Where the records of one batch lie, and what its header says of all of them."""

    start: int
    end: int
    rows: int
    base_offset: int
    first_timestamp_ms: int
    append_timestamp_ms: int | None
    """The broker's time, which then holds for every record."""
    epoch: int


def decode(data: bytes, spans: list[Span]) -> Block | None:
    """The rows of those batches, at least one each; None: not plainly well formed."""
    if any(abs(span.base_offset) > _FAR or abs(span.first_timestamp_ms) > _FAR for span in spans):
        return None
    try:
        return _decode(data, spans)
    except (_RefusedError, IndexError, ValueError, OverflowError):
        return None


def _decode(data: bytes, spans: list[Span]) -> Block:
    raw = np.frombuffer(data, np.uint8)
    ends = np.array(_ends(data, spans), np.int64)
    counts = np.array([span.rows for span in spans], np.int64)
    starts = np.empty_like(ends)
    starts[1:] = ends[:-1]
    starts[counts.cumsum() - counts] = [span.start for span in spans]

    sizes, at = _varints(raw, starts)
    if np.count_nonzero(at + sizes != ends) or np.count_nonzero(raw[at] > 0x7F):
        raise _RefusedError
    stamp_deltas, at = _varints(raw, at + 1, _STAMP_BYTES)
    offset_deltas, at = _varints(raw, at)
    key_sizes, key_at = _varints(raw, at)
    value_sizes, value_at = _varints(raw, key_at + np.maximum(key_sizes, 0))
    header_counts, at = _varints(raw, value_at + np.maximum(value_sizes, 0))
    headers: dict[int, Headers] = {}
    for row in header_counts.nonzero()[0].tolist():
        headers[row], at[row] = _headers(data, int(at[row]), int(header_counts[row]))
    # A length that runs past its record, or past its batch, ends elsewhere than the record's own length says.
    if np.count_nonzero(at != ends):
        raise _RefusedError

    batch_of = np.repeat(np.arange(len(spans)), counts)
    stamps = np.array([span.first_timestamp_ms for span in spans], np.int64)[batch_of] + stamp_deltas
    kinds = [int(span.append_timestamp_ms is not None) for span in spans]
    if any(kinds):
        appended = np.array([span.append_timestamp_ms or 0 for span in spans], np.int64)
        stamps = np.where(np.array(kinds, np.bool_)[batch_of], appended[batch_of], stamps)
    return Block(
        data=data,
        offsets=np.array([span.base_offset for span in spans], np.int64)[batch_of] + offset_deltas,
        timestamps_ms=stamps,
        sizes=sizes,
        key_at=key_at,
        key_sizes=np.maximum(key_sizes, -1),
        value_at=value_at,
        value_sizes=np.maximum(value_sizes, -1),
        batch_of=batch_of,
        epochs=[span.epoch for span in spans],
        kinds=kinds,
        headers=headers,
    )


def _ends(data: bytes, spans: list[Span]) -> list[int]:
    """One past each record. The only loop over rows in Python: about 0.1 µs for each."""
    ends: list[int] = []
    add = ends.append
    for pos, end, rows, *_ in spans:
        for _ in range(rows):
            low = data[pos]
            if low < 0x80:
                pos += 1 + (low >> 1)
            elif (high := data[pos + 1]) < 0x80:
                pos += 2 + ((low & 0x7F | high << 7) >> 1)
            else:
                size, pos = decode_varint(data, pos)
                pos += size
            add(pos)
        # Also bounds every number above: one far outside is never made an array of.
        if pos != end:
            raise _RefusedError
    return ends


def _varints(raw: NDArray[np.uint8], at: I64, longest: int = _SIZE_BYTES) -> tuple[I64, I64]:
    """The zigzag varints that begin at ``at``, and where each ends; IndexError past the data's end."""
    low = raw[at]
    value = low.astype(np.int64)
    at = at + 1
    rows = (low > 0x7F).nonzero()[0]
    if rows.size:
        value &= 0x7F
    shift = 7
    while rows.size:
        if shift >= 7 * longest:
            raise _RefusedError
        if rows.size == at.size:
            low = raw[at]
            value |= (low & 0x7F).astype(np.int64) << shift
            at += 1
            rows = (low > 0x7F).nonzero()[0]
        else:
            low = raw[at[rows]]
            value[rows] |= (low & 0x7F).astype(np.int64) << shift
            at[rows] += 1
            rows = rows[low > 0x7F]
        shift += 7
    return (value >> 1) ^ -(value & 1), at


def _headers(data: bytes, pos: int, count: int) -> tuple[Headers, int]:
    """One record's headers, and where they end; ValueError, IndexError or _RefusedError where they are malformed."""
    found: Headers = []
    if count < 0:
        raise _RefusedError
    for _ in range(count):
        size, pos = decode_varint(data, pos)
        if size < 0:
            raise _RefusedError
        name = data[pos : pos + size].decode()
        pos += size
        size, pos = decode_varint(data, pos)
        if size < 0:
            found.append((name, None))
        else:
            found.append((name, data[pos : pos + size]))
            pos += size
    return found, pos
