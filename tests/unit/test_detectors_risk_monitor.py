from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.base import F64
from detectors.betting_bank import GRID, LEVELS
from detectors.risk_monitor import RiskMonitor

unit = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 1.0]))


def errors(seed: int, rate: float, rows: int) -> F64:
    return (np.random.default_rng(seed).random(rows) < rate).astype(float)


def assert_same(left: RiskMonitor, right: RiskMonitor) -> None:
    assert left.state_dict() == right.state_dict()
    assert (left.statistic, left.drift, left.warning) == (right.statistic, right.drift, right.warning)


@settings(max_examples=60, deadline=None)
@given(st.lists(unit, max_size=300), st.lists(st.integers(0, 300), max_size=5), st.floats(0.2, 0.8))
def test_cutting_a_stream_into_batches_changes_nothing(values: list[float], cuts: list[int], risk: float) -> None:
    single, batched = RiskMonitor(2.0, risk=risk), RiskMonitor(2.0, risk=risk)
    alarms = [index for index, value in enumerate(values) if single.update(value).drift]
    found, begin = [], 0
    for end in [*sorted(min(cut, len(values)) for cut in cuts), len(values)]:
        found += [begin + index for index in batched.update_many(np.array(values[begin:end]))]
        begin = end
    assert found == alarms
    assert_same(batched, single)


@settings(max_examples=60, deadline=None)
@given(st.lists(unit, min_size=1, max_size=80), st.floats(0.05, 0.9))
def test_follows_the_recursion_of_the_paper(values: list[float], risk: float) -> None:
    monitor = RiskMonitor(50.0, risk=risk)
    sums = [0.0] * 5
    for value in values:
        monitor.update(value)
        for k, odds in enumerate((1.25, 1.5, 2.0, 4.0, 8.0)):
            after = odds * risk / (1 - risk + odds * risk)
            rounded = math.floor(value * LEVELS) / LEVELS
            sums[k] = max(0.0, sums[k] + math.log1p((after - risk) / (risk * (1 - risk)) * (rounded - risk)))
    assert monitor.statistic == pytest.approx(max(sums) - math.log(5), abs=2 * len(values) / GRID)


@pytest.mark.parametrize("threshold", [2.0, 4.0])
@pytest.mark.parametrize("kind", ["errors", "losses", "bound"])
def test_false_alarms_are_rarer_than_the_guarantee(kind: str, threshold: float) -> None:
    rng = np.random.default_rng(1)
    values = {
        "errors": errors(2, 0.1, 100_000),
        "losses": rng.beta(0.2, 1.8, size=100_000),
        "bound": np.full(100_000, 0.1),
    }[kind]
    alarms = RiskMonitor(threshold, risk=0.1).update_many(values)
    assert values.size / max(len(alarms), 1) > math.exp(threshold)


def test_a_doubled_risk_is_found_and_a_halved_one_is_none() -> None:
    monitor = RiskMonitor().fit(errors(3, 0.1, 2000))
    assert monitor.update_many(errors(4, 0.1, 5000)) == []
    assert monitor.update_many(errors(5, 0.05, 5000)) == []
    found = monitor.update_many(errors(6, 0.2, 1000))
    assert found and found[0] < 500


def test_harm_within_the_tolerance_is_borne() -> None:
    reference, worse = errors(7, 0.1, 2000), errors(8, 0.14, 20_000)
    assert RiskMonitor().fit(reference).update_many(worse)
    assert RiskMonitor(tolerance=0.05).fit(reference).update_many(worse) == []


def test_fit_grants_the_reference_its_standard_error() -> None:
    long, short = errors(9, 0.2, 20_000), errors(9, 0.2, 200)
    assert RiskMonitor().fit(long).bound == pytest.approx(0.2, abs=0.01)
    assert RiskMonitor().fit(short).bound - short.mean() > 5.0 * (RiskMonitor().fit(long).bound - long.mean())
    bursts = np.repeat(errors(9, 0.2, 200), 10)
    assert RiskMonitor().fit(bursts).bound > RiskMonitor().fit(np.random.default_rng(0).permutation(bursts)).bound


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_a_reference_without_errors_or_without_successes_can_be_read(mean: float) -> None:
    monitor = RiskMonitor().fit(np.full(500, mean))
    assert monitor.update_many(np.full(2000, mean)) == []
    assert bool(monitor.update_many(np.full(50, 1.0))) is (mean == 0.0)


