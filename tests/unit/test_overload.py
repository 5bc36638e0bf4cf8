from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.overload import (
    DRAINING,
    HYSTERESIS,
    LONGEST_RETURN_S,
    RETURN_S,
    SETTLE_S,
    SHED_TO,
    Overload,
    OverloadLimits,
    Step,
)

TICK_S = 0.5


class World:
    """A stream of ``arrivals`` rows a second before a worker that answers ``rate`` of them, half a second at a time."""

    def __init__(self, overload: Overload, lag: float = 0.0) -> None:
        self.overload = overload
        self.lag = lag
        self.now = 1000.0
        self.shed = 0
        self.steps = [overload.step]

    def run(self, seconds: float, *, arrivals: float, rate: float | dict[Step, float]) -> list[Step]:
        """Steps of the time."""
        began = len(self.steps)
        for _ in range(int(seconds / TICK_S)):
            self.now += TICK_S
            able = (rate[self.overload.step] if isinstance(rate, dict) else rate) * TICK_S
            answered = min(able, self.lag + arrivals * TICK_S)
            self.lag += arrivals * TICK_S - answered
            if answered:
                self.overload.worked(int(answered), TICK_S * answered / able)
            self.steps.append(self.overload.observe(self.now, self.lag, int(answered)))
            if skipped := self.overload.excess(self.lag):
                self.lag -= skipped
                self.shed += skipped
                self.overload.interrupted()
        return self.steps[began:]

    @property
    def changes(self) -> int:
        return sum(a is not b for a, b in pairwise(self.steps))


def machine(*, shed_s: float | None = None, step: Step = Step.NORMAL, **limits: float) -> Overload:
    return Overload(OverloadLimits(**limits), shed_s=shed_s, step=step)


def test_a_growing_lag_takes_every_step_in_its_order_and_skips_only_in_the_last() -> None:
    world = World(machine(shed_s=20.0))
    steps = world.run(200, arrivals=2_000, rate=1_000)
    assert list(dict.fromkeys(steps)) == [Step.NORMAL, Step.BATCHES, Step.SAMPLE, Step.FROZEN, Step.SHEDDING]
    assert world.shed > 0 and world.lag <= 1_000 * 20.0 * 1.1


def test_without_leave_nothing_is_ever_skipped_and_no_adaptation_is_the_end() -> None:
    world = World(machine())
    assert world.run(600, arrivals=5_000, rate=1_000)[-1] is Step.FROZEN
    assert world.shed == 0


def test_switched_off_nothing_gives_way_and_nothing_is_skipped() -> None:
    world = World(machine(shed_s=1.0, enabled=False))
    assert set(world.run(300, arrivals=5_000, rate=1_000)) == {Step.NORMAL} and world.shed == 0


def test_a_backlog_of_any_length_that_is_worked_off_takes_no_step() -> None:
    world = World(machine(shed_s=5.0), lag=1_000_000)
    assert set(world.run(600, arrivals=700, rate=1_000)) == {Step.NORMAL}
    assert world.lag < 1_000_000 and world.shed == 0


def test_the_same_backlog_takes_steps_where_records_come_nearly_as_fast_as_they_are_answered() -> None:
    world = World(machine(), lag=1_000_000)
    assert world.run(60, arrivals=900, rate=1_000)[-1] is Step.FROZEN


def test_a_short_burst_takes_no_step() -> None:
    world = World(machine())
    world.run(30, arrivals=500, rate=1_000)
    world.lag += 1_900
    assert set(world.run(30, arrivals=500, rate=1_000)) == {Step.NORMAL}


def test_a_lag_must_last_for_the_patience() -> None:
    for patience_s, expected in ((0.0, Step.BATCHES), (20.0, Step.NORMAL)):
        world = World(machine(patience_s=patience_s), lag=3_000)
        assert world.run(3, arrivals=1_000, rate=1_000)[-1] is expected


def test_a_step_has_its_time_before_the_next() -> None:
    world = World(machine(patience_s=0.0), lag=100_000)
    world.run(30, arrivals=1_000, rate=1_000)
    at = [index for index, (a, b) in enumerate(pairwise(world.steps)) if a is not b]
    assert len(at) == 3 and all((b - a) * TICK_S >= SETTLE_S for a, b in pairwise(at))


def test_when_the_lag_is_gone_every_step_is_taken_back_one_at_a_time() -> None:
    world = World(machine(shed_s=20.0))
    world.run(200, arrivals=2_000, rate=1_000)
    steps = world.run(200, arrivals=100, rate=1_000)
    assert steps[-1] is Step.NORMAL
    assert all(abs(a - b) <= 1 for a, b in pairwise(world.steps))


def test_a_worker_that_is_fast_enough_only_without_adaptation_swings_less_and_less() -> None:
    rate = {Step.NORMAL: 500.0, Step.BATCHES: 500.0, Step.SAMPLE: 500.0, Step.FROZEN: 2_000.0}
    world = World(machine())
    world.run(1_200, arrivals=1_000, rate=rate)
    early = world.changes
    world.run(1_200, arrivals=1_000, rate=rate)
    assert world.changes - early < early / 2


