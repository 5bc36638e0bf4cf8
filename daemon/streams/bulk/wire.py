"""Record batches as a broker sends them, for trying out a decoder without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kafka.codec import has_gzip, has_lz4, has_snappy, has_zstd
from kafka.record.default_records import DefaultRecordBase, DefaultRecordBatchBuilder
from kafka.record.util import calc_crc32c

from daemon.streams.bulk.chunk import Headers

_HEADER = DefaultRecordBase.HEADER_STRUCT
_CODECS = ((1, has_gzip), (2, has_snappy), (3, has_lz4), (4, has_zstd))


class Row(NamedTuple):
    """One record to write."""

    offset_delta: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers


def codecs() -> list[int]:
    """Numbers of the compressions that can be had here, 0 (none) among them."""
    return [0, *(number for number, there in _CODECS if there())]


def batch(
    rows: Sequence[Row],
    *,
    base_offset: int = 0,
    codec: int = 0,
    epoch: int = 0,
    producer: int = -1,
    transactional: bool = False,
    append_ms: int | None = None,
    last_delta: int | None = None,
) -> bytes:
    """A batch of format 2. ``last_delta`` lies behind the last row where compaction took rows from the end."""
    builder = DefaultRecordBatchBuilder(2, codec, transactional, producer, 0, 0, 1 << 30)
    for row in rows:
        builder.append(row.offset_delta, row.timestamp_ms, row.key, row.value, row.headers)
    made = bytearray(builder.build())
    edits: dict[int, Any] = {0: base_offset, 2: epoch}
    if last_delta is not None:
        edits[6] = last_delta
    if append_ms is not None:
        edits |= {5: _HEADER.unpack_from(made)[5] | DefaultRecordBase.TIMESTAMP_TYPE_MASK, 8: append_ms}
    return edited(made, edits)


def marker(base_offset: int, producer: int, *, abort: bool, epoch: int = 0) -> bytes:
    """The control batch that ends a transaction."""
    key = (0).to_bytes(2) + int(not abort).to_bytes(2)
    made = batch(
        [Row(0, 0, key, bytes(6), [])], base_offset=base_offset, producer=producer, transactional=True, epoch=epoch
    )
    return edited(made, {5: DefaultRecordBase.TRANSACTIONAL_MASK | DefaultRecordBase.CONTROL_MASK})


def edited(made: bytes | bytearray, fields: dict[int, Any]) -> bytes:
    """The batch with other header fields, by their number in kafka-python's ``HEADER_STRUCT``, and a right checksum."""
    made = bytearray(made)
    header = list(_HEADER.unpack_from(made))
    for number, value in fields.items():
        header[number] = value
    header[4] = 0
    _HEADER.pack_into(made, 0, *header)
    header[4] = calc_crc32c(memoryview(made)[DefaultRecordBase.ATTRIBUTES_OFFSET :])
    _HEADER.pack_into(made, 0, *header)
    return bytes(made)
