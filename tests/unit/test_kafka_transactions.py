"""Transactions of one producer: what is begun, ended, aborted, and what is said when one fails."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from kafka import errors as kafka_errors

from daemon.errors import StreamError, TransactionError
from daemon.streams.kafka_transactions import Transactions


class Producer:
    """Notes what is asked of it; a commit waits for ``gate`` and then raises ``refusal``."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.refusal = refusal
        self.gate = threading.Event()
        self.gate.set()
        self.slow_opens = 0

    def init_transactions(self) -> None:
        self.asked.append("init")
        if self.slow_opens:
            self.slow_opens -= 1
            raise kafka_errors.KafkaTimeoutError("not yet")

    def begin_transaction(self) -> None:
        self.asked.append("begin")

    def send_offsets_to_transaction(self, offsets: dict[Any, Any], group: Any) -> None:
        self.asked.append((offsets, group))

    def commit_transaction(self) -> None:
        assert self.gate.wait(30)
        if self.refusal is not None:
            raise self.refusal
        self.asked.append("commit")

    def abort_transaction(self) -> None:
        self.asked.append("abort")


def never(reason: str) -> None:
    raise AssertionError(f"nothing to wait for: {reason}")


def test_what_is_sent_opens_one_and_its_end_commits_the_offsets_with_it() -> None:
    producer = Producer()
    many = Transactions(producer, "line-1")
    many.open(time.monotonic())
    many.begin(never)
    many.begin(never)
    many.end({"p": 7}, "member", never)
    many.settle(30)
    many.end({}, "member", never)  # no record was read, nothing was sent
    many.settle(30)
    many.close(30)
    assert producer.asked == ["init", "begin", ({"p": 7}, "member"), "commit", "begin", "commit"]


def test_what_is_sent_while_one_is_ended_waits_for_its_end() -> None:
    producer, reasons = Producer(), []
    many = Transactions(producer, "line-1")
    many.begin(never)
    producer.gate.clear()
    many.end({}, None, never)

    def waiting(reason: str) -> None:
        reasons.append(reason)
        producer.gate.set()

    assert many.ending
    with pytest.raises(TimeoutError):
        many.settle(0)
    many.begin(waiting)
    assert not many.ending and reasons == ["transaction line-1 not committed yet"]
    assert producer.asked == ["begin", "commit", "begin"]


def test_one_that_fails_is_the_last() -> None:
    producer = Producer(kafka_errors.InvalidProducerEpochError("fenced"))
    many = Transactions(producer, "line-1")
    many.end({}, None, never)
    told: list[str] = []
    for ask in (lambda: many.settle(30), many.verify, lambda: many.begin(never), lambda: many.end({}, None, never)):
        with pytest.raises(TransactionError, match=r"transaction of 'line-1' not committed: InvalidProducer\w+: .*fen"):
            ask()
        told.append("raised")
    many.close(30)
    assert len(told) == 4 and producer.asked == ["begin", "abort"]


def test_one_that_is_open_at_the_end_is_aborted() -> None:
    producer = Producer()
    many = Transactions(producer, "line-1")
    many.begin(never)
    many.close(30)
    assert producer.asked == ["begin", "abort"]


def test_a_name_that_the_broker_does_not_open_is_tried_again_until_the_deadline() -> None:
    producer = Producer()
    producer.slow_opens = 2
    Transactions(producer, "line-1").open(time.monotonic() + 30)
    assert producer.asked == ["init"] * 3
    producer.slow_opens = 1
    with pytest.raises(StreamError, match=r"transactional id 'line-1': .* in time"):
        Transactions(producer, "line-1").open(time.monotonic() - 1)
