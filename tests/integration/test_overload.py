"""Nothing of ours gets a worker evicted: a sink that stands still for longer than the group waits between two polls."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from daemon.broker import TrialBroker
from daemon.pressure import GroupSource, SheddingSource
from daemon.service import Service
from daemon.stream_settings import KafkaClient
from daemon.streams import kafka as kafka_stream
from daemon.streams import kafka_sink, open_sink, open_source
from daemon.streams.bulk.write import BulkProducer
from daemon.streams.codecs import codec
from daemon.streams.kafka import KafkaSource
from tests.daemon_process import answers as answers_of
from tests.daemon_process import eventually, ids
from tests.kafka import produce
from tests.unit.worlds import records, worker

MAX_POLL_S = 12.0
"""The group's patience in these tests, in place of 300 s. A checkpoint alone may flush for 5 s without a poll."""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that gives a member's partitions away after `MAX_POLL_S` without a poll."""
    consumer = functools.partial(KafkaConsumer, max_poll_interval_ms=int(MAX_POLL_S * 1000), heartbeat_interval_ms=1000)
    monkeypatch.setattr(kafka_stream, "KafkaConsumer", consumer)


@pytest.fixture
def answers_broker(trial_kafka: None, tmp_path: Path) -> Iterator[TrialBroker]:
    """A broker that takes nothing but answers, and can be stopped without the group noticing."""
    with TrialBroker(tmp_path / "answers", port=0) as broker:
        yield broker
        _signal(broker, signal.SIGCONT)


def _signal(broker: TrialBroker, number: int) -> None:
    assert broker._node is not None
    os.kill(broker._node.pid, number)


class Running:
    """A service in a thread of its own, on real streams."""

    def __init__(self, folder: Path, source: str, sink: str, group: str, **changes: Any) -> None:
        made = worker(folder, source=source, sink=sink, kafka={"group": group, "session_timeout_ms": 6000}, **changes)
        kafka = made.settings.kafka
        made.source = open_source(source, codec("json", (4,)), kafka=kafka)
        made.sink = made.loop.sink = open_sink(sink, dead_letters_url="null:", kafka=kafka)
        self.lost: list[Any] = []
        brokers, self._topic = source.removeprefix("kafka://").split("/")
        self._watcher = KafkaConsumer(bootstrap_servers=brokers, group_id=group, enable_auto_commit=False)
        self.service = Service(made)
        self.service.start()
        listener = made.source._listener  # type: ignore[attr-defined]
        noted = listener.on_partitions_lost
        listener.on_partitions_lost = lambda lost: (self.lost.extend(lost), noted(lost))
        self.source = made.source
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self.service._stop.is_set():
                self.service.turn()
            self.service._drain()
        except BaseException as error:
            self.failed = error

    def committed(self) -> int:
        """The group's offset, as another client is told."""
        found = self._watcher.committed(TopicPartition(self._topic, 0))
        return found or 0

    def stop(self) -> None:
        self.service.stop()
        self._thread.join(30)
        self.service.close()
        self._watcher.close(autocommit=False)
        assert self.failed is None, self.failed


def test_the_source_can_stay_a_member_and_skip(topic: Callable[..., str], kafka_broker: str) -> None:
    name = topic(partitions=2)
    for number in (0, 1):
        produce(kafka_broker, name, records(100), partition=number)
    source = open_source(f"kafka://{kafka_broker}/{name}", codec("json", (4,)), kafka=KafkaClient(group=f"g-{name}"))
    assert isinstance(source, GroupSource) and isinstance(source, SheddingSource)
    source.open(None)
    try:
        read: list[tuple[str, int]] = []

        def take(rows: int) -> int:
            got = source.poll(rows, 0.1)
            read.extend(zip(got.partitions, got.offsets, strict=True))
            return len(got)

        eventually("records of both partitions", lambda: take(20) and (source.lag() or 0) + len(read) == 200)
        source.keep_alive()
        lag = source.lag()
        assert lag == 200 - len(read) and lag > 0
        skipped = source.skip(lag // 2)
        count = sum(after - before for before, after in skipped.values())
        assert abs(count - lag // 2) <= 2
        eventually("what was not skipped", lambda: take(50) + 1 and len(read) >= 200 - count)
        left_out = {(part, offset) for part, (start, stop) in skipped.items() for offset in range(start, stop)}
        everything = {(f"{name}/{number}", offset) for number in (0, 1) for offset in range(100)}
        assert set(read) | left_out == everything and len(read) + len(left_out) == len(everything)
    finally:
        source.close()


@pytest.mark.slow
# The counter-check, without signs of life, is of the long form.
@pytest.mark.parametrize("patient", [True, False] if os.environ.get("HOMEOSTAT_LONG") == "1" else [True])
def test_a_sink_that_stands_still_for_longer_than_the_group_waits_costs_no_partition(
    patient: bool,
    impatient: None,
    topic: Callable[..., str],
    kafka_broker: str,
    answers_broker: TrialBroker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not patient:
        monkeypatch.setattr(KafkaSource, "keep_alive", lambda self: None)
    # So that `send` itself stands still, as it does with the real bound after minutes.
    monkeypatch.setattr(kafka_sink, "BulkProducer", functools.partial(BulkProducer, buffer_bytes=1_024))
    name = topic()
    group = f"g-{name}"
    produce(kafka_broker, name, records(64))
    running = Running(
        tmp_path,
        f"kafka://{kafka_broker}/{name}",
        f"kafka://{answers_broker.address}/{name}.answers",
        group,
        checkpoint={"every_s": 0.2},
    )
    try:
        eventually("the first are committed", lambda: running.committed() == 64)
        _signal(answers_broker, signal.SIGSTOP)
        stopped = time.monotonic()
        produce(kafka_broker, name, records(192, first=64))
        eventually("it waits for the sink", lambda: running.service.progress.waiting)
        waited = lambda: time.monotonic() - stopped > 2 * MAX_POLL_S  # noqa: E731
        eventually("twice the group's patience has passed", waited)
        assert running.committed() == 64
        _signal(answers_broker, signal.SIGCONT)
        eventually("the rest is committed", lambda: running.committed() == 256)
    finally:
        _signal(answers_broker, signal.SIGCONT)
        running.stop()
    assert bool(running.lost) is not patient
    found = ids(answers_of(answers_broker.address, f"{name}.answers"))
    if patient:
        assert sorted(found, key=int) == [str(row) for row in range(256)]
    assert set(found) == {str(row) for row in range(256)}
