"""A library's own log, held to what an operator can read: some say everything three times, ten times a second."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Hashable

EVERY_S = 60.0
"""The same complaint passes once in this time, with the number of those held back."""
_NUMBER = re.compile(r"[0-9]+")
_MOST_KINDS = 500
"""Complaints told apart; with more than that the oldest are forgotten."""


def by_text(record: logging.LogRecord) -> Hashable:
    """A place with its text; the numbers in that, of ports and requests, don't make it another kind."""
    return (record.name, record.lineno, _NUMBER.sub("", record.getMessage()))


def by_place(record: logging.LogRecord) -> Hashable:
    """A place alone, for texts that never are the same twice."""
    return (record.name, record.lineno)


class Seldom(logging.Handler):
    """Passes the first complaint of a kind on to the root's handlers, then one a minute; nothing below WARNING.

    Args:
        kind: tells complaints apart.
        now: the monotonic clock, in seconds.
    """

    def __init__(
        self,
        kind: Callable[[logging.LogRecord], Hashable] = by_text,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(logging.WARNING)
        self._kind = kind
        self._now = now
        self._kinds: dict[Hashable, tuple[float, int]] = {}
        self._held = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Take one record of the library."""
        now, kind = self._now(), self._kind(record)
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
        # A stack trace of the library's own loop tells an operator nothing that the message does not.
        record.exc_info, record.exc_text = None, None
        logging.getLogger().handle(record)


def listen(name: str, handler: Seldom) -> None:
    """Put ``handler`` between the library's logger and the program's log; calling it again changes nothing."""
    logger = logging.getLogger(name)
    if handler not in logger.handlers:
        logger.addHandler(handler)
        logger.propagate = False
