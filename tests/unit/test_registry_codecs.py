"""Records framed for a schema registry end as their JSON twins do, whatever they are and whatever the registry says."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.errors import SettingsError
from daemon.records import Batch
from daemon.stream_settings import SchemaRegistry
from daemon.streams.codec_avro import AvroCodec
from daemon.streams.codec_json_schema import JsonSchemaCodec
from daemon.streams.codec_registry import KEPT_REFUSED, REFUSED_S
from daemon.streams.codecs import codec
from daemon.streams.registry import RegistryAwayError, Schema, SchemaError
from tests.daemon_process import free_port
from tests.registry_server import RegistryServer, framed
from tests.unit.test_codecs import check_aligned, fate, raw

EXAMPLES = 3_000 if os.environ.get("HOMEOSTAT_LONG") else 60
NOWHERE = SchemaRegistry(url="http://127.0.0.1:1", timeout_s=0.2)
FLOATS: dict[str, Any] = {"type": "array", "items": "float"}
SCALARS = {"int": 7, "long": -(2**40), "float": 0.5, "double": 0.1, "string": "s", "bytes": b"b", "boolean": True}


class Shelf:
    """Stands in for the registry's client: schemas by id."""

    def __init__(self, *schemas: Schema) -> None:
        self.schemas = dict(enumerate(schemas, 1))
        self.asked: list[int] = []

    def schema(self, number: int) -> Schema:
        self.asked.append(number)
        if number not in self.schemas:
            raise SchemaError("the registry has none")
        return self.schemas[number]


def avro(schema: Any, shape: tuple[int, ...], *references: Schema) -> AvroCodec:
    """A codec that knows the schema as number 1."""
    made = AvroCodec(shape, NOWHERE)
    made._registry = Shelf(Schema("AVRO", json.dumps(schema)), *references)  # type: ignore[assignment]
    return made


def json_schema(schema: Any, shape: tuple[int, ...] = (2,)) -> JsonSchemaCodec:
    made = JsonSchemaCodec(shape, NOWHERE)
    made._registry = Shelf(Schema("JSON", json.dumps(schema)))  # type: ignore[assignment]
    return made


def record_of(**fields: Any) -> dict[str, Any]:
    return {"type": "record", "name": "R", "fields": [{"name": name, "type": kind} for name, kind in fields.items()]}


