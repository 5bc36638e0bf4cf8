"""Every record ends as one valid row, one invalid row or one dead letter, whatever its bytes are."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.records import Batch, RawBatch
from daemon.streams.codecs import (
    CODECS,
    REASONS,
    codec,
    decode_label,
    encode_invalid,
    encode_predictions,
)

CAME_S = 1_700_000_000.0


def raw(*values: bytes | None, keys: list[bytes | None] | None = None) -> RawBatch:
    count = len(values)
    return RawBatch(
        values=list(values),
        keys=keys or [None] * count,
        times_s=[CAME_S + row for row in range(count)],
        partitions=["sensors/0"] * count,
        offsets=list(range(100, 100 + count)),
    )


def record(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def fate(batch: Batch, row: int = 0) -> tuple[str, str]:
    """What became of a record: ("valid", id), ("invalid", reason) or ("dead", reason)."""
    for letter in batch.dead:
        if letter.offset == 100 + row:
            return "dead", letter.reason
    at = batch.rows.index(row)
    return ("valid", batch.ids[at]) if batch.valid[at] else ("invalid", batch.invalid[at])


def check_aligned(given: RawBatch, batch: Batch) -> None:
    """Every raw row is there exactly once, all columns have one length, and nothing unusable is left in x."""
    dead = [letter.offset - 100 for letter in batch.dead]
    assert sorted(batch.rows + dead) == list(range(len(given)))
    assert batch.rows == sorted(batch.rows)
    assert len(batch.ids) == len(batch.y) == len(batch.rows) == len(batch.x) == len(batch.times_s) == len(batch.valid)
    assert {row for row, fine in enumerate(batch.valid.tolist()) if not fine} == set(batch.invalid)
    assert batch.x.dtype == np.float32
    assert np.isfinite(batch.x).all()
    assert np.isfinite(batch.times_s).all()
    assert not batch.x[~batch.valid].any()
    assert all(y is None or math.isfinite(y) for y in batch.y)
    assert {*batch.invalid.values(), *(letter.reason for letter in batch.dead)} <= set(REASONS)
    for letter in batch.dead:
        assert letter.value == given.values[letter.offset - 100]
    encode_predictions("classification", batch.ids, [0] * len(batch), None, 1, "steady")


def test_the_reasons_are_pinned_because_alerts_name_them() -> None:
    assert REASONS == (
        "tombstone",
        "empty",
        "too_large",
        "undecodable",
        "schema",
        "missing_field",
        "wrong_type",
        "wrong_shape",
        "not_finite",
        "out_of_range",
    )


def test_a_json_record_keeps_its_id_numbers_label_and_time() -> None:
    given = raw(
        record(id="a", x=[1, 2.5], y=3, ts=12.5),
        record(id=7, x=[0.1, -1e-3], y=0.25, ts="2026-01-01T01:00:00+01:00", extra={"ignored": [1]}),
        record(id="c", x=[0, 0]),
        record(id="d", x=[0, 0], y=None, ts=None),
    )
    batch = codec("json", (2,)).decode(given)
    check_aligned(given, batch)
    assert batch.ids == ["a", "7", "c", "d"]
    assert batch.y == [3, 0.25, None, None]
    assert batch.times_s.tolist() == [12.5, 1_767_225_600.0, CAME_S + 2, CAME_S + 3]
    np.testing.assert_array_equal(batch.x, np.array([[1, 2.5], [0.1, -1e-3], [0, 0], [0, 0]], np.float32))


def test_the_epoch_itself_is_a_time() -> None:
    given = raw(record(id="a", x=[1], ts=0), record(id="b", x=[1], ts="1970-01-01T00:00:00Z"))
    assert codec("json", (1,)).decode(given).times_s.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (6, 1), (1, 6)])
@pytest.mark.parametrize("name", ["json", "msgpack"])
def test_x_is_nested_like_the_input_or_flat(name: str, shape: tuple[int, ...]) -> None:
    numbers = np.arange(6, dtype=np.float32)
    encode = msgspec.json.encode if name == "json" else msgspec.msgpack.encode
    given = raw(
        encode({"id": "nested", "x": numbers.reshape(shape).tolist()}), encode({"id": "flat", "x": numbers.tolist()})
    )
    batch = codec(name, shape).decode(given)
    check_aligned(given, batch)
    assert batch.valid.all()
    for row in batch.x:
        np.testing.assert_array_equal(row, numbers.reshape(shape))


def test_raw_records_are_named_by_their_key_else_by_their_origin() -> None:
    numbers = np.arange(6, dtype="<f4").reshape(2, 3)
    given = raw(*[numbers.tobytes()] * 4, keys=[b"a", None, b"", b"\xff"])
    batch = codec("raw", (2, 3)).decode(given)
    check_aligned(given, batch)
    assert batch.ids == ["a", "sensors/0:101", "sensors/0:102", "sensors/0:103"]
    np.testing.assert_array_equal(batch.x, np.stack([numbers] * 4))
    assert batch.times_s.tolist() == given.times_s


def test_a_json_record_without_an_id_is_named_by_its_key_else_by_its_origin() -> None:
    given = raw(record(x=[1]), record(x=[2]), record(x=[3], id=None), keys=[b"k", None, b"\xff"])
    assert codec("json", (1,)).decode(given).ids == ["k", "sensors/0:101", "sensors/0:102"]


def test_a_msgpack_bin_is_float32_never_small_integers() -> None:
    # As many bytes as numbers: taken byte by byte it would fit.
    numbers = np.array([1.5, -2, 3e-5, 4], dtype="<f4")
    given = raw(
        msgspec.msgpack.encode({"id": "a", "x": numbers.tobytes()}),
        msgspec.msgpack.encode({"id": "b", "x": b"\x01\x02\x03\x04"}),
    )
    batch = codec("msgpack", (4,)).decode(given)
    check_aligned(given, batch)
    np.testing.assert_array_equal(batch.x[0], numbers)
    assert fate(batch, 1) == ("invalid", "wrong_shape")


@pytest.mark.parametrize("name", list(CODECS))
def test_what_is_decoded_may_be_written_to_so_that_torch_takes_it_without_a_copy(name: str) -> None:
    values = {"json": record(id="a", x=[1]), "raw": bytes(4), "msgpack": msgspec.msgpack.encode({"x": bytes(4)})}
    batch = codec(name, (1,)).decode(raw(values[name]))
    torch.from_numpy(batch.x).add_(1)
    assert batch.x[0, 0] in (1, 2)


@pytest.mark.parametrize("name", list(CODECS))
def test_an_empty_poll_is_an_empty_batch(name: str) -> None:
    batch = codec(name, (2, 3)).decode(raw())
    assert len(batch) == 0
    assert batch.x.shape == (0, 2, 3)


def test_a_batch_that_came_decoded_passes_through() -> None:
    batch = codec("json", (1,)).decode(raw(record(id="a", x=[1])))
    for name in CODECS:
        assert codec(name, (1,)).decode(RawBatch(offsets=[0], partitions=["p"], batch=batch)) is batch


DEEP = b"[" * 100_000
CASES: list[tuple[str, bytes | None, str, str]] = [
    ("no value", None, "dead", "tombstone"),
    ("no bytes", b"", "dead", "empty"),
    ("only a space", b" ", "dead", "undecodable"),
    ("not JSON", b"{'id': 1}", "dead", "undecodable"),
    ("cut short", b'{"id":"a","x":[1,2', "dead", "undecodable"),
    ("two records in one", b'{"id":"a","x":[1,2]}{"id":"b","x":[1,2]}', "dead", "undecodable"),
    ("not a map", b"[1,2]", "dead", "undecodable"),
    ("a number", b"1", "dead", "undecodable"),
    ("UTF-16", '{"id":"a","x":[1,2]}'.encode("utf-16"), "dead", "undecodable"),
    ("a byte order mark", b'\xef\xbb\xbf{"id":"a","x":[1,2]}', "dead", "undecodable"),
    ("an id that is not UTF-8", b'{"id":"\xff","x":[1,2]}', "dead", "undecodable"),
    ("an id that is half a character", b'{"id":"\\ud800","x":[1,2]}', "dead", "undecodable"),
    ("an id that is true", b'{"id":true,"x":[1,2]}', "dead", "wrong_type"),
    ("an id that is a list", b'{"id":[1],"x":[1,2]}', "dead", "wrong_type"),
    ("an id that is a fraction", b'{"id":1.5,"x":[1,2]}', "dead", "wrong_type"),
    ("nested too deep", DEEP, "dead", "undecodable"),
    ("nested too deep in a field", b'{"id":"a","x":' + DEEP, "dead", "undecodable"),
    ("nested too deep in an ignored field", b'{"id":"a","x":[1,2],"z":' + DEEP, "dead", "undecodable"),
    ("more digits than Python reads", b'{"id":"a","x":[1%s,2]}' % (b"0" * 5000), "dead", "undecodable"),
    ("nobody's, without x", b'{"temperature":3}', "dead", "missing_field"),
    ("nobody's, with too few numbers", b'{"x":[1]}', "dead", "wrong_shape"),
    ("no x", b'{"id":"a"}', "invalid", "missing_field"),
    ("x is null", b'{"id":"a","x":null}', "invalid", "missing_field"),
    ("x is text", b'{"id":"a","x":"AAAA"}', "invalid", "wrong_type"),
    ("x is a map", b'{"id":"a","x":{}}', "invalid", "wrong_type"),
    ("text in x", b'{"id":"a","x":[1,"2"]}', "invalid", "wrong_type"),
    ("true in x", b'{"id":"a","x":[1,true]}', "invalid", "wrong_type"),
    ("x is empty", b'{"id":"a","x":[]}', "invalid", "wrong_shape"),
    ("too few numbers", b'{"id":"a","x":[1]}', "invalid", "wrong_shape"),
    ("too many numbers", b'{"id":"a","x":[1,2,3]}', "invalid", "wrong_shape"),
    ("nested where it is flat", b'{"id":"a","x":[[1,2]]}', "invalid", "wrong_shape"),
    ("ragged", b'{"id":"a","x":[1,[2]]}', "invalid", "wrong_shape"),
    ("NaN as Python writes it", b'{"id":"a","x":[1,NaN]}', "invalid", "not_finite"),
    ("Infinity as Python writes it", b'{"id":"a","x":[-Infinity,1]}', "invalid", "not_finite"),
    ("null in x", b'{"id":"a","x":[1,null]}', "invalid", "not_finite"),
    ("beyond a double", b'{"id":"a","x":[1e400,1]}', "invalid", "not_finite"),
    ("NaN, and nobody's", b'{"x":[1,NaN]}', "invalid", "not_finite"),
    ("beyond float32", b'{"id":"a","x":[1e39,1]}', "invalid", "out_of_range"),
    ("beyond float32, and nobody's", b'{"x":[1e39,1]}', "invalid", "out_of_range"),
    ("an integer beyond a double", b'{"id":"a","x":[1%s,2]}' % (b"0" * 400), "invalid", "out_of_range"),
    ("the label is true", b'{"id":"a","x":[1,2],"y":true}', "invalid", "wrong_type"),
    ("the label is text", b'{"id":"a","x":[1,2],"y":"3"}', "invalid", "wrong_type"),
    ("the label is no class of this world", b'{"id":"a","x":[1,2],"y":1%s}' % (b"0" * 40), "invalid", "wrong_type"),
    ("the time has no offset", b'{"id":"a","x":[1,2],"ts":"2026-01-01T00:00:00"}', "invalid", "wrong_type"),
    ("the time is a list", b'{"id":"a","x":[1,2],"ts":[1]}', "invalid", "wrong_type"),
    ("a label that is NaN is none", b'{"id":"a","x":[1,2],"y":NaN}', "valid", "a"),
    ("a time that is NaN is none", b'{"id":"a","x":[1,2],"ts":NaN}', "valid", "a"),
    ("an id beyond 64 bits", b'{"id":1%s,"x":[1,2]}' % (b"0" * 30), "valid", "1" + "0" * 30),
    ("the largest float32", b'{"id":"a","x":[3.4028234e38,1]}', "valid", "a"),
    ("a field twice: the last one counts", b'{"id":"b","id":"a","x":[],"x":[1,2]}', "valid", "a"),
]


@pytest.mark.parametrize(("value", "kind", "what"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_json_record_meets_its_fate_and_its_neighbours_do_not_notice(
    value: bytes | None, kind: str, what: str
) -> None:
    fine = [record(id="before", x=[1, 2], y=1, ts=5), record(id="after", x=[3, 4])]
    given = raw(fine[0], value, fine[1])
    batch = codec("json", (2,)).decode(given)
    check_aligned(given, batch)
    assert fate(batch, 1) == (kind, what)
    assert fate(batch, 0) == ("valid", "before")
    assert fate(batch, 2) == ("valid", "after")
    alone = codec("json", (2,)).decode(raw(*fine))
    np.testing.assert_array_equal(batch.x[[0, -1]], alone.x)
    assert [batch.y[0], batch.y[-1]] == alone.y


def test_what_is_wrong_with_a_record_that_nests_like_the_input_is_said() -> None:
    shapes = {
        "[[1,2,3],[4,5,6]]": "valid",
        "[1,2,3,4,5,6]": "valid",
        "[[1,2],[3,4],[5,6]]": "wrong_shape",
        "[[1,2,3],[4,5]]": "wrong_shape",
        "[[1,2,3],4,5,6]": "wrong_shape",
        "[1,2,3,[4,5,6]]": "wrong_shape",
        "[[1,2,3],[4,5,[6]]]": "wrong_shape",
        "[[],[]]": "wrong_shape",
        "[[1,2,3],null]": "wrong_shape",
        "[[1,2,3],[4,5,null]]": "not_finite",
        "[[1,2,3],[4,5,1e39]]": "out_of_range",
    }
    given = raw(*[b'{"id":"valid","x":%s}' % x.encode() for x in shapes])
    batch = codec("json", (2, 3)).decode(given)
    check_aligned(given, batch)
    assert [fate(batch, row)[1] for row in range(len(shapes))] == list(shapes.values())


def test_a_hostile_record_neither_splits_nor_swallows_its_neighbours() -> None:
    # Joined with commas or line ends these would be four well-formed records, or one.
    given = raw(b'{"id":"a","x":[1]', b'"y":2}', b'{"id":"c","x":[1]},{"id":"d","x":[2]}', b'{"id":"e",', b'"x":[1]}')
    batch = codec("json", (1,)).decode(given)
    check_aligned(given, batch)
    assert batch.ids == []
    assert [letter.reason for letter in batch.dead] == ["undecodable"] * 5


def test_a_dead_letter_carries_the_record_and_where_it_came_from() -> None:
    batch = codec("json", (1,)).decode(raw(record(id="a", x=[1]), b"\xff\x00", keys=[None, b"k"]))
    (letter,) = batch.dead
    assert (letter.partition, letter.offset, letter.key, letter.value) == ("sensors/0", 101, b"k", b"\xff\x00")
    assert letter.reason == "undecodable"
    assert letter.detail.startswith("not json")


def test_raw_records_of_another_length_are_answered_when_they_have_a_key() -> None:
    given = raw(bytes(8), bytes(7), bytes(7), None, b"", keys=[None, b"k", None, None, None])
    batch = codec("raw", (2,)).decode(given)
    check_aligned(given, batch)
    assert [fate(batch, row) for row in range(5)] == [
        ("valid", "sensors/0:100"),
        ("invalid", "wrong_shape"),
        ("dead", "wrong_shape"),
        ("dead", "tombstone"),
        ("dead", "empty"),
    ]
    assert batch.ids[1] == "k"


def test_one_raw_row_with_nan_is_invalid_and_zero() -> None:
    numbers = np.array([[1, 2], [np.nan, 4], [5, np.inf], [7, 8]], dtype="<f4")
    given = raw(*[row.tobytes() for row in numbers])
    batch = codec("raw", (2,)).decode(given)
    check_aligned(given, batch)
    assert batch.invalid == {1: "not_finite", 2: "not_finite"}
    np.testing.assert_array_equal(batch.x, [[1, 2], [0, 0], [0, 0], [7, 8]])


def test_a_record_over_the_size_limit_is_not_looked_at() -> None:
    fine = record(id="a", x=[1])
    kind = CODECS["json"]((1,), max_bytes=len(fine))
    batch = kind.decode(raw(fine, fine + b" "))
    assert fate(batch, 0) == ("valid", "a")
    assert fate(batch, 1) == ("dead", "too_large")


def test_an_msgpack_record_may_claim_any_length_without_getting_memory() -> None:
    claims = [b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"]
    given = raw(*[b"\x81\xa1x" + claim for claim in claims], *claims)
    batch = codec("msgpack", (2,)).decode(given)
    check_aligned(given, batch)
    assert {letter.reason for letter in batch.dead} == {"undecodable"}


def test_msgpack_takes_nan_and_its_own_timestamps() -> None:
    encode = msgspec.msgpack.encode
    given = raw(
        encode({"id": "a", "x": [1.0, float("nan")]}),
        encode({"id": "b", "x": [1, 2], "y": float("nan"), "ts": float("inf")}),
        b"\x83\xa2id\xa1c\xa1x\x92\x01\x02\xa2ts\xd6\xff\x00\x00\x00\x05",
        b"\x82\xa1x\x92\x01\x02\x91\x90\x01",
    )
    batch = codec("msgpack", (2,)).decode(given)
    check_aligned(given, batch)
    assert batch.invalid == {0: "not_finite"}
    assert batch.y == [None, None, None, None]
    assert batch.times_s.tolist() == [CAME_S, CAME_S + 1, 5.0, CAME_S + 3]


VALID = {
    "json": record(id="a", x=[1.5, 2, -3e-7], y=1, ts="2026-01-01T00:00:00Z"),
    "msgpack": msgspec.msgpack.encode({"id": "a", "x": [1.5, 2, -3e-7], "y": 1, "ts": 5.0}),
    "raw": np.arange(3, dtype="<f4").tobytes(),
}
TOKENS = [*rb'NaN -Infinity null 1e400 1e39 true [ ] { } , " \u'.split(), b"\xff"]


@st.composite
def mutated(draw: st.DrawFn, value: bytes) -> bytes:
    """A valid record with a few pieces cut out and others put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(value)))
        stop = draw(st.integers(start, min(len(value), start + 8)))
        value = value[:start] + draw(st.sampled_from(TOKENS) | st.binary(max_size=4)) + value[stop:]
    return value


