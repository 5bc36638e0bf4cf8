"""The fast/slow feedback controller: a pure state machine without torch, I/O or a clock of its own.

One :class:`Regulator` serves any regulated variable: a model's error or entropy, or a sensor's event rate. Its fast
actuator is a gain; its slow actuator is a request to the learner. Time is counted in rows.

Two loops: Ashby, "Design for a Brain", 1952. Slew limit, hysteresis and hard limits of a controller that turns a
sensor's own knobs: Delbruck, Graca and Paluch, "Feedback control of event cameras", CVPR workshops 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from daemon.band import Band
from daemon.regulator_types import Decision, Event, Reading, RegulatorLimits, State

__all__ = ["Decision", "Event", "Reading", "Regulator", "RegulatorLimits", "State"]


@dataclass(slots=True)
class _Draft:
    """The events of the decision being made."""

    ask_slow: bool = False
    cancel_slow: bool = False
    reset_fast: bool = False
    rebaseline: bool = False
    reasons: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Memory:
    """What outlives a reading, beside the band. Spans in rows; ``railed`` is signed by the rail."""

    gain: float
    loop_gain: float
    next_retry: int
    next_cooldown: int
    next_probe: int
    state: State = State.STEADY
    in_state: int = 0
    alarm: bool = False
    railed: int = 0
    lead_to: float | None = None
    probed_from: float | None = None
    probe_age: int = 0
    slow_wait: int = 0
    cooldown: int = 0
    calm: int = 0


class Regulator:
    """Keeps one variable in its band with a bounded gain, and asks for a slow change when the gain is not enough.

    - The gain follows the value by integral action: while an excursion lasts (see :class:`daemon.band.Band`), a
      reading moves it by ``clip(loop_gain * (value -+ hysteresis), -slew, slew) * min(1, rows / slew_rows)``.
    - Hunting halves the loop gain, and the slew with it; rows in band double both again, slowly.
    - In ``steady`` the gain is held, but for *probes*: every ``probe_rows`` it is lowered by ``slew``, so that a
      disturbance that has passed lets it go down to ``gain_min``. A value above ``hysteresis`` takes the probe back; an
      alarm or an excursion leads ``fast`` to the old gain again; both double the time to the next probe.
    - A promotion sets the gain to ``gain_min``: the new version serves as it was judged, and the fast state, learnt
      beside the old version, is void. ``settling`` does not adapt: the detectors see the new version alone.
    - After a cool-down ``fast`` begins at ``gain_min``, led to ``gain_start`` only if drift was seen meanwhile.
    - Hard limits: the gain stays within ``[gain_min, gain_max]``; one request to the learner at a time, cancelled
      after ``slow_budget_rows``, and at least ``slow_retry_rows`` after a fruitless one.
    - While input is dropped the gain does not rise, adaptation does not begin and the learner is not asked; an alarm
      is kept for later.
    """

    def __init__(self, limits: RegulatorLimits | None = None) -> None:
        self.limits = limits if limits is not None else RegulatorLimits()
        self.band = Band(
            hysteresis=self.limits.hysteresis,
            patience_rows=self.limits.patience_rows,
            hunting_rows=self.limits.hunting_rows,
            hunting_reversals=self.limits.hunting_reversals,
        )
        self._m = _Memory(
            gain=self.limits.gain_min,
            loop_gain=self.limits.loop_gain,
            next_retry=self.limits.slow_retry_rows,
            next_cooldown=self.limits.cooldown_rows,
            next_probe=self.limits.probe_rows,
        )
        self._handlers: dict[State, Callable[[Reading, _Draft], None]] = {
            State.STEADY: self._steady,
            State.FAST: self._fast,
            State.SLOW: self._slow,
            State.SETTLING: self._settling,
            State.FALLBACK: self._fallback,
        }

    @property
    def state(self) -> State:
        """The present state."""
        return self._m.state

    @property
    def gain(self) -> float:
        """The present gain, in [gain_min, gain_max]."""
        return self._m.gain

    @property
    def loop_gain(self) -> float:
        """The present loop gain, in [loop_gain_min, loop_gain]: below its setting after hunting."""
        return self._m.loop_gain

    def step(self, reading: Reading) -> Decision:
        """Take one reading and say what to do until the next.

        Raises:
            ValueError: ``rows`` is negative.
        """
        if reading.rows < 0:
            raise ValueError(f"a reading of {reading.rows} rows: give the rows since the last reading, 0 or more")
        before, draft = self._m.state, _Draft()
        if reading.rows:
            self._measure(reading, draft)
            if reading.trip is not None:
                self._fall_back(reading.trip, draft)
            elif reading.learner == "promoted" and before is not State.FALLBACK:
                self._settle(draft)
            else:
                self._handlers[before](reading, draft)
        state = self._m.state
        return Decision(
            state=state,
            gain=self._m.gain,
            adapt=state in (State.FAST, State.SLOW),
            ask_slow=draft.ask_slow,
            cancel_slow=draft.cancel_slow,
            reset_fast=draft.reset_fast,
            rebaseline=draft.rebaseline,
            changed=state is not before,
            reasons=tuple(draft.reasons),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped."""
        return {**asdict(self._m), "state": self._m.state.value, "band": self.band.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``. Gains that the present limits no longer allow are clipped to them.

        Raises:
            ValueError: keys are missing or unknown, or the name of the state is.
        """
        differing = state.keys() ^ ({f.name for f in fields(_Memory)} | {"band"})
        if differing:
            raise ValueError(f"regulator state does not fit (keys that differ: {sorted(differing)}): start without it")
        own = {name: value for name, value in state.items() if name != "band"}
        memory = _Memory(**{**own, "state": State(state["state"])})
        self.band.load_state_dict(state["band"])
        self._m = memory
        self._move_to(memory.gain)
        memory.loop_gain = _clip(memory.loop_gain, self.limits.loop_gain_min, self.limits.loop_gain)

    def _measure(self, reading: Reading, draft: _Draft) -> None:
        m, limits, rows = self._m, self.limits, reading.rows
        m.in_state += rows
        m.slow_wait = max(0, m.slow_wait - rows)
        if m.state is not State.FALLBACK:
            m.calm += rows
            if m.calm >= limits.calm_rows:
                m.next_cooldown = limits.cooldown_rows
        acting = m.state in (State.FAST, State.SLOW)
        if self.band.update(reading.value, rows, dropped=reading.dropped, acting=acting):
            m.loop_gain = max(limits.loop_gain_min, m.loop_gain / 2)
            draft.reasons.append(f"hunting: loop gain lowered to {m.loop_gain:g}")
        elif not self.band.side and not self.band.hunting:
            m.loop_gain = min(limits.loop_gain, m.loop_gain * 2.0 ** min(64.0, rows / limits.recover_rows))

    def _steady(self, reading: Reading, draft: _Draft) -> None:
        m, limits = self._m, self.limits
        m.alarm |= reading.drift
        if reading.dropped or not (m.alarm or self.band.patient_outside):
            self._probe(reading, draft)
            return
        if m.probed_from is None:
            lead_to, m.next_probe = limits.gain_start, limits.probe_rows
        else:
            lead_to, m.next_probe = max(limits.gain_start, m.probed_from), self._doubled_probe()
        reason = "drift alarm" if m.alarm else f"no alarm, but out of band for {abs(self.band.outside)} rows"
        self._enter_fast(draft, reason, lead_to)

    def _fast(self, reading: Reading, draft: _Draft) -> None:
        m, limits = self._m, self.limits
        self._regulate(reading)
        saturated = abs(m.railed) >= limits.patience_rows
        if self.band.patient_inside:
            draft.rebaseline = True
            self._enter(State.STEADY, draft, f"in band for {self.band.inside} rows")
        elif saturated and limits.slow_enabled and not (reading.dropped or m.slow_wait or self.band.only_hunting):
            draft.ask_slow = True
            self._enter(State.SLOW, draft, f"gain {m.gain:g} is the limit, yet out of band for {abs(m.railed)} rows")

    def _slow(self, reading: Reading, draft: _Draft) -> None:
        m, limits = self._m, self.limits
        self._regulate(reading)
        if reading.learner in ("rejected", "failed"):
            reason = f"slow step {reading.learner}"
        elif m.in_state >= limits.slow_budget_rows:
            draft.cancel_slow = True
            reason = f"slow step unfinished after {m.in_state} rows"
        else:
            return
        m.slow_wait, m.next_retry = m.next_retry, min(2 * m.next_retry, limits.slow_retry_max_rows)
        self._enter_fast(draft, f"{reason}, the next one in {m.slow_wait} rows at the earliest")

    def _settling(self, reading: Reading, draft: _Draft) -> None:
        if self._m.in_state < self.limits.settle_rows:
            return
        if not self.band.side:
            self._enter(State.STEADY, draft, "settled in band")
        elif not reading.dropped:
            self._enter_fast(draft, "settled out of band", self.limits.gain_start)

    def _fallback(self, reading: Reading, draft: _Draft) -> None:
        m = self._m
        m.alarm |= reading.drift
        if reading.learner == "promoted":
            draft.rebaseline = True
            draft.reasons.append("new version promoted during the cool-down")
        if m.in_state >= m.cooldown and not reading.dropped:
            wanted = m.alarm or self.band.side > 0
            self._enter_fast(draft, "cool-down over", self.limits.gain_start if wanted else None)

    def _settle(self, draft: _Draft) -> None:
        m, limits = self._m, self.limits
        m.gain, m.slow_wait, m.next_retry = limits.gain_min, 0, limits.slow_retry_rows
        draft.reset_fast = draft.rebaseline = True
        self._enter(State.SETTLING, draft, "new version promoted")

    def _fall_back(self, trip: str, draft: _Draft) -> None:
        m, limits = self._m, self.limits
        if m.state is not State.FALLBACK:
            m.cooldown, m.next_cooldown = m.next_cooldown, min(2 * m.next_cooldown, limits.cooldown_max_rows)
        m.gain, m.calm = limits.gain_min, 0
        draft.reset_fast = draft.cancel_slow = True
        self._enter(State.FALLBACK, draft, f"guard: {trip}; cooling down for {m.cooldown} rows")

    def _enter(self, state: State, draft: _Draft, reason: str) -> None:
        m = self._m
        m.state, m.in_state, m.railed, m.alarm = state, 0, 0, False
        m.lead_to, m.probed_from, m.probe_age = None, None, 0
        self.band.restart()
        draft.reasons.append(reason)

    def _enter_fast(self, draft: _Draft, reason: str, lead_to: float | None = None) -> None:
        self._enter(State.FAST, draft, reason)
        self._m.lead_to = lead_to

    def _regulate(self, reading: Reading) -> None:
        """Move the gain: by the value, and up to ``lead_to`` unless the value is too low for that."""
        m, limits, band = self._m, self.limits, self.band
        share = min(1.0, reading.rows / limits.slew_rows)
        move = 0.0
        if band.side:
            slew = limits.slew * m.loop_gain / limits.loop_gain
            move = _clip(m.loop_gain * (band.value - band.side * limits.hysteresis), -slew, slew) * share
        if m.lead_to is not None and band.side >= 0 and m.gain < m.lead_to:
            move = max(move, min(limits.slew * share, m.lead_to - m.gain))
        else:
            m.lead_to = None
        self._move_to(m.gain + (min(move, 0.0) if reading.dropped else move))
        at_rail = m.gain >= limits.gain_max if band.beyond > 0 else m.gain <= limits.gain_min
        m.railed = band.count(m.railed, reading.rows, dropped=reading.dropped) if at_rail else 0

    def _probe(self, reading: Reading, draft: _Draft) -> None:
        """Lower the gain a step at a time while nothing gets worse; ``lead_to`` is where it is on its way to."""
        m, limits = self._m, self.limits
        m.probe_age += reading.rows
        if m.probed_from is not None and self.band.value > limits.hysteresis:
            draft.reasons.append(f"a lower gain made it worse: back to {m.probed_from:g}")
            m.lead_to, m.probed_from, m.probe_age, m.next_probe = m.probed_from, None, 0, self._doubled_probe()
        elif limits.probe_rows and m.probe_age >= m.next_probe and not self.band.side:
            m.probe_age, m.probed_from = 0, None
            if m.gain > limits.gain_min:
                m.probed_from, m.lead_to = m.gain, max(limits.gain_min, m.gain - limits.slew)
                draft.reasons.append(f"steady for long: trying gain {m.lead_to:g}")
        if m.lead_to is not None and not (reading.dropped and m.lead_to > m.gain):
            most = limits.slew * min(1.0, reading.rows / limits.slew_rows)
            self._move_to(m.gain + _clip(m.lead_to - m.gain, -most, most))

    def _doubled_probe(self) -> int:
        return min(2 * self._m.next_probe, self.limits.probe_max_rows)

    def _move_to(self, gain: float) -> None:
        self._m.gain = _clip(gain, self.limits.gain_min, self.limits.gain_max)


def _clip(x: float, low: float, high: float) -> float:
    return min(high, max(low, x))
