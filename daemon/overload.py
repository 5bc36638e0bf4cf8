"""What gives way when records come faster than they are answered: limits, steps, and the machine that takes them.

Lag is judged in seconds of work, rows that wait over rows answered per second of work, and not by the age of records:
an old topic, or a backlog after an outage, is old whatever the worker does, and of use all the same. And a lag that
goes away by itself is no overload: steps are taken only while records come at `DRAINING` of the rate of work or more.
"""

from __future__ import annotations

import math
from enum import IntEnum

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from daemon.section import Section

DRAINING = 0.75
"""Records that come per record that can be answered: below, a lag is gone within four times itself, and nothing gives
way for it. A backlog after a restart is read as it would have been read live, in batches of the same size."""
HYSTERESIS = 0.5
"""A step is taken back below this share of the lag that it was taken at."""
RATE_S = 2.0
"""Memory of the rate of work, in seconds of work."""
ARRIVALS_S = 5.0
"""Memory of the rate at which records come, in seconds."""
LEAST_SEEN_S = 1.0
"""How long arrivals have to be watched before anything is concluded from them."""
SETTLE_S = 3.0
"""Time that a step is given to show its effect before the next one is taken."""
RETURN_S = 5.0
"""Time below its bound after which a step is taken back; doubles where it has to be taken again soon after."""
LONGEST_RETURN_S = 300.0
"""Where that doubling ends."""
SHED_TO = 0.9
"""Share of the bound of skipping that is left waiting, so that there is not a skip for every batch."""
RELAPSE = 4.0
"""Taken again within this many times the wait for its return: the step was taken back too soon."""


class OverloadLimits(Section):
    """From which lag on what gives way: larger batches, then adaptation on a sample of rows, then none."""

    enabled: bool = True
    """Whether anything gives way at all."""
    lag_s: PositiveFloat = 2.0
    """Lag, in seconds of work at the present rate, from which batches grow; the later steps come at its multiples."""
    max_rows: PositiveInt = 4_096
    """Most rows of a batch that has grown."""
    sample: float = Field(0.25, gt=0, le=1)
    """Share of the batches that adaptation is given when it gives way."""
    patience_s: NonNegativeFloat = 1.0
    """Time that a lag has to last before the next step is taken."""


class Step(IntEnum):
    """How much gives way; each step keeps those before it."""

    NORMAL = 0
    BATCHES = 1
    """Batches grow."""
    SAMPLE = 2
    """Adaptation is given a share of the batches."""
    FROZEN = 3
    """Adaptation is given none, and no burst of the slow loop begins; what was learnt goes on being applied."""
    SHEDDING = 4
    """The oldest records are skipped."""

    @property
    def words(self) -> str:
        """For a log line."""
        return _WORDS[self]


_WORDS = {
    Step.NORMAL: "nothing gives way",
    Step.BATCHES: "larger batches",
    Step.SAMPLE: "adaptation on a sample of the batches",
    Step.FROZEN: "no adaptation",
    Step.SHEDDING: "the oldest records are skipped",
}
_MULTIPLES = {Step.BATCHES: 1.0, Step.SAMPLE: 2.0, Step.FROZEN: 4.0}


