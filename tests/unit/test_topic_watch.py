"""What is concluded from a topic's metadata and offsets; on a real broker in tests/integration/test_odd_topics.py."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from kafka import TopicPartition

from daemon.errors import StreamError
from daemon.streams import topic_watch
from daemon.streams.kafka_client import Address
from daemon.streams.kafka_mending import mend_consumer
from daemon.streams.topic_watch import StableEnds, TopicWatch

ZERO, ONE = TopicPartition("t", 0), TopicPartition("t", 1)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(topic_watch, "time", made)
    return made


class Client:
    """Consumer and its metadata in one."""

    def __init__(self) -> None:
        self.id: uuid.UUID | None = uuid.uuid4()
        self.numbers: set[int] | None = {0}
        self.assigned = {ZERO}
        self.offsets: dict[TopicPartition, int] = {}
        self.highwaters = {ZERO: 10}
        self.ends = {ZERO: 10}
        self.asked = 0
        self.config: dict[str, Any] = {"allow_auto_create_topics": True}

    @property
    def _cluster(self) -> Client:
        return self

    def topic_id(self, topic: str) -> uuid.UUID | None:
        return self.id

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return self.numbers

    def assignment(self) -> set[TopicPartition]:
        return self.assigned

    def committed(self, partition: TopicPartition, timeout_ms: int) -> int | None:
        return self.offsets.get(partition)

    def highwater(self, partition: TopicPartition) -> int | None:
        return self.highwaters.get(partition)

    def position(self, partition: TopicPartition, timeout_ms: int) -> int:
        return 4

    def end_offsets(self, partitions: list[TopicPartition], timeout_ms: int) -> dict[TopicPartition, int]:
        self.asked += 1
        return {partition: self.ends[partition] for partition in partitions}


def watch(client: Client, topic_id: str = "") -> TopicWatch:
    made = TopicWatch(Address.parse("kafka://h:1/t", "HOMEOSTAT_SOURCE"), topic_id)
    made.open(client, [TopicPartition("t", number) for number in client.numbers or ()])
    return made


def test_a_topic_is_another_once_when_its_id_changes_and_never_while_there_is_none() -> None:
    client = Client()
    made = watch(client)
    assert made.topic_id == str(client.id) and not made.look()
    # A broker gives an unknown topic the id zero.
    client.id, client.numbers = uuid.UUID(int=0), None
    assert not made.look() and made.gone
    client.id = None
    assert not made.look() and made.gone
    client.id, client.numbers = uuid.uuid4(), {0}
    assert made.look() and not made.gone
    assert not made.look()


def test_positions_of_another_topic_are_told_at_the_start_and_unknown_ids_are_not_judged() -> None:
    client = Client()
    address = Address.parse("kafka://h:1/t", "HOMEOSTAT_SOURCE")
    for known, another in (("", False), (str(client.id), False), (str(uuid.uuid4()), True)):
        assert TopicWatch(address, known).open(client, [ZERO]) == another
    client.id = None
    assert not TopicWatch(address, "known").open(client, [ZERO])
    assert not TopicWatch(address, "known").open(object(), [ZERO])


def test_a_worker_never_makes_a_deleted_topic_anew_itself() -> None:
    client = Client()
    mend_consumer(client)
    assert client.config == {"allow_auto_create_topics": False}


def test_fail_ends_the_worker_and_says_what_to_set() -> None:
    made = watch(Client())
    with pytest.raises(StreamError, match=r"HOMEOSTAT_SOURCE=kafka://h:1/t: .*HOMEOSTAT_KAFKA__OUT_OF_RANGE=earliest"):
        made.recreated("fail")
    made.recreated("latest")
    assert made.begins(ZERO, {}, "earliest") == "latest"


@pytest.mark.parametrize(
    ("partition", "file", "offsets", "begins"),
    [
        (ZERO, {}, {}, "latest"),  # a new group
        (ZERO, {"t/1": 5}, {}, "earliest"),  # the checkpoint knows the others
        (ZERO, {}, {ONE: 5}, "earliest"),  # the group does
        (ZERO, {}, {ONE: 0}, "earliest"),
        (TopicPartition("t", 2), {}, {}, "earliest"),  # was not there at the start
    ],
)
def test_latest_is_for_new_groups_and_not_for_new_partitions(
    partition: TopicPartition, file: dict[str, int], offsets: dict[TopicPartition, int], begins: str
) -> None:
    client = Client()
    client.numbers, client.offsets = {0, 1}, offsets
    made = watch(client)
    assert made.begins(partition, file, "latest") == begins
    assert made.begins(partition, file, "earliest") == "earliest"


def test_a_group_that_gives_out_no_partition_of_a_topic_that_is_back_is_joined_again_a_few_times(clock: Clock) -> None:
    client = Client()
    made = watch(client)
    client.assigned, client.numbers = set(), None
    made.look()
    clock.now += 60
    assert not made.left_out()  # there is nothing to give out
    client.numbers = {0}
    made.look()
    assert not made.left_out()
    times = 0
    for _ in range(100):
        clock.now += 1.0
        times += made.left_out()
    assert times == 5
    # One that gets its partition does not.
    client.numbers = None
    made.look()
    client.numbers = {0}
    made.look()
    client.assigned = {ZERO}
    clock.now += 60
    assert not made.left_out()


def test_records_that_can_not_be_had_are_no_lag_and_are_asked_about_rarely(clock: Clock) -> None:
    client, ends = Client(), StableEnds()
    client.ends[ZERO] = 4  # an open transaction begins there
    ends.heard()
    assert ends.lag(client, {ZERO}) == 6 and client.asked == 0  # records came just now: most likely more do
    clock.now += 1.0
    assert ends.lag(client, {ZERO}) == 0 and client.asked == 1
    for _ in range(20):
        clock.now += 0.01
        assert ends.lag(client, {ZERO}) == 0
    assert client.asked == 1
    client.highwaters[ZERO] = 11  # it was committed, or more came
    assert ends.lag(client, {ZERO}) == 7
    client.ends[ZERO] = 11
    clock.now += 1.0
    assert ends.lag(client, {ZERO}) == 7
    client.highwaters[ZERO] = 4
    assert ends.lag(client, {ZERO}) == 0
    assert ends.lag(client, set()) is None
    client.highwaters.clear()
    assert ends.lag(client, {ZERO}) is None
