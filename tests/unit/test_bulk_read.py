"""Bulk decoding gives what kafka-python's own decoder gives: record by record, field by field, error by error."""

from __future__ import annotations

import gc
import os
import weakref
from types import SimpleNamespace
from typing import Any

import kafka
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.protocol.consumer import IsolationLevel
from kafka.record.default_records import DefaultRecordBase
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder

from daemon.streams.bulk import install, wire
from daemon.streams.bulk.chunk import Chunk
from daemon.streams.bulk.columns import Span, decode
from daemon.streams.bulk.install import history
from daemon.streams.bulk.read import BulkRecords

TP = TopicPartition("t", 3)
EXAMPLES = 1_000 if os.environ.get("HOMEOSTAT_LONG") == "1" else 50
HEADER_BYTES = DefaultRecordBase.HEADER_STRUCT.size
PRODUCERS = (-1, 7, 8)


class Always(BulkRecords):
    """Decodes in bulk also where the public decoder would be as fast."""

    few = 0


def bulk_history(data: bytes, take: int | list[int], fetch_offset: int = 0, **options: Any) -> list[Any]:
    """Of `Always`, after checking that the class as it is used gives the same."""
    found = []
    for few in (0, 12):
        BulkRecords.few = few
        try:
            found.append(history(BulkRecords, data, take, fetch_offset, **options))
        finally:
            BulkRecords.few = 12
    assert found[0] == found[1]
    return found[0]


def same(data: bytes, take: int | list[int] = 7, fetch_offset: int = 0, **options: Any) -> list[Any]:
    public = history(Fetcher.PartitionRecords, data, take, fetch_offset, **options)
    assert bulk_history(data, take, fetch_offset, **options) == public
    return public


def taken(data: bytes, kind: type[BulkRecords] = Always, **options: Any) -> list[Chunk]:
    return list(kind(0, TP, MemoryRecords(data), **options).take())


def rows(count: int, size: int = 20, **fields: Any) -> list[wire.Row]:
    row = wire.Row(0, 0, None, b"", [])._replace(**fields)
    return [
        row._replace(offset_delta=at, timestamp_ms=1_000 + at, value=bytes([at % 256]) * size) for at in range(count)
    ]


contents = st.none() | st.binary(max_size=3) | st.integers(60, 70).map(bytes) | st.sampled_from([bytes(9_000)])
headers = st.lists(st.tuples(st.text(max_size=3), st.none() | st.binary(max_size=3)), max_size=2)
stamps = st.integers(-1, 300) | st.integers(-(1 << 40), 1 << 40) | st.just((1 << 61) + 3)


@st.composite
def batches(draw: st.DrawFn) -> tuple[bytes, list[Any]]:
    """What a broker may send of one partition, and the aborted transactions that it names beside it."""
    alike = draw(st.booleans())
    parts: list[bytes] = []
    aborted: list[Any] = []
    offset = draw(st.sampled_from([0, 5, 1 << 40]))
    for _ in range(draw(st.integers(1, 6))):
        producer = draw(st.sampled_from(PRODUCERS))
        epoch = draw(st.integers(-1, 3))
        kind = draw(st.sampled_from("ddddmal"))
        if kind == "a":
            aborted.append(SimpleNamespace(producer_id=abs(producer), first_offset=offset))
        elif kind == "m" and producer > 0:
            parts.append(wire.marker(offset, producer, abort=draw(st.booleans()), epoch=epoch))
            offset += 1
        elif kind == "l":
            builder = MemoryRecordsBuilder(draw(st.integers(0, 1)), 0, 1 << 20, offset=offset)
            for _ in range(draw(st.integers(1, 3))):
                builder.append(draw(st.integers(0, 1 << 40)), draw(contents), draw(contents))
            offset = builder.next_offset()
            builder.close()
            parts.append(bytes(builder.buffer()))
        else:
            deltas = draw(st.lists(st.integers(0, 200), min_size=0 if parts else 1, max_size=20, unique=True))
            one = (draw(contents), draw(contents), draw(headers))
            made = [
                wire.Row(delta, draw(stamps), *(one if alike else (draw(contents), draw(contents), draw(headers))))
                for delta in sorted(deltas)
            ]
            last = max(deltas, default=0) + draw(st.sampled_from([0, 0, 90]))
            parts.append(
                wire.batch(
                    made,
                    base_offset=offset,
                    codec=draw(st.sampled_from(wire.codecs())),
                    epoch=epoch,
                    producer=producer,
                    transactional=producer > 0 and draw(st.booleans()),
                    append_ms=draw(st.none() | st.integers(0, 1 << 41)),
                    last_delta=last,
                )
            )
            offset += last + 1
    return b"".join(parts), aborted


