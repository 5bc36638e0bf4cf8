"""What the loop asks of a stream: records in, answers out, late labels in. Brokers and files are behind these."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from daemon.records import DeadLetter, Labels, Positions, RawBatch
from daemon.streams.resume import Start


class Source(Protocol):
    """Records in order, each with a partition and an offset by which it can be asked for again."""

    def open(self, positions: Positions | None) -> None:
        """Start reading at ``positions`` (next offset per partition); None: from the configured start.

        Raises:
            StreamError: the stream can't be opened, or has nothing at that position.
        """

    def poll(self, max_rows: int, timeout_s: float) -> RawBatch:
        """At most ``max_rows`` records, possibly none; never blocks for longer than ``timeout_s`` seconds.

        Raises:
            StreamError: the stream can't be read any further.
        """

    def at_end(self) -> bool:
        """Whether nothing more is to be had right now, so that a partial batch need not wait."""

    @property
    def ended(self) -> bool:
        """Whether the stream is finished for ever and every row of it was given out."""

    def lag(self) -> int | None:
        """Rows not yet read; None where that is unknown. A file's is estimated from the length of its lines."""

    def commit(self, positions: Positions, note: str) -> None:
        """Make ``positions`` durable for outside observers, with ``note`` beside it; files have nowhere to put it."""

    def ready(self) -> bool:
        """Whether the stream is open and can be read."""

    def close(self) -> None:
        """Give back what is held; closing twice is allowed."""


@runtime_checkable
class SharedSource(Source, Protocol):
    """A source whose partitions come and go while it runs, because other workers read the same stream."""

    checkpoint_id: str
    """Line of descent of the checkpoint that ``open`` gets its positions from."""

    def take_starts(self) -> dict[str, Start]:
        """Where newly assigned partitions go on, since the last call."""

    def take_revoked(self) -> tuple[set[str], set[str]]:
        """Partitions given up since the last call: (revoked: finish and commit them, lost: drop them)."""


class Sink(Protocol):
    """Where answers and dead letters go."""

    def open(self) -> None:
        """Make ready to be written to.

        Raises:
            StreamError: there is nothing there that can be written to.
        """

    def send(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Take answers; row ``i`` is ``keys[i]``, ``values[i]``. They are durable only after ``flush``.

        Raises:
            DeliveryError: the sink can't take them.
        """

    def send_dead(self, letter: DeadLetter) -> None:
        """Take a record that can't be answered. Durable only after ``flush``.

        Raises:
            DeliveryError: the sink can't take it.
        """

    def flush(self, timeout_s: float) -> None:
        """Return when all that was sent is durable, or acknowledged.

        Raises:
            DeliveryError: something was refused, or not acknowledged within ``timeout_s`` seconds.
        """

    def close(self) -> None:
        """Give back what is held, without waiting for deliveries; closing twice is allowed."""


@runtime_checkable
class PatientSink(Sink, Protocol):
    """A sink that waits, rather than fails, while what takes its answers is away."""

    waiting: Callable[[str], None]
    """Called again and again meanwhile, with the reason; may raise to give up."""


class LabelSource(Protocol):
    """Late labels. One that can't be read is counted in ``rejected`` by its reason and skipped, never raised."""

    rejected: dict[str, int]

    def open(self, positions: Positions | None) -> None:
        """Start reading at ``positions``; None: from the configured start.

        Raises:
            StreamError: the stream can't be opened, or has nothing at that position.
        """

    def poll(self, timeout_s: float = 0) -> Labels:
        """The labels that came, possibly none; never blocks for longer than ``timeout_s`` seconds."""

    def at_end(self) -> bool:
        """Whether nothing more is to be had right now."""

    def positions(self) -> Positions:
        """Next offset per partition, after everything that ``poll`` returned or rejected."""

    def close(self) -> None:
        """Give back what is held; closing twice is allowed."""


class NullSink:
    """Discards answers and dead letters: for measuring, and for a daemon that is only watched."""

    def open(self) -> None:
        """Nothing to open."""

    def send(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Discard answers."""

    def send_dead(self, letter: DeadLetter) -> None:
        """Discard a dead letter."""

    def flush(self, timeout_s: float) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""


class SplitSink:
    """Answers to one sink, dead letters to another; durable when both are."""

    def __init__(self, answers: Sink, dead_letters: Sink) -> None:
        self._answers = answers
        self._dead_letters = dead_letters
        self.sinks = (answers, dead_letters)

    def open(self) -> None:
        """Open both.

        Raises:
            StreamError: one of them can't be written to.
        """
        self._answers.open()
        self._dead_letters.open()

    def send(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Take answers."""
        self._answers.send(keys, values)

    def send_dead(self, letter: DeadLetter) -> None:
        """Take a dead letter."""
        self._dead_letters.send_dead(letter)

    def flush(self, timeout_s: float) -> None:
        """Return when both sinks are durable; ``timeout_s`` is for the two together.

        Raises:
            DeliveryError: one of them is not.
        """
        deadline = time.monotonic() + timeout_s
        self._dead_letters.flush(timeout_s)
        self._answers.flush(max(deadline - time.monotonic(), 0.0))

    def close(self) -> None:
        """Close both."""
        try:
            self._answers.close()
        finally:
            self._dead_letters.close()
