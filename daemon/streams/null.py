"""A sink into nothing."""

from __future__ import annotations

from daemon.records import DeadLetter


class NullSink:
    """Discards answers and dead letters: for measuring, and for a daemon that is only watched."""

    def open(self) -> None:
        """Nothing to open."""

    def send(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Discard answers."""

    def send_dead(self, letter: DeadLetter) -> None:
        """Discard a dead letter."""

    def send_queries(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Discard questions."""

    def flush(self, timeout_s: float) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""
