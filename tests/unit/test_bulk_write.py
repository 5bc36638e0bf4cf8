from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kafka import KafkaProducer, TopicPartition
from kafka import errors as kafka_errors
from kafka.partitioner import StickyPartitioner
from kafka.partitioner.default import DefaultPartitioner, murmur2
from kafka.producer.record_accumulator import RecordAccumulator
from kafka.producer.transaction_manager import ProducerIdAndEpoch, TransactionManager
from kafka.record.memory_records import MemoryRecords

from daemon.streams.bulk import write_check
from daemon.streams.bulk.write import BulkProducer, usable
from daemon.streams.bulk.write_partitions import choose, murmur2_all

NOW = 1_700_000_000_000
Row = tuple[bytes | None, bytes | None, int, list[tuple[str, bytes]]]


class Cluster:
    """Metadata of one topic, ``t``; one node leads the available partitions."""

    internal_topics: frozenset[str] = frozenset()

    def __init__(self, partitions: list[int], available: list[int] | None = None) -> None:
        self.partitions = partitions
        self.available = partitions if available is None else available

    def topics(self) -> set[str]:
        return {"t"}

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return set(self.partitions) if topic == "t" else None

    def available_partitions_for_topic(self, topic: str) -> set[int] | None:
        return set(self.available) if topic == "t" else None

    def partitions_for_broker(self, _: int) -> list[TopicPartition]:
        return [TopicPartition("t", number) for number in self.available]


class Sender:
    """Counts how often it is woken; nothing is sent but by the test."""

    def __init__(self) -> None:
        self.woken = 0

    def wakeup(self) -> None:
        self.woken += 1


class Offline(KafkaProducer):
    """kafka-python's producer with its accumulator and its `send`, but without a network."""

    def __init__(self, cluster: Cluster, manager: Any = None, **config: Any) -> None:
        self.config = {
            **KafkaProducer.DEFAULT_CONFIG,
            "api_version": (4, 0),
            "compression_attrs": 0,
            "partitioner": DefaultPartitioner(),
            "max_block_ms": 0,
            **config,
        }
        self._metadata = cluster
        self._transaction_manager = manager
        self._accumulator = RecordAccumulator(transaction_manager=manager, message_version=2, **self.config)
        self._sender = Sender()
        self._closed = False

    def __del__(self) -> None:
        """Nothing to close."""

    def drain(self) -> list[Any]:
        """The batches that the sender would take next: the oldest of each partition, closed."""
        return list(self._accumulator.drain_batches_for_one_node(self._metadata, 0, 2**31))

    def drain_all(self) -> dict[int, list[Any]]:
        """All batches, closed, per partition."""
        drained: dict[int, list[Any]] = {}
        while batches := self.drain():
            for batch in batches:
                drained.setdefault(batch.topic_partition.partition, []).append(batch)
        return drained

    def acknowledge(self, batch: Any, error: Exception | None = None) -> None:
        if error is None:
            batch.complete(0, -1)
        else:
            batch.complete_exceptionally(error, lambda _: error)
        self._accumulator.deallocate(batch)


def rows_in(batch: Any) -> list[Row]:
    return [
        (record.key, record.value, record.timestamp, record.headers)
        for part in MemoryRecords(batch.records.buffer())
        for record in part
    ]


def buffers(producer: Offline) -> dict[int, list[bytes]]:
    return {
        number: [bytes(batch.records.buffer()) for batch in batches] for number, batches in producer.drain_all().items()
    }


# Lengths around the places where a varint gets longer (64 and 8192), and the small ones.
lengths = st.one_of(st.integers(0, 70), st.sampled_from([63, 64, 65, 8191, 8192, 8193]))
contents = lengths.flatmap(lambda size: st.binary(min_size=1, max_size=1).map(lambda byte: byte * size))
keys = st.one_of(st.none(), st.binary(max_size=20), st.integers(60, 70).map(lambda size: b"k" * size))
times = st.one_of(st.integers(NOW - 5, NOW + 5), st.integers(-1, 2**62 - 1))
header_lists = st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=5)), max_size=3)


