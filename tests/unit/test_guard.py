"""The guard: what trips it and, as important, what does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from daemon.guard import Guard, GuardLimits
from daemon.records import F64

any_speed = settings(deadline=None)
K = 10
UNIFORM = np.full(K, 1 / K)


def one_hot(k: int, sharpness: float = 0.97) -> F64:
    p = np.full(K, (1 - sharpness) / (K - 1))
    p[k] = sharpness
    return p


def observe(guard: Guard, served: F64 | None, frozen: F64 | None, rows: int = 64, finite: bool = True) -> None:
    guard.observe(rows=rows, finite=finite, mean_p_served=served, mean_p_frozen=frozen)


def test_a_new_guard_has_no_verdict_and_no_evidence() -> None:
    guard = Guard()
    assert guard.verdict() is None
    assert guard.evidence == {"harm_evidence": 0.0, "proxy_evidence": 0.0, "collapse": 1.0}


def test_outputs_that_are_not_finite_trip_at_once() -> None:
    guard = Guard()
    observe(guard, None, None, rows=1, finite=False)
    assert guard.verdict() == "non_finite"


def test_a_mean_prediction_that_is_not_finite_trips_and_never_reaches_the_window() -> None:
    guard = Guard()
    observe(guard, np.full(K, np.nan), UNIFORM)
    assert guard.verdict() == "non_finite"
    assert guard.state_dict()["means"] is None


def test_a_frozen_mean_that_is_not_finite_is_left_out() -> None:
    guard = Guard()
    observe(guard, UNIFORM, np.full(K, np.inf))
    assert guard.verdict() is None
    assert guard.state_dict()["seen"] == 0


def test_the_first_verdict_stays_until_reset() -> None:
    guard = Guard()
    guard.paired(np.ones(200))
    assert guard.verdict() == "harm"
    observe(guard, None, None, finite=False)
    guard.paired(np.full(1_000, -1.0))
    assert guard.verdict() == "harm"
    guard.reset()
    assert guard.verdict() is None
    assert guard.evidence["harm_evidence"] == 0.0


def test_harm_by_the_proxy_trips_at_its_own_level() -> None:
    strict = Guard(GuardLimits(delta=1e-9, proxy_delta=0.01))
    strict.paired(np.ones(12))
    strict.proxy(np.ones(12))
    assert strict.verdict() == "proxy_harm"
    assert strict.evidence["proxy_evidence"] == strict.evidence["harm_evidence"] >= 2


def test_evidence_passed_within_one_call_still_trips() -> None:
    guard = Guard()
    guard.paired(np.concatenate([np.ones(200), -np.ones(5_000)]))
    assert guard.evidence["harm_evidence"] < 1
    assert guard.verdict() == "harm"


def rows_to_collapse(guard: Guard, good_rows: int) -> int:
    for _ in range(good_rows // 64):
        observe(guard, UNIFORM, UNIFORM)
    assert guard.verdict() is None
    rows = 0
    while guard.verdict() is None and rows < 20_000:
        observe(guard, one_hot(3), UNIFORM)
        rows += 64
    assert guard.verdict() == "collapse"
    return rows


def test_a_collapse_to_one_class_is_found_within_two_windows() -> None:
    assert rows_to_collapse(Guard(), good_rows=0) <= 2_000 + 64
    assert rows_to_collapse(Guard(prior=UNIFORM), good_rows=50_000) <= 4_000


def test_nothing_is_judged_before_a_full_window() -> None:
    guard = Guard(GuardLimits(collapse_rows=1_000))
    for _ in range(9):
        observe(guard, one_hot(3), UNIFORM, rows=100)
    assert guard.verdict() is None
    assert guard.evidence["collapse"] < 0.5
    observe(guard, one_hot(3), UNIFORM, rows=100)
    assert guard.verdict() == "collapse"


@any_speed
@given(
    st.lists(st.tuples(st.integers(0, K - 1), st.integers(1, 80), st.integers(1, 256)), min_size=1, max_size=20),
    st.floats(0.3, 0.999),
    st.floats(0.3, 0.999),
)
def test_a_class_sorted_stream_is_no_collapse(
    runs: list[tuple[int, int, int]], sharp_frozen: float, sharp_served: float
) -> None:
    # Adapted outputs may be sharper or duller than the frozen ones, as long as they follow the same classes.
    sharp_served = min(sharp_served, sharp_frozen + (1 - sharp_frozen) / 3)
    guard = Guard(prior=UNIFORM)
    for k, batches, rows in runs:
        for _ in range(batches):
            observe(guard, one_hot(k, sharp_served), one_hot(k, sharp_frozen), rows=rows)
    assert guard.verdict() is None


def test_a_stream_of_one_class_is_no_collapse_however_sharp_the_served_rows_are() -> None:
    guard = Guard(prior=UNIFORM)
    for _ in range(100):
        observe(guard, one_hot(3, 0.99999), one_hot(3, 0.99))
    assert guard.verdict() is None
    assert guard.evidence["collapse"] == 1.0


MEANS = arrays(np.float64, K, elements=st.floats(0, 1)).filter(lambda p: p.sum() > 1e-3).map(lambda p: p / p.sum())


@any_speed
@given(st.lists(st.tuples(MEANS, st.integers(0, 4_000)), min_size=1, max_size=20), st.none() | MEANS)
def test_serving_the_frozen_model_never_trips(batches: list[tuple[F64, int]], prior: F64 | None) -> None:
    guard = Guard(prior=prior)
    for mean, rows in batches:
        observe(guard, mean, mean, rows=rows)
        guard.paired(np.zeros(rows))
    assert guard.verdict() is None


@any_speed
@given(st.lists(st.tuples(MEANS, MEANS, st.integers(1, 4_000)), min_size=1, max_size=20))
def test_a_collapse_is_never_declared_while_the_served_entropy_is_half_of_the_expected(
    batches: list[tuple[F64, F64, int]],
) -> None:
    guard = Guard(prior=UNIFORM)
    window, seen = np.zeros((2, K)), 0
    for served, frozen, rows in batches:
        observe(guard, served, frozen, rows=rows)
        keep = np.exp(-rows / 2_000)
        window = keep * window + (1 - keep) * np.stack([served, frozen])
        seen += rows
        share = window / window.sum(axis=1, keepdims=True)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1) / np.log(K)
        if guard.verdict() is not None:
            assert seen >= 2_000
            assert entropy[0] < 0.5 * min(1.0, entropy[1]) + 1e-9
            break


def test_an_imbalanced_reference_is_no_reason_to_trip() -> None:
    prior = one_hot(0, 0.8)
    guard, unaware = Guard(prior=prior), Guard()
    for _ in range(100):
        observe(guard, one_hot(0, 0.85), UNIFORM)
        observe(unaware, one_hot(0, 0.85), UNIFORM)
    assert guard.verdict() is None
    assert unaware.verdict() == "collapse"


def test_a_regression_and_a_batch_without_its_twin_are_not_judged_for_collapse() -> None:
    guard = Guard()
    for served, frozen in ((None, None), (one_hot(0), None), (None, UNIFORM)):
        for _ in range(100):
            observe(guard, served, frozen)
    assert guard.verdict() is None
    assert guard.evidence["collapse"] == 1.0


@pytest.mark.parametrize(
    ("served", "frozen", "rows"),
    [(np.ones(3), np.ones(4), 1), (np.ones(1), np.ones(1), 1), (np.ones((2, 2)), np.ones((2, 2)), 1), (None, None, -1)],
)
def test_inputs_that_do_not_fit_are_refused(served: F64 | None, frozen: F64 | None, rows: int) -> None:
    with pytest.raises(ValueError, match="give"):
        observe(Guard(), served, frozen, rows=rows)


def test_a_change_of_the_number_of_classes_is_refused() -> None:
    guard = Guard()
    observe(guard, UNIFORM, UNIFORM)
    with pytest.raises(ValueError, match="shapes"):
        observe(guard, np.ones(3) / 3, np.ones(3) / 3)


@pytest.mark.parametrize("prior", [[1.0], [0.0, 0.0], [0.5, -0.5], [np.nan, 1.0], [[0.5, 0.5]]])
def test_a_prior_that_is_no_distribution_is_refused(prior: Any) -> None:
    with pytest.raises(ValueError, match="class prior"):
        Guard(prior=np.asarray(prior))


@pytest.mark.parametrize(
    "change", [{"delta": 0.0}, {"proxy_delta": 1.0}, {"collapse_ratio": -1.0}, {"collapse_rows": 0}, {"delta": np.nan}]
)
def test_limits_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        GuardLimits(**change)


STEPS = st.lists(
    st.tuples(MEANS, MEANS, st.integers(0, 2_000), arrays(np.float64, st.integers(0, 40), elements=st.floats(-1, 1))),
    max_size=8,
)


def play(guard: Guard, steps: list[tuple[F64, F64, int, F64]]) -> list[tuple[str | None, dict[str, float]]]:
    seen: list[tuple[str | None, dict[str, float]]] = []
    for served, frozen, rows, d in steps:
        observe(guard, served, frozen, rows=rows)
        guard.paired(d)
        guard.proxy(-d)
        seen.append((guard.verdict(), guard.evidence))
    return seen


@any_speed
@given(STEPS, STEPS)
def test_a_restart_at_any_point_continues_identically(before: Any, after: Any) -> None:
    first, second = Guard(prior=UNIFORM), Guard(prior=UNIFORM)
    play(first, before)
    state = first.state_dict()
    second.load_state_dict(state)
    continued = play(first, after)
    assert play(second, after) == continued
    third = Guard(prior=UNIFORM)
    third.load_state_dict(state)  # what was handed out is a copy that no later batch has touched
    assert play(third, after) == continued


def test_a_state_of_another_version_is_refused() -> None:
    state = Guard().state_dict()
    for wrong in ({**state, "more": 1}, {**state, "harm": {}}):
        with pytest.raises(ValueError, match="does not fit"):
            Guard().load_state_dict(wrong)