def written(schema: Any, value: Any) -> bytes:
    """The value in Avro, as schema 1, by a writer that is not ours."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), value)
    return framed(1, out.getvalue())


def columns(batch: Batch) -> tuple[Any, ...]:
    """All that became of the records, so that two batches can be compared."""
    dead = [(letter.offset, letter.reason) for letter in batch.dead]
    plain = batch.x.tolist(), batch.times_s.tolist(), batch.valid.tolist()
    return (batch.ids, batch.y, batch.rows, batch.invalid, dead, *plain)


# The same records in Avro and in JSON --------------------------------------------------------------------------------

number = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-(2**63), 2**63 - 1), st.integers(-9, 9), st.none()
)
fine = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4)
twins = st.fixed_dictionaries(
    {
        "id": st.one_of(st.none(), st.text(max_size=5), st.integers(-(2**63), 2**63 - 1), st.booleans()),
        "x": st.one_of(
            fine,
            fine.map(lambda x: [x[:2], x[2:]]),
            st.lists(number, max_size=5),
            st.lists(st.lists(number, max_size=3), max_size=3),
            st.lists(st.booleans(), min_size=4, max_size=4),
            st.none(),
            st.text(max_size=3),
        ),
        "y": st.one_of(number, st.text(max_size=2), st.booleans()),
        "ts": st.one_of(number, st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01T00:00:00", "soon"])),
    }
)
TWIN = record_of(
    before={"type": "map", "values": ["null", "string"]},
    id=["null", "string", "long", "boolean"],
    x=[
        "null",
        "string",
        {
            "type": "array",
            "items": ["null", "double", "long", "boolean", {"type": "array", "items": ["null", "double", "long"]}],
        },
    ],
    between=["null", "bytes"],
    y=["null", "double", "long", "string", "boolean"],
    ts=["null", "double", "long", "string"],
    behind={"type": "array", "items": {"type": "enum", "name": "E", "symbols": ["A", "B"]}},
)
OTHERS = {"before": {"k": "v", "n": None}, "between": b"\1\2", "behind": ["A", "B"]}


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(twins, min_size=1, max_size=4), st.sampled_from([(4,), (2, 2)]))
def test_avro_records_end_as_their_json_twins_do(records: list[dict[str, Any]], shape: tuple[int, ...]) -> None:
    keys = [b"key", None] * 2
    twin = raw(*(json.dumps(each).encode() for each in records), keys=keys[: len(records)])
    expected = codec("json", shape).decode(twin)
    values = raw(*(written(TWIN, OTHERS | each) for each in records), keys=keys[: len(records)])
    found = avro(TWIN, shape).decode(values)
    check_aligned(values, found)
    assert columns(found) == columns(expected)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(twins, min_size=1, max_size=4), st.sampled_from([(4,), (2, 2)]))
def test_records_of_a_schema_that_asks_for_nothing_end_as_their_json_twins_do(
    records: list[dict[str, Any]], shape: tuple[int, ...]
) -> None:
    texts = [json.dumps(each).encode() for each in records]
    found = json_schema({}, shape).decode(raw(*(framed(1, text) for text in texts)))
    assert columns(found) == columns(codec("json", shape).decode(raw(*texts)))


@pytest.mark.parametrize("items", ["float", "double", "int", "long", ["null", "double"], ["float", "null"]])
@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_numbers_of_every_kind_are_numbers(items: Any, shape: tuple[int, ...]) -> None:
    for kind in ({"type": "array", "items": items}, ["null", {"type": "array", "items": items}]):
        schema = record_of(id="string", x=kind)
        batch = avro(schema, shape).decode(raw(written(schema, {"id": "a", "x": [1, 2, -3]})))
        assert columns(batch)[:5] == (["a"], [None], [0], {}, [])
        assert batch.x.ravel().tolist() == [1, 2, -3]


def test_bytes_and_fixed_are_little_endian_float32() -> None:
    numbers = np.array([1, 2.5, -3], "<f4").tobytes()
    fixed = {"type": "fixed", "name": "F", "size": 12}
    for kind in ("bytes", fixed, ["null", "bytes"]):
        schema = record_of(id="string", x=kind)
        batch = avro(schema, (3,)).decode(raw(written(schema, {"id": "a", "x": numbers})))
        assert batch.x.tolist() == [[1, 2.5, -3]]
    short = record_of(id="string", x="bytes")
    assert fate(avro(short, (3,)).decode(raw(written(short, {"id": "a", "x": b"1234"})))) == ("invalid", "wrong_shape")
    decimal = record_of(id="string", x={"type": "bytes", "logicalType": "decimal", "precision": 30})
    value = framed(1, b"\x02a" + b"\x18" + numbers)
    assert fate(avro(decimal, (3,)).decode(raw(value))) == ("invalid", "wrong_type")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("double", 12.5, 12.5),
        ("float", 12.5, 12.5),
        ("long", 12, 12.0),
        ("int", 12, 12.0),
        ("string", "1970-01-01T00:00:12+00:00", 12.0),
        ({"type": "long", "logicalType": "timestamp-millis"}, 12_500, 12.5),
        ({"type": "long", "logicalType": "timestamp-micros"}, 12_500_000, 12.5),
        ({"type": "long", "logicalType": "timestamp-nanos"}, 12_500_000_000, 12.5),
        ({"type": "long", "logicalType": "timestamp-millis"}, 2**62, 2**62 / 1e3),
        (["null", {"type": "long", "logicalType": "timestamp-millis"}], 12_500, 12.5),
        (["null", "double"], None, 1_700_000_000.0),
        ("double", math.nan, 1_700_000_000.0),
        ("string", "1970-01-01T00:00:12", "wrong_type"),
        ({"type": "long", "logicalType": "local-timestamp-millis"}, 12_500, "wrong_type"),
        ({"type": "int", "logicalType": "date"}, 12, "wrong_type"),
        ({"type": "int", "logicalType": "time-millis"}, 12, "wrong_type"),
        ("boolean", True, "wrong_type"),
    ],
)
def test_times_are_seconds_or_say_what_they_are(kind: Any, value: Any, expected: float | str) -> None:
    plain = json.loads(json.dumps(kind).replace("logicalType", "was"))  # the writer would want a datetime
    value = written(record_of(id="string", x=FLOATS, ts=plain), {"id": "a", "x": [1.0], "ts": value})
    batch = avro(record_of(id="string", x=FLOATS, ts=kind), (1,)).decode(raw(value))
    if isinstance(expected, str):
        assert fate(batch) == ("invalid", expected)
    else:
        assert (batch.times_s.tolist(), batch.invalid) == ([expected], {})


def test_an_id_is_text_a_number_an_enum_or_the_key() -> None:
    enum = {"type": "enum", "name": "E", "symbols": ["left", "right"]}
    for kind, value, expected in [("string", "ä", "ä"), ("long", -(2**63), str(-(2**63))), (enum, "right", "right")]:
        schema = record_of(id=kind, x=FLOATS)
        assert avro(schema, (1,)).decode(raw(written(schema, {"id": value, "x": [1.0]}))).ids == [expected]
    schema = record_of(x=FLOATS)
    values = [written(schema, {"x": [1.0]})] * 2
    assert avro(schema, (1,)).decode(raw(*values, keys=[b"k", None])).ids == ["k", "sensors/0:101"]
    schema = record_of(id="bytes", x=FLOATS)
    assert fate(avro(schema, (1,)).decode(raw(written(schema, {"id": b"a", "x": [1.0]})))) == ("dead", "wrong_type")


def test_a_union_of_records_is_read_by_the_branch_that_was_written() -> None:
    other = {"type": "record", "name": "Alarm", "fields": [{"name": "text", "type": "string"}]}
    union = [record_of(id="string", x=FLOATS), "string", other]
    values = [
        written(union, {"id": "a", "x": [1.0]}),
        written(union, "text"),
        written(union, ("Alarm", {"text": "t"})),
        framed(1, b"\x06"),
        framed(1, b"\x01"),
    ]
    batch = avro(union, (1,)).decode(raw(*values, keys=[None, None, b"k", None, None]))
    fates = [fate(batch, row) for row in range(5)]
    # One that has no numbers and whose key is known is answered, as it is of a JSON record.
    assert (
        fates == [("valid", "a"), ("dead", "undecodable"), ("invalid", "missing_field")] + [("dead", "undecodable")] * 2
    )


def test_types_of_other_subjects_are_read_through_the_references() -> None:
    with RegistryServer() as server:
        server.add({"type": "fixed", "name": "lab.Block", "size": 4}, subject="block")
        reading = {"type": "record", "name": "lab.Reading", "fields": [{"name": "raw", "type": "Block"}]}
        server.add(reading, subject="reading", references=(("lab.Block", "block", 1),))
        root = record_of(more="lab.Reading", id="string", x="lab.Block")
        known = server.add(root, references=(("lab.Reading", "reading", 1), ("lab.Block", "block", 1)))
        made = codec("avro", (1,), SchemaRegistry(url=server.url))
        batch = made.decode(raw(framed(known, b"\1\2\3\4" + b"\x02a" + np.float32(2.5).tobytes())))
        assert (batch.ids, batch.x.tolist()) == (["a"], [[2.5]])


# What is stepped over -----------------------------------------------------------------------------------------------


def _named(kind: str, made: list[int], **more: Any) -> dict[str, Any]:
    made.append(1)
    return {"type": kind, "name": f"N{len(made)}", **more}


@st.composite
def typed(draw: st.DrawFn, depth: int = 3, made: list[int] | None = None) -> tuple[Any, Any]:
    """Any Avro type, and a value of it."""
    made = [] if made is None else made
    kinds = ["null", *SCALARS, "fixed", "enum"] + (["array", "map", "union", "record"] if depth else [])
    kind = draw(st.sampled_from(kinds))
    inner = typed(depth - 1, made)
    if kind in SCALARS:
        return kind, SCALARS[kind]
    if kind == "fixed":
        size = draw(st.integers(0, 4))
        return _named("fixed", made, size=size), b"f" * size
    if kind == "enum":
        return _named("enum", made, symbols=["A", "B"]), draw(st.sampled_from(["A", "B"]))
    if kind == "array":
        items, value = draw(inner)
        return {"type": "array", "items": items}, [value] * draw(st.integers(0, 3))
    if kind == "map":
        values, value = draw(inner)
        return {"type": "map", "values": values}, {key: value for key in draw(st.sets(st.text(max_size=3), max_size=3))}
    if kind == "union":
        return draw(st.permutations(["null", "string"])), draw(st.sampled_from([None, "text"]))
    if kind == "record":
        fields = [draw(inner) for _ in range(draw(st.integers(0, 3)))]
        names = [{"name": f"f{at}", "type": each} for at, (each, _) in enumerate(fields)]
        return _named("record", made, fields=names), {f"f{at}": value for at, (_, value) in enumerate(fields)}
    return kind, None


@settings(max_examples=EXAMPLES, deadline=None)
@given(typed(), st.integers(0, 2))
def test_fields_of_any_type_are_stepped_over(other: tuple[Any, Any], place: int) -> None:
    kinds: list[tuple[str, Any]] = [("id", "string"), ("x", FLOATS)]
    kinds.insert(place, ("other", other[0]))
    schema = record_of(**dict(kinds))
    value = written(schema, {"id": "a", "x": [1.5, 2.5], "other": other[1]})
    batch = avro(schema, (2,)).decode(raw(value, value + b"\0", value[:-1]))
    assert (batch.ids, batch.x.tolist(), batch.invalid) == (["a"], [[1.5, 2.5]], {})
    assert [letter.reason for letter in batch.dead] == ["undecodable"] * 2


def test_blocks_may_say_their_size_and_come_in_any_number() -> None:
    numbers = np.arange(4, dtype="<f4").tobytes()
    blocks = b"\x03\x10" + numbers[:8] + b"\x04" + numbers[8:] + b"\x00"  # -2 items in 8 bytes, then 2, then the end
    whole = b"\x07\x20" + numbers + b"\x00"
    other = b"\x03\x08\x02a\x02b" + b"\x00"  # -2 texts in 4 bytes
    schema = record_of(a=FLOATS, b={"type": "array", "items": "string"}, id="string", x=FLOATS)
    batch = avro(schema, (4,)).decode(
        raw(*(framed(1, x + other + b"\x02i" + y) for x in (blocks, whole) for y in (blocks, whole)))
    )
    assert batch.x.tolist() == [[0, 1, 2, 3]] * 4
    assert not batch.invalid


# Hostile -----------------------------------------------------------------------------------------------------------

NESTED = {
    "type": "record",
    "name": "R",
    "fields": [{"name": "next", "type": ["null", "R"]}, {"name": "x", "type": FLOATS}],
}
MANY = b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"  # 2**62 as a long
LEAST = b"\xff" * 9 + b"\x01"  # -2**63
DOUBLING = [{"type": "record", "name": "D0", "fields": []}] + [
    {
        "type": "record",
        "name": f"D{at}",
        "fields": [{"name": "a", "type": f"D{at - 1}"}, {"name": "b", "type": f"D{at - 1}"}],
    }
    for at in range(1, 60)
]


@pytest.mark.parametrize(
    ("schema", "payload"),
    [
        (record_of(a=FLOATS, x=FLOATS), MANY),
        (record_of(a={"type": "array", "items": "null"}, x=FLOATS), MANY + b"\0"),
        (record_of(a={"type": "array", "items": {"type": "record", "name": "N", "fields": []}}, x=FLOATS), MANY * 9),
        (record_of(a={"type": "map", "values": "null"}, x=FLOATS), MANY),
        (record_of(a="string", x=FLOATS), MANY),
        (record_of(a="string", x=FLOATS), LEAST),
        (record_of(a={"type": "array", "items": "string"}, x=FLOATS), LEAST + LEAST),
        (record_of(a=["null", "int"], x=FLOATS), b"\x01" + b"\0" * 3),
        (record_of(x=FLOATS), MANY),
        (record_of(x=FLOATS), LEAST + LEAST),
        (record_of(x={"type": "array", "items": "double"}), MANY),
        (record_of(x={"type": "array", "items": "int"}), MANY),
        (record_of(x={"type": "array", "items": {"type": "array", "items": "null"}}), MANY * 2),
        (record_of(x="bytes"), MANY),
        (record_of(x="int"), b"\xff" * 11),
        (record_of(x="int"), b"\xff" * 9 + b"\x7f"),
        (record_of(x={"type": "enum", "name": "E", "symbols": ["A"]}), b"\x01"),
        (record_of(id="string", x=FLOATS), b"\x04\xff\xfe\0"),
        (NESTED, b"\x02" * (1 << 20)),
        (record_of(a={"type": "array", "items": NESTED}, x=FLOATS), MANY + b"\x02" * (1 << 20)),
    ],
)
def test_a_payload_that_claims_what_it_has_not_is_a_dead_letter(schema: Any, payload: bytes) -> None:
    given = raw(framed(1, payload))
    batch = avro(schema, (2,)).decode(given)
    check_aligned(given, batch)
    assert fate(batch)[0] == "dead"


def test_any_number_of_nothings_is_stepped_over_at_once() -> None:
    for items in ("null", {"type": "record", "name": "N", "fields": []}, {"type": "fixed", "name": "F", "size": 0}):
        schema = record_of(a={"type": "array", "items": items}, id="string", x=FLOATS)
        batch = avro(schema, (1,)).decode(raw(framed(1, MANY + b"\0" + b"\x02a" + b"\x02\0\0\x80\x3f\0")))
        assert batch.x.tolist() == [[1.0]]
        schema = record_of(id="string", x={"type": "array", "items": items})
        assert fate(avro(schema, (1,)).decode(raw(framed(1, b"\x02a" + MANY + b"\0")))) == ("invalid", "wrong_type")


def test_a_schema_whose_records_hold_2_to_the_60_others_is_read_like_any_other() -> None:
    made = AvroCodec((1,), NOWHERE)
    root = record_of(a="D59", id="string", x=FLOATS)
    references = tuple(Schema("AVRO", json.dumps(each)) for each in DOUBLING)
    made._registry = Shelf(Schema("AVRO", json.dumps(root), references))  # type: ignore[assignment,arg-type]
    assert made.decode(raw(framed(1, b"\x02a\x02\0\0\x80\x3f\0"))).x.tolist() == [[1.0]]


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=60), st.data())
def test_no_bytes_are_raised_for(junk: bytes, data: st.DataObject) -> None:
    value = bytearray(written(TWIN, OTHERS | {"id": "a", "x": [1.0, 2.0, None, 4], "y": 1, "ts": 2.5}))
    for _ in range(data.draw(st.integers(0, 4))):
        value[data.draw(st.integers(5, len(value) - 1))] = data.draw(st.integers(0, 255))
    values = raw(framed(1, junk), bytes(value), junk, b"\0" + junk, None, b"")
    for made in (avro(TWIN, (4,)), json_schema({"required": ["x"]}, (4,))):
        check_aligned(values, made.decode(values))


@pytest.mark.parametrize(
    "schema",
    [
        "not json",
        '"string"',
        '{"type": "array", "items": "int"}',
        "[]",
        "3",
        "{}",
        '{"type": "record", "fields": []}',
        '{"type": "record", "name": "R", "fields": [{"name": "x", "type": "Away"}]}',
        '{"type": "record", "name": "R", "fields": 3}',
        '{"type": "record", "name": "R", "fields": [{"name": "x", "type": {"type": "enum", "name": "E"}}]}',
        '{"type":"array","items":' * 400 + '"int"' + "}" * 400,
        "[" * 100_000,
    ],
)
def test_a_schema_that_is_none_is_a_reason_and_no_error(schema: str) -> None:
    made = AvroCodec((1,), NOWHERE)
    made._registry = Shelf(Schema("AVRO", schema))  # type: ignore[assignment]
    batch = made.decode(raw(framed(1, b"\0\0")))
    assert fate(batch) == ("dead", "schema")
    assert batch.dead[0].detail.startswith("schema 1: ")


# JSON Schema --------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "required": ["id", "x"],
    "properties": {
        "x": {"type": "array", "items": {"type": "number", "minimum": -5}, "maxItems": 3},
        "w": {"pattern": "a"},
    },
}


@pytest.mark.parametrize(
    ("payload", "expected", "detail"),
    [
        (b'{"id": "a", "x": [1, 2]}', ("valid", "a"), ""),
        (b'{"id": "a", "x": [1, 2, 3]}', ("invalid", "wrong_shape"), ""),
        (b'{"id": "a", "x": [1, -6]}', ("dead", "schema"), "schema 1: /x/1 breaks its `minimum`"),
        (b'{"id": "a", "x": [1, 2, 3, 4]}', ("dead", "schema"), "schema 1: /x breaks its `maxItems`"),
        (b'{"x": [1, 2]}', ("dead", "schema"), "schema 1: / breaks its `required`"),
        (b'{"id": "a", "x": [1, NaN]}', ("dead", "schema"), "schema 1: /x/1 breaks its `type`"),
        (b"[1, 2]", ("dead", "schema"), "schema 1: / breaks its `type`"),
        (b"{", ("dead", "undecodable"), "not json-schema: "),
        (b"", ("dead", "undecodable"), "not json-schema: "),
        (b'{"id": "a", "x": ' + b"[" * 700 + b"]" * 700 + b"}", ("dead", "schema"), "more than 500 lists within lists"),
        (b'{"id": "a", "x": ' + b"[" * 100_000 + b"}", ("dead", "undecodable"), "not json-schema: "),
        (b'{"id": "a", "x": [1, 2], "z": [' + b"[]," * 700 + b"[]]}", ("valid", "a"), ""),
        (b'{"id": "a", "x": [1, 1e999]}', ("dead", "schema"), ""),
        (b'{"id": "a", "x": [1, 1' + b"0" * 400 + b"]}", ("invalid", "out_of_range"), ""),
        (b'{"id": "a", "x": [1, 2], "z": "\\ud800"}', ("valid", "a"), ""),
        (b'{"id": "a", "x": [1, 2], "w": "\\ud800"}', ("dead", "schema"), "can't be held against its schema"),
    ],
)
def test_a_record_that_breaks_its_schema_is_a_dead_letter_that_says_where(
    payload: bytes, expected: tuple[str, str], detail: str
) -> None:
    batch = json_schema(SCHEMA).decode(raw(framed(1, payload)))
    assert fate(batch) == expected
    assert detail in "".join(letter.detail for letter in batch.dead)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"$ref": "http://127.0.0.1:1/x"},
        {"$ref": "file:///etc/hostname"},
        {"properties": {"id": {"pattern": "(a"}}},
        {"properties": {"id": {"pattern": "(a{1000}){1000}"}}},
        3,
    ],
)
def test_a_json_schema_that_is_none_or_leads_elsewhere_is_a_reason_and_no_error(schema: Any) -> None:
    batch = json_schema(schema).decode(raw(framed(1, b'{"id": "a", "x": [1, 2]}')))
    assert fate(batch) == ("dead", "schema")
    assert "not a JSON Schema: " in batch.dead[0].detail


def test_what_a_pattern_costs_is_bounded() -> None:
    schema = {"properties": {"id": {"pattern": "(?=a)(a|a)*(a|b)*\\1?$"}}}
    given = raw(framed(1, json.dumps({"id": "a" * 100_000 + "!", "x": [1, 2]}).encode()))
    check_aligned(given, json_schema(schema).decode(given))


def test_a_json_schema_is_read_through_its_references() -> None:
    for identity, name in (("http://lab/root.json", "row.json"), ("", "http://lab/row.json")):
        with RegistryServer() as server:
            server.add({"type": "array", "maxItems": 2}, "JSON", subject="row")
            root: dict[str, Any] = {"properties": {"x": {"$ref": name}}} | ({"$id": identity} if identity else {})
            known = server.add(root, "JSON", references=((name, "row", 1),))
            made = codec("json-schema", (2,), SchemaRegistry(url=server.url))
            texts = [b'{"id": "a", "x": [1, 2]}', b'{"id": "b", "x": [1, 2, 3]}']
            batch = made.decode(raw(*(framed(known, text) for text in texts)))
            assert [fate(batch, row) for row in range(2)] == [("valid", "a"), ("dead", "schema")]


def test_without_a_draft_named_it_is_draft_7() -> None:
    # In draft 7 a list of items is by position; in 2020-12 it is no schema.
    schema = {"properties": {"x": {"items": [{"type": "integer"}, {"type": "number"}]}}}
    texts = [b'{"id": "a", "x": [1, 2.5]}', b'{"id": "a", "x": [1.5, 2]}']
    batch = json_schema(schema).decode(raw(*(framed(1, text) for text in texts)))
    assert [fate(batch, row) for row in range(2)] == [("valid", "a"), ("dead", "schema")]


# The registry ------------------------------------------------------------------------------------------------------

FINE = record_of(id="string", x=FLOATS)


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with RegistryServer() as server:
        server.add(FINE)
        yield server


def fine_value(name: str = "a", schema: int = 1) -> bytes:
    return framed(schema, written(FINE, {"id": name, "x": [1.0]})[5:])


class Time:
    """A clock that goes on when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def timed(url: str, time: Time) -> AvroCodec:
    return AvroCodec((1,), SchemaRegistry(url=url), clock=time, sleep=time.sleep)