class _Rate:
    """Rows per second with an exponential memory of ``memory_s`` seconds; unknown before the first."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._rows = 0.0
        self.seconds = 0.0

    def update(self, rows: float, seconds: float) -> None:
        kept = math.exp(-seconds / self._memory_s)
        self._rows, self.seconds = self._rows * kept + rows, self.seconds * kept + seconds

    @property
    def value(self) -> float | None:
        return max(0.0, self._rows) / self.seconds if self.seconds > 0 else None


class Overload:
    """Decides what gives way: a state machine without a clock of its own.

    - One step at a time, in their order, up and down. ``SHEDDING`` is the last, and only where ``shed_s`` is given.
    - The bound of a step is ``lag_s`` times 1, 2, 4, and ``shed_s`` for the last; none is above ``shed_s``.
    - A step is taken when the lag has been above the next bound, and not draining (see `DRAINING`), for ``patience_s``,
      and the step before has had `SETTLE_S`.
    - It is taken back when the lag has been below `HYSTERESIS` of its own bound for `RETURN_S`; twice as long whenever
      it is needed again soon, up to `LONGEST_RETURN_S`: a worker that is fast enough only without adaptation does not
      swing.
    - A lag that is unknown or not finite holds the step, and every wait begins anew.
    """

    def __init__(self, limits: OverloadLimits, *, shed_s: float | None = None, step: Step = Step.NORMAL) -> None:
        """``step``: of a checkpoint. Skipping is never gone on with unseen."""
        self.step = Step.NORMAL
        self.change(limits, shed_s)
        self.step = min(step, self.most, Step.FROZEN)
        self._work, self._arrivals = _Rate(RATE_S), _Rate(ARRIVALS_S)
        self._before: tuple[float, float] | None = None
        """Time and lag of the last observation."""
        self._above: float | None = None
        self._below: float | None = None
        self._changed_at: float | None = None
        self._returned_at: float | None = None
        self._return_s = RETURN_S

    def change(self, limits: OverloadLimits, shed_s: float | None) -> None:
        """Other limits from now on; a step that they don't allow is taken back."""
        self.limits = limits
        self.shed_s = shed_s
        most = Step.FROZEN if shed_s is None else Step.SHEDDING
        self.most = most if limits.enabled else Step.NORMAL
        """The last step that may be taken."""
        self.step = min(self.step, self.most)

    def bound(self, step: Step) -> float:
        """Lag in seconds from which ``step`` may be taken; infinite where it never is."""
        if step is Step.NORMAL:
            return 0.0
        shed_s = math.inf if self.shed_s is None else self.shed_s
        return min(self.limits.lag_s * _MULTIPLES.get(step, math.inf), shed_s)

    @property
    def rate(self) -> float | None:
        """Rows answered per second of work; None before that is known."""
        return self._work.value

    @property
    def draining(self) -> bool | None:
        """Whether a lag goes away by itself soon; None while that is not known."""
        work, arrivals = self._work.value, self._arrivals.value
        if not work or arrivals is None or self._arrivals.seconds < LEAST_SEEN_S:
            return None
        return arrivals < DRAINING * work

    def seconds(self, lag_rows: float | None) -> float | None:
        """A lag in seconds of work; None when it or the rate is unknown."""
        if lag_rows is None or not math.isfinite(lag_rows):
            return None
        if lag_rows <= 0:
            return 0.0
        return lag_rows / self.rate if self.rate else None

    def excess(self, lag_rows: float | None) -> int:
        """Rows to skip now: where the lag is beyond the bound of skipping, down to `SHED_TO` of it."""
        lag_s, bound = self.seconds(lag_rows), self.bound(Step.SHEDDING)
        if self.step is not Step.SHEDDING or lag_s is None or lag_rows is None or lag_s <= bound:
            return 0
        return int(lag_rows * (1.0 - SHED_TO * bound / lag_s))

    def worked(self, rows: int, seconds: float) -> None:
        """``rows`` were answered in ``seconds`` of work without a wait for records or for a sink."""
        if rows > 0 and 0 < seconds < math.inf:
            self._work.update(rows, seconds)

    def interrupted(self) -> None:
        """Partitions came or went, or something outside was waited for: the lag before says nothing of arrivals."""
        self._before = self._above = self._below = None
        self._arrivals = _Rate(ARRIVALS_S)

    def observe(self, now: float, lag_rows: float | None, taken: int) -> Step:
        """Take in the lag and say what gives way from now on.

        Args:
            now: seconds of any clock that does not go back.
            lag_rows: rows that wait at the source; None or not finite: unknown.
            taken: rows taken from there since the last call, answered or skipped.
        """
        lag_s = self.seconds(lag_rows)
        if lag_rows is None or not math.isfinite(lag_rows):
            self._before = self._above = self._below = None
            return self.step
        if self._before is not None and now > self._before[0]:
            self._arrivals.update(lag_rows - self._before[1] + taken, now - self._before[0])
        self._before = (now, lag_rows)
        if lag_s is None:
            self._above = self._below = None
        else:
            self._judge(now, lag_s)
        return self.step

    def _judge(self, now: float, lag_s: float) -> None:
        above = self.step < self.most and self.draining is False and lag_s > self.bound(Step(self.step + 1))
        below = self.step > Step.NORMAL and lag_s <= HYSTERESIS * self.bound(self.step)
        self._above = (now if self._above is None else self._above) if above else None
        self._below = (now if self._below is None else self._below) if below else None
        settled = self._changed_at is None or now - self._changed_at >= SETTLE_S
        if self._above is not None and settled and now - self._above >= self.limits.patience_s:
            relapsed = self._returned_at is not None and now - self._returned_at < RELAPSE * self._return_s
            self._return_s = min(2 * self._return_s, LONGEST_RETURN_S) if relapsed else RETURN_S
            self._returned_at = None
            self._go(now, Step(self.step + 1))
        elif self._below is not None and now - self._below >= self._return_s:
            self._returned_at = now
            self._go(now, Step(self.step - 1))

    def _go(self, now: float, step: Step) -> None:
        self.step, self._changed_at, self._above, self._below = step, now, None, None
