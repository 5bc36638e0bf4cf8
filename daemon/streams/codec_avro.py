"""Records in Avro, each decoded with the schema that it was written with, as the registry has it.

A record has the fields of a JSON one: ``id`` (string, int, long, enum), ``x`` (an array of numbers, nested or flat, or
bytes or fixed of little-endian float32), ``y`` (a number) and ``ts`` (int, long, float or double in seconds; a long
with the logical type timestamp-millis, -micros or -nanos; RFC 3339 text); each may be a union with null. Other fields
are stepped over. The schema is one record, or a union of records.

fastavro parses the schema, so that names are resolved as everywhere else; `daemon.streams.avro_types` reads the
records and says why. There is no schema of the reader. An array of as many floats as the model takes is a row as it is.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import fastavro

from daemon.streams.avro_types import Read, Skip, Types, kind_of, long
from daemon.streams.codec_base import FAILURES, Row
from daemon.streams.codec_maps import _MapCodec
from daemon.streams.codec_registry import FRAME, RegistryCodec
from daemon.streams.fields import RefusedError, identity, label, seconds
from daemon.streams.registry import Schema, SchemaError

MAX_DEPTH = 100
"""Types within types of a schema's text: fastavro goes down with it in C."""
FIELDS = ("id", "x", "y", "ts")
_EXACT = 2**53

Plan = list[tuple[str, Read] | int | Skip]
"""A record's fields in order: (name, how it is read) for those that count; how to get over the others."""


class Layout:
    """How records of one schema are read.

    Args:
        schema: a record's, or a union of records', and what it is built on.
        numbers: makes, from the types and the schema of ``x``, what reads it as a row's bytes.

    Raises:
        SchemaError: the schema can't be used.
    """

    def __init__(self, schema: Schema, numbers: Callable[[Types, Any], Read]) -> None:
        named: dict[str, Any] = {}
        try:
            for each in schema.references:
                fastavro.parse_schema(_parsed(each.text), named)
            root = fastavro.parse_schema(_parsed(schema.text), named)
            self._types = types = Types(named)
            root = types.resolve(root)
            branches = [types.resolve(branch) for branch in root] if isinstance(root, list) else [root]
            self._union = isinstance(root, list)
            self._kinds = [kind_of(branch) for branch in branches]
            self._fast = [self._plan(branch, partial(numbers, types)) for branch in branches]
            self._whole = [self._plan(branch, types.value) for branch in branches]
        except SchemaError:
            raise
        except Exception as error:  # fastavro has no base class of its errors, and lets KeyError and the like pass
            raise SchemaError(f"not an Avro schema: {type(error).__name__}: {str(error)[:100]}") from None
        if "record" not in self._kinds:
            raise SchemaError(f"it is of type {kind_of(root)}; give a record with id and x")

    def _plan(self, schema: Any, x: Callable[[Any], Read]) -> Plan:
        if kind_of(schema) != "record":
            return []
        plan: Plan = []
        for field in schema["fields"]:
            name, kind = field["name"], field["type"]
            if name == "x":
                plan.append((name, x(kind)))
            elif name in FIELDS:
                plan.append((name, self._types.value(kind, time=name == "ts")))
            else:
                plan.append(self._types.step(kind))
        return plan

    def row(self, value: bytes) -> dict[str, Any]:
        """The fields of a record as it should be, ``x`` as a row's bytes; raises one of FAILURES for any other."""
        return self._read(self._fast, value)

    def fields(self, value: bytes) -> dict[str, Any]:
        """The fields of any record; raises one of FAILURES for what is not one."""
        return self._read(self._whole, value)

    def _read(self, plans: list[Plan], value: bytes) -> dict[str, Any]:
        at, branch = FRAME, 0
        try:
            if self._union:
                branch, at = long(value, at)
                if not 0 <= branch < len(plans) or self._kinds[branch] != "record":
                    raise ValueError(f"branch {branch} of the union {self._kinds} is no record")
            found: dict[str, Any] = {}
            for step in plans[branch]:
                if isinstance(step, tuple):
                    found[step[0]], at = step[1](value, at)
                else:
                    at = at + step if isinstance(step, int) else step(value, at)
        except IndexError:
            raise ValueError("it ends too early") from None
        if at != len(value):
            raise ValueError(f"it ends {at - len(value)} bytes too early" if at > len(value) else "bytes behind it")
        return found


