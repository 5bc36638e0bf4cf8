"""What kafka-python 3.0.12 gets wrong under a worker that polls often and for long, mended on its objects.

Each is looked for by what it needs, and left alone where a version of the client has none of that: then nothing is
mended, and nothing breaks. What goes wrong without each is shown by a test against a real broker.
"""

from __future__ import annotations

import time
from typing import Any

import structlog
from kafka import errors as kafka_errors

log = structlog.get_logger("homeostat.kafka")

_JOIN_MS = 500
"""Time that a poll has, at the least, while the group is being joined."""
_UNREACHED_S = 0.02


def mend_consumer(consumer: Any) -> None:
    """Have reading create no topic, and no poll sleep beside records that have come.

    The client does not hand its own option on: a topic that is missing, or was deleted, would come into being by being
    read. And a fetch that ends between two lines of a poll is taken for none: the poll then sleeps for 100 ms.
    """
    config = getattr(getattr(consumer, "_cluster", None), "config", None)
    if isinstance(config, dict):
        config["allow_auto_create_topics"] = False
    _know_coordinator(getattr(consumer, "_coordinator", None))
    fetcher: Any = getattr(consumer, "_fetcher", None)
    fetch = getattr(fetcher, "fetch_records", None)
    if fetch is None or not hasattr(fetcher, "_completed_fetches"):
        return

    def fetch_records(*arguments: Any, **named: Any) -> tuple[Any, bool]:
        records, idle = fetch(*arguments, **named)
        return records, idle and not fetcher._completed_fetches

    fetcher.fetch_records = fetch_records


def _know_coordinator(coordinator: Any) -> None:
    """Have a poll ask the client's own thread for the group's coordinator only while none is known or connected.

    The client asks it in every poll, and waits: two changes of thread, while the records are there.
    """
    ask = getattr(coordinator, "ensure_coordinator_ready", None)
    disconnected = getattr(getattr(coordinator, "_client", None), "is_disconnected", None)
    if ask is None or disconnected is None or not hasattr(coordinator, "coordinator_id"):
        return

    def ensure_coordinator_ready(timeout_ms: float | None = None) -> bool:
        known = coordinator.coordinator_id
        return bool((known is not None and not disconnected(known)) or ask(timeout_ms=timeout_ms))

    coordinator.ensure_coordinator_ready = ensure_coordinator_ready


def next_records(consumer: Any, rows: int, timeout_ms: int) -> Any:
    """What a poll gives: at most ``rows`` records, by partition; and a rebalance that is under way gets through.

    The client loses a join of the group that a poll leaves in the middle: one that is done before the next poll is
    begun anew, and one that was begun because the topic's partitions had changed is forgotten. Then no heartbeat is
    sent, every commit is refused, and the group evicts the member. No records come meanwhile anyway.
    """
    coordinator: Any = getattr(consumer, "_coordinator", None)
    if coordinator is not None and (coordinator.rejoining or coordinator.need_rejoin()):
        timeout_ms = max(timeout_ms, _JOIN_MS)
        with coordinator._lock:  # it may be through by now
            if coordinator.rejoining:
                coordinator.request_rejoin()
    return consumer.poll(timeout_ms=timeout_ms, max_records=rows)


def mend_producer(producer: Any) -> None:
    """Have the producer's thread try again what a dead coordinator did not take.

    The client drops a transaction's request when the node that it is for can't be reached, and the end of the
    transaction is then waited for for ever. Where the node is only "not ready" it looks for another and tries again.
    """
    client = getattr(getattr(producer, "_sender", None), "_client", None)
    ready = getattr(client, "await_ready", None)
    if client is None or ready is None:
        return

    def await_ready(*arguments: Any, **named: Any) -> bool:
        try:
            return bool(ready(*arguments, **named))
        except kafka_errors.KafkaConnectionError as error:
            log.debug("coordinator not reached, asking for another", error=str(error))
            time.sleep(_UNREACHED_S)  # it is asked for again at once
            return False

    client.await_ready = await_ready