@st.composite
def row_lists(draw: st.DrawFn, max_size: int = 30) -> list[Row]:
    drawn = draw(st.lists(st.tuples(keys, st.one_of(st.none(), contents), times, header_lists), max_size=max_size))
    return [(b"" if key is None and value is None else key, value, time, heads) for key, value, time, heads in drawn]


def send_rows(producer: BulkProducer, rows: list[Row]) -> list[Any]:
    columns = [[row[column] for row in rows] for column in range(4)]
    return producer.send_many("t", columns[0], columns[1], columns[2], columns[3])  # type: ignore[arg-type]


def test_the_installed_client_is_the_one_this_was_written_for() -> None:
    usable.cache_clear()
    assert usable() is None


@given(calls=st.lists(row_lists(), max_size=4), batch_size=st.sampled_from([100, 300, 2_000, 65_536]))
@settings(max_examples=40, deadline=None)
def test_batches_are_byte_for_byte_those_of_the_public_path(calls: list[list[Row]], batch_size: int) -> None:
    public, bulk = (Offline(Cluster([0]), batch_size=batch_size) for _ in range(2))
    many = BulkProducer(bulk)
    assert many.reason is None
    for number, rows in enumerate(calls):
        if number % 3 == 2:  # both ways fill the same batches
            for key, value, time, heads in rows:
                bulk.send("t", value, key, heads, timestamp_ms=time)
        else:
            send_rows(many, rows)
        for key, value, time, heads in rows:
            public.send("t", value, key, heads, timestamp_ms=time)
    assert buffers(bulk) == buffers(public)


@given(data=st.data(), count=st.integers(1, 700), codec=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_one_time_for_all_rows_and_every_codec(data: st.DataObject, count: int, codec: int) -> None:
    value = data.draw(st.binary(max_size=300))
    values = [value + b"%d" % row for row in range(count)]
    row_keys = [None if row % 3 == 0 else b"%d" % row for row in range(count)]
    public, bulk = (Offline(Cluster([4]), compression_attrs=codec) for _ in range(2))
    BulkProducer(bulk).send_many("t", row_keys, values, NOW)
    for key, item in zip(row_keys, values, strict=True):
        public.send("t", item, key, timestamp_ms=NOW)
    assert buffers(bulk) == buffers(public)


@given(st.lists(st.one_of(st.binary(max_size=40), st.binary(min_size=250, max_size=270)), max_size=60))
def test_hashes_are_those_of_the_client(named: list[bytes]) -> None:
    assert murmur2_all(named) == [murmur2(key) for key in named]


@given(
    row_keys=st.lists(st.one_of(st.none(), st.binary(max_size=12)), max_size=80),
    partitions=st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True),
    data=st.data(),
)
def test_partitions_are_those_of_the_default_partitioner(
    row_keys: list[bytes | None], partitions: list[int], data: st.DataObject
) -> None:
    available = data.draw(st.lists(st.sampled_from(partitions), unique=True))
    cluster = Cluster(partitions, available)
    chosen = choose(row_keys, sorted(partitions), sorted(available))
    assert len(chosen) == len(row_keys)
    for key, partition in zip(row_keys, chosen, strict=True):
        if key is None:
            assert partition in (available or partitions)
        else:
            assert partition == DefaultPartitioner().partition("t", key, key, None, None, cluster)


def test_rows_without_a_key_go_to_all_partitions_that_have_a_leader() -> None:
    assert set(choose([None] * 500, [0, 1, 2, 3], [1, 3])) == {1, 3}


@pytest.mark.parametrize("in_bulk", [True, False])
def test_a_named_partition_takes_all_rows_and_must_exist(in_bulk: bool) -> None:
    producer = Offline(Cluster([0, 1, 2]))
    many = BulkProducer(producer, bulk=in_bulk)
    many.send_many("t", [b"%d" % row for row in range(30)], [b"v"] * 30, partition=1)
    with pytest.raises(ValueError, match="partition 3"):
        many.send_many("t", [b"k"], [b"v"], partition=3)
    (batch,) = producer.drain()
    assert batch.topic_partition.partition == 1 and batch.record_count == 30
    producer.acknowledge(batch)
    assert many.held_bytes == 0