class AvroCodec(RegistryCodec[Layout], _MapCodec):
    """Records in Avro behind the registry's five bytes."""

    name = "avro"
    kind = "AVRO"

    def compile(self, schema: Schema) -> Layout:
        """How its records are read; raises SchemaError for a schema that is none."""
        return Layout(schema, self._numbers_of)

    def _read(self, value: bytes) -> Row:
        found = self.schema_of(value).row(value)
        if "x" not in found:
            raise ValueError("no x")
        name, y, ts = found.get("id"), found.get("y"), found.get("ts")
        if name is not None and type(name) is not str:
            name = identity(name)
        if type(y) is int:
            if not -_EXACT <= y <= _EXACT:
                raise ValueError("a label beyond what a float holds")
        elif y is not None and type(y) is not float:
            y = label(y)
        if ts is not None and type(ts) is not float:
            ts = seconds(ts)
        return name, found["x"], y, ts

    def _open(self, value: bytes) -> tuple[str | None, Any]:
        layout = self.schema_of(value)
        try:
            found = layout.fields(value)
        except FAILURES as error:
            raise RefusedError("undecodable", f"not {self.name} of its schema: {error}") from None
        return identity(found.get("id")), found

    def _numbers(self, x: Any) -> bytes:
        return self._bin(x) if isinstance(x, bytes) else super()._numbers(x)

    def _numbers_of(self, types: Types, schema: Any) -> Read:
        """Reads ``x`` as a row's bytes; what it raises for is read again as a whole, to say why."""
        schema = types.resolve(schema)
        kind = kind_of(schema)
        if kind == "union":
            return partial(_branch_of, [self._numbers_of(types, branch) for branch in schema])
        item = kind_of(types.resolve(schema["items"])) if kind == "array" else ""
        if item == "float":
            return partial(_floats, self.size)
        if item == "double":
            form = struct.Struct(f"<{self.size}d")
            return partial(_doubles, self.size, form, self.pack)
        return partial(self._converted, types.value(schema), kind in ("bytes", "fixed"), _may_be_packed(types, schema))

    def _converted(self, read: Read, binary: bool, packed: bool, data: bytes, at: int) -> tuple[bytes, int]:
        x, at = read(data, at)
        if binary and isinstance(x, bytes):
            return self._bin(x), at
        if not packed:
            raise ValueError("no numbers")
        return self._typed_numbers(x), at


def _parsed(text: str) -> Any:
    """A schema's JSON, or the bare name of a type, with no more types within types than are read."""
    try:
        schema = json.loads(text)
    except RecursionError:
        raise SchemaError("nested too deep") from None
    level, depth = [schema], 0
    while level := [item for each in level for item in _within(each)]:
        depth += 1
        if depth > 3 * MAX_DEPTH:
            raise SchemaError("nested too deep")
    return schema


def _within(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _may_be_packed(types: Types, schema: Any) -> bool:
    """Whether an array holds, at its bottom, numbers alone: struct takes true and false for numbers too."""
    while kind_of(schema := types.resolve(schema)) == "array":
        schema = schema["items"]
    kinds = [kind_of(types.resolve(branch)) for branch in schema] if isinstance(schema, list) else [kind_of(schema)]
    return {"int", "long", "float", "double", "null"} >= set(kinds)


def _branch_of(branches: list[Read], data: bytes, at: int) -> tuple[Any, int]:
    index, at = long(data, at)
    if not 0 <= index < len(branches):
        raise ValueError(f"number {index} of {len(branches)} choices")
    return branches[index](data, at)


def _floats(size: int, data: bytes, at: int) -> tuple[bytes, int]:
    """An array of so many floats in one block: it is a row's bytes already."""
    at = _one_block(size, data, at)
    end = at + 4 * size
    if data[end]:
        raise ValueError("more than one block")
    return data[at:end], end + 1


def _doubles(size: int, form: struct.Struct, pack: Callable[..., bytes], data: bytes, at: int) -> tuple[bytes, int]:
    """The same of doubles; OverflowError beyond float32."""
    at = _one_block(size, data, at)
    end = at + 8 * size
    if data[end]:
        raise ValueError("more than one block")
    return pack(*form.unpack_from(data, at)), end + 1


def _one_block(size: int, data: bytes, at: int) -> int:
    count, at = long(data, at)
    if count < 0:
        count, (_, at) = -count, long(data, at)
    if count != size:
        raise ValueError(f"{count} numbers in the first block")
    return at
