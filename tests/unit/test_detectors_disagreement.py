from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.base import F64
from detectors.disagreement import Disagreement


def differs(seed: int, rate: float, rows: int) -> F64:
    return (np.random.default_rng(seed).random(rows) < rate).astype(float)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=300), st.integers(0, 300), st.floats(0.005, 0.8))
def test_cutting_a_stream_into_batches_changes_nothing(values: list[float], cut: int, rate: float) -> None:
    single, batched = Disagreement(1.5, rate=rate), Disagreement(1.5, rate=rate)
    alarms = [index for index, value in enumerate(values) if single.update(value).drift]
    cut = min(cut, len(values) - 1)
    found = batched.update_many(np.array(values[:cut]))
    found += [cut + index for index in batched.update_many(np.array(values[cut:]))]
    assert found == alarms
    assert batched.state_dict() == single.state_dict()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=200), st.floats(0.05, 0.95))
def test_is_the_same_for_agreement_as_for_disagreement(values: list[float], rate: float) -> None:
    there, back = Disagreement(2.0, rate=rate), Disagreement(2.0, rate=1.0 - rate)
    levels = np.rint(np.array(values) * 64) / 64  # exact, and so is 1 - x
    assert there.update_many(levels) == back.update_many(1.0 - levels)
    assert there.statistic == pytest.approx(back.statistic, abs=1e-3)


@pytest.mark.parametrize("threshold", [2.0, 4.0])
@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_false_alarms_are_rarer_than_the_guarantee(rate: float, threshold: float) -> None:
    alarms = Disagreement(threshold, rate=rate).update_many(differs(0, rate, 100_000))
    assert 100_000 / max(len(alarms), 1) > math.exp(threshold)


@pytest.mark.parametrize("rate", [0.06, 0.4])
def test_looks_both_ways(rate: float) -> None:
    watch = Disagreement().fit(differs(1, 0.2, 3000))
    assert watch.update_many(differs(2, 0.2, 5000)) == []
    found = watch.update_many(differs(3, rate, 600))
    assert found and found[0] < 400


def test_where_nothing_differed_the_first_disagreements_count() -> None:
    watch = Disagreement().fit(np.zeros(1000))
    assert watch.update_many(np.zeros(100_000)) == []
    assert watch.update_many(differs(4, 0.3, 100))


def test_a_rate_under_the_floor_is_as_good_as_none() -> None:
    watch = Disagreement(floor=0.05).fit(differs(5, 0.01, 5000))
    assert watch.update_many(differs(6, 0.04, 50_000)) == []
    assert watch.update_many(np.zeros(50_000)) == []
    assert watch.update_many(differs(7, 0.15, 2000))


def test_total_variation_of_small_variance_is_read_too() -> None:
    rng = np.random.default_rng(8)
    watch = Disagreement().fit(rng.beta(2.0, 18.0, size=2000))
    assert watch.update_many(rng.beta(2.0, 18.0, size=10_000)) == []
    assert watch.update_many(rng.beta(4.0, 16.0, size=1000))


def test_a_change_within_the_tolerance_is_borne() -> None:
    reference = differs(9, 0.2, 5000)
    for rate in (0.12, 0.28):
        assert Disagreement().fit(reference).update_many(differs(10, rate, 20_000))
        assert Disagreement(tolerance=0.1).fit(reference).update_many(differs(10, rate, 20_000)) == []


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_what_fit_learnt_and_the_state_survive_json(rate: float) -> None:
    fitted = Disagreement().fit(differs(11, rate, 2000))
    carried = Disagreement().with_fitted(json.loads(json.dumps(fitted.fitted())))
    assert carried.fitted() == fitted.fitted()
    values = differs(12, 0.3, 400)
    carried.update_many(values[:11])
    restored = Disagreement()
    restored.load_state_dict(json.loads(json.dumps(carried.state_dict())))
    fitted.update_many(values)
    restored.update_many(values[11:])
    assert restored.state_dict() == fitted.state_dict()


def test_a_state_with_bets_on_a_fall_does_not_fit_one_without() -> None:
    state = Disagreement(rate=0.2).state_dict()
    with pytest.raises(ValueError, match="bounds"):
        Disagreement(rate=0.0).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"), [({"rate": -1.0}, "rate"), ({"floor": 2.0}, "floor"), ({"tolerance": 1.0}, "tolerance")]
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Disagreement(**options)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 2.0])
def test_a_value_that_is_no_distance_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="Disagreement needs finite values from 0 to 1"):
        Disagreement().update(bad)