@pytest.mark.parametrize("name", list(CODECS))
@settings(deadline=None)
@given(data=st.data())
def test_no_bytes_raise_and_every_row_is_accounted_for(name: str, data: st.DataObject) -> None:
    any_value = st.none() | st.binary(max_size=64) | mutated(VALID[name]) | st.just(VALID[name])
    values = data.draw(st.lists(any_value, max_size=6))
    keys = data.draw(st.lists(st.none() | st.binary(max_size=4), min_size=len(values), max_size=len(values)))
    given = raw(*values, keys=keys)
    batch = codec(name, (3,)).decode(given)
    check_aligned(given, batch)
    for row, value in enumerate(values):
        alone = codec(name, (3,)).decode(raw(value, keys=[keys[row]]))
        kind, what = fate(alone)
        assert fate(batch, row) == (kind, what.replace("sensors/0:100", f"sensors/0:{100 + row}"))


number = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**50), 10**50) | st.none()


@settings(deadline=None)
@given(rows=st.lists(st.lists(number, min_size=2, max_size=2), min_size=1, max_size=5))
def test_a_row_is_valid_just_when_float32_holds_all_its_numbers(rows: list[list[float | int | None]]) -> None:
    beyond = 2.0**128 - 2.0**103  # from here on the nearest float32 is infinite
    given = raw(*[record(id=str(row), x=numbers) for row, numbers in enumerate(rows)])
    batch = codec("json", (2,)).decode(given)
    check_aligned(given, batch)
    for row, numbers in enumerate(rows):
        finite = [float(value) for value in numbers if value is not None and math.isfinite(value)]
        if any(abs(value) >= beyond for value in finite):
            assert batch.invalid[row] == "out_of_range"
        elif len(finite) < 2:
            assert batch.invalid[row] == "not_finite"
        else:
            assert batch.valid[row]
            np.testing.assert_array_equal(batch.x[row], np.array(finite).astype(np.float32))


