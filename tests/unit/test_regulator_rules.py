"""The regulator's rules, for any history of readings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daemon.regulator import Decision, Reading, Regulator, RegulatorLimits, State

any_speed = settings(deadline=None)
LIMITS = RegulatorLimits(
    gain_min=0.1,
    gain_max=0.9,
    gain_start=0.4,
    slew=0.3,
    slew_rows=30,
    patience_rows=60,
    slow_budget_rows=300,
    slow_retry_rows=100,
    slow_retry_max_rows=400,
    settle_rows=80,
    cooldown_rows=100,
    cooldown_max_rows=400,
    calm_rows=1_000,
    hunting_reversals=3,
    hunting_rows=500,
    recover_rows=200,
    probe_rows=150,
    probe_max_rows=600,
)
ACTING = (State.FAST, State.SLOW)

# Wide enough values to saturate, hunt and rest; runs of one value, or no excursion would ever last.
VALUES = st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.1, 4.0, 1e300, -0.9, -1.1, -4.0, math.nan, math.inf, -math.inf])
LEARNER: st.SearchStrategy[Any] = st.sampled_from(["idle", "idle", "idle", "busy", "promoted", "rejected", "failed"])


@st.composite
def runs(draw: st.DrawFn) -> list[Reading]:
    """Up to twelve equal readings: an alarm, a trip or an event of the learner is in the first."""
    one_in_eight = st.integers(0, 7).map(lambda n: n == 0)
    first = Reading(
        rows=draw(st.integers(0, 80)),
        value=draw(VALUES | st.floats(-3, 3)),
        drift=draw(st.booleans()),
        dropped=draw(st.booleans()) and draw(st.booleans()),
        trip="harm" if draw(one_in_eight) else None,
        learner=draw(LEARNER),
    )
    return [first] + draw(st.integers(0, 11)) * [replace(first, drift=False, trip=None, learner="idle")]


HISTORIES = st.lists(runs(), max_size=25).map(lambda parts: [reading for part in parts for reading in part])
SATURATION = [Reading(rows=30, value=4.0, drift=True)] * 12


def play(regulator: Regulator, readings: list[Reading]) -> list[Decision]:
    return [regulator.step(reading) for reading in readings]


def events(decision: Decision) -> tuple[bool, ...]:
    return (
        decision.ask_slow,
        decision.cancel_slow,
        decision.reset_fast,
        decision.rebaseline,
        decision.changed,
        bool(decision.reasons),
    )


@any_speed
@given(HISTORIES)
def test_the_gain_keeps_its_hard_limits_and_its_slew_limit(readings: list[Reading]) -> None:
    regulator = Regulator(LIMITS)
    before = regulator.gain
    for reading in readings:
        decision = regulator.step(reading)
        assert LIMITS.gain_min <= decision.gain <= LIMITS.gain_max
        if decision.reset_fast:
            assert decision.gain == LIMITS.gain_min
        else:
            assert abs(decision.gain - before) <= LIMITS.slew * min(1.0, reading.rows / LIMITS.slew_rows) + 1e-12
        before = decision.gain


@any_speed
@given(HISTORIES)
@example(SATURATION)
def test_the_slow_actuator_keeps_its_hard_limits(readings: list[Reading]) -> None:
    limits = replace(LIMITS, slow_retry_rows=200)
    regulator = Regulator(limits)
    open_rows: int | None = None
    since_fruitless = limits.slow_retry_rows
    for reading in readings:
        before = regulator.state
        decision = regulator.step(reading)
        since_fruitless += reading.rows
        if open_rows is not None:
            open_rows += reading.rows
            assert open_rows < limits.slow_budget_rows or decision.state is not State.SLOW
        if decision.ask_slow:
            assert open_rows is None
            assert since_fruitless >= limits.slow_retry_rows
            open_rows = 0
        if before is State.SLOW and decision.changed:
            open_rows = None
            since_fruitless = 0 if decision.state is State.FAST else since_fruitless
        if decision.state is State.SETTLING:
            since_fruitless = limits.slow_retry_rows


@any_speed
@given(HISTORIES)
def test_the_model_is_adapted_in_fast_and_slow_alone(readings: list[Reading]) -> None:
    for decision in play(Regulator(LIMITS), readings):
        assert decision.adapt == (decision.state in ACTING)


@any_speed
@given(HISTORIES)
@example([Reading(rows=20, value=v, drift=True, dropped=d) for v in (0.0, 4.0, -4.0) for d in (False, True) * 6])
def test_a_dropped_reading_only_throttles(readings: list[Reading]) -> None:
    regulator = Regulator(LIMITS)
    adapted, gain = False, regulator.gain
    for reading in readings:
        decision = regulator.step(reading)
        if reading.dropped:
            assert decision.gain <= gain
            assert not decision.ask_slow
            assert adapted or not decision.adapt
        adapted, gain = decision.adapt, decision.gain


@any_speed
@given(HISTORIES)
@example([Reading(rows=30, value=4.0, drift=True), Reading(rows=30, value=math.nan)] * 8)
def test_a_value_that_is_not_finite_acts_as_the_last_finite_one(readings: list[Reading]) -> None:
    held, repeated = 0.0, []
    for reading in readings:
        held = reading.value if math.isfinite(reading.value) and reading.rows else held
        repeated.append(replace(reading, value=held))
    assert play(Regulator(LIMITS), readings) == play(Regulator(LIMITS), repeated)


@any_speed
@given(HISTORIES, st.sampled_from([0.0, 0.5, -0.7]))
@example(SATURATION, 0.0)
def test_a_long_run_in_band_reaches_steady_from_any_history(readings: list[Reading], value: float) -> None:
    regulator = Regulator(LIMITS)
    play(regulator, readings)
    play(regulator, [Reading(rows=20, value=value)] * 60)
    assert regulator.state is State.STEADY
    assert {d.state for d in play(regulator, [Reading(rows=20, value=value)] * 60)} == {State.STEADY}


@any_speed
@given(HISTORIES)
def test_no_state_is_left_stuck_by_values_that_are_not_finite(readings: list[Reading]) -> None:
    regulator = Regulator(LIMITS)
    play(regulator, readings)
    regulator.step(Reading(rows=1, value=0.0))
    play(regulator, [Reading(rows=20, value=math.nan)] * 60)
    assert regulator.state is State.STEADY


def lasting(readings: list[Reading], values: list[float]) -> int:
    """Rows of the newest unbroken run beyond one side of the band, without those that may not count."""
    side = 1 if values[-1] > 1 else -1
    rows = 0
    for reading, value in zip(reversed(readings), reversed(values), strict=True):
        if value * side <= 1:
            break
        rows += 0 if reading.dropped and side > 0 else reading.rows
    return rows


@any_speed
@given(HISTORIES)
@example(SATURATION)
@example([Reading(rows=50, value=v, drift=True) for v in (4.0, 4.0, 4.0, -4.0, 4.0, 0.9, 4.0, 4.0, 4.0)])
def test_only_an_unbroken_run_on_one_side_counts_as_saturated_or_out_of_band(readings: list[Reading]) -> None:
    regulator = Regulator(LIMITS)
    values: list[float] = []
    counted: list[Reading] = []
    alarmed = False
    for reading in readings:
        before = regulator.state
        decision = regulator.step(reading)
        if not reading.rows:
            continue
        counted.append(reading)
        values.append(reading.value if math.isfinite(reading.value) else values[-1] if values else 0.0)
        alarmed = reading.drift or (alarmed and before is State.STEADY)
        unprompted = before is State.STEADY and decision.state is State.FAST and not alarmed
        if decision.ask_slow or unprompted:
            assert abs(values[-1]) > 1
            assert lasting(counted, values) >= LIMITS.patience_rows


@any_speed
@given(HISTORIES, st.builds(Reading, rows=st.just(0), value=VALUES, drift=st.booleans(), dropped=st.booleans()))
def test_a_reading_of_no_rows_changes_nothing(readings: list[Reading], empty: Reading) -> None:
    regulator = Regulator(LIMITS)
    play(regulator, readings)
    before = regulator.state_dict()
    decision = regulator.step(replace(empty, trip="harm", learner="promoted"))
    assert regulator.state_dict() == before
    assert not any(events(decision))
    assert (decision.state, decision.gain) == (regulator.state, regulator.gain)


@any_speed
@given(HISTORIES, HISTORIES)
def test_a_restart_at_any_point_continues_identically(before: list[Reading], after: list[Reading]) -> None:
    first, second = Regulator(LIMITS), Regulator(LIMITS)
    play(first, before)
    state = first.state_dict()
    second.load_state_dict(state)
    assert play(first, after) == play(second, after)
    assert first.state_dict() == second.state_dict()


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    return all(map(plain, value)) if type(value) is list else type(value) in (int, float, bool, str, type(None))


@any_speed
@given(HISTORIES)
def test_the_state_is_plain_data_and_a_copy(readings: list[Reading]) -> None:
    regulator = Regulator(LIMITS)
    play(regulator, readings)
    state = regulator.state_dict()
    assert plain(state)
    state["band"]["reversals"].append(-1)
    assert -1 not in regulator.state_dict()["band"]["reversals"]


class Service(RuleBasedStateMachine):
    """A life of the regulator in the words of an operator; the invariants are those of the table of states."""

    def __init__(self) -> None:
        super().__init__()
        self.regulator = Regulator(LIMITS)
        self.last = self.regulator.step(Reading(rows=0, value=0.0))
        self.seen: list[tuple[State, Decision]] = []

    def step(self, **reading: Any) -> None:
        before = self.regulator.state
        self.last = self.regulator.step(Reading(**{"rows": 20, "value": 0.0} | reading))
        self.seen.append((before, self.last))

    @rule(times=st.integers(1, 20), value=st.floats(-1, 1))
    def in_band(self, times: int, value: float) -> None:
        for _ in range(times):
            self.step(value=value)

    @rule(times=st.integers(1, 20), value=st.floats(1.1, 5), side=st.sampled_from([1, -1]), dropped=st.booleans())
    def out_of_band(self, times: int, value: float, side: int, dropped: bool) -> None:
        for _ in range(times):
            self.step(value=side * value, dropped=dropped)

    @rule()
    def alarm(self) -> None:
        self.step(drift=True)

    @rule()
    def trip(self) -> None:
        self.step(trip="non_finite")
        assert self.last.state is State.FALLBACK

    @precondition(lambda self: self.regulator.state is State.SLOW)
    @rule(event=st.sampled_from(["promoted", "rejected", "failed"]))
    def learner_answers(self, event: Any) -> None:
        self.step(value=3.0, learner=event)
        assert self.last.state is (State.SETTLING if event == "promoted" else State.FAST)

    @rule()
    def restart(self) -> None:
        state = self.regulator.state_dict()
        self.regulator = Regulator(LIMITS)
        self.regulator.load_state_dict(state)

    @invariant()
    def only_the_transitions_of_the_table_happen(self) -> None:
        allowed = {
            State.STEADY: {State.FAST, State.FALLBACK},
            State.FAST: {State.STEADY, State.SLOW, State.FALLBACK},
            State.SLOW: {State.SETTLING, State.FAST, State.FALLBACK},
            State.SETTLING: {State.STEADY, State.FAST, State.FALLBACK},
            State.FALLBACK: {State.FAST},
        }
        for before, decision in self.seen:
            assert decision.changed == (decision.state is not before)
            assert not decision.changed or decision.state in allowed[before]
            assert decision.reasons or not any(events(decision))
            assert decision.ask_slow == (decision.state is State.SLOW and decision.changed)
        self.seen.clear()


TestService = Service.TestCase
TestService.settings = any_speed


@pytest.mark.parametrize("hysteresis", [0.3, 0.8, 1.0])
@any_speed
@given(values=st.lists(st.floats(-2, 2), min_size=1, max_size=40))
def test_each_bound_has_hysteresis(hysteresis: float, values: list[float]) -> None:
    limits = replace(LIMITS, hysteresis=hysteresis, gain_start=0.1, patience_rows=10**9)
    regulator = Regulator(limits)
    regulator.step(Reading(rows=30, value=0.0, drift=True))
    side, before = 0, regulator.gain
    for value in values:
        if abs(value) > 1:
            side = 1 if value > 0 else -1
        elif value * side < hysteresis:
            side = 0
        gain = regulator.step(Reading(rows=30, value=value)).gain
        assert gain == before if side == 0 else (gain - before) * side >= 0
        before = gain
