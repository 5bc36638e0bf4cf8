"""The codecs of records that are maps: JSON and MessagePack."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import msgspec

from daemon.streams.codec_base import FAILURES, MAX_BYTES, Codec, Row
from daemon.streams.fields import Number, RefusedError, Time, flatten, identity, label, seconds


class _MapCodec(Codec):
    """Maps with the fields id, x, y, ts: a typed decoder takes what is well formed, an untyped one says what is not.

    Each record has a decoder call of its own. Joining JSON records to decode many at once is not safe: a hostile one
    can close a list, or open one, and so split or swallow its neighbours (``decode_lines`` too takes several objects
    on a line, and objects that run over lines).
    """

    _typed: Callable[[bytes], Any]
    _untyped: Callable[[bytes], Any]

    def _record(self, *also: Any) -> Any:
        """The struct for the typed decoder: x is flat or nested numbers, or one of the types ``also``."""
        x: Any = list[float]
        for _ in self.input_shape[1:]:
            x = list[float | x]
        for other in also:
            x = other | x
        fields: list[tuple[str, Any, Any]] = [("x", x, msgspec.NODEFAULT)]
        fields += [("id", str | int | None, None), ("y", Number | None, None), ("ts", Time | None, None)]
        # A record can't be part of a cycle, so the collector need not look at hundreds of them per batch.
        return msgspec.defstruct("Record", fields, gc=False)

    def _read(self, value: bytes) -> Row:
        record = self._typed(value)
        return record.id, self._typed_numbers(record.x), record.y, record.ts

    def _typed_numbers(self, x: Any) -> bytes:
        # The type has settled that x is floats, nested at most as deep as the shape: a float where a list belongs has
        # no length, and a list where a float belongs can't be packed.
        if x and type(x[0]) is list:
            for width in self.input_shape[1:]:
                if set(map(len, x)) != {width}:
                    raise ValueError("ragged")
                x = list(chain.from_iterable(x))
        return self.pack(*x)

    def _open(self, value: bytes) -> tuple[str | None, Any]:
        try:
            fields = self._untyped(value)
        except FAILURES as error:
            raise RefusedError("undecodable", f"not {self.name}: {error}") from None
        if not isinstance(fields, dict):
            raise RefusedError("undecodable", f"the record is a {type(fields).__name__}; give a map with id and x")
        return identity(fields.get("id")), fields

    def _reread(self, content: Any) -> tuple[bytes, int | float | None, float | None]:
        try:
            x = self._numbers(content.get("x"))
        except OverflowError as error:
            raise RefusedError("out_of_range", f"x: {error}") from None
        return x, label(content.get("y")), seconds(content.get("ts"))

    def _numbers(self, x: Any) -> bytes:
        return self.pack(*flatten(x, self.input_shape))


class JsonCodec(_MapCodec):
    """Records as JSON maps. NaN and Infinity, which Python writes into JSON, and null in ``x`` count as not finite."""

    name = "json"

    def __init__(self, input_shape: Sequence[int], *, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(input_shape, max_bytes=max_bytes)
        self._typed = msgspec.json.Decoder(self._record()).decode

    @staticmethod
    def _untyped(value: bytes) -> Any:
        # Decoded here, because json.loads would guess UTF-16 and UTF-32 from bytes.
        return json.loads(value.decode())


class MsgpackCodec(_MapCodec):
    """Records as MessagePack maps; ``x`` is numbers, or a bin of little-endian float32 in row-major order."""

    name = "msgpack"

    def __init__(self, input_shape: Sequence[int], *, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(input_shape, max_bytes=max_bytes)
        self._typed = msgspec.msgpack.Decoder(self._record(bytes)).decode
        self._untyped = msgspec.msgpack.decode

    def _numbers(self, x: Any) -> bytes:
        return self._bin(x) if isinstance(x, bytes) else super()._numbers(x)

    def _typed_numbers(self, x: Any) -> bytes:
        return self._bin(x) if type(x) is bytes else super()._typed_numbers(x)
