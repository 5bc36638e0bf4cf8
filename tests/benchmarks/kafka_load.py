"""The load of `make bench-kafka`, in processes of its own: one that sends, one that reads the answers.

A live record's key is the monotonic clock in nanoseconds at which it was handed to the producer; both processes read
that clock on this machine. Records are due at a fixed rate: a sender that was held up catches up, and says how late it
was, so that a slow subject can't slow the question down.

With confluent-kafka where that is installed (it comes with Quix Streams), because at 25,000 records a second
kafka-python would take the processor from the subject; else with kafka-python.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks.kafka_world import POOL, Stream

TICK_S = 0.001
DISCARDED_S = 2.0
"""Answers to the first seconds of a load are not counted: the subject's clients are finding their pace."""
PATIENCE_S = 20.0


def sender(address: str, topic: str, linger_ms: int) -> tuple[Callable[[bytes, bytes], None], Callable[[], None]]:
    """``send(key, value)`` and ``flush()``; every record is acknowledged once flush has returned."""
    try:
        from confluent_kafka import Producer
    except ImportError:
        from kafka import KafkaProducer

        slow = KafkaProducer(bootstrap_servers=address, linger_ms=linger_ms, batch_size=65_536, metrics_enabled=False)
        return lambda key, value: slow.send(topic, value, key), slow.flush
    producer = Producer({"bootstrap.servers": address, "linger.ms": linger_ms, "acks": "all"})

    def send(key: bytes, value: bytes) -> None:
        while True:
            try:
                return producer.produce(topic, value, key)  # type: ignore[no-any-return]
            except BufferError:
                producer.poll(0.01)

    def flush() -> None:
        left = producer.flush(120)
        if left:
            raise RuntimeError(f"{left} records of the load were not acknowledged")

    return send, flush


def fill(address: str, topic: str, stream: Stream, count: int) -> None:
    """A backlog of ``count`` records, named by their number."""
    send, flush = sender(address, topic, 20)
    for key, value in stream.records(b"%d" % number for number in range(count)):
        send(key, value)
    flush()


def offer(address: str, topic: str, stream: Stream, rate: float, seconds: float) -> dict[str, Any]:
    """Send at ``rate`` records a second; how many, and how late against their time (ms)."""
    send, flush = sender(address, topic, 1)
    records, count = _by_now(stream), int(rate * seconds)
    lateness = np.zeros(count)
    sent, start = 0, time.monotonic()
    while sent < count:
        now = time.monotonic()
        due = min(count, int((now - start) * rate) + 1)
        while sent < due:
            key, value = next(records)
            send(key, value)
            lateness[sent] = time.monotonic() - start - sent / rate
            sent += 1
        time.sleep(TICK_S)
    took = time.monotonic() - start
    flush()
    return {"sent": count, "rate": count / took, "late_p99_ms": float(np.percentile(lateness, 99)) * 1000}


def _by_now(stream: Stream) -> Any:
    def names() -> Any:
        while True:
            yield b"%d" % time.monotonic_ns()

    return stream.records(names())


def receive(address: str, topic: str, after: int, count: int, discarded: int) -> dict[str, Any]:
    """Read ``count`` answers from offset ``after`` on; their times from hand to hand, in ms, without the first ones."""
    times = np.full(count, np.nan)
    found, deadline = 0, time.monotonic() + PATIENCE_S
    poll = _reader(address, topic, after)
    print("ready", flush=True)
    while found < count and time.monotonic() < deadline:
        keys = poll()
        now = time.monotonic_ns()
        for key in keys[: count - found]:
            times[found] = (now - int(key)) / 1e6
            found += 1
        if keys:
            deadline = time.monotonic() + PATIENCE_S
    counted = times[discarded:found]
    if not len(counted):
        return {"received": found}
    p50, p99, most = np.percentile(counted, (50, 99, 100)).tolist()
    return {"received": found, "p50_ms": p50, "p99_ms": p99, "max_ms": most}


def _reader(address: str, topic: str, after: int) -> Callable[[], list[bytes]]:
    """``poll()`` gives the keys of what came, committed records alone."""
    try:
        from confluent_kafka import Consumer, TopicPartition
    except ImportError:
        from kafka import KafkaConsumer
        from kafka import TopicPartition as Partition

        slow = KafkaConsumer(
            bootstrap_servers=address, enable_auto_commit=False, isolation_level="read_committed", metrics_enabled=False
        )
        slow.assign([Partition(topic, 0)])
        slow.seek(Partition(topic, 0), after)
        return lambda: [row.key for rows in slow.poll(timeout_ms=100).values() for row in rows]
    consumer = Consumer(
        {"bootstrap.servers": address, "group.id": "latency", "enable.auto.commit": False,
         "isolation.level": "read_committed", "fetch.wait.max.ms": 100}
    )  # fmt: skip
    consumer.assign([TopicPartition(topic, 0, after)])

    def poll() -> list[bytes]:
        # One at a time: `consume` waits until it has as many as it was asked for.
        first = consumer.poll(0.1)
        if first is None:
            return []
        messages = [first]
        while len(messages) < POOL and (more := consumer.poll(0)) is not None:
            messages.append(more)
        return [message.key() for message in messages if message.error() is None]

    return poll


def count_answers(address: str, topic: str, expected: int) -> dict[str, Any]:
    """Committed answers and their different keys, read until there are ``expected`` or none come any more."""
    seen: set[bytes] = set()
    total = 0
    poll = _reader(address, topic, 0)
    deadline = time.monotonic() + PATIENCE_S
    while len(seen) < expected and time.monotonic() < deadline:
        if keys := poll():
            seen.update(keys)
            total += len(keys)
            deadline = time.monotonic() + PATIENCE_S
    return {"answered": len(seen), "answers": total}


def main(given: dict[str, Any]) -> dict[str, Any]:
    """One piece of work; what it found."""
    where = given["address"], given["topic"]
    if given["do"] == "receive":
        return receive(*where, given["after"], given["count"], given["discarded"])
    if given["do"] == "count":
        return count_answers(*where, given["count"])
    stream = Stream(given["codec"], given["value_bytes"])
    if given["do"] == "offer":
        return offer(*where, stream, given["rate"], given["seconds"])
    fill(*where, stream, given["count"])
    return {}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