@pytest.mark.parametrize(("name", "shape"), [("xml", (1,)), ("json", ()), ("raw", (0,)), ("json", (2, -1))])
def test_a_codec_that_does_not_exist_or_has_no_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"no codec 'xml'; there are json, raw, msgpack|input_shape is .*; give"):
        codec(name, shape)


def test_a_class_is_answered_with_its_confidence_in_four_digits() -> None:
    confidence = np.array([0.98760003, 1.0], dtype=np.float32)
    first, second = encode_predictions("classification", ["a", "b"], np.array([2, 0]), confidence, 7, "fast")
    assert first == b'{"id":"a","status":"ok","y":2,"version":7,"state":"fast","confidence":0.9876}'
    assert json.loads(second)["confidence"] == 1.0


def test_probabilities_are_answered_when_they_are_given() -> None:
    shares = np.array([[0.12341, 0.87659]], dtype=np.float32)
    (answer,) = encode_predictions("classification", ["a"], [1], [0.87659], 1, "steady", shares)
    assert json.loads(answer)["p"] == [0.1234, 0.8766]


def test_a_value_is_answered_as_a_number_without_confidence() -> None:
    answers = encode_predictions("regression", ["a", "b"], np.array([2, 0.5], np.float32), np.ones(2), 1, "steady")
    assert [json.loads(answer) for answer in answers] == [
        {"id": "a", "status": "ok", "y": 2.0, "version": 1, "state": "steady"},
        {"id": "b", "status": "ok", "y": 0.5, "version": 1, "state": "steady"},
    ]
    assert b'"y":2.0,' in answers[0]


