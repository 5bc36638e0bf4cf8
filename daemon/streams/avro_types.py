"""Avro's binary encoding, one type at a time: a function that reads a value, and one that steps over it.

Source: the Avro specification 1.12, "Binary Encoding". Records are hostile some day, so every function takes the whole
value and a position, looks at no byte twice, and needs memory in proportion to the value alone. fastavro's own readers
(1.13.1) are not used for records: on what they skip they don't look for the end, so that an array that claims 2**40
floats runs for hours; a recursive schema and 20 kB nested by it overflow the C stack; a union's index may be negative.
They raise ValueError, IndexError (the value ends too early), struct.error or RecursionError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from daemon.streams.registry import SchemaError

Skip = Callable[[bytes, int], int]
"""(value, position) → the position behind."""
Read = Callable[[bytes, int], tuple[Any, int]]
"""(value, position) → what is there, and the position behind."""

WIDTHS = {"null": 0, "boolean": 1, "float": 4, "double": 8}
_LETTERS = {"float": "f", "double": "d"}
_PER_SECOND = {"timestamp-millis": 1e3, "timestamp-micros": 1e6, "timestamp-nanos": 1e9}
_NO_BYTES = ("decimal", "duration", "uuid", "big-decimal")
_NO_TIMES = ("date", "time-millis", "time-micros")


def long(data: bytes, at: int) -> tuple[int, int]:
    """An int or a long: zig-zag, seven bits a byte, the lowest first."""
    byte = data[at]
    at += 1
    if byte < 0x80:
        return (byte >> 1) ^ -(byte & 1), at
    value, shift = byte & 0x7F, 7
    while byte >= 0x80:
        if shift > 63:
            raise ValueError("a number of more than ten bytes")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
    if value >> 64:
        raise ValueError("a number of more than 64 bits")
    return (value >> 1) ^ -(value & 1), at


def sized(data: bytes, at: int) -> tuple[bytes, int]:
    """Bytes after their length."""
    size, at = long(data, at)
    return fixed(size, data, at)


def fixed(size: int, data: bytes, at: int) -> tuple[bytes, int]:
    """That many bytes."""
    if not 0 <= size <= len(data) - at:
        raise ValueError(f"{size} bytes claimed where {len(data) - at} are left")
    return data[at : at + size], at + size


def _block(data: bytes, at: int) -> tuple[int, int, int]:
    """The head of an array's or a map's next block: items, bytes (0: not said), the position behind."""
    count, at = long(data, at)
    if count >= 0:
        return count, 0, at
    size, at = long(data, at)
    if size < 0:
        raise ValueError(f"a block of {size} bytes")
    return -count, size, at


def kind_of(schema: Any) -> str:
    """The name of a schema's type, or of the named type that it refers to."""
    while isinstance(schema, dict):
        schema = schema["type"]
    return "union" if isinstance(schema, list) else str(schema)


class Types:
    """Makes the functions for the types of one schema.

    Args:
        named: the schemas of its records, enums and fixed, by their full names.
    """

    def __init__(self, named: dict[str, Any]) -> None:
        self._named = named
        self._steps: dict[str, int | Skip | None] = {}

    def resolve(self, schema: Any) -> Any:
        """The definition behind a name or a type in a type."""
        while True:
            if isinstance(schema, str) and schema in self._named:
                schema = self._named[schema]
            elif isinstance(schema, dict) and (not isinstance(schema["type"], str) or schema["type"] in self._named):
                schema = schema["type"]
            else:
                return schema

    def step(self, schema: Any) -> int | Skip:
        """How to get behind a value: by that many bytes, or by a function.

        A function always looks at a byte or more, so that no count, however large, gets it past the value's end.
        """
        schema = self.resolve(schema)
        kind = kind_of(schema)
        if kind in WIDTHS:
            return WIDTHS[kind]
        if kind in ("int", "long", "enum"):
            return _behind_long
        if kind in ("bytes", "string"):
            return _behind_sized
        if kind == "fixed":
            return int(schema["size"])
        if kind == "array":
            return partial(_behind_items, self.step(schema["items"]))
        if kind == "map":
            return partial(_behind_items, _chain([_behind_sized, self.step(schema["values"])]))
        if kind == "union":
            return partial(_behind_union, [self.step(branch) for branch in schema])
        if kind in ("record", "error"):
            return self._behind_record(schema)
        raise SchemaError(f"a type {kind[:60]!r} is not known")

    def _behind_record(self, schema: Any) -> int | Skip:
        name = schema["name"]
        if name not in self._steps:
            self._steps[name] = None
            self._steps[name] = _chain([self.step(field["type"]) for field in schema["fields"]])
        known = self._steps[name]
        # None: a record within itself, whose own step is not there yet.
        return partial(self._behind_named, name) if known is None else known

    def _behind_named(self, name: str, data: bytes, at: int) -> int:
        step = self._steps[name]
        return at + step if isinstance(step, int) else step(data, at)  # type: ignore[misc]

    def value(self, schema: Any, *, time: bool = False) -> Read:
        """Reads numbers, text, bytes, lists of these and null; of anything else a word that says what it was.

        Args:
            schema: the value's.
            time: whether it is one: timestamps become seconds, other dates and times are not to be taken for such.
        """
        schema = self.resolve(schema)
        kind = kind_of(schema)
        logical = str(schema.get("logicalType", "")) if isinstance(schema, dict) else ""
        if (time and (logical in _NO_TIMES or logical.startswith("local-"))) or (
            logical in _NO_BYTES and kind in ("bytes", "fixed")
        ):
            return partial(_word, logical, self.step(schema))
        if time and kind == "long" and logical in _PER_SECOND:
            return partial(_seconds, _PER_SECOND[logical])
        if kind == "null":
            return _null
        if kind == "boolean":
            return _boolean
        if kind in ("int", "long"):
            return long
        if kind in _LETTERS:
            return partial(_unpack, struct.Struct("<" + _LETTERS[kind]))
        if kind == "bytes":
            return sized
        if kind == "string":
            return _text
        if kind == "fixed":
            return partial(fixed, int(schema["size"]))
        if kind == "enum":
            return partial(_symbol, schema["symbols"])
        if kind == "union":
            return partial(_branch, [self.value(branch, time=time) for branch in schema])
        if kind == "array":
            item = self.resolve(schema["items"])
            if kind_of(item) in _LETTERS:
                return partial(_numbers, _LETTERS[kind_of(item)], WIDTHS[kind_of(item)])
            if self.step(item) != 0:  # else any number of them fits into no byte at all
                return partial(_items, self.value(item, time=time))
        return partial(_word, kind, self.step(schema))


