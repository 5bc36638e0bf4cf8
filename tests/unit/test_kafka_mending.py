"""What is mended of kafka-python, on objects that have what it needs and on such that have not."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import errors as kafka_errors

from daemon.streams.kafka_mending import mend_consumer, mend_producer, next_records


def test_a_poll_does_not_sleep_beside_records_that_came_between_its_lines() -> None:
    fetcher = SimpleNamespace(_completed_fetches=["came"], fetch_records=lambda most, timeout_ms: ({}, True))
    consumer = SimpleNamespace(_cluster=SimpleNamespace(config={"allow_auto_create_topics": True}), _fetcher=fetcher)
    mend_consumer(consumer)
    assert fetcher.fetch_records(1, timeout_ms=100) == ({}, False)
    fetcher._completed_fetches.clear()
    assert fetcher.fetch_records(1, timeout_ms=100) == ({}, True)
    assert consumer._cluster.config == {"allow_auto_create_topics": False}


def test_the_clients_thread_is_asked_only_while_no_coordinator_is_known_and_connected() -> None:
    asked: list[float | None] = []
    away: set[int] = set()

    def ask(timeout_ms: float | None = None) -> bool:
        asked.append(timeout_ms)
        return False

    coordinator: Any = SimpleNamespace(
        ensure_coordinator_ready=ask, coordinator_id=None, _client=SimpleNamespace(is_disconnected=away.__contains__)
    )
    mend_consumer(SimpleNamespace(_coordinator=coordinator))
    assert not coordinator.ensure_coordinator_ready(timeout_ms=7) and asked == [7]
    coordinator.coordinator_id = 1
    assert coordinator.ensure_coordinator_ready(timeout_ms=8) and asked == [7]
    away.add(1)
    assert not coordinator.ensure_coordinator_ready() and asked == [7, None]


class Joining:
    """A consumer whose coordinator is in the middle of a join."""

    def __init__(self, *, rejoining: bool, needed: bool) -> None:
        self._coordinator = self
        self._lock = threading.RLock()
        self.rejoining, self.rejoin_needed = rejoining, needed
        self.polled: list[tuple[int, int]] = []

    def need_rejoin(self) -> bool:
        return self.rejoin_needed

    def request_rejoin(self) -> None:
        self.rejoin_needed = True

    def poll(self, timeout_ms: int, max_records: int) -> dict[str, Any]:
        self.polled.append((timeout_ms, max_records))
        return {}


@pytest.mark.parametrize(
    ("rejoining", "needed", "timeout_ms", "needed_then"),
    [(False, False, 5, False), (True, False, 500, True), (True, True, 500, True), (False, True, 500, True)],
)
def test_a_join_that_was_left_is_taken_up_and_has_time(
    rejoining: bool, needed: bool, timeout_ms: int, needed_then: bool
) -> None:
    consumer = Joining(rejoining=rejoining, needed=needed)
    next_records(consumer, 7, 5)
    assert consumer.polled == [(timeout_ms, 7)] and consumer.rejoin_needed == needed_then


def test_a_dead_coordinator_is_one_that_is_not_ready() -> None:
    def await_ready(node: int, timeout_ms: int) -> bool:
        if node == 1:
            raise kafka_errors.KafkaConnectionError("refused")
        return True

    client = SimpleNamespace(await_ready=await_ready)
    mend_producer(SimpleNamespace(_sender=SimpleNamespace(_client=client)))
    assert not client.await_ready(1, timeout_ms=10)
    assert client.await_ready(2, timeout_ms=10)


def test_a_client_of_another_making_is_left_alone() -> None:
    bare = SimpleNamespace(poll=lambda timeout_ms, max_records: {"p": [timeout_ms, max_records]})
    mend_consumer(bare)
    mend_producer(bare)
    assert next_records(bare, 3, 5) == {"p": [5, 3]}