def test_each_schema_is_asked_for_once(server: RegistryServer) -> None:
    server.add(FINE, number=258)
    made = codec("avro", (1,), SchemaRegistry(url=server.url))
    for _ in range(3):
        batch = made.decode(raw(fine_value("a"), fine_value("b", 258), fine_value("c")))
        assert batch.ids == ["a", "b", "c"]
    assert server.asked == ["/schemas/ids/1", "/schemas/ids/258"]


def test_an_unknown_schema_is_asked_for_once_a_minute(server: RegistryServer) -> None:
    time = Time()
    made = timed(server.url, time)
    values = raw(fine_value("a", 2), fine_value("b", 2), fine_value("c"))
    batch = made.decode(values)
    assert [fate(batch, row) for row in range(3)] == [("dead", "schema")] * 2 + [("valid", "c")]
    assert batch.dead[0].detail == "schema 2: the registry has none: Schema 2 not found"
    server.add(FINE, number=2)
    time.now += REFUSED_S - 1
    assert len(made.decode(values).dead) == 2
    time.now += 2
    assert made.decode(values).ids == ["a", "b", "c"]
    assert server.asked == ["/schemas/ids/2", "/schemas/ids/1", "/schemas/ids/2"]


def test_a_schema_of_another_type_is_refused_by_name(server: RegistryServer) -> None:
    server.add({}, "JSON", number=2)
    server.add('syntax = "proto3";', "PROTOBUF", number=3)
    made = codec("avro", (1,), SchemaRegistry(url=server.url))
    batch = made.decode(raw(fine_value("a", 2), fine_value("b", 3), fine_value("c", 1 << 31)))
    assert [letter.detail for letter in batch.dead] == [
        "schema 2: it is of type JSON; HOMEOSTAT_CODEC=avro reads AVRO",
        "schema 3: it is of type PROTOBUF; HOMEOSTAT_CODEC=avro reads AVRO",
        f"schema {1 << 31}: no registry gives an id beyond 31 bits",
    ]


