"""What the loop asks of a stream: records in, answers out, late labels in. Brokers and files are behind these."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from daemon.records import DeadLetter, Labels, Positions, RawBatch, RowHeaders
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

    def can_fill(self, rows: int) -> bool:
        """Whether so many rows are there to be polled, or may be: a batch that lacks them waits for them."""

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
class CheckedSource(Source, Protocol):
    """A source on a broker that can be visited before it is opened."""

    def check(self) -> None:
        """Reach what is to be read; nothing is joined.

        Raises:
            StreamError: it can't be had.
        """


@runtime_checkable
class SharedSource(Source, Protocol):
    """A source whose partitions come and go while it runs, because other workers read the same stream."""

    checkpoint_id: str
    """Line of descent of the checkpoint that ``open`` gets its positions from."""

    topic_id: str
    """Of the topic that is read; set before ``open`` to that which the positions belong to, empty where unknown."""
    uncommitted: bool
    """Whether the last commit failed."""

    def take_starts(self) -> dict[str, Start]:
        """Where newly assigned partitions go on, since the last call."""

    def take_revoked(self) -> tuple[set[str], set[str]]:
        """Partitions given up since the last call: (revoked: finish and commit them, lost: drop them)."""

    def offsets(self, positions: Positions, note: str) -> dict[Any, Any]:
        """What a transaction commits for those of ``positions`` that are this worker's, in the client's own types."""

    def group_metadata(self) -> Any:
        """This worker's membership as the broker knows it now, so that it can refuse one that is a member no more."""


@runtime_checkable
class AcknowledgedSource(Protocol):
    """Records or labels that a broker goes on sending only as earlier ones are committed."""

    @property
    def wants_commit(self) -> bool:
        """Whether a checkpoint should come before its time."""


@runtime_checkable
class AcknowledgedLabels(Protocol):
    """Labels that have to be committed."""

    def commit(self, positions: Positions) -> None:
        """Acknowledge what lies before ``positions``."""


@runtime_checkable
class ContextSource(Protocol):
    """A source that keeps its records' trace context only where it is told to."""

    keeps_context: bool


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
class HeaderSink(Sink, Protocol):
    """A sink whose answers may have headers."""

    @property
    def takes_headers(self) -> bool:
        """Whether the place where answers go has headers at all."""

    def send(self, keys: list[bytes | None], values: list[bytes], headers: RowHeaders | None = None) -> None:
        """Take answers, as every sink does; ``headers[i]`` are row ``i``'s, in printable ASCII.

        Raises:
            DeliveryError: the sink can't take them.
        """


class AskingSink(Sink, Protocol):
    """A sink that also takes the questions for labels."""

    def send_queries(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Take questions; row ``i`` is ``keys[i]``, ``values[i]``. They are durable only after ``flush``.

        Raises:
            DeliveryError: the sink can't take them.
        """


@runtime_checkable
class PatientSink(Sink, Protocol):
    """A sink that waits, rather than fails, while what takes its answers is away."""

    waiting: Callable[[str], None]
    """Called again and again meanwhile, with the reason; may raise to give up."""


@runtime_checkable
class TransactionalSink(Sink, Protocol):
    """A sink whose answers, and the offsets of what they answer, become visible together or not at all.

    A transaction begins with the first thing sent and is ended beside the caller; what is sent meanwhile waits.
    """

    @property
    def ending(self) -> bool:
        """Whether a transaction is being ended."""

    def end(self, offsets: dict[Any, Any], group: Any) -> None:
        """Begin to commit all that was sent, and ``offsets`` for the member ``group``."""

    def verify(self) -> None:
        """Raise TransactionError when the last one was not committed."""

    def settle(self, timeout_s: float) -> None:
        """Return when no transaction is being ended.

        Raises:
            TimeoutError: not yet; call again.
            TransactionError: it was not committed.
        """


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


class SplitSink:
    """Answers, dead letters and questions, each to a sink that may be another's too; durable when all are.

    Args:
        answers: takes what is sent.
        dead_letters: takes what is sent dead.
        queries: takes the questions, with ``send_queries``; None: nobody is asked.
    """

    def __init__(self, answers: Sink, dead_letters: Sink, queries: AskingSink | None = None) -> None:
        self._answers = answers
        self._dead_letters = dead_letters
        self._queries = queries
        given = [sink for sink in (answers, dead_letters, queries) if sink is not None]
        self.sinks = tuple(sink for at, sink in enumerate(given) if all(sink is not earlier for earlier in given[:at]))
        """Each of them once."""

    def open(self) -> None:
        """Open them all.

        Raises:
            StreamError: one of them can't be written to.
        """
        for sink in self.sinks:
            sink.open()

    @property
    def takes_headers(self) -> bool:
        """Whether the answers' sink does."""
        return isinstance(self._answers, HeaderSink) and self._answers.takes_headers

    def send(self, keys: list[bytes | None], values: list[bytes], headers: RowHeaders | None = None) -> None:
        """Take answers; ``headers`` go on to a sink that takes them."""
        if headers is not None and isinstance(self._answers, HeaderSink):
            self._answers.send(keys, values, headers)
        else:
            self._answers.send(keys, values)

    def send_dead(self, letter: DeadLetter) -> None:
        """Take a dead letter."""
        self._dead_letters.send_dead(letter)

    def send_queries(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Take questions."""
        if self._queries is not None:
            self._queries.send_queries(keys, values)

    def flush(self, timeout_s: float) -> None:
        """Return when all sinks are durable; ``timeout_s`` is for them together.

        Raises:
            DeliveryError: one of them is not.
        """
        deadline = time.monotonic() + timeout_s
        for sink in reversed(self.sinks):
            sink.flush(max(deadline - time.monotonic(), 0.0))

    def close(self) -> None:
        """Close them all, whatever one of them says."""
        with contextlib.ExitStack() as all_of_them:
            for sink in reversed(self.sinks):
                all_of_them.callback(sink.close)


def parts_of(sink: Sink) -> tuple[Sink, ...]:
    """The sinks that ``sink`` consists of: itself, where it is one."""
    return sink.sinks if isinstance(sink, SplitSink) else (sink,)