@pytest.mark.parametrize("risk", [0.02, 0.3])
def test_the_lower_bound_is_under_the_true_risk_at_all_times_at_once(risk: float) -> None:
    wrong = 0
    for seed in range(60):
        monitor = RiskMonitor(700.0, risk=0.9)
        for part in np.split(errors(seed, risk, 1000), 50):
            monitor.update_many(part)
            if monitor.lower > risk:
                wrong += 1
                break
    assert wrong <= 3 + 3  # 5% of 60 is the bound, plus twice the deviation of that count


def test_the_lower_bound_closes_in_on_the_risk() -> None:
    monitor = RiskMonitor(700.0, risk=0.9)
    assert monitor.lower == 0.0
    assert math.isnan(monitor.mean)
    monitor.update_many(errors(10, 0.2, 100_000))
    assert monitor.mean == pytest.approx(0.2, abs=0.01)
    assert 0.19 < monitor.lower < monitor.mean
    monitor.reset()
    assert monitor.lower == 0.0


def test_after_an_alarm_the_mean_is_counted_anew() -> None:
    monitor = RiskMonitor(3.0, risk=0.1)
    alarms = monitor.update_many(np.ones(3))
    assert alarms == [2]  # log 1/0.1 * odds 8 tells 1.55 a row: above 3 + log 5 at the third
    assert monitor.drift
    assert math.isnan(monitor.mean)
    assert monitor.statistic == pytest.approx(-math.log(5))


def test_what_fit_learnt_survives_json_threshold_and_state() -> None:
    fitted = RiskMonitor(odds=[2.0, 3.0]).fit(errors(11, 0.07, 3000))
    carried = RiskMonitor(odds=[2.0, 3.0]).with_fitted(json.loads(json.dumps(fitted.fitted())))
    assert carried.bound == fitted.bound == fitted.with_threshold(2.0).bound
    values = errors(12, 0.2, 400)
    fitted.update_many(values[:200])
    restored = RiskMonitor(odds=[2.0, 3.0])
    restored.load_state_dict(json.loads(json.dumps(fitted.state_dict())))
    assert restored.update_many(values[200:]) == fitted.update_many(values[200:])
    assert_same(restored, fitted)


@pytest.mark.parametrize(
    "damage",
    [{"low": None}, {"low": None, "high": "much"}, {"low": None, "high": 1.5}, {"low": None, "high": math.nan}],
)
def test_damaged_knowledge_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="damaged|from 0 to 1"):
        RiskMonitor().with_fitted(damage)


def test_a_state_for_other_odds_is_refused_and_nothing_changes() -> None:
    monitor = RiskMonitor()
    before = monitor.state_dict()
    with pytest.raises(ValueError, match="odds"):
        monitor.load_state_dict(RiskMonitor(odds=[2.0]).state_dict())
    assert monitor.state_dict() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.01, 1.01])
def test_a_value_that_is_no_loss_is_refused_and_nothing_changes(bad: float) -> None:
    monitor = RiskMonitor().update(1.0)
    before = monitor.state_dict()
    with pytest.raises(ValueError, match="finite values from 0 to 1"):
        monitor.update(bad)
    with pytest.raises(ValueError, match="finite values from 0 to 1"):
        monitor.update_many(np.array([1.0, bad]))
    with pytest.raises(ValueError, match="finite values from 0 to 1"):
        monitor.fit(np.array([1.0, bad]))
    assert monitor.state_dict() == before


def test_a_rounding_error_of_float32_is_no_reason_to_stop() -> None:
    single, batched = RiskMonitor(), RiskMonitor()
    above = float(np.nextafter(np.float32(1.0), np.float32(2.0)))
    single.update(above).update(-1e-9)
    batched.update_many(np.array([above, -1e-9]))
    assert_same(single, batched)
    assert single.mean == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"risk": 1.2}, "risk"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"odds": []}, "odds"),
        ({"odds": [0.5]}, "odds"),
        ({"warn_at": 0.0}, "warn_at"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RiskMonitor(**options)


def test_an_empty_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        RiskMonitor().fit(np.empty(0))