takes = st.lists(st.integers(1, 30), min_size=1, max_size=4)
levels = st.sampled_from([IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED])


@settings(max_examples=EXAMPLES, deadline=None)
@given(batches(), takes, levels, st.integers(0, 400))
def test_what_a_broker_sends_decodes_as_by_the_public_path(
    sent: tuple[bytes, list[Any]], take: list[int], level: Any, fetch_offset: int
) -> None:
    data, aborted = sent
    assert same(data, take, fetch_offset, isolation_level=level, aborted_transactions=aborted)


@settings(max_examples=EXAMPLES, deadline=None)
@given(batches(), takes, st.data())
def test_damage_is_found_at_the_same_record_with_the_same_words(
    sent: tuple[bytes, list[Any]], take: list[int], draw: st.DataObject
) -> None:
    data, aborted = bytearray(sent[0]), sent[1]
    for _ in range(draw.draw(st.integers(0, 3 if data else 0))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.integers(0, len(data)) | st.just(len(data)))
    # Without checksums the damage gets through to the records themselves.
    options = {"check_crcs": draw.draw(st.booleans()), "isolation_level": IsolationLevel.READ_COMMITTED}
    same(bytes(data[:cut]), take, aborted_transactions=aborted, **options)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(min_size=1, max_size=60), st.integers(-2, 9), st.sampled_from([0, 1 << 62, -(1 << 63)]))
def test_records_that_are_any_bytes_decode_or_fail_as_by_the_public_path(body: bytes, count: int, base: int) -> None:
    good = wire.batch(rows(2), base_offset=1)
    made = bytearray(wire.batch(rows(1), base_offset=9)[:HEADER_BYTES]) + body
    odd = wire.edited(made, {0: base, 1: len(made) - 12, 12: count})
    same(good + odd + good, [1, 9])


def test_values_of_one_length_come_as_one_array_and_others_do_not() -> None:
    chunk = taken(wire.batch(rows(100, 20)))[0]
    array = chunk.fixed(20)
    assert array is not None and array.dtype == np.uint8 and array.shape == (100, 20)
    assert [row.tobytes() for row in array] == chunk.values
    array[:] = 0
    assert chunk.values[1] == b"\x01" * 20 and chunk.fixed(19) is None
    uneven = taken(wire.batch([*rows(5, 20), wire.Row(5, 0, None, None, [])]))[0]
    assert uneven.fixed(20) is None and uneven.values[-1] is None


@pytest.mark.parametrize("size", [0, 1, 63, 64, 8_191, 8_192, 1 << 20])
def test_every_length_of_a_length_is_read(size: int) -> None:
    data = wire.batch(rows(70, size)) if size < 1 << 20 else wire.batch(rows(3, size))
    chunk = taken(data)[0]
    assert chunk.values == [row.value for row in rows(len(chunk), size)]
    array = chunk.fixed(size)
    assert array is not None and array.shape == (len(chunk), size)
    same(data)


def test_a_chunk_is_a_window_on_its_columns() -> None:
    made = [*rows(30, 10, key=b"k"), wire.Row(30, 5, None, b"tail", [("h", b"1")]), wire.Row(40, 6, b"", None, [])]
    part = Always(0, TP, MemoryRecords(wire.batch(made, base_offset=100)))
    chunks = [chunk for _ in range(4) for chunk in part.take(9)]
    assert [len(chunk) for chunk in chunks] == [9, 9, 9, 5]
    last = chunks[-1]
    assert last.topic_partition == TP
    assert last.offsets.tolist() == [127, 128, 129, 130, 140]
    assert last.timestamps_ms.tolist() == [1_027, 1_028, 1_029, 5, 6]
    assert last.keys == [b"k", b"k", b"k", None, b""] and last.key_sizes.tolist() == [1, 1, 1, -1, 0]
    assert last.values[-2:] == [b"tail", None] and last.value_sizes.tolist() == [10, 10, 10, 4, -1]
    assert last.headers == {3: [("h", b"1")]} and chunks[0].headers == {}
    assert sum(chunk.nbytes for chunk in chunks) == part.bytes_read
    assert not part


