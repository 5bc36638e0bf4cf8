"""kafka-python's own log: at debug it prints every request, logins included, and at all levels too much.

What it says of the network is also the only sign, before records stay away, that a client lost its connection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from daemon import seldom
from daemon.seldom import EVERY_S

__all__ = ["EVERY_S", "KafkaLog", "kafka_log", "listen"]


class KafkaLog(seldom.Seldom):
    """Passes each kind of complaint on once a minute, and notes when the network was in trouble."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(now=now)
        self.trouble_at = float("-inf")
        """When a connection was last lost or refused, by ``now``."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take one record of kafka-python."""
        if record.name.startswith("kafka.net") and record.levelno >= logging.ERROR:
            self.trouble_at = self._now()
        super().emit(record)

    def recent_trouble(self) -> bool:
        """Whether a connection was lost or refused within the last minute."""
        return self._now() - self.trouble_at < EVERY_S


kafka_log = KafkaLog()
"""The one of this process."""


def listen() -> None:
    """Put it between kafka-python and the program's log; calling it again changes nothing."""
    seldom.listen("kafka", kafka_log)