def _chain(steps: Sequence[int | Skip]) -> int | Skip:
    """One step for several; neighbours of fixed width become one."""
    merged: list[int | Skip] = [0]
    for step in steps:
        if isinstance(step, int) and isinstance(merged[-1], int):
            merged[-1] += step
        else:
            merged.append(step)
    if len(merged) == 1:
        return merged[0]
    return partial(_behind_all, [step for step in merged if step != 0])


def _behind_all(steps: list[int | Skip], data: bytes, at: int) -> int:
    for step in steps:
        at = at + step if isinstance(step, int) else step(data, at)
    return at


def _behind_long(data: bytes, at: int) -> int:
    return at + 1 if data[at] < 0x80 else long(data, at)[1]


def _behind_sized(data: bytes, at: int) -> int:
    size, at = long(data, at)
    if size < 0:
        raise ValueError(f"a length of {size}")
    return at + size


def _behind_union(branches: list[int | Skip], data: bytes, at: int) -> int:
    index, at = _index(len(branches), data, at)
    step = branches[index]
    return at + step if isinstance(step, int) else step(data, at)


def _behind_items(item: int | Skip, data: bytes, at: int) -> int:
    while True:
        count, size, at = _block(data, at)
        if not count:
            return at
        if isinstance(item, int):
            at += count * item
        elif size:
            at += size
        else:
            for _ in range(count):
                at = item(data, at)


def _index(count: int, data: bytes, at: int) -> tuple[int, int]:
    index, at = long(data, at)
    if not 0 <= index < count:
        raise ValueError(f"number {index} of {count} choices")
    return index, at


def _null(data: bytes, at: int) -> tuple[None, int]:
    return None, at


def _boolean(data: bytes, at: int) -> tuple[bool, int]:
    return data[at] != 0, at + 1


def _text(data: bytes, at: int) -> tuple[str, int]:
    text, at = sized(data, at)
    return text.decode(), at


def _seconds(per_second: float, data: bytes, at: int) -> tuple[float, int]:
    value, at = long(data, at)
    return value / per_second, at


def _unpack(form: struct.Struct, data: bytes, at: int) -> tuple[Any, int]:
    return form.unpack_from(data, at)[0], at + form.size


def _symbol(symbols: Sequence[str], data: bytes, at: int) -> tuple[str, int]:
    index, at = _index(len(symbols), data, at)
    return symbols[index], at


def _branch(branches: list[Read], data: bytes, at: int) -> tuple[Any, int]:
    index, at = _index(len(branches), data, at)
    return branches[index](data, at)


def _numbers(letter: str, width: int, data: bytes, at: int) -> tuple[list[float], int]:
    """A list of floats, a block at a time."""
    found: list[float] = []
    while True:
        count, _, at = _block(data, at)
        if not count:
            return found, at
        if count * width > len(data) - at:
            raise ValueError(f"{count} numbers claimed where {len(data) - at} bytes are left")
        found += struct.unpack_from(f"<{count}{letter}", data, at)
        at += count * width


def _items(item: Read, data: bytes, at: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    while True:
        count, _, at = _block(data, at)
        if not count:
            return found, at
        for _ in range(count):
            value, at = item(data, at)
            found.append(value)


def _word(kind: str, step: int | Skip, data: bytes, at: int) -> tuple[Any, int]:
    # An object of a type with that name: whoever says what is wrong with a field names its type.
    return type(kind, (), {})(), at + step if isinstance(step, int) else step(data, at)
