"""River's detectors behind this package's interface: the same alarms, a state that is plain, a threshold that turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river import drift
from river.drift import binary

import detectors
from detectors.base import F64

pytestmark = pytest.mark.sweep


NAMES = ["ddm", "eddm", "fhddm", "hddm_a", "hddm_w", "kswin", "page_hinkley"]


def stream(name: str, seed: int, rows: int = 3000) -> F64:
    """Values of the detector's domain; half-way the mean rises by a deviation or the share of ones from 0.3 to 0.7."""
    rng = np.random.default_rng(seed)
    late = np.arange(rows) >= rows // 2
    match detectors.build(name).domain:
        case "binary":
            return (rng.random(rows) < np.where(late, 0.7, 0.3)).astype(np.float64)
        case "unit":
            return np.clip(rng.normal(0.35 + 0.3 * late, 0.2), 0.0, 1.0)
        case _:
            return rng.normal(size=rows) + late


def rivers(detector: Any, values: F64) -> tuple[list[int], list[int]]:
    """Indices of the alarms and of the warnings of river's own ``detector``."""
    alarms, warned = [], []
    for index, value in enumerate(values.tolist()):
        detector.update(value)
        if detector.drift_detected:
            alarms.append(index)
        if getattr(detector, "warning_detected", False):
            warned.append(index)
    return alarms, warned


def ours(detector: Any, values: F64) -> tuple[list[int], list[int]]:
    alarms, warned = [], []
    for index, value in enumerate(values):
        detector.update(value)
        if detector.drift:
            alarms.append(index)
        if detector.warning:
            warned.append(index)
    return alarms, warned


CASES: list[tuple[str, dict[str, Any], Callable[[], Any]]] = [
    ("page_hinkley", {}, drift.PageHinkley),
    ("page_hinkley", {"threshold": 8.0, "mode": "up"}, lambda: drift.PageHinkley(threshold=8.0, mode="up")),
    (
        "page_hinkley",
        {"threshold": 5.0, "mode": "down", "delta": 0.1, "alpha": 0.99, "min_instances": 7},
        lambda: drift.PageHinkley(threshold=5.0, mode="down", delta=0.1, alpha=0.99, min_instances=7),
    ),
    ("ddm", {}, binary.DDM),
    (
        "ddm",
        {"threshold": 1.5, "warm_start": 10},
        lambda: binary.DDM(drift_threshold=1.5, warning_threshold=1.0, warm_start=10),
    ),
    ("eddm", {}, binary.EDDM),
    ("eddm", {"threshold": -10 * math.log(0.7)}, lambda: binary.EDDM(alpha=0.7**0.48683, beta=0.7)),
    ("hddm_a", {}, binary.HDDMA),
    ("hddm_a", {"two_sided_test": True}, lambda: binary.HDDMA(two_sided_test=True)),
    ("hddm_w", {}, binary.HDDMW),
    (
        "hddm_w",
        {"two_sided_test": True, "lambda_val": 0.02},
        lambda: binary.HDDMW(two_sided_test=True, lambda_val=0.02),
    ),
]


@pytest.mark.parametrize(("name", "options", "build"), CASES)
def test_alarms_and_warnings_are_those_of_rivers_own(
    name: str, options: dict[str, Any], build: Callable[[], Any]
) -> None:
    values = np.concatenate([stream(name, seed) for seed in range(3)])
    alarms, warned = rivers(build(), values)
    assert alarms
    assert ours(detectors.build(name, **options), values) == (alarms, warned)
    assert detectors.build(name, **options).update_many(values) == alarms


@pytest.mark.parametrize("name", ["hddm_a", "hddm_w"])
@pytest.mark.parametrize("two_valued", [True, False])
def test_hddm_alarms_as_rivers_own_on_numbers_from_0_to_1(name: str, two_valued: bool) -> None:
    values = np.concatenate([stream("ddm" if two_valued else "hddm_w", seed) for seed in range(3)])
    build = binary.HDDMA if name == "hddm_a" else binary.HDDMW
    assert ours(detectors.build(name), values) == rivers(build(), values)


@pytest.mark.parametrize("short", [None, 25])
@pytest.mark.parametrize("watch", ["rise", "fall"])
def test_fhddm_alarms_as_rivers_own_does_at_a_fall_and_mirrored_at_a_rise(watch: str, short: int | None) -> None:
    values = np.concatenate([stream("fhddm", seed) for seed in range(3)])
    fhddm = detectors.build("fhddm", threshold=8.0, watch=watch, short_window_size=short)
    river = binary.FHDDM(confidence_level=math.exp(-8.0), short_window_size=short)
    alarms, _ = rivers(river, 1.0 - values if watch == "rise" else values)
    # The share of ones rises thrice and falls twice, at each return to 0.3.
    assert len(alarms) >= (3 if watch == "rise" else 2)
    assert fhddm.update_many(values) == alarms


