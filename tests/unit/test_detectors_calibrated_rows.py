"""``Calibrated`` around detectors that read rows."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import detectors
from detectors import Calibrated
from detectors.base import F64

NAMES = ["ks", "mahalanobis", "mmd"]
LEVEL, SCALE = np.array([20.0, -3.0, 0.0, 1e6]), np.array([3.0, 0.1, 1e-6, 1e5])
pytestmark = pytest.mark.sweep


def noise(seed: int, rows: int = 1000, phi: float = 0.6) -> F64:
    """Four AR(1) columns of their own levels and deviations."""
    values = np.random.default_rng(seed).normal(size=(rows, 4))
    for t in range(1, rows):
        values[t] = phi * values[t - 1] + math.sqrt(1 - phi**2) * values[t]
    return LEVEL + SCALE * values


@cache
def calibrated(name: str) -> dict[str, Any]:
    return detectors.calibrate(detectors.build(name), noise(0), arl0=500).calibration()


def ready(name: str) -> Calibrated:
    return Calibrated.from_calibration(detectors.build(name), calibrated(name))


def assert_same(left: Calibrated, right: Calibrated) -> None:
    np.testing.assert_equal(left.state_dict(), right.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_another_rate_of_false_alarms_keeps_the_evidence(name: str) -> None:
    watch, as_before = ready(name), ready(name)
    for one in (watch, as_before):
        one.update_many(noise(3, 130))
    watch.retarget(8 * as_before.arl0)
    assert watch.threshold > as_before.threshold and watch.statistic == as_before.statistic
    other = ready(name)
    other.load_state_dict(watch.state_dict())
    assert other.update_many(noise(4, 90)) == watch.update_many(noise(4, 90))
    assert other.statistic == watch.statistic


@pytest.mark.parametrize("name", NAMES)
class TestRows:
    def test_a_shift_is_noticed_in_the_columns_own_units(self, name: str) -> None:
        watch = ready(name)
        watch.update_many(noise(1, 300))
        assert watch.update_many(noise(2, 500) + 1.5 * SCALE)

    def test_columns_of_any_unit_count_alike(self, name: str) -> None:
        moved = noise(2, 600)
        moved[:, 2] += 3.0 * SCALE[2]
        assert ready(name).update_many(moved)

    def test_batches_with_bad_rows_match_single_updates(self, name: str) -> None:
        @settings(max_examples=8, deadline=None)
        @given(
            st.integers(0, 1000), st.lists(st.integers(0, 199), max_size=9), st.lists(st.integers(0, 90), max_size=5)
        )
        def check(seed: int, bad: list[int], lengths: list[int]) -> None:
            values = noise(seed, 200)
            values[100:] += SCALE
            values[bad, 1] = np.nan
            single, batched = ready(name), ready(name)
            expected = [index for index, row in enumerate(values) if single.update(row).drift]
            found: list[int] = []
            begin = 0
            for end in [*[end for end in np.cumsum(lengths).tolist() if end <= 200], 200]:
                found += [begin + i for i in batched.update_many(values[begin:end])]
                begin = end
            assert found == expected
            assert batched.ignored == single.ignored == len(set(bad))
            assert_same(batched, single)

        check()

    def test_tensors_and_arrays_are_read_alike(self, name: str) -> None:
        values = noise(3, 300).astype(np.float32)
        left, right = ready(name), ready(name)
        assert left.update_many(torch.from_numpy(values)) == right.update_many(values)
        assert_same(left, right)

    def test_a_restored_one_goes_on_bit_identically(self, name: str) -> None:
        values = np.r_[noise(4, 200), noise(5, 200) + SCALE]
        original, restored = ready(name), ready(name)
        original.update_many(values[:170])
        restored.load_state_dict(original.state_dict())
        assert restored.update_many(values[170:]) == original.update_many(values[170:])
        assert_same(restored, original)

    def test_a_calibration_survives_json(self, name: str) -> None:
        again = Calibrated.from_calibration(detectors.build(name), json.loads(json.dumps(calibrated(name))))
        assert_same(again, ready(name))
        assert again.calibration() == calibrated(name)

    def test_after_a_new_baseline_the_new_level_is_normal(self, name: str) -> None:
        watch, moved = ready(name), noise(6, 1400) + 2.0 * SCALE
        watch.rebaseline(900)
        assert watch.update_many(moved[:900]) == []
        assert watch.location == pytest.approx(LEVEL + 2.0 * SCALE, abs=float(0.4 * SCALE.max()))
        assert len(watch.update_many(moved[900:])) <= 4  # expected: 1 in 500 rows
        assert watch.update_many(noise(7, 500))

    def test_rows_of_another_width_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="rows of 4 numbers, got 3"):
            ready(name).update_many(np.zeros((5, 3)))

    def test_no_rows_are_no_alarm(self, name: str) -> None:
        assert ready(name).update_many(np.empty((0, 4))) == []

    def test_false_alarms_come_about_as_often_as_asked(self, name: str) -> None:
        watch, rows = ready(name), 40_000
        reached = rows / len(watch.update_many(noise(8, rows)))
        # A reference of 1,000 rows with an autocorrelation time of 4 says little more than the order of magnitude.
        assert 150 < reached < 2000


def test_the_first_rows_become_the_reference() -> None:
    watch = Calibrated(detectors.build("mmd"), arl0=500, warmup=1000)
    assert watch.update_many(noise(0)[:999]) == [] and watch.learning == 1
    watch.update(noise(0)[999])
    assert watch.calibration() == calibrated("mmd")


def test_a_detector_of_values_refuses_rows() -> None:
    with pytest.raises(ValueError, match=r"cusum reads single values.*\(1000, 4\)"):
        detectors.calibrate(detectors.build("cusum"), noise(0))


def test_class_indices_are_read_as_they_are() -> None:
    rng = np.random.default_rng(0)
    watch = detectors.calibrate(detectors.build("label_shift"), rng.choice(3, 1000, p=[0.5, 0.3, 0.2]), arl0=1000)
    assert len(watch.update_many(rng.choice(3, 500, p=[0.5, 0.3, 0.2]))) <= 3
    assert watch.update_many(rng.choice(3, 300, p=[0.2, 0.3, 0.5]))