def test_rows_of_a_key_stay_in_order_over_calls_and_batches() -> None:
    producer = Offline(Cluster([0, 1, 2]), batch_size=300)
    many = BulkProducer(producer)
    for start in range(0, 3000, 1500):
        numbers = range(start, start + 1500)
        many.send_many("t", [b"%d" % (row % 7) for row in numbers], [b"%d" % row for row in numbers])
    seen: dict[bytes, list[int]] = {}
    for batches in producer.drain_all().values():
        for batch in batches:
            for key, value, _, _ in rows_in(batch):
                seen.setdefault(key or b"", []).append(int(value or b"-1"))
    assert seen == {b"%d" % key: list(range(key, 3000, 7)) for key in range(7)}


def test_a_full_buffer_says_how_many_rows_it_took_and_the_rest_can_follow() -> None:
    producer = Offline(Cluster([0]), batch_size=1000)
    many = BulkProducer(producer, buffer_bytes=5_000)
    values = [b"%04d" % row + b"x" * 96 for row in range(200)]
    sent, done, futures = 0, [], []
    while sent < len(values):
        try:
            futures += many.send_many("t", [None] * (200 - sent), values[sent:])
            break
        except kafka_errors.KafkaTimeoutError as error:
            assert error.accepted > 0 and "5000 bytes" in str(error)
            sent += error.accepted
            futures += error.futures
        assert many.held_bytes <= 5_000
        for batch in producer.drain_all()[0]:
            done += [row[1] for row in rows_in(batch)]
            producer.acknowledge(batch)
        assert many.held_bytes == 0
    for batch in producer.drain_all()[0]:
        done += [row[1] for row in rows_in(batch)]
        producer.acknowledge(batch)
    assert done == values
    assert sum(future.rows for future in futures) == 200 and all(future.succeeded() for future in futures)
    assert producer._accumulator._flushes_in_progress.get() == 0


def test_a_row_larger_than_the_buffer_passes_alone() -> None:
    producer = Offline(Cluster([0]))
    many = BulkProducer(producer, buffer_bytes=100)
    assert len(many.send_many("t", [None], [b"x" * 5000])) == 1
    with pytest.raises(kafka_errors.KafkaTimeoutError) as caught:
        many.send_many("t", [None], [b"y"])
    assert caught.value.accepted == 0 and caught.value.futures == []


def test_room_is_waited_for_while_the_sender_acknowledges() -> None:
    producer = Offline(Cluster([0]), batch_size=1000, max_block_ms=60_000)
    many = BulkProducer(producer, buffer_bytes=2_000)
    stop = threading.Event()

    def acknowledge() -> None:
        while not stop.wait(0.001):
            for batch in producer.drain():
                producer.acknowledge(batch)

    thread = threading.Thread(target=acknowledge)
    thread.start()
    try:
        futures = many.send_many("t", [None] * 500, [b"x" * 50] * 500)
        many.flush(60)
    finally:
        stop.set()
        thread.join()
    assert sum(future.rows for future in futures) == 500 and all(future.succeeded() for future in futures)


def test_flush_says_when_rows_are_not_acknowledged_in_time() -> None:
    producer = Offline(Cluster([0]))
    many = BulkProducer(producer)
    (future,) = many.send_many("t", [None], [b"x"])
    with pytest.raises(kafka_errors.KafkaTimeoutError):
        many.flush(0.0)
    assert not future.is_done
    producer.acknowledge(producer.drain()[0])
    many.flush(0.0)
    assert future.succeeded() and not future.failed()


