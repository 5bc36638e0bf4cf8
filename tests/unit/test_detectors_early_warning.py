from __future__ import annotations

import json
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import detectors
from detectors.base import F64
from detectors.early_warning import EarlyWarning


def slowing(seed: int, rows: int, first: float, last: float) -> F64:
    """x[t] = phi x[t-1] + noise of fixed size, with phi moving evenly from ``first`` to ``last``."""
    values = np.random.default_rng(seed).normal(size=rows)
    for t, phi in enumerate(np.linspace(first, last, rows)):
        if t:
            values[t] += phi * values[t - 1]
    return values


def indicators(values: F64, block: int) -> tuple[list[float], list[float]]:
    """Variance and lag-1 autocorrelation of each whole block, by numpy's own functions."""
    blocks = [values[i : i + block] for i in range(0, values.size - block + 1, block)]
    centred = [part - part.mean() for part in blocks]
    return [float(part.var()) for part in blocks], [float(d[1:] @ d[:-1] / (d @ d)) for d in centred]


def tau(values: list[float]) -> float:
    """Kendall's tau of ``values`` (n,) with time."""
    return float(np.mean([np.sign(later - earlier) for earlier, later in combinations(values, 2)]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 500), max_size=8), st.sampled_from(["both", "one"]))
def test_cutting_a_stream_into_batches_changes_nothing(seed: int, lengths: list[int], need: Any) -> None:
    values = slowing(seed, 1000, 0.0, 0.9)
    single, batched = (EarlyWarning(0.8, block=8, points=10, need=need) for _ in range(2))
    expected = [index for index, value in enumerate(values) if single.update(value).warning]
    found, begin = [], 0
    for length in [*lengths, values.size]:
        found += [begin + index for index in batched.update_many(values[begin : begin + length])]
        begin = min(begin + length, values.size)
        if begin == values.size:
            break
    assert found == expected
    assert batched.state_dict() == single.state_dict()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(8, 30))
def test_the_trends_are_kendalls_tau(seed: int, blocks: int) -> None:
    values = np.random.default_rng(seed).normal(size=16 * blocks)
    detector = EarlyWarning(100.0, block=16, points=12)
    detector.update_many(values)
    taus = [tau(x[-12:]) for x in indicators(values, 16)]
    assert detector.trends == pytest.approx(taus)
    n = min(blocks, 12)
    z = min(taus) * (n * (n - 1) / 2) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    assert detector.statistic == pytest.approx(max(z, 0.0) ** 2)


def test_critical_slowing_down_is_told_before_the_change() -> None:
    values = slowing(0, 3000, 0.0, 0.95)
    detector = EarlyWarning()
    assert detector.update_many(values)


def test_it_never_alarms() -> None:
    detector = EarlyWarning()
    raised = [(detector.update(value).drift, detector.warning) for value in slowing(1, 3000, 0.0, 0.95)]
    assert (False, True) in raised
    assert not any(drift for drift, _ in raised)
    assert EarlyWarning.advisory


def test_calibrated_a_steady_correlated_signal_warns_as_often_as_asked() -> None:
    steady = slowing(2, 105_000, 0.8, 0.8)
    calibrated = detectors.calibrate(EarlyWarning(), steady[:5000], arl0=2000)
    detector = EarlyWarning(calibrated.threshold)
    assert 25 < len(detector.update_many(steady[5000:] / steady.std())) < 100


def test_growing_noise_alone_is_warned_of_less_where_both_must_rise() -> None:
    growing = np.random.default_rng(3).normal(size=(20, 3000)) * np.linspace(1.0, 4.0, 3000)
    one, both = (sum(len(EarlyWarning(3.0, need=need).update_many(x)) for x in growing) for need in ("one", "both"))
    assert one > 2 * both


def test_a_moving_level_is_no_variance() -> None:
    values = np.random.default_rng(4).normal(size=3000)
    moving = values + np.linspace(0.0, 1.0, 3000) + (np.arange(3000) > 1600)
    still, moved = EarlyWarning(100.0), EarlyWarning(100.0)
    still.update_many(values)
    moved.update_many(moving)
    assert moved.trends == pytest.approx(still.trends, abs=0.05)


def test_a_constant_signal_says_nothing() -> None:
    detector = EarlyWarning(0.01)
    assert detector.update_many(np.full(5000, 3.0)) == []
    assert detector.trends == (0.0, 0.0)


def test_after_a_warning_the_trend_is_looked_for_anew() -> None:
    warnings = EarlyWarning(0.5, block=8, points=8).update_many(slowing(5, 4000, 0.0, 0.99))
    assert len(warnings) > 1
    assert np.diff(warnings).min() >= 8 * 8
    assert all((index + 1) % 8 == 0 for index in warnings)


def test_a_greater_threshold_warns_less() -> None:
    values = slowing(6, 200_000, 0.0, 0.0)
    counts = [len(EarlyWarning(threshold).update_many(values)) for threshold in (0.5, 1.0, 2.0, 4.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 3 * counts[2] > 0


def test_the_default_threshold_warns_about_once_in_10_000_values() -> None:
    warnings = len(EarlyWarning().update_many(slowing(7, 500_000, 0.0, 0.0)))
    assert 25 < warnings < 100


def test_a_state_goes_through_json_and_on_bit_identically() -> None:
    values = slowing(8, 3000, 0.0, 0.9)
    original = EarlyWarning(2.5)
    original.update_many(values[:1234])
    restored = EarlyWarning()
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.state_dict() == original.state_dict()
    assert restored.update_many(values[1234:]) == original.update_many(values[1234:])
    assert restored.state_dict() == original.state_dict()
    original.reset()
    assert original.state_dict() == EarlyWarning(2.5).state_dict()


def test_a_state_for_another_block_is_refused_and_nothing_changes() -> None:
    original = EarlyWarning(block=32)
    original.update_many(np.arange(20.0))
    other = EarlyWarning(block=16)
    before = other.state_dict()
    with pytest.raises(ValueError, match="block"):
        other.load_state_dict(original.state_dict())
    assert other.state_dict() == before


@pytest.mark.parametrize(
    ("options", "message"), [({"block": 3}, "block"), ({"points": 7}, "points"), ({"need": "none"}, "need")]
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyWarning(**options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        EarlyWarning().update(bad)
    with pytest.raises(ValueError, match="finite"):
        EarlyWarning().update_many(np.array([0.0, bad]))
