"""Carries out what overload makes give way, bounds a batch in time, and keeps a worker that waits in its group.

Only a live, shared stream can overload a worker: of a file nobody waits for an answer, and its batches have to be the
same in every run.

What a step means for the fast adaptation:

- A method that the controller starts (tent and the others): withheld batches are answered by it as it is, without its
  update. That saves the backward pass, or nothing in ``steady``, where it does not run.
- A method that decides by itself (auto): each answer comes out of the rows before, so that it is given every row in
  every step; predicting without following would cost more, not less. In ``FROZEN`` it runs no copy in shadow, and
  the slow loop begins no burst. The rest of what it costs does not give way: that would change its answers.

While batches are withheld, or records skipped, the controller is told so: it may throttle, and opens nothing up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import structlog

from daemon.loop import Loop
from daemon.overload import Overload, Step
from daemon.records import Positions
from daemon.settings import Settings
from daemon.streams.base import Source

log = structlog.get_logger("homeostat.overload")

BATCH_S = 5.0
"""Longest time of a batch; one that took longer is followed by smaller ones. The broker gives a worker 300 s between
two polls, liveness 60 s, a drain 20 s."""
FIRST_S = 30.0
"""The same of the first batch, by the time that a few rows took while the model was warmed up."""
MOST_BYTES = 32 << 20
"""Most inputs of a batch that has grown."""
SHED_EVERY_S = 5.0
"""Seconds between two skips."""
SAY_EVERY_S = 60.0
"""Seconds between two log lines on skips."""


@runtime_checkable
class SheddingSource(Source, Protocol):
    """A source that can leave out its oldest waiting records."""

    def skip(self, rows: int) -> dict[str, tuple[int, int]]:
        """Skip up to ``rows`` of the records that `poll` has not returned, the oldest of each partition.

        Returns the next offset of each partition before and after.
        """


@runtime_checkable
class GroupSource(Source, Protocol):
    """A source that is lost to its worker when that does not poll for long."""

    def keep_alive(self) -> None:
        """Stay a member without taking records; to be called again and again while nothing is polled."""


class Pressure:
    """One worker under load. Times are of ``clock``; rows are the stream's."""

    def __init__(
        self,
        settings: Settings,
        loop: Loop,
        source: Source,
        *,
        live: bool,
        row_bytes: int,
        row_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with the step that ``loop`` was in.

        Args:
            settings: ``batch_rows``, ``overload`` and ``shed`` are used.
            loop: told what is withheld.
            source: told to skip.
            live: whether others wait for the answers; else nothing gives way.
            row_bytes: of one row's input.
            row_seconds: what a row took while the model was warmed up.
            clock: seconds.
        """
        self._settings, self._loop, self._source, self._clock = settings, loop, source, clock
        self._live = live
        self._row_bytes = row_bytes
        if settings.shed is not None and not isinstance(source, SheddingSource):
            log.warning("HOMEOSTAT_SHED has no effect: this source can't skip records", source=settings.source)
        shed_s = settings.shed if isinstance(source, SheddingSource) else None
        self.overload = Overload(settings.overload, shed_s=shed_s, step=loop.load.step)
        self._cap: int | None = None
        if live and row_seconds is not None and row_seconds * settings.batch_rows > FIRST_S:
            self._cap = _power_of_two(FIRST_S / row_seconds)
        self._full: tuple[int, float] | None = None
        """Rows and seconds of the last full batch."""
        self._full_at: float | None = None
        self._taken = 0
        self.shed = 0
        """Records skipped since the start."""
        self._shed_at = self._said_at = -math.inf
        self._apply()

    def change(self, settings: Settings) -> None:
        """Other limits from now on; the step stays, if they allow it."""
        self._settings = settings
        self.overload.change(settings.overload, settings.shed if isinstance(self._source, SheddingSource) else None)
        self._apply()

    @property
    def rows(self) -> int:
        """Most rows of the next batch."""
        rows, limits = self._settings.batch_rows, self._settings.overload
        if self.overload.step >= Step.BATCHES:
            grown = min(limits.max_rows, MOST_BYTES // max(1, self._row_bytes))
            if self._full is not None:
                grown = min(grown, int(self._full[0] * BATCH_S / max(self._full[1], 1e-9)))
            rows = max(rows, grown)
        return rows if self._cap is None else max(1, min(rows, self._cap))

    def batch(self, rows: int) -> None:
        """A batch of so many rows was answered."""
        now = self._clock()
        self._taken += rows
        if not self._live:
            return
        if rows < self.rows:
            self._full_at = None
            return
        seconds = self._loop.load.seconds
        self._full = (rows, seconds)
        # From one full batch to the next there is no wait for records: reading and checkpoints are work too.
        if self._full_at is not None:
            self.overload.worked(rows, now - self._full_at)
        self._full_at = now
        if seconds > BATCH_S:
            self._cap = _power_of_two(rows * BATCH_S / seconds)
            log.warning("a batch took too long: smaller ones from now on", rows=rows, seconds=seconds, most=self._cap)
        elif self._cap is not None and seconds < BATCH_S / 4:
            self._cap = 2 * self._cap if 2 * self._cap < self._settings.overload.max_rows else None

    def lag(self, rows: int | None) -> int:
        """So many rows wait at the source, none is held between it and the loop; returns how many of them were skipped.

        Those are behind ``loop.positions`` then: a checkpoint should follow.
        """
        taken, self._taken = self._taken, 0
        lag_s = self.overload.seconds(rows)
        self._loop.telemetry.lag_seconds.set(math.nan if lag_s is None else lag_s)
        if not self._live:
            return 0
        if self._loop.emit_from:
            # Records are read again for the state: as they were read the first time, as far as that is known.
            self.overload.interrupted()
            return 0
        before, step = self.overload.step, self.overload.observe(self._clock(), rows, taken)
        if step is not before:
            say = log.warning if step > before else log.info
            rate = self.overload.rate
            lag_s = lag_s if lag_s is None else round(lag_s, 1)
            say("overload", now=step.words, before=before.words, lag_s=lag_s, lag=rows, rate=rate and round(rate))
            self._apply()
        return self._shed(rows)

    def _apply(self) -> None:
        step, loop = self.overload.step, self._loop
        loop.load.step = step
        loop.load.adapt_share = (
            0.0 if step >= Step.FROZEN else self._settings.overload.sample if step is Step.SAMPLE else 1.0
        )
        loop.actions.rests = step >= Step.FROZEN
        loop.telemetry.overload_step.set(step)

    def _shed(self, lag: int | None) -> int:
        excess, now = self.overload.excess(lag), self._clock()
        if not excess or now - self._shed_at < SHED_EVERY_S or not isinstance(self._source, SheddingSource):
            return 0
        self._shed_at = now
        skipped = self._source.skip(excess)
        positions: Positions = {name: after for name, (_, after) in skipped.items()}
        count = sum(after - before for before, after in skipped.values())
        if not count:
            return 0
        self._loop.positions |= positions
        self._loop.load.dropped = True
        self._loop.telemetry.records_shed.inc(count)
        self._taken += count
        self.shed += count
        if now - self._said_at >= SAY_EVERY_S:
            self._said_at = now
            ranges = {name: f"{before} to {after}" for name, (before, after) in skipped.items()}
            log.error("oldest records skipped unanswered (HOMEOSTAT_SHED)", offsets=ranges, shed=self.shed)
        return count

    def waiting(self) -> None:
        """A sink can't take more, and nothing is polled meanwhile; what that costs is not the model's work."""
        self.moved()
        if isinstance(self._source, GroupSource):
            self._source.keep_alive()

    def moved(self) -> None:
        """Partitions came or went, or records were waited for: what was measured across that says nothing."""
        self._full_at = None
        self.overload.interrupted()


def _power_of_two(rows: float) -> int:
    """The next one below, so that small changes in speed don't cut other batches."""
    return 1 << max(0, int(rows).bit_length() - 1) if rows >= 1 else 1
