"""What every codec does: each record becomes one valid row, one invalid row or one dead letter."""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar

import numpy as np

from daemon.records import F32, Batch, DeadLetter, RawBatch
from daemon.streams.fields import RefusedError

MAX_BYTES = 8 << 20

# What decoders say about a record: msgspec a ValueError (DecodeError, UnicodeDecodeError), a RecursionError for deep
# nesting; struct its own error for a wrong count or a nested list, OverflowError beyond float32.
FAILURES = (ValueError, TypeError, RecursionError, OverflowError, struct.error)


# One record: id, x as little-endian float32, label, time. Decoders leave id an integer and time a datetime.
Row = tuple[str | int | None, bytes, int | float | None, float | datetime | None]


class Codec(ABC):
    """Decodes records of one wire format into float32 rows of ``input_shape`` (without the batch axis).

    Records longer than ``max_bytes`` are refused unread.
    """

    name: ClassVar[str]

    def __init__(self, input_shape: Sequence[int], *, max_bytes: int = MAX_BYTES) -> None:
        self.input_shape = tuple(input_shape)
        if not self.input_shape or min(self.input_shape) < 1:
            raise ValueError(f"input_shape is {self.input_shape}; give at least one axis, each of length 1 or more")
        self.size = math.prod(self.input_shape)
        self.max_bytes = max_bytes
        self.pack = struct.Struct(f"<{self.size}f").pack
        """Bytes of one row's numbers; struct.error for a wrong count, OverflowError beyond float32."""
        self._nbytes = 4 * self.size

    def decode(self, raw: RawBatch) -> Batch:
        """Decode every record of ``raw`` into a valid row, an invalid row or a dead letter. Never raises for bytes."""
        if raw.batch is not None:
            return raw.batch
        parts: list[bytes] = []
        ids: list[str] = []
        y: list[float | int | None] = []
        times: list[float] = []
        rows: list[int] = []
        invalid: dict[int, str] = {}
        dead: list[DeadLetter] = []
        read, limit, isfinite = self._read, self.max_bytes, math.isfinite
        for row, value in enumerate(raw.unpack()):
            try:
                if value is None or len(value) > limit:
                    raise ValueError("not to be read")
                name, x, number, ts = read(value)
            except FAILURES:
                try:
                    (name, x, number, ts), reason = self._explain(value, raw.keys[row] if raw.names_by_key else None)
                except RefusedError as refused:
                    dead.append(raw.dead_letter(row, refused.reason, refused.detail))
                    continue
                if reason is not None:
                    invalid[len(ids)] = reason
            if type(name) is not str:
                name = _name(raw, row) if name is None else str(name)
            if not isinstance(ts, float):
                ts = raw.times_s[row] if ts is None else ts.timestamp()
            ids.append(name)
            parts.append(x)
            y.append(number if number is None or isfinite(number) else None)
            times.append(ts if isfinite(ts) else raw.times_s[row])
            rows.append(row)
        return assemble(self.stack(parts), ids, y, times, rows=rows, invalid=invalid, dead=dead)

    @abstractmethod
    def _read(self, value: bytes) -> Row:
        """One well-formed record; raises one of FAILURES for any other."""

    @abstractmethod
    def _open(self, value: bytes) -> tuple[str | None, Any]:
        """The id of a record that ``_read`` fails on, and its content; RefusedError when neither is to be had."""

    @abstractmethod
    def _reread(self, content: Any) -> tuple[bytes, int | float | None, float | None]:
        """x, label and time of what ``_open`` found; RefusedError when one of them can't be used."""

    def _explain(self, value: bytes | None, key: bytes | None) -> tuple[Row, str | None]:
        """What a record is that ``_read`` fails on, and why it is invalid (None: it is not, after all).

        Raises:
            RefusedError: it can't be answered.
        """
        if value is None:
            raise RefusedError("tombstone", "the record has no value")
        if not value:
            raise RefusedError("empty", "the value has no bytes")
        if len(value) > self.max_bytes:
            raise RefusedError("too_large", f"{len(value)} bytes; at most {self.max_bytes} are read")
        name, content = self._open(value)
        try:
            return (name, *self._reread(content)), None
        except RefusedError as refused:
            if name is None and _key_text(key) is None and refused.reason != "out_of_range":
                raise  # nobody's, and not even numbers: most likely not meant for this stream
            return (name, bytes(self._nbytes), None, None), refused.reason

    def stack(self, parts: Sequence[bytes]) -> F32:
        """Rows (B, *input_shape) from what ``pack`` gave for each."""
        # A bytearray, because torch wants memory that may be written to.
        flat = np.frombuffer(bytearray().join(parts), dtype="<f4").astype(np.float32, copy=False)
        return flat.reshape(len(parts), *self.input_shape)

    def _bin(self, x: bytes) -> bytes:
        if len(x) != self._nbytes:
            shape = list(self.input_shape)
            raise RefusedError("wrong_shape", f"{len(x)} bytes; float32 of shape {shape} takes {self._nbytes}")
        return x