def test_a_row_that_is_too_large_is_named_and_those_before_it_are_taken() -> None:
    producer = Offline(Cluster([0, 1]), max_request_size=1000)
    many = BulkProducer(producer)
    values = [b"a", b"b", b"x" * 2000, b"d"]
    with pytest.raises(kafka_errors.MessageSizeTooLargeError, match=r"topic t, row 2: 2\d+ bytes.* 1000") as caught:
        many.send_many("t", [b"k"] * 4, values)
    assert caught.value.accepted == 2
    assert sum(future.rows for future in caught.value.futures) == 2
    (batches,) = producer.drain_all().values()
    assert [row[1] for row in rows_in(batches[0])] == [b"a", b"b"]
    with pytest.raises(kafka_errors.MessageSizeTooLargeError):
        producer.send("t", values[2], b"k")


@given(size=st.integers(880, 960), heads=header_lists)
@settings(max_examples=40, deadline=None)
def test_what_is_too_large_is_what_the_public_path_refuses(size: int, heads: list[tuple[str, bytes]]) -> None:
    outcomes = []
    for way in ("bulk", "send"):
        producer = Offline(Cluster([0]), max_request_size=1000)
        try:
            if way == "bulk":
                BulkProducer(producer).send_many("t", [b"k"], [b"x" * size], headers=[heads])
            else:
                producer.send("t", b"x" * size, b"k", heads)
            outcomes.append("taken")
        except kafka_errors.MessageSizeTooLargeError:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (([None], [None]), "neither key nor value"),
        ((["k"], [b"v"]), "a key is bytes or None, not str"),
        (([b"k"], [bytearray(b"v")]), "a value is bytes or None, not bytearray"),
        (([b"k", b"l"], [b"v"]), "1 values, but 2 keys"),
        (([b"k"], [b"v"], [1, 2]), "1 values, but 2 timestamps"),
        (([b"k"], [b"v"], 2**62), "no time in milliseconds"),
        (([b"k"], [b"v"], [-2]), "no time in milliseconds"),
        (([b"k"], [b"v"], None, [[("h", None)]]), r"a header is \(str, bytes\)"),
    ],
)
def test_what_is_no_row_is_refused_before_anything_is_taken(rows: Any, error: str) -> None:
    producer = Offline(Cluster([0]))
    with pytest.raises((TypeError, ValueError), match=error):
        BulkProducer(producer).send_many("t", *rows)
    assert producer.drain_all() == {}


def test_a_closed_producer_takes_nothing() -> None:
    producer = Offline(Cluster([0]))
    many = BulkProducer(producer)
    producer._closed = True
    with pytest.raises(kafka_errors.IllegalStateError) as caught:
        many.send_many("t", [None], [b"v"])
    assert caught.value.accepted == 0
    producer._closed, producer._accumulator._closed = False, True
    with pytest.raises(kafka_errors.IllegalStateError):
        many.send_many("t", [None], [b"v"])
    assert many.held_bytes == 0


def test_a_topic_without_metadata_takes_nothing() -> None:
    producer = Offline(Cluster([]))
    many = BulkProducer(producer)
    with pytest.raises(kafka_errors.KafkaTimeoutError, match="no partitions") as caught:
        many.send_many("t", [None], [b"v"])
    assert caught.value.accepted == 0 and many.held_bytes == 0


def test_a_refused_batch_fails_its_rows_with_the_brokers_reason() -> None:
    producer = Offline(Cluster([0]))
    many = BulkProducer(producer)
    (future,) = many.send_many("t", [None] * 3, [b"v"] * 3)
    (batch,) = producer.drain()
    at_fault = kafka_errors.InvalidRecordError("row 1")
    top = kafka_errors.InvalidRecordError()
    batch.complete_exceptionally(top, lambda row: at_fault if row == 1 else kafka_errors.KafkaError("another row"))
    assert future.failed() and not future.succeeded() and future.exception is at_fault
    assert many.held_bytes == 0


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_rows_of_a_batch_that_is_cut_in_two_are_done_when_both_parts_are(failing: int | None) -> None:
    producer = Offline(Cluster([0]))
    many = BulkProducer(producer)
    (future,) = many.send_many("t", [None] * 5, [b"%d" % row for row in range(5)])
    (batch,) = producer.drain()
    assert producer._accumulator.split_and_reenqueue(batch) == 2
    producer._accumulator.deallocate(batch)
    assert batch.produce_future._latch.is_set()  # the client's own flush does not hang on it
    parts = [producer.drain()[0], producer.drain()[0]]
    assert [[row[1] for row in rows_in(part)] for part in parts] == [[b"0", b"1", b"2"], [b"3", b"4"]]
    for number, part in enumerate(parts):
        assert not future.is_done and many.held_bytes > 0
        producer.acknowledge(part, ValueError("refused") if number == failing else None)
    assert future.is_done and future.failed() == (failing is not None)
    assert many.held_bytes == 0


