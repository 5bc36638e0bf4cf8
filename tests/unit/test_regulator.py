"""The regulator's transitions, one claim a test. Its rules for any history are in test_regulator_rules.py."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.regulator import Decision, Reading, Regulator, RegulatorLimits, State

LIMITS = RegulatorLimits(
    loop_gain=0.2,
    slew=0.25,
    slew_rows=10,
    patience_rows=40,
    slow_budget_rows=200,
    slow_retry_rows=100,
    slow_retry_max_rows=300,
    settle_rows=50,
    cooldown_rows=100,
    cooldown_max_rows=300,
    calm_rows=1_000,
    hunting_reversals=3,
    hunting_rows=400,
    recover_rows=100,
    probe_rows=0,
)


def with_(**changes: Any) -> RegulatorLimits:
    return RegulatorLimits(**{name: getattr(LIMITS, name) for name in LIMITS.__dataclass_fields__} | changes)


def feed(regulator: Regulator, rows: int, value: float = 0.0, **reading: Any) -> list[Decision]:
    """Readings of 10 rows each."""
    return [regulator.step(Reading(rows=10, value=value, **reading)) for _ in range(rows // 10)]


def in_fast(limits: RegulatorLimits = LIMITS) -> Regulator:
    regulator = Regulator(limits)
    assert feed(regulator, 10, drift=True)[-1].state is State.FAST
    return regulator


def in_slow(limits: RegulatorLimits = LIMITS) -> Regulator:
    regulator = in_fast(limits)
    while not feed(regulator, 10, value=3.0)[-1].ask_slow:
        assert regulator.state is State.FAST
    assert regulator.state is State.SLOW
    return regulator


def test_a_new_regulator_is_steady_at_the_lowest_gain_with_every_counter_at_zero() -> None:
    state = Regulator(LIMITS).state_dict()
    own = {name: state[name] for name in ("in_state", "railed", "probe_age", "slow_wait", "cooldown", "calm", "gain")}
    band = {name: value for name, value in state["band"].items() if name != "reversals"}
    assert state["state"] == "steady"
    assert set((own | band).values()) == {0}
    assert state["band"]["reversals"] == []


def test_nothing_is_adapted_and_the_gain_is_held_while_steady() -> None:
    decisions = feed(Regulator(LIMITS), 1_000, value=0.9)
    assert {(d.state, d.adapt, d.gain, d.reasons) for d in decisions} == {(State.STEADY, False, 0.0, ())}


def test_an_alarm_starts_fast_and_leads_the_gain_to_its_start_within_the_slew_limit() -> None:
    regulator = Regulator(LIMITS)
    first = regulator.step(Reading(rows=10, value=0.0, drift=True))
    assert (first.state, first.adapt, first.changed, first.reasons) == (State.FAST, True, True, ("drift alarm",))
    assert [d.gain for d in feed(regulator, 30)] == [0.25, 0.5, 0.5]


def test_out_of_band_for_patience_without_an_alarm_starts_fast_and_says_so() -> None:
    regulator = Regulator(LIMITS)
    decisions = feed(regulator, 40, value=1.5)
    assert [d.state for d in decisions] == [State.STEADY] * 3 + [State.FAST]
    assert decisions[-1].reasons == ("no alarm, but out of band for 40 rows",)


def test_a_value_that_is_too_low_lowers_the_gain_and_is_not_led_up_to_the_start() -> None:
    regulator = in_fast()
    feed(regulator, 20)
    assert regulator.gain == 0.5
    feed(regulator, 40, value=-1.5)
    assert regulator.gain < 0.25
    assert feed(Regulator(LIMITS), 60, value=-1.5)[-1].gain == 0.0


def test_back_in_band_for_patience_returns_to_steady_with_the_gain_held_and_new_baselines() -> None:
    regulator = in_fast()
    decisions = feed(regulator, 40)
    assert [d.state for d in decisions] == [State.FAST] * 3 + [State.STEADY]
    assert (decisions[-1].gain, decisions[-1].adapt, decisions[-1].rebaseline) == (0.5, False, True)


@pytest.mark.parametrize(("side", "start", "rising"), [(1, 0.0, True), (-1, 1.0, False)])
def test_an_excursion_ends_below_the_hysteresis_not_at_the_band(side: int, start: float, rising: bool) -> None:
    limits = with_(gain_start=start, loop_gain=0.05)
    regulator = in_fast(limits)
    feed(regulator, 30)
    at_first = regulator.gain
    pushed = [d.gain for v in (1.2, 0.9, 0.85) for d in feed(regulator, 10, value=side * v)]
    assert pushed == sorted(pushed, reverse=not rising)
    assert len({at_first, *pushed}) == 4
    held = [d.gain for v in (0.79, 0.9, 0.99) for d in feed(regulator, 10, value=side * v)]
    assert set(held) == {pushed[-1]}


def test_a_value_that_stays_just_within_the_band_still_reaches_steady() -> None:
    regulator = in_fast()
    feed(regulator, 10, value=1.2)
    assert feed(regulator, 60, value=0.9)[-1].state is State.FAST
    assert feed(regulator, 10, value=0.9)[-1].state is State.STEADY


def test_saturated_and_out_of_band_for_patience_asks_for_one_slow_step() -> None:
    regulator = in_slow()
    decision = feed(regulator, 10, value=3.0)[-1]
    assert (decision.state, decision.adapt, decision.ask_slow, decision.gain) == (State.SLOW, True, False, 1.0)


def test_saturated_at_the_lower_rail_asks_too() -> None:
    regulator = in_fast()
    assert any(d.ask_slow for d in feed(regulator, 100, value=-3.0))


def test_the_slow_step_is_never_asked_for_when_it_is_disabled() -> None:
    regulator = in_fast(with_(slow_enabled=False))
    decisions = feed(regulator, 5_000, value=3.0)
    assert {d.state for d in decisions} == {State.FAST}
    assert not any(d.ask_slow for d in decisions)


def test_a_promotion_resets_the_fast_state_and_settles_before_anything_is_judged() -> None:
    regulator = in_slow()
    promoted = regulator.step(Reading(rows=10, value=3.0, learner="promoted"))
    assert (promoted.state, promoted.gain) == (State.SETTLING, 0.0)
    assert promoted.reset_fast and promoted.rebaseline
    settling = feed(regulator, 40, drift=True)
    assert {(d.state, d.adapt, d.gain, d.reasons) for d in settling} == {(State.SETTLING, False, 0.0, ())}
    assert feed(regulator, 10, drift=True)[-1].state is State.STEADY


def test_settling_out_of_band_goes_on_to_fast() -> None:
    regulator = in_slow()
    regulator.step(Reading(rows=10, value=3.0, learner="promoted"))
    assert feed(regulator, 50, value=3.0)[-1].state is State.FAST


@pytest.mark.parametrize("event", ["rejected", "failed"])
def test_a_fruitless_slow_step_returns_to_fast_and_the_wait_doubles_to_its_limit(event: Any) -> None:
    regulator = in_slow()
    waits = []
    for _ in range(4):
        assert regulator.step(Reading(rows=10, value=3.0, learner=event)).state is State.FAST
        waited = 0
        while not feed(regulator, 10, value=3.0)[-1].ask_slow:
            waited += 10
        waits.append(waited + 10)
    assert waits == [100, 200, 300, 300]


def test_a_promotion_ends_the_wait_for_the_next_slow_step() -> None:
    regulator = in_slow()
    for _ in range(3):
        regulator.step(Reading(rows=10, value=3.0, learner="failed"))
        while not feed(regulator, 10, value=3.0)[-1].ask_slow:
            pass
    regulator.step(Reading(rows=10, value=3.0, learner="promoted"))
    state = regulator.state_dict()
    assert (state["slow_wait"], state["next_retry"]) == (0, 100)


def test_a_slow_step_out_of_budget_is_cancelled() -> None:
    regulator = in_slow()
    decisions = feed(regulator, 200, value=3.0, learner="busy")
    assert [d.cancel_slow for d in decisions] == [False] * 19 + [True]
    assert decisions[-1].state is State.FAST


@pytest.mark.parametrize("history", ["steady", "fast", "slow", "settling", "fallback"])
def test_a_trip_falls_back_from_every_state(history: str) -> None:
    regulator = {"fast": in_fast, "slow": in_slow, "settling": in_slow}.get(history, lambda: Regulator(LIMITS))()
    if history == "settling":
        feed(regulator, 10, learner="promoted")
    if history == "fallback":
        feed(regulator, 10, trip="harm")
    assert regulator.state == history
    d = regulator.step(Reading(rows=10, value=2.0, trip="collapse", learner="promoted"))
    assert (d.state, d.gain, d.adapt, d.reset_fast, d.cancel_slow) == (State.FALLBACK, 0.0, False, True, True)
    assert d.changed == (history != "fallback")
    assert "collapse" in d.reasons[-1]


def test_the_cool_down_doubles_to_its_limit_and_starts_over_after_long_calm() -> None:
    regulator = Regulator(LIMITS)

    def cool_down() -> int:
        feed(regulator, 10, trip="harm")
        rows = 0
        while regulator.state is State.FALLBACK:
            feed(regulator, 10)
            rows += 10
        return rows

    assert [cool_down() for _ in range(4)] == [100, 200, 300, 300]
    feed(regulator, 900)
    assert cool_down() == 300
    feed(regulator, 1_000)
    assert cool_down() == 100


def test_a_repeated_trip_during_the_cool_down_restarts_it_without_doubling() -> None:
    regulator = Regulator(LIMITS)
    feed(regulator, 50, trip="harm")
    assert [d.state for d in feed(regulator, 100)] == [State.FALLBACK] * 9 + [State.FAST]


@pytest.mark.parametrize(("seen", "gain"), [({"drift": True}, 0.5), ({"value": 2.0}, 0.5), ({}, 0.0)])
def test_after_a_cool_down_the_gain_rises_only_if_drift_was_seen(seen: dict[str, Any], gain: float) -> None:
    regulator = Regulator(LIMITS)
    feed(regulator, 10, trip="harm")
    feed(regulator, 100, **seen)
    assert regulator.state is State.FAST
    assert regulator.gain == 0.0
    feed(regulator, 30)
    assert regulator.gain == gain


def test_a_promotion_that_comes_during_the_cool_down_does_not_end_it() -> None:
    regulator = Regulator(LIMITS)
    feed(regulator, 10, trip="harm")
    decision = feed(regulator, 10, learner="promoted")[-1]
    assert (decision.state, decision.rebaseline) == (State.FALLBACK, True)


def test_hunting_halves_the_loop_gain_down_to_its_limit_and_calm_restores_it() -> None:
    regulator = in_fast()
    for _ in range(2):
        feed(regulator, 10, value=2.0)
        feed(regulator, 10, value=-2.0)
    assert regulator.loop_gain == 0.1
    for _ in range(40):
        feed(regulator, 10, value=2.0)
        feed(regulator, 10, value=-2.0)
    assert regulator.loop_gain == LIMITS.loop_gain_min
    feed(regulator, 360)
    assert regulator.loop_gain == LIMITS.loop_gain_min
    feed(regulator, 1_000)
    assert regulator.loop_gain == LIMITS.loop_gain


def test_hunting_lowers_the_steps_that_the_slew_limit_cuts_too() -> None:
    regulator = in_fast()
    steps = []
    for _ in range(2):
        before = regulator.gain
        feed(regulator, 10, value=50.0)
        steps.append(regulator.gain - before)
        feed(regulator, 10, value=-50.0)
    before = regulator.gain
    feed(regulator, 10, value=50.0)
    steps.append(regulator.gain - before)
    assert steps == [0.25, 0.25, 0.125]


def swing(regulator: Regulator, high: float, low: float) -> list[Decision]:
    """Short swings, so that hunting is found, then ones in which each side lasts longer than the patience."""
    short = [d for _ in range(4) for value in (high, low) for d in feed(regulator, 10, value=value)]
    return short + [d for _ in range(4) for value in (high, low) for d in feed(regulator, 120, value=value)]


@pytest.mark.parametrize(("high", "asks"), [(2.0, False), (60.0, True)])
def test_hunting_asks_for_no_slow_step_unless_the_average_is_out_of_band(high: float, asks: bool) -> None:
    regulator = in_fast(with_(loop_gain=1.0, loop_gain_min=1.0, slew=1.0))
    assert any(d.ask_slow for d in swing(regulator, high, -2.0)) is asks


def test_a_variable_that_swings_while_the_gain_is_held_is_no_hunting() -> None:
    regulator = Regulator(LIMITS)
    for _ in range(20):
        feed(regulator, 10, value=2.0)
        feed(regulator, 10, value=-2.0)
    assert regulator.loop_gain == LIMITS.loop_gain


def test_an_alarm_while_input_is_dropped_is_kept_for_later() -> None:
    regulator = Regulator(LIMITS)
    feed(regulator, 10, drift=True, dropped=True)
    assert feed(regulator, 100, dropped=True)[-1].state is State.STEADY
    assert feed(regulator, 10)[-1].state is State.FAST


def test_dropped_readings_lower_the_gain_but_never_raise_it() -> None:
    regulator = in_fast()
    feed(regulator, 10)
    assert {d.gain for d in feed(regulator, 50, value=3.0, dropped=True)} == {0.25}
    gains = [d.gain for d in feed(regulator, 10, value=-1.2, dropped=True)]
    assert gains[0] < 0.25


def test_dropped_rows_on_the_high_side_count_for_nothing_but_do_not_clear_what_was_counted() -> None:
    regulator = Regulator(LIMITS)
    feed(regulator, 20, value=2.0)
    feed(regulator, 200, value=2.0, dropped=True)
    assert [d.state for d in feed(regulator, 20, value=2.0)] == [State.STEADY, State.FAST]


def test_the_learner_is_not_asked_while_input_is_dropped() -> None:
    regulator = in_fast()
    assert not any(d.ask_slow for d in feed(regulator, 200, value=-3.0, dropped=True))
    assert feed(regulator, 10, value=-3.0)[-1].ask_slow


def probing() -> Regulator:
    """Steady at gain 0.5, with the first probe, to 0.25, just begun."""
    regulator = in_fast(with_(probe_rows=200, probe_max_rows=800))
    feed(regulator, 240)
    assert (regulator.state, regulator.gain) == (State.STEADY, 0.25)
    return regulator


def test_a_disturbance_that_has_passed_lets_the_gain_go_down_to_its_minimum() -> None:
    regulator = probing()
    decisions = feed(regulator, 1_000)
    assert {d.state for d in decisions} == {State.STEADY}
    assert decisions[-1].gain == 0.0


def test_a_probe_that_makes_the_value_worse_is_taken_back_and_the_next_one_waits_twice_as_long() -> None:
    regulator = probing()
    assert feed(regulator, 10, value=0.9)[-1].gain == 0.5
    assert {d.gain for d in feed(regulator, 390)} == {0.5}
    assert feed(regulator, 10)[-1].gain == 0.25


def test_a_probe_that_raises_an_alarm_leads_back_to_the_gain_before_it() -> None:
    limits = with_(probe_rows=200, probe_max_rows=800, gain_start=0.1)
    regulator = in_fast(limits)
    while regulator.gain < 0.6:
        feed(regulator, 10, value=2.0)
    before = regulator.gain
    while regulator.gain >= before:
        feed(regulator, 10)
    feed(regulator, 30, drift=True)
    assert (regulator.state, regulator.gain) == (State.FAST, before)
    assert regulator.state_dict()["next_probe"] == 400


def test_a_probe_is_not_taken_back_while_input_is_dropped() -> None:
    regulator = probing()
    assert feed(regulator, 10, value=0.9, dropped=True)[-1].gain == 0.25
    assert feed(regulator, 10)[-1].gain == 0.5


def test_negative_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="-1 rows"):
        Regulator(LIMITS).step(Reading(rows=-1, value=0.0))


@pytest.mark.parametrize(
    "change",
    [
        {"gain_start": 1.5},
        {"gain_max": float("inf")},
        {"loop_gain_min": 0.0},
        {"loop_gain_min": 0.3},
        {"hysteresis": 0.0},
        {"slew": 0.0},
        {"patience_rows": 0},
        {"hunting_reversals": 1},
        {"probe_rows": -1},
        {"cooldown_max_rows": 10},
    ],
)
def test_limits_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).split("_")[0]):
        with_(**change)


def test_a_state_of_another_version_is_refused_and_changes_nothing() -> None:
    regulator = in_slow()
    before = regulator.state_dict()
    unknown, lacking = {**before, "colour": 1}, {**before, "band": {}}
    for state in (unknown, lacking, {**before, "state": "asleep"}):
        with pytest.raises(ValueError, match=r"does not fit|asleep"):
            regulator.load_state_dict(state)
        assert regulator.state_dict() == before


def test_a_gain_that_new_limits_forbid_is_clipped_on_loading() -> None:
    regulator = Regulator(with_(gain_max=0.5, loop_gain=0.1))
    regulator.load_state_dict(in_slow().state_dict())
    assert (regulator.gain, regulator.loop_gain) == (0.5, 0.1)
