"""kafka-python's own log, held to what an operator can read: it says everything three times, ten times a second.

What it says of the network is also the only sign, before records stay away, that a client lost its connection.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable

EVERY_S = 60.0
"""The same complaint passes once in this time, with the number of those held back."""
_NUMBER = re.compile(r"[0-9]+")
_MOST_KINDS = 500
"""Complaints told apart; with more than that the oldest are forgotten."""


class KafkaLog(logging.Handler):
    """Passes the first complaint of a kind on to the root's handlers, then one a minute.

    A kind is a place in kafka-python with its text; the numbers in that, of ports and requests, don't make it another
    one. Nothing below WARNING passes, whatever the level: at debug it prints every request, logins included.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._now = now
        self._kinds: dict[tuple[str, int, str], tuple[float, int]] = {}
        self._held = threading.Lock()
        self.trouble_at = float("-inf")
        """When a connection was last lost or refused, by ``now``."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take one record of kafka-python."""
        now = self._now()
        if record.name.startswith("kafka.net") and record.levelno >= logging.ERROR:
            self.trouble_at = now
        kind = (record.name, record.lineno, _NUMBER.sub("", record.getMessage()))
        with self._held:
            passed, held = self._kinds.pop(kind, (float("-inf"), 0))
            passes = now - passed >= EVERY_S
            self._kinds[kind] = (now, 0) if passes else (passed, held + 1)
            if len(self._kinds) > _MOST_KINDS:
                del self._kinds[next(iter(self._kinds))]
        if not passes:
            return
        if held:
            record.msg, record.args = f"{record.getMessage()} ({held} more like this since the last one)", None
        # A stack trace of the client's own reading loop tells an operator nothing that the message does not.
        record.exc_info, record.exc_text = None, None
        logging.getLogger().handle(record)

    def recent_trouble(self) -> bool:
        """Whether a connection was lost or refused within the last minute."""
        return self._now() - self.trouble_at < EVERY_S


kafka_log = KafkaLog()
"""The one of this process."""


def listen() -> None:
    """Put it between kafka-python and the program's log; calling it again changes nothing."""
    logger = logging.getLogger("kafka")
    if kafka_log not in logger.handlers:
        logger.addHandler(kafka_log)
        logger.propagate = False