def test_records_wait_for_a_registry_that_is_away_and_keep_their_order(server: RegistryServer) -> None:
    time = Time()
    made, said = timed(server.url, time), []

    def waiting(reason: str) -> None:
        said.append(reason)
        if len(said) == 30:
            server.login, server.answers = "", []

    server.login, server.answers = "", [(503, b"{}")] * 1000
    made.waiting = waiting
    began = time.now
    batch = made.decode(raw(fine_value("a"), b"junk", fine_value("b"), fine_value("c")))
    assert batch.ids == ["a", "b", "c"]
    assert len(batch.dead) == 1
    assert said[0] == (
        f"schema 1: HOMEOSTAT_REGISTRY__URL={server.url}: the schema registry answers /schemas/ids/1 with HTTP 503"
    )
    assert time.now - began <= 30 * 2.0, "it is asked again every two seconds at least"


def test_whoever_waits_may_give_up_and_nothing_is_taken_for_read(server: RegistryServer) -> None:
    made = timed(f"http://127.0.0.1:{free_port()}", Time())

    def waiting(reason: str) -> None:
        raise TimeoutError(reason)

    made.waiting = waiting
    with pytest.raises(TimeoutError, match="schema 1: .*refused"):
        made.decode(raw(fine_value("a")))
    made.waiting = None
    with pytest.raises(RegistryAwayError, match="refused"):
        made.decode(raw(fine_value("a")))


