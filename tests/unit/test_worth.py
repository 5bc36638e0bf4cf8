"""Whether a burst is expected to pay."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import checkpoint
from daemon.inspecting import digest
from daemon.worth import LATER, LATEST, PASSES, RISEN, Worth

SOURCE = 0.05
ERRORS = st.floats(0.0, 1.0)
BAD = st.sampled_from([math.nan, math.inf, -math.inf])
TRIES = st.lists(st.tuples(ERRORS | BAD, st.booleans(), st.booleans(), st.integers(0, 5_000)), max_size=20)


def made(price: float = 1e-4, tries: list[tuple[float, bool, bool, int]] | None = None) -> Worth:
    worth = Worth(price, SOURCE)
    for error, promoted, burst, rows in tries or []:
        worth.served(rows)
        worth.tried(error, promoted=promoted, burst=burst)
    return worth


@given(TRIES, ERRORS, ERRORS, st.integers(1, 10_000))
def test_a_larger_error_never_promises_less_and_costs_the_same(
    tries: list[tuple[float, bool, bool, int]], one: float, other: float, rows: int
) -> None:
    worth = made(tries=tries)
    low, high = (worth.estimate(error, rows) for error in sorted((one, other)))
    assert low.expected <= high.expected and low.needed == high.needed


@given(TRIES, ERRORS)
def test_no_more_is_expected_than_there_is_to_win(tries: list[tuple[float, bool, bool, int]], error: float) -> None:
    assert 0.0 <= made(tries=tries).estimate(error, 100).expected <= max(0.0, error - SOURCE)


@given(TRIES, st.floats(SOURCE + 1e-6, 1.0))
def test_what_costs_nothing_pays_whenever_there_is_something_to_win(
    tries: list[tuple[float, bool, bool, int]], error: float
) -> None:
    assert made(0.0, tries).estimate(error, 6_400).pays


@given(TRIES, st.floats(0.0, SOURCE), st.floats(0.0, 1.0))
def test_nothing_pays_at_the_source_s_error_whatever_it_costs(
    tries: list[tuple[float, bool, bool, int]], error: float, price: float
) -> None:
    assert not made(price, tries).estimate(error, 100).pays


@given(TRIES, BAD, st.floats(0.0, 1.0))
def test_an_error_that_is_not_known_never_pays(
    tries: list[tuple[float, bool, bool, int]], error: float, price: float
) -> None:
    assert not made(price, tries).estimate(error, 100).pays


@given(BAD)
def test_nor_does_any_error_where_the_source_s_is_not_known(source: float) -> None:
    assert not Worth(1e-4, abs(source)).estimate(0.9, 100).pays


@given(TRIES, st.integers(1, 10_000), st.integers(1, 10_000))
def test_more_rows_served_make_the_same_burst_cheaper(
    tries: list[tuple[float, bool, bool, int]], before: int, after: int
) -> None:
    worth = made(tries=tries)
    worth.served(before)
    first = worth.estimate(0.5, 6_400).needed
    worth.served(after)
    assert worth.estimate(0.5, 6_400).needed < first


def test_the_cost_is_forward_passes_for_each_row_served_since_the_last_try() -> None:
    worth = made(1e-3)
    worth.served(6_400)
    assert worth.estimate(0.5, 6_400).needed == pytest.approx(1e-3 * PASSES)
    worth.tried(0.5, promoted=False, burst=True)
    worth.served(640)
    assert worth.estimate(0.5, 6_400).needed == pytest.approx(1e-2 * PASSES)


def test_fruitless_bursts_fade_out_and_a_promotion_brings_the_hope_back() -> None:
    worth, expected = made(), []
    for _ in range(8):
        worth.served(6_400)
        expected.append(worth.estimate(0.5, 6_400).expected)
        worth.tried(0.5, promoted=False, burst=True)
    assert all(later == pytest.approx(before / 2) for before, later in pairwise(expected))
    worth.served(6_400)
    assert not worth.estimate(0.05 + 4e-3, 6_400).pays
    worth.tried(0.5, promoted=True, burst=True)
    assert worth.estimate(0.5, 6_400).expected == expected[0]


def test_a_look_without_a_burst_costs_no_hope() -> None:
    worth = made()
    before = worth.estimate(0.5, 100)
    worth.tried(0.5, promoted=False, burst=False)
    assert worth.estimate(0.5, 100) == before


def test_a_shift_since_the_last_burst_is_hoped_for_in_full() -> None:
    worth = made(tries=[(0.2, False, True, 0)] * 20)
    assert worth.estimate(0.2, 100).expected < 1e-5
    assert worth.estimate(0.5, 100).expected == pytest.approx(0.3, abs=1e-5)


@given(TRIES)
def test_the_patience_is_bounded(tries: list[tuple[float, bool, bool, int]]) -> None:
    worth = made(tries=tries)
    assert 1.0 <= worth.patience <= LATEST
    assert 1.0 <= worth.wait(0.5) <= LATEST


@pytest.mark.parametrize("burst", [True, False])
def test_fruitless_looks_wait_longer_until_the_error_rises_or_one_is_promoted(burst: bool) -> None:
    worth = made(tries=[(0.3, False, burst, 100)] * 20)
    assert worth.patience == LATEST == worth.wait(0.3) == worth.wait(math.nan)
    assert worth.wait(0.3 + 0.9 * RISEN) == LATEST and worth.wait(0.3 + 1.1 * RISEN) == 1.0
    worth.tried(0.3 + 1.1 * RISEN, promoted=False, burst=burst)
    assert worth.patience == LATER
    worth.tried(0.4, promoted=True, burst=burst)
    assert worth.patience == 1.0


def test_a_rise_to_below_what_a_promoted_look_began_at_ends_the_waiting_too() -> None:
    worth = made(tries=[(0.6, True, True, 100), *[(0.15, False, False, 100)] * 20])
    assert worth.wait(0.15) == LATEST and worth.wait(0.5) == 1.0


@given(TRIES, TRIES, st.integers(0, 1_000))
def test_its_state_goes_through_a_checkpoint_to_the_bit_and_on_as_if_never_stopped(
    before: list[tuple[float, bool, bool, int]], after: list[tuple[float, bool, bool, int]], rows: int
) -> None:
    worth, other = made(tries=before), made()
    worth.served(rows)
    other.load_state_dict(checkpoint.decode(checkpoint.encode(worth.state_dict())))
    for each in (worth, other):
        for error, promoted, burst, more in after:
            each.served(more)
            each.tried(error, promoted=promoted, burst=burst)
    assert digest(other.state_dict()) == digest(worth.state_dict())
    assert other.estimate(0.4, 640) == worth.estimate(0.4, 640)


def test_the_log_says_both_numbers() -> None:
    worth = made()
    worth.served(1)
    assert worth.estimate(0.45, 10_000).said == (
        "a burst would not pay: 0.2000 of error to be expected, 3.0000 needed for its cost"
    )
    worth.served(10**9)
    assert worth.estimate(0.45, 10_000).said.startswith("a burst pays: 0.2000 of error to be expected, 0.0000 needed")