class RawCodec(Codec):
    """The value is the input: little-endian float32 in row-major order. The id is the record's key (UTF-8)."""

    name = "raw"

    def decode(self, raw: RawBatch) -> Batch:
        """Decode every record of ``raw``; a batch in which each has the right length is one copy."""
        fixed = raw.fixed(self._nbytes)
        if fixed is not None:
            x = fixed.reshape(-1).view("<f4").astype(np.float32, copy=False).reshape(len(fixed), *self.input_shape)
        else:
            values = [value for value in raw.unpack() if value is not None and len(value) == self._nbytes]
            if raw.batch is not None or len(values) < len(raw):
                return super().decode(raw)
            x = self.stack(values)
        return assemble(x, _names(raw), [None] * len(x), raw.times_s)

    def _read(self, value: bytes) -> Row:
        return None, self._bin(value), None, None

    def _open(self, value: bytes) -> tuple[str | None, Any]:
        return None, value

    def _reread(self, content: Any) -> tuple[bytes, int | float | None, float | None]:
        return self._bin(content), None, None


def assemble(
    x: F32,
    ids: list[str],
    y: list[float | int | None],
    times_s: Sequence[float],
    *,
    rows: list[int] | None = None,
    invalid: dict[int, str] | None = None,
    dead: list[DeadLetter] | None = None,
) -> Batch:
    """A batch from columns. Rows that are not finite become invalid, and zero.

    Args:
        x: (B, *input_shape) float32, writable; it becomes the batch's own.
        ids: one per row.
        y: labels that came inside, None where there is none.
        times_s: seconds since the epoch.
        rows: each row's index in its RawBatch; by default the row itself.
        invalid: rows known to be invalid, with the reason; their x is zero already.
        dead: records that have no row.
    """
    invalid = {} if invalid is None else invalid
    finite = np.isfinite(x)
    if not finite.all():
        for row in np.flatnonzero(~finite.reshape(len(x), -1).all(axis=1)).tolist():
            invalid[row] = "not_finite"
            x[row] = 0.0
    valid = np.ones(len(x), dtype=np.bool_)
    valid[list(invalid)] = False
    times = np.array(times_s, dtype=np.float64)
    return Batch(ids, x, y, times, valid, list(range(len(x))) if rows is None else rows, invalid, dead or [])


def _name(raw: RawBatch, row: int) -> str:
    """What a record is called that has no id of its own."""
    return (raw.names_by_key and _key_text(raw.keys[row])) or _origin(raw, row)


def _names(raw: RawBatch) -> list[str]:
    """`_name` of every record."""
    if raw.names_by_key:
        try:
            return [key.decode() if key else _origin(raw, row) for row, key in enumerate(raw.keys)]
        except UnicodeDecodeError:
            pass  # one of them is no text
    return [_name(raw, row) for row in range(len(raw))]


def _origin(raw: RawBatch, row: int) -> str:
    return f"{raw.partitions[row]}:{raw.offsets[row]}"


def _key_text(key: bytes | None) -> str | None:
    try:
        return key.decode() if key else None
    except UnicodeDecodeError:
        return None
