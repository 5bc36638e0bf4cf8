"""What a regulated variable's values say: out of band, back in it, for how long, and whether the loop is hunting."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

VALUE_LIMIT = 100.0
"""Values are clipped to this many bands: farther out says no more, and sums stay finite."""


@dataclass(slots=True, kw_only=True)
class Band:
    """A two-sided band with hysteresis, watched in units of itself: beyond it is ``|value| > 1``.

    An *excursion* begins beyond the band. It ends below ``hysteresis``, or after ``patience_rows`` within the band:
    a value that stays between the two is in band, only not by much. Counters are in rows and start at zero; those of
    the two sides share one signed number, so that the count of one side can't survive the other.
    """

    hysteresis: float
    patience_rows: int
    hunting_rows: int
    hunting_reversals: int

    value: float = 0.0
    """Last finite value."""
    beyond: int = 0
    """Side on which the last value lies beyond the band: 1 too high, -1 too low, 0 within."""
    side: int = 0
    """Side of the excursion that still lasts, 0 when in band."""
    outside: int = 0
    """Rows in a row beyond the band, signed by side."""
    inside: int = 0
    """Rows within the band since it was last left, since the excursion ended, or since ``restart``."""
    mean: float = 0.0
    """Exponential mean of the value over ``hunting_rows``."""
    hunting: int = 0
    """Rows for which the last hunting is still remembered."""
    clock: int = 0
    direction: int = 0
    reversals: list[int] = field(default_factory=list)

    def update(self, value: float, rows: int, *, dropped: bool, acting: bool) -> bool:
        """Take a value that held for ``rows`` > 0 rows; True when the loop was just found hunting.

        A value that is not finite repeats the last finite one. Hunting is looked for only while the loop is
        ``acting``: a variable that swings by itself is none of the gain's fault.
        """
        if math.isfinite(value):
            self.value = min(VALUE_LIMIT, max(-VALUE_LIMIT, float(value)))
        self.clock += rows
        self.hunting = max(0, self.hunting - rows)
        self.mean += (self.value - self.mean) * -math.expm1(-rows / self.hunting_rows)
        self.beyond = (self.value > 1) - (self.value < -1)
        if self.beyond:
            self.side, self.inside = self.beyond, 0
            self.outside = self.count(self.outside, rows, dropped=dropped)
            return self._reversed() and acting and self._hunting()
        self.outside = 0
        self.inside += rows
        if self.side and (self.value * self.side < self.hysteresis or self.inside >= self.patience_rows):
            self.side, self.inside = 0, rows
        return False

    def count(self, counter: int, rows: int, *, dropped: bool) -> int:
        """Add rows to a signed counter of rows beyond the band; within it, or on the other side, the count goes.

        While input is dropped, rows on the high side are not counted: they may not open anything up.
        """
        kept = counter if counter * self.beyond > 0 else 0
        return kept if dropped and self.beyond > 0 else kept + self.beyond * rows

    @property
    def patient_inside(self) -> bool:
        """In band for ``patience_rows`` in a row."""
        return not self.side and self.inside >= self.patience_rows

    @property
    def patient_outside(self) -> bool:
        """Beyond the band, on one side, for ``patience_rows`` in a row."""
        return abs(self.outside) >= self.patience_rows

    @property
    def only_hunting(self) -> bool:
        """Hunting not long ago, and on average in band: no case for the slow actuator."""
        return self.hunting > 0 and abs(self.mean) <= 1

    def restart(self) -> None:
        """Begin to count the rows in band anew."""
        self.inside = 0

    def limit(self, limits: Any) -> None:
        """Take the four limits of ``limits``; what was counted stays."""
        for name in _LIMITS:
            setattr(self, name, getattr(limits, name))

    def state_dict(self) -> dict[str, Any]:
        """All but the four limits."""
        return {name: value for name, value in asdict(self).items() if name not in _LIMITS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``.

        Raises:
            ValueError: keys are missing or unknown.
        """
        differing = state.keys() ^ ({f.name for f in fields(self)} - _LIMITS)
        if differing:
            raise ValueError(f"band state does not fit (keys that differ: {sorted(differing)}): start without it")
        for name, value in state.items():
            setattr(self, name, list(value) if name == "reversals" else value)

    def _reversed(self) -> bool:
        before, self.direction = self.direction, self.beyond
        return before == -self.beyond

    def _hunting(self) -> bool:
        self.reversals = [at for at in self.reversals if self.clock - at < self.hunting_rows] + [self.clock]
        if len(self.reversals) < self.hunting_reversals:
            return False
        self.hunting, self.reversals = self.hunting_rows, []
        return True


_LIMITS = {"hysteresis", "patience_rows", "hunting_rows", "hunting_reversals"}