def transactional() -> TransactionManager:
    manager = TransactionManager(transactional_id="w", transaction_timeout_ms=1000)
    manager.set_producer_id_and_epoch(ProducerIdAndEpoch(5, 0))
    return manager


def test_a_transaction_knows_each_partition_before_its_rows_wait() -> None:
    manager = transactional()
    manager._current_state = type(manager._current_state).READY
    manager.begin_transaction()
    producer = Offline(Cluster([0, 1, 2, 3]), manager)
    many = BulkProducer(producer)
    row_keys = [b"%d" % row for row in range(40)]
    many.send_many("t", row_keys, [b"v"] * 40)
    wanted = {TopicPartition("t", number) for number in choose(row_keys, [0, 1, 2, 3], [0, 1, 2, 3])}
    assert manager._new_partitions_in_transaction == wanted


def test_outside_a_transaction_nothing_is_taken() -> None:
    producer = Offline(Cluster([0]), transactional())
    many = BulkProducer(producer)
    with pytest.raises(kafka_errors.IllegalStateError) as caught:
        many.send_many("t", [None], [b"v"])
    assert caught.value.accepted == 0 and many.held_bytes == 0
    assert not producer._accumulator.has_undrained()


def test_the_sender_is_woken_for_each_new_batch_only() -> None:
    producer = Offline(Cluster([0]), batch_size=1000)
    many = BulkProducer(producer)
    for _ in range(3):
        many.send_many("t", [None], [b"v"])
    assert producer._sender.woken == 1
    many.send_many("t", [None] * 30, [b"v" * 90] * 30)
    assert producer._sender.woken == len(producer.drain_all()[0])


def slow(monkeypatch: pytest.MonkeyPatch) -> Offline:
    return Offline(Cluster([0]), partitioner=StickyPartitioner())


def old(monkeypatch: pytest.MonkeyPatch) -> Offline:
    monkeypatch.setattr(write_check, "__version__", "3.0.11")
    return Offline(Cluster([0]))


def different(monkeypatch: pytest.MonkeyPatch) -> Offline:
    monkeypatch.setattr(write_check, "encode_headers", lambda _: b"\x00")
    return Offline(Cluster([0]))


def renamed(monkeypatch: pytest.MonkeyPatch) -> Offline:
    monkeypatch.delattr(RecordAccumulator, "_tp_lock")
    return Offline(Cluster([0]))


def raising(monkeypatch: pytest.MonkeyPatch) -> Offline:
    monkeypatch.setattr(write_check, "fill", lambda *_: 1 / 0)
    return Offline(Cluster([0]))


@pytest.fixture
def fresh_check() -> Iterator[None]:
    usable.cache_clear()
    yield
    usable.cache_clear()