def test_fhddm_at_rivers_default_alarms_as_it_does() -> None:
    values = 1.0 - stream("fhddm", 5)
    assert detectors.build("fhddm", watch="fall").update_many(values) == rivers(binary.FHDDM(), values)[0] != []


class TestKSWIN:
    @pytest.mark.parametrize(
        "values",
        [
            stream("kswin", 0),
            stream("kswin", 1, rows=2000).round(),
            np.random.default_rng(2).integers(0, 3, size=2000).astype(np.float64),
            np.repeat([0.0, 1.0, -0.0, 1.0], 150),
        ],
        ids=["continuous", "many ties", "three values", "constant runs"],
    )
    def test_alarms_are_those_of_rivers_own_with_the_same_seed(self, values: F64) -> None:
        alarms, _ = rivers(drift.KSWIN(alpha=0.05, seed=3), values)
        assert alarms
        assert detectors.build("kswin", threshold=-math.log(0.05), seed=3).update_many(values) == alarms

    @pytest.mark.parametrize(("size", "taken"), [(100, 10), (60, 30), (50, 7), (41, 20)])
    def test_alarms_are_those_of_rivers_own_for_other_windows(self, size: int, taken: int) -> None:
        values = stream("kswin", 4, rows=1500)
        alarms, _ = rivers(drift.KSWIN(alpha=0.01, window_size=size, stat_size=taken, seed=0), values)
        kswin = detectors.build("kswin", threshold=-math.log(0.01), window_size=size, stat_size=taken)
        assert kswin.update_many(values) == alarms != []

    def test_the_statistic_is_the_logarithm_of_the_p_value(self) -> None:
        values = stream("kswin", 0)[:400]
        river, kswin = drift.KSWIN(alpha=1e-9, seed=0), detectors.build("kswin", threshold=-math.log(1e-9))
        rivers(river, values)
        kswin.update_many(values)
        assert kswin.statistic == pytest.approx(-math.log(river.p_value))

    def test_notices_a_change_of_the_spread_alone(self) -> None:
        values = np.random.default_rng(0).normal(size=400)
        values[200:] *= 4.0
        (alarm,) = detectors.build("kswin", threshold=5.0, window_size=200, stat_size=70).update_many(values)
        assert 200 < alarm < 300

    def test_never_alarms_where_no_pair_of_samples_has_so_small_a_p_value(self) -> None:
        values = np.repeat([0.0, 1.0], 200)
        assert detectors.build("kswin", threshold=38.0).update_many(values) == [229]
        assert detectors.build("kswin", threshold=39.0).update_many(values) == []

    def test_a_state_for_another_window_is_refused_and_nothing_changes(self) -> None:
        kswin, narrow = detectors.build("kswin"), detectors.build("kswin", window_size=60)
        kswin.update_many(stream("kswin", 0)[:200])
        narrow.update_many(stream("kswin", 0)[:20])
        before = narrow.state_dict()
        with pytest.raises(ValueError, match="start the detector anew"):
            narrow.load_state_dict(kswin.state_dict())
        assert narrow.state_dict() == before


