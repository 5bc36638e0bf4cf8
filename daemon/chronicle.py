"""What happened lately, in memory, for whoever looks: decisions as they are logged, and the last dead letters."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from daemon.records import DeadLetter

ENTRIES, LETTERS = 160, 12
"""How many of each are kept; the oldest go first."""
LONGEST = 300
"""Characters kept of a text that came in with a record."""


class Entry(NamedTuple):
    """One decision."""

    at: float
    """Monotonic seconds: a clock that is set must not put decisions into another order."""
    event: str
    """As in the log."""
    facts: Mapping[str, Any]


class Letter(NamedTuple):
    """A dead letter without its payload."""

    at: float
    """Monotonic seconds."""
    partition: str
    offset: int
    reason: str
    detail: str


class Chronicle:
    """Written by the loop, read from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.heard: Callable[[Entry], None] = lambda entry: None
        """Called with each new entry, in the loop's thread."""
        self._clock = clock
        self._entries: deque[Entry] = deque(maxlen=ENTRIES)
        self._letters: deque[Letter] = deque(maxlen=LETTERS)
        self._lock = threading.Lock()

    def tell(self, say: Callable[..., Any], event: str, /, **facts: Any) -> None:
        """Log a decision by ``say``, and remember it whatever is logged."""
        say(event, **facts)
        entry = Entry(self._clock(), event, facts)
        with self._lock:
            self._entries.append(entry)
        self.heard(entry)

    def before(self, entries: Iterable[Entry]) -> None:
        """Put decisions of earlier runs in front, as far as there is room; nobody is told of them again."""
        with self._lock:
            self._entries = deque([*entries, *self._entries], maxlen=ENTRIES)

    def died(self, letters: Iterable[DeadLetter]) -> None:
        """Remember dead letters, without what they hold."""
        now = self._clock()
        found = [Letter(now, one.partition[:LONGEST], one.offset, one.reason, one.detail[:LONGEST]) for one in letters]
        with self._lock:
            self._letters.extend(found)

    def entries(self) -> list[Entry]:
        """The newest decisions, oldest first."""
        with self._lock:
            return list(self._entries)

    def letters(self) -> list[Letter]:
        """The newest dead letters, oldest first."""
        with self._lock:
            return list(self._letters)