def test_many_batches_of_a_fetch_make_one_chunk() -> None:
    data = b"".join(wire.batch(rows(10), base_offset=10 * at, epoch=at) for at in range(50))
    chunks = taken(data)
    assert [len(chunk) for chunk in chunks] == [500]
    assert [record.leader_epoch for record in chunks[0].records()] == [row // 10 for row in range(500)]


def test_decompressing_ahead_is_bounded() -> None:
    data = b"".join(wire.batch(rows(30, 20_000), base_offset=30 * at, codec=1) for at in range(6))
    assert len(data) < 100_000
    part = Always(0, TP, MemoryRecords(data))
    found = list(part.take())
    assert sum(map(len, found)) == 180 and max(chunk.nbytes for chunk in found) < 2 << 20


@pytest.mark.parametrize("count", [1 << 30, (1 << 31) - 1])
def test_a_batch_that_claims_more_records_than_fit_is_refused_before_memory_is_taken(count: int) -> None:
    data = wire.edited(wire.batch(rows(20)), {12: count})
    assert "Found invalid record structure" in same(data, 50)[-1][0]


def test_a_timestamp_beyond_64_bits_is_clamped_and_loses_no_record() -> None:
    made = wire.edited(wire.batch(rows(20)), {7: (1 << 63) - 5})
    chunks = taken(made)
    assert sum(map(len, chunks)) == 20
    assert chunks[0].timestamps_ms.tolist() == [(1 << 63) - 5 + at for at in range(4)] + [(1 << 63) - 1] * 16


def test_after_an_error_the_rest_is_dropped_so_that_the_next_poll_asks_again() -> None:
    data = bytearray(wire.batch(rows(20)) + wire.batch(rows(20), base_offset=20))
    data[-1] ^= 1
    drained: list[Any] = []
    part = Always(0, TP, MemoryRecords(bytes(data)), on_drain=drained.append)
    assert len(part.take(30)) == 20 and part and not drained
    with pytest.raises(CorruptRecordError, match=r"TopicPartition\(topic='t', partition=3\) at offset 20 failed crc"):
        part.take(30)
    assert not part and drained == [part] and part.next_fetch_offset == 20


def test_a_batch_is_refused_in_bulk_rather_than_guessed_at() -> None:
    body = wire.batch(rows(20))[HEADER_BYTES:]
    span = Span(0, len(body), 20, 0, 0, None, 0)
    good = decode(body, [span])
    assert good is not None and len(good) == 20
    assert decode(body, [span._replace(rows=19)]) is None
    assert decode(body, [span._replace(end=len(body) - 1)]) is None
    assert decode(body, [span._replace(base_offset=1 << 63)]) is None
    assert decode(body[:-1], [span]) is None


def test_what_is_taken_and_let_go_frees_the_fetch() -> None:
    part = Always(0, TP, MemoryRecords(wire.batch(rows(50))))
    chunk = next(iter(part.take()))
    held = weakref.ref(chunk._block.offsets)
    assert not part
    values = chunk.values
    del chunk
    gc.collect()
    assert held() is None and len(values) == 50


def consumer(**config: Any) -> Any:
    made = SimpleNamespace(config={"key_deserializer": None, "value_deserializer": None} | config)
    made._fetcher = Fetcher.__new__(Fetcher)
    return made


@pytest.fixture
def fresh():
    install.usable.cache_clear()
    yield
    install.usable.cache_clear()


def test_it_is_installed_where_the_self_test_passes(fresh: None) -> None:
    made = consumer()
    assert install.install(made) is None
    assert made._fetcher.PartitionRecords is BulkRecords and Fetcher.PartitionRecords is not BulkRecords


def test_a_consumer_that_it_does_not_suit_keeps_the_public_path(fresh: None) -> None:
    made = consumer(value_deserializer=object())
    assert "deserialisers" in str(install.install(made))
    assert made._fetcher.PartitionRecords is Fetcher.PartitionRecords
    made._fetcher = None
    assert "no fetcher" in str(install.install(made))


@pytest.mark.parametrize("version", ["3.0.11", "2.9.9", "4.0.0", "4.0.0rc1"])
def test_another_version_of_the_client_keeps_the_public_path(
    fresh: None, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(kafka, "__version__", version)
    assert version in str(install.install(consumer()))


def changed_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fetcher.PartitionRecords, "__init__", lambda self, fetch_offset, tp, batches: None)


def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fetcher, "_append", lambda *_: 0)


def no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fetcher, "_parse_fetched_data", lambda self, completed_fetch: None)


def renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(MemoryRecords, "_cache_next")


def wrong_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    public = Fetcher.PartitionRecords.take

    def take(self: Any, n: int | None = None) -> list[Any]:
        return [record._replace(offset=record.offset + 1) for record in public(self, n)]

    monkeypatch.setattr(Fetcher.PartitionRecords, "take", take)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed_signature, "makes PartitionRecords of"),
        (no_hook, "does not read fetches by"),
        (uncounted, "does not count the rows"),
        (renamed, "self-test failed: AttributeError"),
        (wrong_offsets, "found a difference at step 0"),
    ],
)
def test_a_client_that_has_changed_inside_keeps_the_public_path(
    fresh: None, monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
) -> None:
    made = consumer()
    change(monkeypatch)
    assert reason in str(install.install(made))
    assert "PartitionRecords" not in vars(made._fetcher)