def test_several_values_are_answered_as_a_list() -> None:
    (answer,) = encode_predictions("regression", ["a"], np.array([[1.0, 2.0]]), None, 1, "steady")
    assert json.loads(answer)["y"] == [1.0, 2.0]


def test_columns_of_another_length_and_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError):
        encode_predictions("classification", ["a"], [1, 2], None, 1, "steady")
    with pytest.raises(ValueError, match="give classification or regression"):
        encode_predictions("ranking", ["a"], [1], None, 1, "steady")


def test_an_invalid_input_is_answered_with_its_reason() -> None:
    assert encode_invalid('a"b', "not_finite") == b'{"id":"a\\"b","status":"invalid_input","reason":"not_finite"}'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b'{"id":"a","y":1}', ("a", 1, None)),
        (b'{"id":7,"y":0.5,"ts":12}', ("7", 0.5, 12.0)),
        (b'{"id":"a","y":1,"ts":"1970-01-01T00:00:05Z","by":"lab"}', ("a", 1, 5.0)),
        (b'{"id":1%s,"y":1}' % (b"0" * 30), ("1" + "0" * 30, 1, None)),
    ],
)
def test_a_label_keeps_its_id_value_and_time(value: bytes, expected: tuple[str, float, float | None]) -> None:
    label = decode_label(value)
    assert label == expected
    assert type(label[1]) is type(expected[1])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "tombstone"),
        (b"", "empty"),
        (b"x", "undecodable"),
        (b"[1]", "undecodable"),
        (DEEP, "undecodable"),
        (b'{"id":"\\ud800","y":1}', "undecodable"),
        (b'{"y":1}', "missing_field"),
        (b'{"id":"a"}', "missing_field"),
        (b'{"id":"a","y":null}', "missing_field"),
        (b'{"id":"a","y":true}', "wrong_type"),
        (b'{"id":"a","y":"1"}', "wrong_type"),
        (b'{"id":true,"y":1}', "wrong_type"),
        (b'{"id":"a","y":1,"ts":"noon"}', "wrong_type"),
        (b'{"id":"a","y":NaN}', "not_finite"),
        (b'{"id":"a","y":1e400}', "not_finite"),
    ],
)
def test_a_label_that_can_not_be_used_says_why(value: bytes | None, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        decode_label(value)


@settings(deadline=None)
@given(value=st.binary(max_size=64) | mutated(record(id="a", y=1, ts=2.5)))
def test_a_label_is_read_or_refused_with_a_known_reason(value: bytes) -> None:
    try:
        name, y, ts = decode_label(value)
    except ValueError as error:
        assert str(error) in REASONS
    else:
        assert math.isfinite(y)
        assert ts is None or math.isfinite(ts)
        name.encode()
