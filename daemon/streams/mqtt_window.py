"""What came from an MQTT broker and is not acknowledged yet. Pure: no client, no clock, no thread of its own.

A broker sends again, with its old packet identifier, whatever was not acknowledged when a connection broke and its
session lives on (MQTT 5.0, 4.4). Rows that were handed out before the break are known by that identifier and their
content: they keep their number and are not handed out twice. What was acknowledged, or belonged to a session that is
gone, is never taken for known: two readings may be equal, and a row too many is better than one too few.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from daemon.records import Header

QUIET_S = 1.0
"""Time without a new row after which the rows in hand are worth a checkpoint."""
_WAITING = -1
_REFUSED = -2
_RESUMED_S = 0.2
"""A broker that was only waiting for acknowledgements goes on within this time."""


class Taken(NamedTuple):
    """A row as it is handed out."""

    topic: bytes
    payload: bytes
    time_s: float
    offset: int
    headers: tuple[Header, ...] = ()


@dataclass(slots=True)
class Row:
    """One message; ``offset`` is given when it is handed out."""

    mid: int
    qos: int
    topic: bytes
    payload: bytes
    time_s: float
    """Seconds since the epoch at which it came."""
    mark: int = 0
    """Hash of topic and payload."""
    offset: int = _WAITING
    headers: tuple[Header, ...] = ()
    """What is kept of its user properties."""

    @property
    def size(self) -> int:
        """Bytes."""
        own = len(self.topic) + len(self.payload)
        return own + sum(len(value or b"") for _, value in self.headers) if self.headers else own


class Window:
    """Rows in order of arrival, numbered from ``first`` on as they are handed out.

    QoS 1 rows are at most as many as the broker may send without an acknowledgement. Rows that were sent with QoS 0
    can't be acknowledged or asked for again: beyond ``max_rows`` or ``max_bytes`` they are dropped, and counted.
    """

    def __init__(self, first: int, *, max_rows: int, max_bytes: int) -> None:
        self.next = first
        """Number of the next row to be handed out."""
        self.dropped = 0
        """QoS 0 rows for which there was no room."""
        self.bytes = 0
        """Of the rows that wait to be handed out."""
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._committed = first
        self._queue: deque[Row] = deque()
        self._queued_qos1 = 0
        self._unsettled: deque[Row] = deque()
        """QoS 1 rows of this connection, in order of arrival: acknowledgements have to go out in that order."""
        self._settled: deque[Row] = deque()
        """Committed and not yet acknowledged."""
        self._expected: dict[int, Row] = {}
        """By packet identifier: handed out, and to be sent again by the broker."""

    def __len__(self) -> int:
        """Rows that wait to be handed out."""
        return len(self._queue)

    @property
    def unsettled(self) -> int:
        """QoS 1 rows of this connection that were handed out and are not committed."""
        return len(self._unsettled) - self._queued_qos1

    @property
    def full(self) -> bool:
        """Whether reading on would take more memory than is allowed."""
        return self.bytes >= self._max_bytes

    def connected(self, session: bool) -> None:
        """A new connection; ``session``: whether the broker knows what it sent on the one before."""
        before = (*self._settled, *self._unsettled)
        self._settled.clear()
        self._unsettled.clear()
        if session:
            self._expected |= {row.mid: row for row in before if row.offset >= 0}
        else:
            self._expected.clear()
        # What was not handed out yet comes again, if it has a QoS.
        self._queue = deque(row for row in self._queue if not row.qos)
        self._queued_qos1 = 0
        self.bytes = sum(row.size for row in self._queue)

    def arrived(self, row: Row, *, again: bool) -> None:
        """A message came; ``again``: the broker says that it sent it before."""
        if not row.qos:
            if len(self._queue) - self._queued_qos1 >= self._max_rows or self.full:
                self.dropped += 1
                return
        else:
            row.mark = hash((row.topic, row.payload))
            known = self._expected.pop(row.mid, None)
            if known is not None and again and known.mark == row.mark:
                self._unsettled.append(known)
                self._settle()
                return
            self._unsettled.append(row)
            self._queued_qos1 += 1
        self._queue.append(row)
        self.bytes += row.size

    def refuse(self, row: Row) -> None:
        """A message that is not for us: to be acknowledged, in its turn, and not handed out."""
        self._expected.pop(row.mid, None)
        if row.qos:
            row.offset, row.topic, row.payload = _REFUSED, b"", b""
            self._unsettled.append(row)
            self._settle()

    def take(self, max_rows: int) -> list[Taken]:
        """The next rows, numbered."""
        taken = []
        for _ in range(min(max_rows, len(self._queue))):
            row = self._queue.popleft()
            self._queued_qos1 -= row.qos
            self.bytes -= row.size
            row.offset = self.next
            self.next += 1
            taken.append(Taken(row.topic, row.payload, row.time_s, row.offset, row.headers))
            row.headers = ()
            row.topic = row.payload = b""  # what waits for its checkpoint takes no more than its number
        return taken

    def commit(self, position: int) -> None:
        """Rows with numbers below ``position`` are answered for good."""
        self._committed = max(self._committed, position)
        self._settle()

    def _settle(self) -> None:
        while self._unsettled and self._unsettled[0].offset != _WAITING and self._unsettled[0].offset < self._committed:
            self._settled.append(self._unsettled.popleft())

    def acknowledgements(self) -> list[int]:
        """Packet identifiers to be acknowledged now, in this order; each is given once."""
        mids = [row.mid for row in self._settled]
        self._settled.clear()
        return mids


class Pace:
    """Whether a checkpoint is worth taking before its time, so that the broker may go on sending.

    Wanted at half of what may be unacknowledged, or when no row came for a while. Some brokers stop sooner than they
    were allowed to: two stops in a row at the same number of rows, both ended by acknowledgements, tell that limit.
    """

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self.limit = in_flight
        """Rows after which the broker waits, as far as is known."""
        self._stopped_at = 0
        self._suspected = 0

    def wanted(self, unsettled: int, quiet_s: float) -> bool:
        """Whether a checkpoint should come now: ``unsettled`` rows in hand, none new for ``quiet_s`` seconds."""
        if unsettled > self.limit:
            self.limit, self._suspected = self._in_flight, 0
        if not unsettled:
            return False
        if 2 * unsettled >= self.limit:
            return True
        if quiet_s >= QUIET_S:
            self._stopped_at = unsettled
            return True
        return False

    def resumed(self, after_s: float) -> None:
        """The first row after a commit came ``after_s`` seconds after it."""
        if self._stopped_at:
            stopped = self._stopped_at if after_s <= _RESUMED_S else 0
            if stopped and stopped == self._suspected:
                self.limit = stopped
            self._suspected, self._stopped_at = stopped, 0