@pytest.mark.parametrize("name", NAMES)
class TestEachOfRivers:
    def test_neither_batches_nor_a_restart_of_the_process_change_anything(self, name: str) -> None:
        rows = 600

        @settings(max_examples=15, deadline=None)
        @given(st.integers(0, 1000), st.lists(st.integers(0, rows), max_size=5), st.floats(0.3, 6.0))
        def check(seed: int, cuts: list[int], threshold: float) -> None:
            values = stream(name, seed, rows)
            single = detectors.build(name, threshold=threshold)
            alarms, _ = ours(single, values)
            found, begin = [], 0
            batched = detectors.build(name, threshold=threshold)
            for part in np.split(values, sorted(cuts)):
                found += [begin + index for index in batched.update_many(part)]
                begin += part.size
                state = batched.state_dict()
                batched = detectors.build(name)
                batched.load_state_dict(state)
                assert batched.state_dict() == state
            assert found == alarms
            assert batched.state_dict() == single.state_dict()
            assert batched.statistic == single.statistic

        check()

    def test_the_statistic_stays_below_the_threshold_and_is_zero_after_an_alarm(self, name: str) -> None:
        detector = detectors.build(name)
        values = np.concatenate([stream(name, seed) for seed in range(2)])
        highest = 0.0
        for value in values:
            if detector.update(value).drift:
                assert detector.statistic == 0.0
            # FHDDM's share is of one value less than the one tested.
            assert 0.0 <= detector.statistic <= detector.threshold * (1.3 if name == "fhddm" else 1.0 + 1e-9)
            highest = max(highest, detector.statistic)
        assert highest > 0.5 * detector.threshold

    def test_an_alarm_leaves_a_new_detector(self, name: str) -> None:
        detector = detectors.build(name)
        values = stream(name, 1)
        alarm = detector.update_many(values)[-1]
        detector.reset()
        detector.update_many(values[: alarm + 1])
        new = detectors.build(name)
        assert detector.state_dict() | {"drift": False, "warning": False} == new.state_dict() | {"warning": False}

    def test_a_greater_threshold_raises_fewer_alarms(self, name: str) -> None:
        noise = stream("ddm" if name == "hddm_w" else name, 0, rows=24_000)[:12_000]
        detector = detectors.build(name)
        thresholds = [detector.threshold * factor for factor in (1.5, 0.4, 0.1)]
        few, some, many = (len(detector.with_threshold(threshold).update_many(noise)) for threshold in thresholds)
        assert few < some < many

    def test_a_state_of_another_shape_is_refused(self, name: str) -> None:
        detector = detectors.build(name)
        state = detector.state_dict()
        wrong = {"count": -1} if name == "kswin" else {"river": {"p": 1.0}}
        with pytest.raises(ValueError, match="start the detector anew"):
            detector.load_state_dict(state | wrong)
        assert detector.state_dict() == state

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_finite_is_refused_before_any_is_read(self, name: str, bad: float) -> None:
        detector = detectors.build(name)
        before = detector.state_dict()
        with pytest.raises(ValueError, match="finite"):
            detector.update(bad)
        with pytest.raises(ValueError, match="finite"):
            detector.update_many(np.array([0.0, bad]))
        assert detector.state_dict() == before

    def test_the_options_build_the_same_detector(self, name: str) -> None:
        detector = detectors.build(name)
        again = detectors.build(name, threshold=detector.threshold, **detector.options())
        values = stream(name, 3)
        assert again.update_many(values) == detector.update_many(values)


@pytest.mark.parametrize(("name", "value"), [("ddm", 0.5), ("eddm", -1.0), ("fhddm", 2.0), ("hddm_a", 1.5)])
def test_a_value_outside_the_domain_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} reads .* got {value:g}"):
        detectors.build(name).update(value)
    with pytest.raises(ValueError, match=f"{name} reads .* got {value:g}"):
        detectors.build(name).update_many(np.array([0.0, value]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("page_hinkley", {"mode": "sideways"}, "'up', 'down' or 'both'"),
        ("page_hinkley", {"delta": -0.1}, "delta"),
        ("page_hinkley", {"alpha": 1.1}, "alpha"),
        ("ddm", {"warm_start": 0}, "warm_start"),
        ("eddm", {"warm_start": 2.5}, "whole number"),
        ("fhddm", {"short_window_size": 101}, "at most sliding_window_size"),
        ("fhddm", {"watch": "up"}, "'rise' or 'fall'"),
        ("hddm_w", {"lambda_val": 1.5}, "lambda_val"),
        ("hddm_a", {"threshold": 800.0}, "under 745"),
        ("kswin", {"window_size": 50}, "at least twice stat_size"),
        ("kswin", {"window_size": 30_000, "stat_size": 10_001}, "at most 10000"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detectors.build(name, **options)


@pytest.mark.parametrize("name", ["ddm", "eddm", "fhddm", "hddm_a", "hddm_w"])
def test_a_fall_of_errors_is_no_drift_where_rises_are_watched(name: str) -> None:
    quiet = np.zeros(400)
    errors = np.tile([0.0, 1.0], 200)
    assert detectors.build(name).update_many(np.concatenate([errors, quiet])) == []


@pytest.mark.parametrize("name", ["hddm_a", "hddm_w"])
def test_the_two_sided_test_notices_a_fall(name: str) -> None:
    values = 1.0 - stream(name, 0)
    late = [alarm for alarm in detectors.build(name, two_sided_test=True).update_many(values) if alarm >= 1500]
    assert late
    assert late[0] < 1700


def test_ddm_alarms_at_the_first_error_after_a_warm_start_without_one() -> None:
    values = np.zeros(100)
    values[60] = 1.0
    assert detectors.build("ddm", threshold=50.0).update_many(values) == [60]
    assert detectors.build("ddm", threshold=50.0, warm_start=70).update_many(values) == []
