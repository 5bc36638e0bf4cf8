"""Where what an operator asks over HTTP waits for the loop, which alone changes anything, between two batches."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

ACTIONS = ("freeze", "resume", "reset", "rollback", "checkpoint", "reload", "drain")
MOST = 16
"""Wishes that wait at a time."""


@dataclass(slots=True, eq=False)
class Wish:
    """One thing to do, and what became of it."""

    action: str
    number: int = 0
    """``rollback``: to which version."""
    hold: bool = False
    """``rollback``: promote nothing afterwards until ``resume``."""
    who: str = ""
    """From where it was asked."""
    fine: bool = False
    """Whether it was done."""
    text: str = ""
    """What was done, or why not."""
    _done: threading.Event = field(default_factory=threading.Event)

    def end(self, text: str, *, fine: bool = True) -> None:
        """It was done, or refused."""
        self.fine, self.text = fine, text
        self._done.set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within ``timeout_s`` seconds."""
        return self._done.wait(timeout_s)


class Desk:
    """A short queue between the threads that speak HTTP and the loop."""

    def __init__(self) -> None:
        self._waiting: deque[Wish] = deque()
        self._lock = threading.Lock()

    def ask(self, wish: Wish) -> bool:
        """Leave a wish; False: too many wait already."""
        with self._lock:
            if len(self._waiting) >= MOST:
                return False
            self._waiting.append(wish)
            return True

    def take(self) -> list[Wish]:
        """All that wait, in their order; for the loop."""
        if not self._waiting:
            return []
        with self._lock:
            taken = list(self._waiting)
            self._waiting.clear()
            return taken
