"""Messages on their way to an MQTT broker: a bounded queue, and what is in flight. Pure, as mqtt_window.py is."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

Properties = tuple[tuple[str, str], ...]
"""User properties: names and texts."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A message to be published."""

    topic: str
    payload: bytes
    properties: Properties = ()
    carried: Properties = ()
    """More of them, which a message goes without where it is too long for the broker with them."""
    dead: bool = False
    """A dead letter: where it is too long for the broker it goes without its value."""

    @property
    def size(self) -> int:
        """Bytes on the wire, a few more than it is."""
        texts = sum(len(name.encode()) + len(text.encode()) + 5 for name, text in self.properties + self.carried)
        return len(self.topic.encode()) + len(self.payload) + texts + 16


class Outbox:
    """Letters in order; those in flight are sent again, in their order, when the connection is made anew."""

    def __init__(self, max_rows: int, max_bytes: int) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._bytes = 0
        self._queue: deque[Letter] = deque()
        self._flying: dict[int, Letter] = {}

    def __len__(self) -> int:
        """Letters not acknowledged yet."""
        return len(self._queue) + len(self._flying)

    @property
    def flying(self) -> int:
        """Letters in flight."""
        return len(self._flying)

    @property
    def room(self) -> bool:
        """Whether one more may be put in; one always may when there is none."""
        return not len(self) or (len(self) < self._max_rows and self._bytes < self._max_bytes)

    def put(self, letter: Letter) -> None:
        """Take a letter, after all others."""
        self._queue.append(letter)
        self._bytes += letter.size

    def peek(self) -> Letter | None:
        """The next letter to be sent."""
        return self._queue[0] if self._queue else None

    def replace(self, letter: Letter) -> None:
        """Have ``letter`` sent in place of the next one."""
        self._bytes += letter.size - self._queue[0].size
        self._queue[0] = letter

    def sent(self, mid: int) -> None:
        """The next letter is in flight as ``mid``."""
        self._flying[mid] = self._queue.popleft()

    def landed(self, mid: int) -> Letter | None:
        """The broker has answered ``mid``; None where that is nothing of ours."""
        letter = self._flying.pop(mid, None)
        if letter is not None:
            self._bytes -= letter.size
        return letter

    def back(self) -> None:
        """The connection is gone: what was in flight goes first on the next one."""
        self._queue.extendleft(reversed(self._flying.values()))
        self._flying.clear()