@given(lag_s=st.floats(0.0, 100.0), shed_s=st.none() | st.floats(0.1, 60.0), ticks=st.integers(50, 100))
def test_a_constant_lag_never_swings(lag_s: float, shed_s: float | None, ticks: int) -> None:
    overload = machine(shed_s=shed_s)
    overload.worked(1_000, 1.0)
    steps = [overload.observe(tick * TICK_S, lag_s * 1_000, 500) for tick in range(ticks)]
    assert steps == sorted(steps)


EVENTS = st.lists(
    st.tuples(
        st.floats(0.0, 20.0),
        st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.integers(0, 10**9),
        st.integers(0, 10**6),
        st.tuples(st.integers(-5, 10**6), st.floats(allow_nan=True, allow_infinity=True)),
        st.booleans(),
    ),
    max_size=60,
)


@given(events=EVENTS, shed_s=st.none() | st.floats(0.1, 100.0), enabled=st.booleans(), first=st.sampled_from(Step))
def test_whatever_is_measured_steps_go_one_by_one_and_skipping_needs_leave(
    events: list[tuple[float, float | None, int, tuple[int, float], bool]],
    shed_s: float | None,
    enabled: bool,
    first: Step,
) -> None:
    overload, now = machine(shed_s=shed_s, enabled=enabled, step=first), 0.0
    assert overload.step <= Step.FROZEN
    for wait, lag, taken, work, moved in events:
        overload.worked(*work)
        if moved:
            overload.interrupted()
        before, now = overload.step, now + wait
        step = overload.observe(now, lag, taken)
        assert abs(step - before) <= 1 and Step.NORMAL <= step <= overload.most
        excess = overload.excess(lag)
        assert excess >= 0
        if excess:
            assert enabled and shed_s is not None and step is Step.SHEDDING and lag is not None
            assert overload.seconds(lag - excess) == pytest.approx(SHED_TO * shed_s, rel=0.01, abs=2 / overload.rate)
        if lag is None or not math.isfinite(lag):
            assert step is before


@given(step=st.sampled_from([Step.NORMAL, Step.BATCHES, Step.SAMPLE, Step.FROZEN]), ticks=st.integers(1, 200))
def test_an_unknown_lag_holds_the_step(step: Step, ticks: int) -> None:
    overload = machine(step=step)
    overload.worked(1_000, 1.0)
    assert {overload.observe(10.0 * tick, None if tick % 2 else math.nan, 0) for tick in range(ticks)} == {step}


@settings(max_examples=20)
@given(
    loads=st.lists(st.tuples(st.integers(0, 5_000), st.integers(1, 60)), max_size=8), shed_s=st.none() | st.just(10.0)
)
def test_from_any_past_it_comes_back_to_normal_when_the_lag_is_gone(
    loads: list[tuple[int, int]], shed_s: float | None
) -> None:
    world = World(machine(shed_s=shed_s))
    for arrivals, seconds in loads:
        world.run(seconds, arrivals=arrivals, rate=1_000)
    world.lag = 0.0
    world.run(len(Step) * (LONGEST_RETURN_S + SETTLE_S), arrivals=10, rate=1_000)
    assert world.overload.step is Step.NORMAL


@given(step=st.sampled_from([Step.BATCHES, Step.SAMPLE, Step.FROZEN]), part=st.floats(HYSTERESIS + 0.01, 1.0))
def test_between_its_bound_and_the_hysteresis_a_step_stays(step: Step, part: float) -> None:
    overload = machine(step=step)
    overload.worked(1_000, 1.0)
    lag = overload.bound(step) * part * 1_000
    assert {overload.observe(tick * TICK_S, lag, 500) for tick in range(100)} == {step}


def test_bounds_grow_with_the_steps_and_none_is_above_that_of_skipping() -> None:
    for shed_s in (0.5, 3.0, 5.0, 60.0):
        overload = machine(shed_s=shed_s)
        bounds = [overload.bound(step) for step in Step]
        assert bounds == sorted(bounds) and bounds[-1] == shed_s
    assert [machine().bound(step) for step in Step] == [0.0, 2.0, 4.0, 8.0, math.inf]


def test_what_it_waits_for_is_as_documented() -> None:
    overload = machine(step=Step.BATCHES)
    overload.worked(1_000, 1.0)
    at = [tick * TICK_S for tick in range(60) if overload.observe(tick * TICK_S, 0.0, 500) is Step.NORMAL]
    assert at[0] == RETURN_S
    overload = machine()
    assert overload.draining is None
    World(overload, lag=5_000).run(20, arrivals=1_000 * (DRAINING - 0.05), rate=1_000)
    assert overload.draining is True
    overload.interrupted()
    assert overload.draining is None
