"""A steady stream of records from a thread, while the test hurts somebody."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from kafka import KafkaProducer

from tests.daemon_process import record

_TICK_S = 0.05


class Feeder:
    """Sends records "0", "1", ... in turn to the partitions of a topic; none is lost or doubled on its own way.

    Args:
        address: ``host:port``, or several of them, with commas.
        rate: records per second.
    """

    def __init__(self, address: str, topic: str, partitions: int = 1, rate: float = 300) -> None:
        self._address, self._topic, self._partitions = address, topic, partitions
        self._each = max(1, round(rate * _TICK_S))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feeder")
        self._error: BaseException | None = None
        self.sent = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def stop(self) -> int:
        """How many records the topic holds, now that the last is acknowledged."""
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.sent

    def _run(self) -> None:
        futures: list[Any] = []
        try:
            with KafkaProducer(
                bootstrap_servers=self._address.split(","),
                acks="all",
                enable_idempotence=True,
                delivery_timeout_ms=120_000,
                retry_backoff_ms=50,
                reconnect_backoff_max_ms=500,
            ) as producer:
                while not self._over.wait(_TICK_S):
                    for row in range(self.sent, self.sent + self._each):
                        value = record(str(row))
                        futures.append(producer.send(self._topic, value, partition=row % self._partitions))
                    self.sent += self._each
                for future in futures:
                    future.get(timeout=120)
        except BaseException as error:  # `stop` raises it where the test sees it
            self._error = error
