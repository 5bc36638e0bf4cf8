from __future__ import annotations

import copy
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import detectors
from detectors.adwin import ADWIN
from detectors.base import F64, Detector
from detectors.cusum import CUSUM

pytestmark = pytest.mark.sweep


NAMES = detectors.names()
ALARMING = [name for name in NAMES if not detectors.build(name).advisory]


def stream(seed: int, rows: int = 3000) -> F64:
    """Standardised noise whose mean moves by one deviation half-way, so that every detector alarms."""
    values = np.random.default_rng(seed).normal(size=rows)
    values[rows // 2 :] += 1.0
    return values


def stream_for(name: str, seed: int, rows: int = 3000) -> Any:
    """``stream`` in the domain of a detector: (rows,), or (rows, 3) for one that reads rows."""
    detector, values = detectors.build(name), stream(seed, rows)
    if detector.domain == "binary":
        return (values > 1.0).astype(np.float64)
    if detector.domain == "unit":
        return np.clip(values, 0.0, 1.0)
    if detector.reads == "rows":
        return np.stack([values, *np.random.default_rng(seed + 1).normal(size=(2, rows))], 1)
    return values


def raised(detector: Detector) -> bool:
    return detector.warning if detector.advisory else detector.drift


def plain(value: Any) -> bool:
    """Whether ``value`` is what a checkpoint can hold without pickle."""
    if isinstance(value, dict):
        return all(type(key) is str and plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(plain(inner) for inner in value)
    return value is None or type(value) in (int, float, bool, str, bytes, np.ndarray)


def cut(values: F64, lengths: list[int]) -> list[F64]:
    return np.split(values, np.cumsum(lengths)[np.cumsum(lengths) < len(values)])


def test_cusum_and_adwin_are_known_by_name() -> None:
    assert {"adwin", "cusum"} <= set(NAMES)
    assert type(detectors.build("cusum", shift=2.0)) is CUSUM
    assert detectors.build("adwin").name == "adwin"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown detector 'nope'.*adwin, cusum"):
        detectors.build("nope")


def test_an_unknown_option_is_refused_with_the_detectors_name() -> None:
    with pytest.raises(ValueError, match="'cusum'.*shfit"):
        detectors.build("cusum", shfit=1.0)


def test_a_name_can_be_given_once() -> None:
    with pytest.raises(ValueError, match="'cusum' is taken by CUSUM"):
        detectors.register("cusum")(CUSUM)


def test_importing_the_package_loads_neither_river_nor_scipy() -> None:
    code = (
        "import sys, detectors; detectors.names(); print([m for m in ('river', 'scipy', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_building_adwin_loads_no_scipy() -> None:
    code = "import sys, detectors; detectors.build('adwin'); print('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("name", ALARMING)
class TestEveryDetectorThatAlarms:
    def test_notices_a_shift_and_starts_anew(self, name: str) -> None:
        detector = detectors.build(name)
        alarms = detector.update_many(stream_for(name, 0))
        assert any(1500 <= alarm < 1700 for alarm in alarms)

    def test_drift_speaks_about_the_last_update_alone(self, name: str) -> None:
        detector = detectors.build(name)
        after = [detector.update(value).drift for value in stream_for(name, 0)]
        assert any(raised and not following for raised, following in pairwise(after))


@pytest.mark.parametrize("name", NAMES)
class TestEveryDetector:
    def test_update_returns_the_detector(self, name: str) -> None:
        detector = detectors.build(name)
        assert detector.update(stream_for(name, 0)[0]) is detector

    def test_cutting_a_stream_into_batches_changes_neither_alarms_nor_state(self, name: str) -> None:
        @settings(max_examples=12, deadline=None)
        @given(st.integers(0, 1000), st.lists(st.integers(0, 700), max_size=12))
        def check(seed: int, lengths: list[int]) -> None:
            values = stream_for(name, seed)
            single, batched = detectors.build(name), detectors.build(name)
            alarms = [index for index, value in enumerate(values) if raised(single.update(value))]
            found, begin = [], 0
            for part in cut(values, lengths):
                found += [begin + index for index in batched.update_many(part)]
                begin += len(part)
            assert found == alarms
            assert batched.state_dict() == single.state_dict()
            assert batched.statistic == single.statistic

        check()

    def test_a_restored_detector_goes_on_bit_identically(self, name: str) -> None:
        @settings(max_examples=10, deadline=None)
        @given(st.integers(0, 1000), st.integers(0, 3000))
        def check(seed: int, at: int) -> None:
            values = stream_for(name, seed)
            original = detectors.build(name).with_threshold(3.0)
            original.update_many(values[:at])
            state = original.state_dict()
            assert plain(state)
            restored = detectors.build(name)
            restored.load_state_dict(state)
            assert restored.state_dict() == state
            assert restored.update_many(values[at:]) == original.update_many(values[at:])
            assert restored.state_dict() == original.state_dict()

        check()

    def test_a_state_is_a_copy(self, name: str) -> None:
        detector = detectors.build(name)
        detector.update_many(stream_for(name, 1)[:100])
        state = detector.state_dict()
        kept = copy.deepcopy(state)
        detector.update_many(stream_for(name, 1)[100:200])
        assert state == kept != detector.state_dict()

    def test_a_greater_threshold_raises_fewer_alarms(self, name: str) -> None:
        detector, noise = detectors.build(name), stream_for(name, 3, 20_000)
        counts = [len(detector.with_threshold(f * detector.threshold).update_many(noise)) for f in (0.2, 0.6, 1.2)]
        assert counts[0] > counts[1] >= counts[2]

    def test_another_threshold_keeps_the_options_and_starts_empty(self, name: str) -> None:
        detector = detectors.build(name)
        fresh = detector.with_threshold(2.5).state_dict()
        detector.update_many(stream_for(name, 2)[:500])
        other = detector.with_threshold(2.5)
        assert (other.threshold, other.options()) == (2.5, detector.options())
        assert other.state_dict() == fresh

    def test_a_reset_detector_is_as_new(self, name: str) -> None:
        detector = detectors.build(name)
        new = detector.state_dict()
        detector.update_many(stream_for(name, 2)[:500])
        detector.reset()
        assert detector.state_dict() == new

    def test_an_empty_batch_changes_nothing(self, name: str) -> None:
        detector = detectors.build(name)
        detector.update_many(stream_for(name, 2)[:500])
        before = detector.state_dict()
        assert detector.update_many(stream_for(name, 0)[:0]) == []
        assert detector.state_dict() == before

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_value_that_is_not_finite_is_refused(self, name: str, bad: float) -> None:
        with pytest.raises((ValueError, OverflowError)):
            detectors.build(name).update(bad)
        with pytest.raises(ValueError, match="finite"):
            detectors.build(name).update_many(np.array([0.0, bad, 0.0]))

    @pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_threshold_must_be_positive(self, name: str, bad: float) -> None:
        with pytest.raises(ValueError, match="threshold"):
            detectors.build(name).with_threshold(bad)


class TestCUSUM:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.floats(-4.0, 4.0), max_size=200), st.floats(0.1, 4.0), st.floats(0.5, 20.0))
    def test_follows_the_textbook_recursion(self, values: list[float], shift: float, threshold: float) -> None:
        cusum = CUSUM(threshold, shift=shift)
        up = down = 0.0
        for value in values:
            up, down = max(0.0, up + value - shift / 2), max(0.0, down - value - shift / 2)
            cusum.update(value)
            if cusum.drift:
                assert max(up, down) > threshold - 1e-3
                up = down = 0.0
            assert cusum.statistic == pytest.approx(max(up, down), abs=1e-3)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_looks_both_ways(self, sign: float) -> None:
        alarms = CUSUM(5.0).update_many(np.full(11, 1.5 * sign))
        assert alarms == [5]  # 1 per row after the slack of a half: above 5 at the sixth row

    def test_warns_before_it_alarms(self) -> None:
        cusum = CUSUM(5.0, warn_at=0.5)
        seen = [(cusum.update(1.5).warning, cusum.drift) for _ in range(6)]
        assert seen == [(False, False)] * 2 + [(True, False)] * 3 + [(True, True)]

    def test_an_alarm_at_each_row_is_found_in_one_batch(self) -> None:
        assert CUSUM(1.0).update_many(np.full(300, 4.0)) == list(range(300))


class TestADWIN:
    def test_raises_the_alarms_of_rivers_own(self) -> None:
        from river.drift import ADWIN as RiverADWIN

        values = np.concatenate([stream(seed) for seed in range(4)])
        ours, rivers = ADWIN(), RiverADWIN()
        expected = []
        for index, value in enumerate(values.tolist()):
            rivers.update(value)
            if rivers.drift_detected:
                expected.append(index)
        assert len(expected) >= 4
        assert ours.update_many(values) == expected

    def test_the_statistic_is_the_mean_of_the_window(self) -> None:
        adwin = ADWIN()
        assert adwin.statistic == 0.0
        adwin.update_many(np.array([1.0, 2.0, 6.0]))
        assert adwin.statistic == pytest.approx(3.0)

    @pytest.mark.parametrize("window", [b"abc", None])
    def test_a_damaged_window_is_refused_and_nothing_changes(self, window: bytes | None) -> None:
        adwin = ADWIN()
        adwin.update_many(stream(1)[:100])
        before = adwin.state_dict()
        damaged = before | {"window": window} if window else before | {"check": [1.0, 2.0, 3.0]}
        with pytest.raises(ValueError, match="river"):
            adwin.load_state_dict(damaged)
        assert adwin.state_dict() == before

    def test_a_threshold_beyond_float_range_is_refused(self) -> None:
        with pytest.raises(ValueError, match="under 745"):
            ADWIN(800.0)


def test_every_detector_is_a_detector() -> None:
    assert all(isinstance(detectors.build(name), Detector) for name in NAMES)