@pytest.mark.usefixtures("fresh_check")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (slow, "the partitioner is StickyPartitioner"),
        (old, "3.0.11 is not between"),
        (different, "encodes a batch differently"),
        (renamed, "has no _tp_lock"),
        (raising, "ZeroDivisionError"),
    ],
)
def test_another_client_is_noticed(
    make: Callable[[pytest.MonkeyPatch], Offline], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = BulkProducer(make(monkeypatch))
    assert many.reason is not None and reason in many.reason


def test_row_by_row_holds_to_the_same_contract() -> None:
    producer = Offline(Cluster([0]), max_request_size=1000)
    many = BulkProducer(producer, bulk=False, buffer_bytes=10_000)
    futures = many.send_many("t", [b"k"] * 3, [b"a", b"b", None], NOW, [None, [("h", b"1")], []])
    with pytest.raises(kafka_errors.MessageSizeTooLargeError) as caught:
        many.send_many("t", [None] * 3, [b"c", b"x" * 2000, b"d"], [1, 2, 3])
    assert caught.value.accepted == 1
    futures += caught.value.futures
    with pytest.raises(kafka_errors.KafkaTimeoutError) as full:
        many.send_many("t", [None] * 1000, [b"y" * 50] * 1000)
    assert 0 < full.value.accepted < 1000
    (batch,) = producer.drain()
    assert rows_in(batch)[:4] == [
        (b"k", b"a", NOW, []),
        (b"k", b"b", NOW, [("h", b"1")]),
        (b"k", None, NOW, []),
        (None, b"c", 1, []),
    ]
    assert len(rows_in(batch)) == 4 + full.value.accepted
    assert not any(future.is_done for future in futures)
    producer.acknowledge(batch)
    many.flush(0)
    assert all(future.succeeded() for future in futures) and many.held_bytes == 0


class Delivery(RuleBasedStateMachine):
    """Rows are sent both ways while batches are acknowledged, refused, cut and sent again, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.producer = Offline(Cluster([0, 1]), batch_size=250)
        self.many = BulkProducer(self.producer, buffer_bytes=3_000)
        self.flying: list[Any] = []
        self.waiting: dict[Any, list[int]] = {}  # future: what it stands for
        self.next = 0
        self.accepted: set[int] = set()
        self.landed: list[int] = []
        self.refused: set[int] = set()

    @rule(count=st.integers(1, 40), size=st.integers(0, 60), spread=st.integers(1, 5))
    def send_many(self, count: int, size: int, spread: int) -> None:
        values = [b"%d " % (self.next + row) + b"x" * size for row in range(count)]
        row_keys = [b"%d" % (row % spread) for row in range(count)]
        try:
            futures, taken = self.many.send_many("t", row_keys, values), count
        except kafka_errors.KafkaTimeoutError as error:
            futures, taken = error.futures, error.accepted
        assert sum(future.rows for future in futures) == taken
        self.accepted |= set(range(self.next, self.next + taken))
        self.next += taken
        for future in futures:
            self.waiting[future] = []

    @rule()
    def send_one(self) -> None:
        future = self.producer.send("t", b"%d " % self.next, b"one")
        self.accepted.add(self.next)
        self.waiting[future] = [self.next]
        self.next += 1

    @rule()
    def drain(self) -> None:
        self.flying += self.producer.drain()

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), outcome=st.sampled_from(["done", "done", "refused", "cut", "again"]))
    def answer(self, data: st.DataObject, outcome: str) -> None:
        batch = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        numbers = [int((row[1] or b"").split()[0]) for row in rows_in(batch)]
        if outcome == "again":
            self.producer._accumulator.reenqueue(batch, now=-1e9)
        elif outcome == "cut" and len(numbers) > 1:
            self.producer._accumulator.split_and_reenqueue(batch, now=-1e9)
            self.producer._accumulator.deallocate(batch)
        elif outcome == "refused":
            self.refused |= set(numbers)
            self.producer.acknowledge(batch, ValueError("refused"))
        else:
            self.landed += numbers
            self.producer.acknowledge(batch)

    @invariant()
    def what_is_held_is_what_is_not_done(self) -> None:
        held = sum(getattr(future, "_size", 0) for future in self.waiting if not future.is_done)
        assert self.many.held_bytes == held <= 3_000

    def teardown(self) -> None:
        while batches := self.flying or self.producer.drain():
            for batch in batches:
                self.landed += [int((row[1] or b"").split()[0]) for row in rows_in(batch)]
                self.producer.acknowledge(batch)
            self.flying = []
        assert sorted([*self.landed, *self.refused]) == sorted(self.accepted)
        assert all(future.is_done for future in self.waiting)
        assert any(future.failed() for future in self.waiting) == bool(self.refused)
        assert self.many.held_bytes == 0 and not self.producer._accumulator.has_incomplete


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
