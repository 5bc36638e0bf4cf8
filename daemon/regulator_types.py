"""What goes into the regulator and what comes out: its limits, its readings, its decisions."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal

Event = Literal["idle", "busy", "promoted", "rejected", "failed"]
"""What the slow loop has to say in a reading."""


class State(StrEnum):
    """What the regulator is doing."""

    STEADY = "steady"
    FAST = "fast"
    SLOW = "slow"
    SETTLING = "settling"
    FALLBACK = "fallback"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegulatorLimits:
    """Limits of both actuators and the patience of every transition. All spans are in rows, not seconds."""

    gain_min: float = 0.0
    """Lowest gain; also the gain after a fallback or a promotion."""
    gain_max: float = 1.0
    """Highest gain."""
    gain_start: float = 0.5
    """Gain that an alarm leads to even while the value is in band; gain_min: the value alone decides."""
    loop_gain: float = 0.2
    """Change of gain per slew_rows for a value one band width too far out."""
    loop_gain_min: float = 0.0125
    """Lowest loop gain that hunting can bring about."""
    hysteresis: float = 0.8
    """An excursion beyond the band (|value| > 1) ends below this |value|."""
    slew: float = 0.25
    """Most the gain may change in slew_rows rows and in any one reading."""
    slew_rows: int = 50
    """Rows in which the gain may change by slew."""
    patience_rows: int = 200
    """Rows in a row in band before steady, or out of band or saturated before acting on it."""
    slow_enabled: bool = True
    """Whether the slow actuator may be asked at all."""
    slow_budget_rows: int = 20_000
    """Rows after which an unanswered request to the learner is cancelled."""
    slow_retry_rows: int = 500
    """Rows between a fruitless request and the next; doubles each time until a promotion."""
    slow_retry_max_rows: int = 32_000
    """Longest wait between two requests, in rows."""
    settle_rows: int = 300
    """Rows after a promotion in which nothing is judged."""
    cooldown_rows: int = 500
    """Rows in fallback after the first trip; doubles with each further one."""
    cooldown_max_rows: int = 64_000
    """Longest cool-down, in rows."""
    calm_rows: int = 20_000
    """Rows without a trip, outside fallback, after which the cool-down is back at cooldown_rows."""
    hunting_reversals: int = 4
    """Changes of side within hunting_rows that count as hunting."""
    hunting_rows: int = 2_000
    """Window of the reversals and of the average that tells hunting from saturation, in rows."""
    recover_rows: int = 5_000
    """Rows in band in which a loop gain lowered by hunting doubles again."""
    probe_rows: int = 2_000
    """Rows in steady between attempts to lower the gain by slew; doubles when one fails; 0: never."""
    probe_max_rows: int = 64_000
    """Longest time between two such attempts, in rows."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name.endswith("_rows") and f.name != "probe_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1 row")
        if not -math.inf < self.gain_min <= self.gain_start <= self.gain_max < math.inf:
            raise ValueError(
                f"gains {self.gain_min}, {self.gain_start}, {self.gain_max}: "
                "give finite gain_min <= gain_start <= gain_max"
            )
        if not 0 < self.loop_gain_min <= self.loop_gain < math.inf:
            raise ValueError(f"loop_gain {self.loop_gain}: give 0 < loop_gain_min ({self.loop_gain_min}) <= loop_gain")
        if not 0 < self.hysteresis <= 1:
            raise ValueError(f"hysteresis is {self.hysteresis}: give a share of the band in (0, 1]")
        if not 0 < self.slew < math.inf:
            raise ValueError(f"slew is {self.slew}: give a change of gain above 0")
        if self.hunting_reversals < 2:
            raise ValueError(f"hunting_reversals is {self.hunting_reversals}: give at least 2")
        if self.probe_rows < 0:
            raise ValueError(f"probe_rows is {self.probe_rows}: give 0 (never) or more")
        for kind in ("slow_retry", "cooldown", "probe"):
            if getattr(self, f"{kind}_max_rows") < getattr(self, f"{kind}_rows"):
                raise ValueError(f"{kind}_max_rows is below {kind}_rows: give at least as many rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was measured since the last reading.

    A reading of no rows changes nothing, whatever else it says: hand its events in again with the next rows.
    """

    rows: int
    """Rows since the last reading: the machine's only clock."""
    value: float
    """Regulated variable in units of its band: above 1 asks for more gain, below -1 for less."""
    drift: bool = False
    """A calibrated detector raised an alarm in these rows."""
    dropped: bool = False
    """Input was dropped in this period, so the value is not to be trusted to open anything up."""
    trip: str | None = None
    """The guard's reason to fall back now."""
    learner: Event = "idle"
    """Event from the slow loop since the last reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do until the next reading. The flags from ``ask_slow`` to ``rebaseline`` are events: act once."""

    state: State
    gain: float
    adapt: bool
    """Whether the fast method may learn from the rows."""
    ask_slow: bool
    cancel_slow: bool
    reset_fast: bool
    """Put the fast method's state back to the start."""
    rebaseline: bool
    """Let the detectors learn the present as their reference."""
    changed: bool
    """Whether the state differs from the one before."""
    reasons: tuple[str, ...]
    """Short sentences for one log line; empty when nothing of note happened."""