def test_known_schemas_need_no_registry(server: RegistryServer) -> None:
    made = codec("avro", (1,), SchemaRegistry(url=server.url))
    assert made.decode(raw(fine_value("a"))).ids == ["a"]
    server.close()
    assert made.decode(raw(fine_value("b"), fine_value("c"))).ids == ["b", "c"]


def test_a_flood_of_unknown_ids_takes_no_more_memory_for_ever_and_says_that_it_is_slow() -> None:
    time = Time()
    made, said = AvroCodec((1,), NOWHERE, clock=time, sleep=time.sleep), []

    class Slow(Shelf):
        def schema(self, number: int) -> Schema:
            time.now += 0.0 if number % 1000 else 1.5
            return super().schema(number)

    made._registry = Slow()  # type: ignore[assignment]
    made.waiting = said.append
    count = KEPT_REFUSED + 2_000
    batch = made.decode(raw(*(fine_value("a", number) for number in range(1, count + 1))))
    assert [letter.reason for letter in batch.dead] == ["schema"] * count
    assert len(made._refused) == KEPT_REFUSED
    assert len(said) == count // 1000


def test_what_is_not_framed_is_undecodable() -> None:
    values = raw(b"\0\0\0\0", b"\1" + fine_value()[1:], b'{"id": "a"}', None, b"", b"\0" * (9 << 20))
    batch = avro(FINE, (1,)).decode(values)
    assert [letter.reason for letter in batch.dead] == ["undecodable"] * 3 + ["tombstone", "empty", "too_large"]


