"""The harm test: its level on streams without harm, its power on streams with it, and its arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adapters.evidence import BETS, HarmEvidence
from daemon.records import F64

any_speed = settings(deadline=None)
Rng = np.random.Generator
DIFFERENCES = arrays(np.float64, st.integers(0, 200), elements=st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-1, 1))


def by_definition(d: F64) -> tuple[float, float]:
    """The mixture, row by row as it is defined: its value at the end and its largest value."""
    capital, spent, value, largest = np.zeros(len(BETS)), 0.0, 1.0, 1.0
    for t, d_t in enumerate(d[d != 0], start=1):
        w_t = 1 / (t * (t + 1))
        spent += w_t
        capital = (capital + w_t) * (1 + np.asarray(BETS) * d_t)
        value = capital.mean() + 1 - spent
        largest = max(largest, value)
    return value, largest


@any_speed
@given(DIFFERENCES, st.lists(st.integers(0, 200), max_size=6))
def test_it_is_the_mixture_it_claims_to_be_however_the_rows_are_cut(d: F64, cuts: list[int]) -> None:
    evidence = HarmEvidence()
    for part in np.split(d, sorted(cuts)):
        evidence.update(part)
    value, largest = by_definition(d)
    assert np.exp(evidence.log_value) == pytest.approx(value, rel=1e-9)
    assert np.exp(evidence.log_peak) == pytest.approx(largest, rel=1e-9)


def test_rows_on_which_both_models_agree_change_nothing() -> None:
    evidence = HarmEvidence()
    evidence.update(np.array([0.4, -0.2]))
    before = evidence.state_dict()
    evidence.update(np.zeros(100_000))
    after = evidence.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@any_speed
@given(st.lists(st.floats(-1, 1), max_size=30), st.floats(-1, 1))
def test_its_value_is_not_expected_to_grow_over_a_row_without_harm(past: list[float], d: float) -> None:
    def value(*rows: float) -> float:
        evidence = HarmEvidence()
        evidence.update(np.array([*past, *rows]))
        return float(np.exp(evidence.log_value))

    # d and its counterweight at the other end, with the odds that make the mean zero.
    counterweight = -1.0 if d > 0 else 1.0
    expected = (value(d) + abs(d) * value(counterweight)) / (1 + abs(d))
    assert expected <= value() * (1 + 1e-9)


def fair_coin(rng: Rng) -> F64:
    return rng.choice([-1.0, 1.0], 2_000)


def rare_disagreement(rng: Rng) -> F64:
    return rng.choice([-1.0, 0.0, 1.0], 2_000, p=[0.05, 0.9, 0.05])


def bursts_of_variance(rng: Rng) -> F64:
    """Sizes that depend on the past, signs that do not: strongly correlated, mean zero given the past."""
    calm = np.cumsum(rng.random(2_000) < 0.02) % 2
    signed: F64 = np.where(calm, 0.05, 1.0) * rng.choice([-1.0, 1.0], 2_000)
    return signed


def bursts_of_help(rng: Rng) -> F64:
    """Stretches in which adapting helps, between stretches in which it does nothing."""
    helped = np.cumsum(rng.random(2_000) < 0.02) % 2
    return np.where(rng.random(2_000) < np.where(helped, 0.3, 0.5), 1.0, -1.0)


def skewed(rng: Rng) -> F64:
    return np.where(rng.random(2_000) < 0.05, 0.95, -0.05)


@pytest.mark.parametrize("stream", [fair_coin, rare_disagreement, bursts_of_variance, bursts_of_help, skewed])
def test_looking_after_every_row_keeps_the_level(stream: Callable[[Rng], F64]) -> None:
    rng, level, streams = np.random.default_rng(7), 0.05, 600
    trips = 0
    for _ in range(streams):
        evidence = HarmEvidence()
        evidence.update(stream(rng))
        trips += evidence.log_peak >= -np.log(level)
    assert trips / streams <= level


def rows_to_trip(rng: Rng, good: F64, harm: Callable[[Rng, int], F64], batch: int = 32) -> int:
    evidence = HarmEvidence()
    evidence.update(good)
    assert evidence.log_peak < np.log(1_000)
    rows = 0
    while evidence.log_peak < np.log(1_000):
        evidence.update(harm(rng, batch))
        rows += batch
        assert rows < 100_000
    return rows


def ten_points_worse(rng: Rng, rows: int) -> F64:
    return rng.choice([-1.0, 0.0, 1.0], rows, p=[0.05, 0.8, 0.15])


def ten_points_better(rng: Rng, rows: int) -> F64:
    return -ten_points_worse(rng, rows)


def test_ten_points_of_harm_are_found_within_some_hundred_labels() -> None:
    rng = np.random.default_rng(11)
    rows = [rows_to_trip(rng, np.empty(0), ten_points_worse) for _ in range(100)]
    assert np.median(rows) < 600
    assert max(rows) < 2_000


@pytest.mark.parametrize("good", [ten_points_better, rare_disagreement])
def test_harm_that_starts_late_costs_only_a_little_more(good: Callable[..., F64]) -> None:
    rng = np.random.default_rng(13)
    history = np.concatenate([good(rng, 2_000) if good is ten_points_better else good(rng) for _ in range(10)])
    assert len(history) == 20_000
    rows = [rows_to_trip(rng, history, ten_points_worse) for _ in range(50)]
    assert np.median(rows) < 1_200


def test_ten_million_rows_neither_overflow_nor_silence_it() -> None:
    evidence = HarmEvidence()
    for d in (1.0, -1.0):
        for _ in range(50):
            evidence.update(np.full(100_000, d))
        assert np.isfinite(evidence.log_value)
        assert np.isfinite(evidence.state_dict()["log_capital"]).all()
    assert evidence.log_value < 0
    evidence.update(np.ones(100))
    assert evidence.log_value > np.log(1_000)


@pytest.mark.parametrize("d", [[np.nan], [np.inf], [1.1], [-2.0], [[0.1]]])
def test_differences_out_of_range_are_refused_and_leave_the_evidence_as_it_was(d: list[float]) -> None:
    evidence = HarmEvidence()
    evidence.update(np.array([0.5, 0.5]))
    before = evidence.state_dict()
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        evidence.update(np.asarray(d))
    assert str(evidence.state_dict()) == str(before)


def test_a_rounding_beyond_one_is_taken_as_one() -> None:
    first, second = HarmEvidence(), HarmEvidence()
    first.update(np.array([1.0 + 1e-7, -1.0 - 1e-7]))
    second.update(np.array([1.0, -1.0]))
    assert first.log_value == second.log_value


def test_a_capital_of_other_bets_is_refused() -> None:
    evidence = HarmEvidence()
    with pytest.raises(ValueError, match="does not fit"):
        evidence.load_state_dict({**evidence.state_dict(), "log_capital": np.zeros(2)})
