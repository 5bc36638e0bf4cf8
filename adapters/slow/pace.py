"""How long a burst may work, and how much it rests."""

from __future__ import annotations

from collections.abc import Callable

SLICE_S = 0.05
"""Longest rest between two looks at ``stop``."""


class Pace:
    """Counts the seconds of work, and rests after each piece of it so that work takes a share ``duty`` of the time.

    Args:
        seconds: of work that are allowed; None: any.
        duty: share of the time that is worked, in (0, 1].
        clock: seconds that only grow.
        rest: sleeps so many seconds.
        stop: asked while resting; True ends the rest.
    """

    def __init__(
        self,
        seconds: float | None,
        duty: float,
        clock: Callable[[], float],
        rest: Callable[[float], None],
        stop: Callable[[], bool],
    ) -> None:
        self._seconds, self._duty, self._clock, self._rest, self._stop = seconds, duty, clock, rest, stop
        self._since = clock()
        self.worked = 0.0
        """Seconds of work up to the last `mark`."""

    @property
    def overrun(self) -> bool:
        """Whether the seconds that are allowed are used up."""
        return self._seconds is not None and self.worked >= self._seconds

    def mark(self) -> float:
        """A piece of work is done; its seconds."""
        now = self._clock()
        piece = now - self._since
        self.worked += piece
        self._since = now
        return piece

    def pause(self) -> None:
        """A piece of work is done: rest as long as the duty asks."""
        owed = self.mark() * (1 / self._duty - 1)
        while owed > 0 and not self._stop():
            self._rest(min(owed, SLICE_S))
            owed -= SLICE_S
        self._since = self._clock()