# Made from the settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["avro", "json-schema"])
def test_without_an_address_or_the_extra_the_error_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (None, SchemaRegistry()):
        with pytest.raises(SettingsError, match=f"HOMEOSTAT_REGISTRY__URL is empty: HOMEOSTAT_CODEC={name} needs"):
            codec(name, (1,), registry)
    missing = {"avro": ("fastavro", "codec_avro"), "json-schema": ("jsonschema_rs", "codec_json_schema")}[name]
    monkeypatch.setitem(sys.modules, missing[0], None)
    monkeypatch.delitem(sys.modules, f"daemon.streams.{missing[1]}")
    expected = f"HOMEOSTAT_CODEC={name}: {missing[0]} can't be imported; run: pip install homeostat.registry."
    with pytest.raises(SettingsError, match=expected):
        codec(name, (1,), NOWHERE)


def test_a_validator_that_has_changed_is_named_at_the_start_and_no_record_is_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def changed(schema: Any) -> None:
        raise AssertionError("called with too much")

    monkeypatch.setattr("jsonschema_rs.validator_for", changed)
    with pytest.raises(SettingsError, match=r"jsonschema-rs [\d.]+ can't be used: .*TypeError.*; run: pip install"):
        codec("json-schema", (1,), NOWHERE)


def test_the_other_codecs_import_nothing_of_the_registry() -> None:
    claim = (
        "import sys, daemon.streams.codecs as c; c.codec('json', (1,));"
        "print([name for name in sys.modules if name in ('fastavro', 'jsonschema_rs', 'daemon.streams.registry')])"
    )
    done = subprocess.run([sys.executable, "-c", claim], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_start_reaches_the_registry(server: RegistryServer) -> None:
    made: Any = codec("avro", (1,), SchemaRegistry(url=server.url))
    made.check()
    assert server.asked == ["/schemas/types"]
    server.close()
    away: Any = codec("json-schema", (1,), SchemaRegistry(url=server.url, timeout_s=0.3))
    with pytest.raises(RegistryAwayError, match="can't be reached"):
        away.check()
