"""Odd topics: what each of them means to a worker.

| what is odd | what the worker does |
|---|---|
| record without a value (tombstone) | dead letter, reason `tombstone`; kept apart from an empty value |
| value without bytes | dead letter, reason `empty` |
| headers | not looked at; they go with a dead letter, and back with a replay |
| several records with one id | each is answered; a label joins the newest, another label a record yet to come |
| times that go backwards | taken as they are; the stream's time, by which labels are due, never goes back |
| no time (-1) | the time of its reading |
| LogAppendTime | the broker's time counts as the record's |
| offsets missing (compacted, aborted) | passed over; lag reaches 0, and the position is past them |
| transaction marks at the end | passed over; lag reaches 0 |
| transaction of another still open | records from it on are not read, and are no lag; they come when it is committed |
| truncated (retention, DeleteRecords) below the position | nothing happens |
| truncated beyond the position | KAFKA__OUT_OF_RANGE: `fail` ends with 2, the others jump, log and count the missed |
| new partitions | found within KAFKA__METADATA_MAX_AGE_MS, read from their beginning, also with KAFKA__START=latest |
| deleted while running | not ready, says so once, lives on and waits |
| made anew under its name | told by the topic's id; begins again by KAFKA__OUT_OF_RANGE (`fail`: ends with 2) |
| the same while the worker was down | told by the checkpoint's topic id; without it, by an offset beyond the end |
| label topic: new partitions | read from their beginning |
| label topic deleted, made anew | answers go on without labels; the new one is read from its beginning |
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError

from daemon.errors import StreamError
from daemon.labels import FACTS, LabelJoin
from daemon.records import Labels, RawBatch
from daemon.stream_settings import KafkaClient
from daemon.streams.codecs import codec
from daemon.streams.kafka import KafkaSource
from daemon.streams.kafka_labels import KafkaLabels
from tests.daemon_process import eventually
from tests.kafka import create_topic, produce, produce_to_new

Made = Callable[..., KafkaSource]


class Reader:
    """A source, and all that it gave."""

    def __init__(self, source: KafkaSource) -> None:
        self.source = source
        self.values: list[bytes | None] = []
        self.offsets: list[int] = []
        self.batches: list[RawBatch] = []
        self.skipped = 0

    def poll(self, rows: int = 500) -> RawBatch:
        raw = self.source.poll(rows, 0.1)
        self.skipped += sum(start.skipped for start in self.source.take_starts().values())
        self.source.take_revoked()
        self.values += raw.unpack()
        self.offsets += raw.offsets
        self.batches += [raw] if len(raw) else []
        return raw

    def until(self, what: str, claim: Callable[[], bool]) -> None:
        def reached() -> bool:
            self.poll()
            return claim()

        eventually(what, reached)

    def until_at_end(self, count: int) -> None:
        def ended() -> bool:
            return len(self.offsets) >= count and self.source.lag() == 0 and self.source.ready()

        self.until(f"{count} records, and no lag", ended)


@pytest.fixture
def read(kafka_broker: str) -> Iterator[Callable[..., Reader]]:
    """``read(topic, positions=None, topic_id="", **settings)``: an open source in a group of its own."""
    with contextlib.ExitStack() as opened:

        def make(topic: str, positions: dict[str, int] | None = None, topic_id: str = "", **settings: Any) -> Reader:
            given = {"group": f"g-{uuid.uuid4().hex[:8]}", "instance_id": "", "metadata_max_age_ms": 1000} | settings
            source = KafkaSource(f"kafka://{kafka_broker}/{topic}", KafkaClient(**given))
            source.topic.topic_id = topic_id
            opened.callback(source.close)
            source.open(positions)
            return Reader(source)

        yield make


@pytest.fixture
def admin(kafka_broker: str) -> Iterator[KafkaAdminClient]:
    with KafkaAdminClient(bootstrap_servers=kafka_broker) as client:
        yield client


@contextlib.contextmanager
def transactions(address: str) -> Iterator[Any]:
    producer = KafkaProducer(bootstrap_servers=address, transactional_id=uuid.uuid4().hex, retry_backoff_ms=10)
    try:
        producer.init_transactions()
        yield producer
    finally:
        producer.close()


def recreate(admin: KafkaAdminClient, address: str, topic: str, values: list[bytes], partitions: int = 1) -> None:
    admin.delete_topics([topic])
    create_again(admin, address, topic, partitions)
    produce(address, topic, values, partition=0)


def create_again(admin: KafkaAdminClient, address: str, topic: str, partitions: int = 1) -> None:
    def there() -> bool:
        # The broker refuses the name for a moment while it removes the files.
        with contextlib.suppress(KafkaError):
            create_topic(address, topic, partitions)
        return topic in admin.list_topics()

    eventually(f"{topic} is gone", lambda: topic not in admin.list_topics())
    eventually(f"{topic} is there again", there)


def configure(admin: KafkaAdminClient, kind: Any, name: str, **settings: str) -> None:
    admin.alter_configs([ConfigResource(kind, name, {key.replace("_", "."): item for key, item in settings.items()})])


def test_tombstones_empty_values_headers_and_times_come_as_they_are(
    kafka_broker: str, topic: Callable[..., str], read: Callable[..., Reader], admin: KafkaAdminClient
) -> None:
    name = topic()
    with KafkaProducer(bootstrap_servers=kafka_broker) as producer:
        for value, ms in ((None, 5_000), (b"", 2_000), (b'{"id":"a","x":[1]}', -1), (b'{"id":"b","x":[1]}', 1_000)):
            headers = [("h", b"\x00"), ("h", b"2")] if value == b"" else None
            producer.send(name, value, b"k", headers=headers, timestamp_ms=ms)
    configure(admin, ConfigResourceType.TOPIC, name, message_timestamp_type="LogAppendTime")
    produce(kafka_broker, name, [b'{"id":"c","x":[1]}'] * 2)
    reader = read(name)
    reader.until_at_end(6)
    raw = reader.batches[0]
    for more in reader.batches[1:]:
        raw.values += more.unpack()
        raw.keys += more.keys
        raw.times_s += more.times_s
        raw.partitions += more.partitions
        raw.offsets += more.offsets
        raw.headers |= more.headers
    assert raw.values[:2] == [None, b""]
    assert raw.headers == {(f"{name}/0", 1): [("h", b"\x00"), ("h", b"2")]}
    assert (raw.times_s[0], raw.times_s[1], raw.times_s[3]) == (5.0, 2.0, 1.0)
    # Without a time, that of the reading; with LogAppendTime, the broker's.
    assert all(1e9 < time_s < 1e10 for time_s in (raw.times_s[2], raw.times_s[4], raw.times_s[5]))
    batch = codec("json", (1,)).decode(raw)
    assert [letter.reason for letter in batch.dead] == ["tombstone", "empty"]
    assert batch.ids == ["a", "b", "c", "c"]

    # Of two records with one id the label joins the newest, and the stream's time never goes back.
    join = LabelJoin((1,), window=10, max_bytes=1 << 20)
    facts = np.zeros((4, len(FACTS)), np.float32)
    facts[:, 0] = range(4)
    join.predicted(batch.ids, batch.x, facts, float(batch.times_s.max()))
    assert join.now == float(batch.times_s.max())
    join.offer(Labels(["c", "c", "a"], [1, 0, 1], [0.0, 0.0, 0.0]))
    joined = join.due()
    assert joined is not None and joined.served.tolist() == [3.0, 0.0]


def test_missing_offsets_and_transaction_marks_leave_no_lag(
    kafka_broker: str, topic: Callable[..., str], read: Callable[..., Reader]
) -> None:
    name = topic()
    with transactions(kafka_broker) as producer:
        for number, ends in enumerate(("commit", "abort", "commit", "abort")):
            producer.begin_transaction()
            producer.send(name, b"%d" % number)
            producer.flush()
            (producer.commit_transaction if ends == "commit" else producer.abort_transaction)()
        reader = read(name)
        reader.until_at_end(2)
        assert (reader.values, reader.offsets) == ([b"0", b"2"], [0, 4])
        assert reader.batches[-1].next_positions() == {f"{name}/0": 5}

        # What a transaction that is still open holds can't be had: it is no lag, and a batch does not wait for it.
        producer.begin_transaction()
        producer.send(name, b"open")
        producer.flush()
        produce(kafka_broker, name, [b"behind it"])
        behind = TopicPartition(name, 0)
        reader.until("the broker tells of both", lambda: reader.source._consumer.highwater(behind) == 10)
        reader.until_at_end(2)
        assert len(reader.values) == 2
        producer.commit_transaction()
        reader.until_at_end(4)
        assert reader.values[2:] == [b"open", b"behind it"]
    # From the committed position, before the marks at the end, the next start finds its way to the end too.
    again = read(name, {f"{name}/0": 10})
    again.until_at_end(0)
    assert again.values == []


def test_a_compacted_topic_is_read_to_its_end(
    kafka_broker: str, topic: Callable[..., str], read: Callable[..., Reader], admin: KafkaAdminClient
) -> None:
    name = topic()
    quickly = {"cleanup_policy": "compact", "segment_ms": "1", "min_cleanable_dirty_ratio": "0.001"}
    configure(admin, ConfigResourceType.TOPIC, name, **quickly, max_compaction_lag_ms="1", min_compaction_lag_ms="0")
    configure(admin, ConfigResourceType.BROKER, "1", log_cleaner_backoff_ms="50")
    try:
        produce(kafka_broker, name, [b"%d" % number for number in range(40)], [b"k%d" % (n % 4) for n in range(40)])

        def compacted() -> bool:
            # A segment is closed by the next record, and only a closed one is compacted.
            produce(kafka_broker, name, [b"last"], [b"last"])
            reader = read(name)
            reader.until("no lag", lambda: reader.source.lag() == 0)
            return len(reader.values) < 20

        eventually("most of the records were superseded", compacted)
    finally:
        configure(admin, ConfigResourceType.BROKER, "1", log_cleaner_backoff_ms="15000")
    reader = read(name)
    reader.until("no lag", lambda: reader.source.lag() == 0)
    last = reader.offsets[-1]
    assert reader.batches[-1].next_positions() == {f"{name}/0": last + 1}
    assert len(reader.offsets) < last + 1 and reader.values[-1] == b"last"
    # A position in a gap is none that is missing.
    gap = next(offset for offset in range(last) if offset not in reader.offsets)
    inside = read(name, {f"{name}/0": gap})
    inside.until("no lag", lambda: inside.source.lag() == 0)
    after = read(name)
    after.until("no lag", lambda: after.source.lag() == 0)
    # The cleaner may have come by again: what all of them could read is read, and in order.
    assert inside.offsets == sorted(inside.offsets) and inside.values[-1] == b"last" and inside.skipped == 0
    assert {n for n in after.offsets if n > gap} <= set(inside.offsets) <= {n for n in reader.offsets if n > gap}


@pytest.mark.parametrize("policy", ["fail", "earliest"])
def test_a_topic_truncated_under_a_reader_that_is_behind_goes_by_the_policy(
    kafka_broker: str, topic: Callable[..., str], read: Callable[..., Reader], admin: KafkaAdminClient, policy: str
) -> None:
    name = topic()
    produce(kafka_broker, name, [bytes(300_000)] * 30)  # more than the client fetches ahead
    reader = read(name, out_of_range=policy)
    reader.until("a record", lambda: len(reader.offsets) > 0)
    admin.delete_records({TopicPartition(name, 0): 28})
    if policy == "fail":
        with pytest.raises(StreamError, match=rf"offset \d+ of {name}/0 is not on the broker.*OUT_OF_RANGE"):
            reader.until("never", lambda: reader.source.lag() == 0)
        return
    reader.until("no lag", lambda: reader.source.lag() == 0 and reader.offsets[-1] == 29)
    assert reader.offsets[-2:] == [28, 29] and len(set(reader.offsets)) == len(reader.offsets)
    # Each record was given out, or is counted as missed.
    assert len(reader.offsets) + reader.skipped == 30 and reader.skipped > 0


@pytest.mark.parametrize("running", [True, False])
def test_new_partitions_are_read_from_their_beginning_even_by_a_group_that_began_at_the_end(
    kafka_broker: str, topic: Callable[..., str], read: Callable[..., Reader], admin: KafkaAdminClient, running: bool
) -> None:
    name, group = topic(), f"g-{uuid.uuid4().hex[:8]}"
    produce(kafka_broker, name, [b"before"])
    reader = read(name, start="latest", group=group)
    reader.until_at_end(0)
    reader.source.commit({f"{name}/0": 1}, "note")
    if not running:
        reader.source.close()
    admin.create_partitions({name: 3})
    produce_to_new(kafka_broker, name, [b"early"], 2)
    if not running:
        reader = read(name, start="latest", group=group)
    reader.until("the record in the new partition", lambda: b"early" in reader.values)
    produce(kafka_broker, name, [b"old"], partition=0)
    reader.until("a record in the old one", lambda: b"old" in reader.values)
    assert b"before" not in reader.values
    reader.until_at_end(2)


def test_a_topic_deleted_while_it_is_read_is_waited_for_and_begins_again(
    kafka_broker: str, topic: Callable[..., str], read: Callable[..., Reader], admin: KafkaAdminClient
) -> None:
    name = topic()
    produce(kafka_broker, name, [b"old %d" % number for number in range(5)])
    jumping, failing = read(name, out_of_range="earliest"), read(name)
    jumping.until_at_end(5)
    failing.until_at_end(5)
    jumping.source.commit({f"{name}/0": 5}, "note")
    admin.delete_topics([name])
    jumping.until("not ready", lambda: not jumping.source.ready())
    failing.until("not ready", lambda: not failing.source.ready())
    # More records than the old one had: its offset 5 lies within the new topic, and would skip five of them.
    fresh = [b"new %d" % number for number in range(8)]
    create_again(admin, kafka_broker, name)
    produce(kafka_broker, name, fresh)
    jumping.until_at_end(13)
    assert jumping.values[5:] == fresh
    with pytest.raises(StreamError, match=f"{name}.*was deleted and made anew.*OUT_OF_RANGE"):
        failing.until("never", lambda: len(failing.values) > 5)


def test_a_topic_made_anew_while_the_worker_was_down_is_told_by_its_id_or_by_an_offset_beyond_its_end(
    kafka_broker: str, topic: Callable[..., str], read: Callable[..., Reader], admin: KafkaAdminClient
) -> None:
    name = topic()
    produce(kafka_broker, name, [b"old"] * 3)
    before = read(name)
    before.until_at_end(3)
    positions, topic_id = {f"{name}/0": 3}, before.source.topic.topic_id
    assert topic_id
    before.source.close()
    recreate(admin, kafka_broker, name, [b"new %d" % number for number in range(4)])
    with pytest.raises(StreamError, match="was deleted and made anew"):
        read(name, positions, topic_id)
    reader = read(name, positions, topic_id, out_of_range="earliest", start="latest")
    reader.until_at_end(4)
    assert reader.offsets == [0, 1, 2, 3] and reader.source.topic.topic_id != topic_id
    # Its id not known: an offset that the new topic does not have shows it all the same.
    unknown = read(name, {f"{name}/0": 30})
    with pytest.raises(StreamError, match=rf"{name}/0: offset 30 .* is not on the broker: it holds 0 to 4"):
        unknown.until("never", lambda: bool(unknown.values))
    jumped = read(name, {f"{name}/0": 30}, out_of_range="earliest")
    jumped.until_at_end(4)


def test_a_label_topic_may_grow_and_may_be_made_anew(
    kafka_broker: str, topic: Callable[..., str], admin: KafkaAdminClient
) -> None:
    name = topic()
    produce(kafka_broker, name, [b'{"id":"a","y":1}'])
    labels = KafkaLabels(f"kafka://{kafka_broker}/{name}", KafkaClient(metadata_max_age_ms=1000))
    labels.open(None)
    found: list[str] = []

    def has(*ids: str) -> bool:
        found.extend(labels.poll(0.1).ids)
        return set(ids) <= set(found)

    try:
        eventually("the first label", lambda: has("a"))
        eventually("its end", labels.at_end)
        admin.create_partitions({name: 2})
        produce_to_new(kafka_broker, name, [b'{"id":"b","y":1}'], 1)
        eventually("a label in the new partition", lambda: has("b"))
        assert labels.positions() == {f"{name}/0": 1, f"{name}/1": 1}
        recreate(admin, kafka_broker, name, [b'{"id":"c","y":1}', b'{"id":"d","y":2}'], partitions=2)
        eventually("labels of the new topic, from its beginning", lambda: has("c", "d"))
        assert set(found) == {"a", "b", "c", "d"}
        assert labels.positions()[f"{name}/0"] == 2
        # A label of somebody's open transaction is not waited for.
        with transactions(kafka_broker) as producer:
            producer.begin_transaction()
            producer.send(name, b'{"id":"e","y":1}', partition=0)
            producer.flush()
            first = TopicPartition(name, 0)
            eventually("the broker tells of it", lambda: not has("e") and labels._consumer.highwater(first) == 3)
            eventually("at the end", labels.at_end)
            producer.commit_transaction()
            eventually("the label", lambda: has("e"))
    finally:
        labels.close()
