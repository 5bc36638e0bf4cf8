"""Which offsets a worker may commit. What needs a broker is tested on one, in tests/integration."""

from __future__ import annotations

from typing import Any

import pytest
from kafka import TopicPartition

from daemon.errors import StreamError
from daemon.stream_settings import KafkaClient
from daemon.streams.kafka import KafkaSource
from daemon.streams.kafka_client import Address
from daemon.streams.kafka_group import Rebalance


class Recorder:
    """Stands where the client stands, and keeps what is committed."""

    def __init__(self) -> None:
        self.commits: list[dict[str, int]] = []

    def commit(self, offsets: dict[TopicPartition, Any], timeout_ms: int) -> None:
        self.commits.append({f"{part.topic}/{part.partition}": item.offset for part, item in offsets.items()})

    def pause(self, partition: TopicPartition) -> None:
        pass


@pytest.fixture
def source() -> KafkaSource:
    made = KafkaSource("kafka://127.0.0.1:9/t", KafkaClient())
    made._consumer = Recorder()
    made._listener = Rebalance(made._consumer.pause)
    made._placed = {TopicPartition("t", 0), TopicPartition("t", 1)}
    return made


def test_offsets_of_partitions_that_are_another_workers_are_never_committed(source: KafkaSource) -> None:
    source.commit({"t/0": 10, "t/7": 3, "other/0": 5}, "note")
    assert source._consumer.commits == [{"t/0": 10}]


def test_a_revoked_partition_is_committed_once_more_and_a_lost_one_is_not(source: KafkaSource) -> None:
    source._listener.on_partitions_revoked([TopicPartition("t", 0)])
    source._listener.on_partitions_lost([TopicPartition("t", 1)])
    assert source.take_revoked() == ({"t/0"}, {"t/1"})
    source.commit({"t/0": 10, "t/1": 20}, "note")
    assert source.take_revoked() == (set(), set())
    source.commit({"t/0": 11, "t/1": 21}, "note")
    assert source._consumer.commits == [{"t/0": 10}]


def test_a_worker_without_a_partition_is_not_at_the_end_of_its_stream(source: KafkaSource) -> None:
    source._placed.clear()
    assert source.lag() is None and source.can_fill(1)


@pytest.mark.parametrize("url", ["kafka://", "kafka://host/t", "kafka://h:1", "kafka://h:1/a/b", "kafka:///t"])
def test_an_address_without_a_broker_or_a_topic_is_refused_by_variable_and_value(url: str) -> None:
    with pytest.raises(StreamError, match=rf"HOMEOSTAT_SOURCE={url}: .*right would be kafka://"):
        Address.parse(url, "HOMEOSTAT_SOURCE")


def test_several_brokers_may_be_named() -> None:
    assert Address.parse("kafka://a:1,b:2/topic", "V").servers == ["a:1", "b:2"]
