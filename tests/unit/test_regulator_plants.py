"""The regulator in a closed loop: a model that drifts, a sensor whose event rate is kept, and a steep plant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from daemon.regulator import Reading, Regulator, RegulatorLimits, State

ROWS = 100


@dataclass
class Trace:
    """What a closed loop went through, one entry a reading."""

    values: list[float]
    gains: list[float]
    states: list[State]
    asked: int


def close_loop(regulator: Regulator, plant: Callable[[float, int], float], steps: int) -> Trace:
    """Feed ``plant(gain, step)`` back; what is measured belongs to the gain of the reading before."""
    trace = Trace([], [], [], 0)
    for step in range(steps):
        value = plant(regulator.gain, step)
        decision = regulator.step(Reading(rows=ROWS, value=value))
        trace.values.append(value)
        trace.gains.append(decision.gain)
        trace.states.append(decision.state)
        trace.asked += decision.ask_slow
    return trace


def test_a_model_is_brought_back_into_band_and_let_go_when_the_disturbance_has_passed() -> None:
    def error(gain: float, step: int) -> float:
        return 3.0 * (1 - gain) if step < 500 else 0.2

    trace = close_loop(Regulator(RegulatorLimits()), error, 1_500)
    assert trace.states[499] is State.STEADY
    assert abs(trace.values[499]) <= 1
    assert trace.gains[-1] == 0.0
    assert trace.asked == 0


def test_a_disturbance_too_large_for_the_gain_leads_to_the_slow_step() -> None:
    trace = close_loop(Regulator(RegulatorLimits()), lambda gain, step: 6.0 - 2.0 * gain, 200)
    assert trace.asked == 1
    assert trace.states[-1] is State.SLOW
    assert trace.gains[-1] == 1.0


@pytest.mark.parametrize("light", [0.5, 2.0, 8.0])
def test_a_sensor_is_kept_at_its_event_rate_when_the_light_changes(light: float) -> None:
    limits = RegulatorLimits(gain_min=0.01, gain_start=0.01, loop_gain=0.05, probe_rows=0)

    def too_few_events(gain: float, step: int) -> float:
        rate = 1_000 * gain * (1.0 if step < 400 else light)
        return (300 - rate) / 60

    trace = close_loop(Regulator(limits), too_few_events, 1_500)
    for step in (399, 1_499):
        assert trace.states[step] is State.STEADY
        assert abs(trace.values[step]) <= 1
    assert trace.asked == 0


def steep(gain: float, step: int) -> float:
    """In band only within 0.02 of gain 0.6."""
    return 50 * (0.6 - gain)


def steeper(gain: float, step: int) -> float:
    """In band only within 0.01 of gain 0.63: less than one step at the full slew."""
    return 100 * (0.63 - gain)


def rail_visits(gains: list[float]) -> int:
    """How often the gain went from one of its rails to the other."""
    rails = [gain for gain in gains if gain in (0.0, 1.0)]
    return sum(a != b for a, b in pairwise(rails))


UNDAMPED = RegulatorLimits(loop_gain=0.2, loop_gain_min=0.2, probe_rows=0, slow_enabled=False)


def test_without_its_slew_limit_a_steep_plant_locks_into_a_rail_to_rail_cycle() -> None:
    trace = close_loop(Regulator(replace(UNDAMPED, slew=1.0, slew_rows=1)), steep, 400)
    assert rail_visits(trace.gains[200:]) > 50


def test_the_slew_limit_keeps_a_steep_plant_from_cycling_between_the_rails() -> None:
    trace = close_loop(Regulator(UNDAMPED), steep, 400)
    assert rail_visits(trace.gains) == 0


def test_hunting_lowers_the_loop_gain_until_a_steep_plant_is_steady_without_a_slow_step() -> None:
    hunting = close_loop(Regulator(UNDAMPED), steeper, 1_000)
    assert State.STEADY not in hunting.states[30:]
    trace = close_loop(Regulator(RegulatorLimits(probe_rows=0)), steeper, 1_000)
    assert trace.states[-1] is State.STEADY
    assert abs(trace.values[-1]) <= 1
    assert trace.asked == 0
