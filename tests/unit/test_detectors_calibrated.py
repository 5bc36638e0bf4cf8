from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import detectors
from detectors import Calibrated
from detectors.base import F64

NAMES = detectors.names()
ALARMING = [name for name in NAMES if not detectors.build(name).advisory]
pytestmark = pytest.mark.sweep
STANDARD = ["adwin", "cusum", "e_detector", "page_hinkley"]
LEVEL, SCALE = 20.0, 3.0


def noise(seed: int, rows: int = 1000) -> F64:
    """AR(1) noise of level 20 and deviation 3."""
    values = np.random.default_rng(seed).normal(size=rows)
    for t in range(1, rows):
        values[t] = 0.5 * values[t - 1] + math.sqrt(0.75) * values[t]
    return LEVEL + SCALE * values


@cache
def calibrated(name: str) -> dict[str, Any]:
    """Calibrated once: what is stored is what the tests start from."""
    return detectors.calibrate(detectors.build(name), noise(0), arl0=500).calibration()


@pytest.fixture(params=NAMES)
def made(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param, calibrated(request.param)


@pytest.fixture(params=STANDARD)
def standard(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A detector of standardised values: the others have no level that a new baseline could move."""
    return request.param, calibrated(request.param)


def ready(made: tuple[str, dict[str, Any]]) -> Calibrated:
    name, calibration = made
    return Calibrated.from_calibration(detectors.build(name), calibration)


def assert_same(left: Calibrated, right: Calibrated) -> None:
    assert_same_state(left.state_dict(), right.state_dict())


def assert_same_state(left: dict[str, Any], right: dict[str, Any]) -> None:
    np.testing.assert_equal(left, right)  # unlike ==, it compares the arrays inside


def one_by_one(watch: Calibrated, values: F64) -> list[int]:
    return [index for index, value in enumerate(values.tolist()) if raised(watch.update(value))]


def raised(watch: Calibrated) -> bool:
    return watch.warning if detectors.build(watch.name).advisory else watch.drift


@pytest.mark.parametrize("name", ALARMING)
def test_a_shift_of_the_signal_is_noticed_in_its_own_unit(name: str) -> None:
    watch = ready((name, calibrated(name)))
    watch.update_many(noise(1, 300))
    assert watch.update_many(noise(2, 500) + 2.0 * SCALE)


def test_one_nan_row_never_reaches_the_statistics(made: tuple[str, dict[str, Any]]) -> None:
    clean, dirty = ready(made), ready(made)
    for value in noise(3, 200).tolist():
        clean.update(value)
        dirty.update(value)
        for bad in (math.nan, math.inf, -math.inf, 1e300):
            dirty.update(bad)
            assert not dirty.drift
    assert dirty.ignored == 800
    assert dirty.state_dict()["detector"] == clean.state_dict()["detector"]


def test_an_alarm_is_over_with_the_next_value_even_if_that_is_nan(standard: tuple[str, dict[str, Any]]) -> None:
    values = np.r_[noise(3, 200), noise(4, 500) + 2.0 * SCALE]
    first = ready(standard).update_many(values)[0]
    watch = ready(standard)
    watch.update_many(values[: first + 1])
    assert watch.drift
    watch = ready(standard)
    assert watch.update_many(np.r_[values[: first + 1], np.nan]) == [first]
    assert not watch.drift
    assert not watch.warning


def test_a_reset_drops_the_evidence_and_keeps_the_baseline(made: tuple[str, dict[str, Any]]) -> None:
    watch = ready(made)
    watch.rebaseline(50)
    watch.update_many(noise(3, 50))
    fresh = watch.state_dict()
    watch.update_many(noise(4, 33) + SCALE)
    watch.reset()
    assert_same_state(watch.state_dict(), fresh)


def test_another_rate_of_false_alarms_keeps_the_evidence(made: tuple[str, dict[str, Any]]) -> None:
    values = noise(3, 130)
    watch, as_before = ready(made), ready(made)
    for one in (watch, as_before):
        one.update_many(values)
    watch.retarget(4_000)
    assert watch.arl0 == 4_000 and watch.threshold >= as_before.threshold
    assert watch.statistic == pytest.approx(as_before.statistic) and watch.location == as_before.location
    low, reached, high = (watch.calibration()[key] for key in ("reached_low", "reached_arl0", "reached_high"))
    assert low < reached < high and reached == pytest.approx(8 * as_before.reached_arl0)
    other = ready(made)
    other.load_state_dict(watch.state_dict())
    assert other.update_many(noise(4, 90)) == watch.update_many(noise(4, 90))
    assert_same(other, watch)
    watch.retarget(500)
    assert watch.threshold == pytest.approx(as_before.threshold)


def test_a_calibration_that_does_not_tell_the_slope_has_one_rate(standard: tuple[str, dict[str, Any]]) -> None:
    name, calibration = standard
    watch = ready((name, {key: value for key, value in calibration.items() if key != "rise"}))
    watch.update_many(noise(3, 100))
    before = watch.state_dict()
    watch.retarget(500)
    for arl0, problem in ((600, "without the slope"), (math.nan, "arl0 must be"), (1, "arl0 must be")):
        with pytest.raises(ValueError, match=problem):
            watch.retarget(arl0)
    assert_same_state(watch.state_dict(), before)


@pytest.mark.parametrize("name", ["cusum", "e_detector", "kswin"])
def test_false_alarms_come_as_often_as_is_asked_for_later(name: str) -> None:
    watch = ready((name, calibrated(name)))
    watch.retarget(2_000)
    rows = 400_000
    alarms = len(watch.update_many(noise(11, rows)))
    assert 1_000 < rows / alarms < 4_000


def test_one_wild_reading_is_no_drift(standard: tuple[str, dict[str, Any]]) -> None:
    values = noise(9, 200)
    quiet = ready(standard).update_many(values)
    values[150] = 1e90
    assert ready(standard).update_many(values) == quiet == []


def test_batches_with_bad_values_match_single_updates(made: tuple[str, dict[str, Any]]) -> None:
    @settings(max_examples=15, deadline=None)
    @given(
        st.integers(0, 1000),
        st.lists(st.integers(0, 599), max_size=40),
        st.lists(st.integers(0, 200), max_size=8),
        st.integers(0, 600),
        st.integers(2, 300),
    )
    def check(seed: int, bad: list[int], lengths: list[int], rebaseline_at: int, rows: int) -> None:
        values = noise(seed, 600)
        values[300:] += SCALE
        values[bad] = np.nan
        single, batched = ready(made), ready(made)
        expected = one_by_one(single, values[:rebaseline_at])
        single.rebaseline(rows)
        expected += [rebaseline_at + i for i in one_by_one(single, values[rebaseline_at:])]

        found: list[int] = []
        begin = 0
        ends = sorted({*np.cumsum(lengths).tolist(), rebaseline_at, 600})
        for end in [end for end in ends if end <= 600]:
            found += [begin + i for i in batched.update_many(values[begin:end])]
            begin = end
            if end == rebaseline_at:
                batched.rebaseline(rows)
        assert found == expected
        assert_same(batched, single)

    check()


def test_a_restored_detector_goes_on_bit_identically(made: tuple[str, dict[str, Any]]) -> None:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 1000), st.integers(0, 600), st.integers(0, 600), st.integers(2, 300))
    def check(seed: int, at: int, rebaseline_at: int, rows: int) -> None:
        values = noise(seed, 600)
        values[300:] += SCALE
        original, restored = ready(made), ready(made)
        original.update_many(values[: min(at, rebaseline_at)])
        if rebaseline_at < at:
            original.rebaseline(rows)
            original.update_many(values[rebaseline_at:at])
        restored.load_state_dict(original.state_dict())
        assert_same(restored, original)
        assert restored.update_many(values[at:]) == original.update_many(values[at:])
        assert_same(restored, original)

    check()


def test_a_calibration_survives_json(made: tuple[str, dict[str, Any]]) -> None:
    name, calibration = made
    again = Calibrated.from_calibration(detectors.build(name), json.loads(json.dumps(calibration)))
    assert again.calibration() == calibration
    assert_same(again, ready(made))


def test_a_calibration_says_what_was_asked_and_what_was_reached(standard: tuple[str, dict[str, Any]]) -> None:
    watch = ready(standard)
    numbers = watch.calibration()
    assert watch.arl0 == numbers["arl0"] == 500.0
    assert numbers["reached_low"] < watch.reached_arl0 < numbers["reached_high"]
    assert watch.reached_arl0 == pytest.approx(500.0, rel=0.25)
    assert watch.threshold == numbers["threshold"]
    assert (watch.location, watch.scale) == pytest.approx((LEVEL, SCALE), rel=0.1)
    assert numbers["rows"] == 1000
    assert numbers["method"].startswith("1000 rows, AR(")


def test_the_same_seed_gives_the_same_calibration() -> None:
    again = detectors.calibrate(detectors.build("cusum"), noise(0), arl0=500).calibration()
    assert again == calibrated("cusum")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detector": "adwin"}, "made for adwin"),
        ({"options": {"shift": 2.0, "warn_at": 0.7}}, "made for cusum.*2.0"),
        ({"scale": 0.0}, "scale"),
        ({"threshold": math.nan}, "threshold"),
        ({"weights": ["0.5"]}, "weights"),
        ({"surplus": 1.0}, "surplus"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibrated.from_calibration(detectors.build("cusum"), calibrated("cusum") | change)


def test_a_calibration_with_a_missing_entry_is_refused() -> None:
    less = {key: value for key, value in calibrated("cusum").items() if key != "clip"}
    with pytest.raises(ValueError, match="clip"):
        Calibrated.from_calibration(detectors.build("cusum"), less)


class TestRebaseline:
    def test_the_new_level_is_normal_afterwards(self, standard: tuple[str, dict[str, Any]]) -> None:
        watch = ready(standard)
        moved = noise(4, 1500) + 3.0 * SCALE
        watch.rebaseline(1000)
        assert watch.update_many(moved[:1000]) == []
        assert watch.learning == 0
        assert watch.location == pytest.approx(LEVEL + 3.0 * SCALE, abs=0.3 * SCALE)
        assert watch.scale == ready(standard).scale
        assert watch.threshold == ready(standard).threshold
        assert len(watch.update_many(moved[1000:])) <= 4  # expected: 1 in 500 rows
        assert watch.update_many(noise(5, 500))

    def test_no_alarm_until_enough_finite_values_came(self, standard: tuple[str, dict[str, Any]]) -> None:
        watch = ready(standard)
        watch.rebaseline(50)
        for _ in range(49):
            assert not watch.update(1000.0).update(math.nan).drift
        assert watch.learning == 1
        assert not watch.update(1000.0).drift
        assert watch.learning == 0
        assert watch.location == 1000.0

    def test_a_scale_that_is_clearly_another_is_taken_over(self, standard: tuple[str, dict[str, Any]]) -> None:
        watch = ready(standard)
        watch.rebaseline(500)
        watch.update_many(LEVEL + 4.0 * (noise(6, 500) - LEVEL))
        assert watch.scale == pytest.approx(4.0 * SCALE, rel=0.2)

    def test_a_short_baseline_does_not_touch_the_scale(self, standard: tuple[str, dict[str, Any]]) -> None:
        watch = ready(standard)
        watch.rebaseline(10)
        watch.update_many(np.full(10, LEVEL))
        assert watch.scale == ready(standard).scale

    def test_one_wild_reading_does_not_spoil_it(self, standard: tuple[str, dict[str, Any]]) -> None:
        watch = ready(standard)
        values = noise(7, 500)
        values[100] = 1e9
        watch.rebaseline(500)
        watch.update_many(values)
        assert watch.location == pytest.approx(LEVEL, abs=0.5 * SCALE)
        assert watch.scale == ready(standard).scale

    def test_asked_again_it_starts_again(self, standard: tuple[str, dict[str, Any]]) -> None:
        watch = ready(standard)
        watch.rebaseline(100)
        watch.update_many(np.full(99, 500.0))
        watch.rebaseline(50)
        watch.update_many(np.full(50, 7.0))
        assert watch.location == 7.0

    def test_needs_two_rows(self, standard: tuple[str, dict[str, Any]]) -> None:
        with pytest.raises(ValueError, match="at least 2 rows, got 1"):
            ready(standard).rebaseline(1)


class TestWithoutReference:
    def test_the_first_values_become_the_reference(self) -> None:
        values = noise(0)
        watch = Calibrated(detectors.build("cusum"), arl0=500, warmup=1000)
        assert watch.update_many(values[:999]) == []
        assert math.isnan(watch.reached_arl0)
        with pytest.raises(ValueError, match="1 more"):
            watch.calibration()
        watch.update(float(values[999]))
        assert watch.calibration() == detectors.calibrate(detectors.build("cusum"), values, arl0=500).calibration()

    def test_a_restart_during_the_warm_up_loses_nothing(self) -> None:
        values = noise(8)
        whole = Calibrated(detectors.build("cusum"), arl0=500, warmup=100)
        whole.update_many(values[:60])
        restored = Calibrated(detectors.build("cusum"), arl0=500, warmup=100)
        restored.load_state_dict(whole.state_dict())
        assert restored.update_many(values[60:]) == whole.update_many(values[60:])
        assert_same(restored, whole)

    def test_a_new_baseline_in_the_warm_up_starts_the_warm_up_again(self) -> None:
        watch = Calibrated(detectors.build("cusum"), arl0=500, warmup=100)
        watch.update_many(noise(8)[:60])
        watch.rebaseline(10)
        assert watch.learning == 100

    @pytest.mark.parametrize(("arguments", "message"), [({"warmup": 49}, "warmup"), ({"arl0": 1.0}, "arl0")])
    def test_an_impossible_request_is_refused_at_once(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Calibrated(detectors.build("cusum"), **arguments)


class TestReference:
    def test_under_fifty_finite_values_it_is_refused(self) -> None:
        values = np.r_[noise(0, 49), np.full(100, np.nan)]
        with pytest.raises(ValueError, match="at least 50 finite reference values, got 49"):
            detectors.calibrate(detectors.build("cusum"), values)

    @pytest.mark.parametrize("arl0", [0.0, 49.0, math.inf, math.nan])
    def test_an_arl0_that_makes_no_sense_is_refused(self, arl0: float) -> None:
        with pytest.raises(ValueError, match="arl0"):
            detectors.calibrate(detectors.build("cusum"), noise(0), arl0=arl0)

    @pytest.mark.parametrize("name", STANDARD)
    @pytest.mark.parametrize("level", [0.0, 7.0, -1e-9, 1e12])
    def test_a_constant_one_gives_a_detector_that_works(self, name: str, level: float) -> None:
        watch = detectors.calibrate(detectors.build(name), np.full(60, level), arl0=500)
        assert watch.scale > 0.0
        assert watch.update_many(np.full(500, level)) == []
        assert watch.update_many(np.full(100, level + (abs(level) or 1.0)))

    def test_a_signal_of_any_unit_gets_the_same_threshold(self) -> None:
        thresholds = [
            detectors.calibrate(detectors.build("cusum"), unit * noise(0), arl0=500).threshold
            for unit in (1.0, 1e-9, 1e9)
        ]
        assert thresholds == pytest.approx([thresholds[0]] * 3, rel=1e-3)

    def test_beyond_what_can_be_simulated_it_says_that_it_extrapolates(self) -> None:
        numbers = detectors.calibrate(detectors.build("cusum"), noise(0), arl0=1e6).calibration()
        assert "extrapolated from an ARL0 of 20000" in numbers["method"]
        assert numbers["reached_low"] < 1e6 < numbers["reached_high"]

    @pytest.mark.parametrize("name", STANDARD)
    def test_a_periodic_one_without_noise_does_not_flood(self, name: str) -> None:
        saw = np.arange(2000) % 7.0
        watch = detectors.calibrate(detectors.build(name), saw[:1000], arl0=500)
        assert len(watch.update_many(saw[1000:])) <= 4  # expected: 1 in 500 rows

    def test_a_random_walk_is_called_a_guess(self) -> None:
        walk = np.cumsum(np.random.default_rng(0).normal(size=500))
        assert "a guess" in detectors.calibrate(detectors.build("cusum"), walk, arl0=500).calibration()["method"]

    def test_what_a_detector_cannot_reach_is_reported(self) -> None:
        watch = detectors.calibrate(detectors.build("adwin"), noise(0), arl0=50)
        assert watch.reached_arl0 > 100.0
        assert "lowest threshold" in watch.calibration()["method"]

    def test_a_rare_event_signal_errs_on_the_side_of_fewer_false_alarms(self) -> None:
        rare = np.zeros(1000)
        rare[500] = 1.0
        assert detectors.calibrate(detectors.build("cusum"), rare, arl0=10_000).reached_arl0 > 10_000


def test_values_need_one_dimension(standard: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        ready(standard).update_many(np.zeros((2, 2)))
