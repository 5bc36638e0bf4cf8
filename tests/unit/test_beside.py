"""Who answers where an adapter that decides by itself and a promoted version stand beside each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import checkpoint
from daemon.beside import CREDIT, MEMORY_ROWS, WAYS, WORST_LOSS, Beside
from daemon.inspecting import digest
from daemon.records import F64

MOST = 1.0 / (1.0 - (1.0 - 1.0 / MEMORY_ROWS))
"""Rows that the comparison can ever hold."""
LOSSES = st.floats(0.0, 1.0) | st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 1e-300, 0.0, 1.0])
ERRORS = st.floats(0.0, 1.0) | st.just(math.nan)
EVENTS = st.one_of(
    st.tuples(st.just("weigh"), st.lists(st.tuples(LOSSES, LOSSES, LOSSES), max_size=40)),
    st.tuples(st.just("promoted"), st.tuples(st.booleans(), ERRORS, ERRORS)),
    st.tuples(st.just("fast_reset"), st.none()),
    st.tuples(st.just("restart"), st.none()),
)


def play(beside: Beside, event: str, given: Any) -> None:
    if event == "weigh":
        beside.weigh(*np.asarray(given, np.float64).reshape(-1, 3).T)
    elif event == "promoted":
        beside.promoted(first=given[0], version_error=given[1], fast_error=given[2])
    else:
        getattr(beside, event)()


def coins(seed: int, rows: int, share: float) -> F64:
    """(rows,) losses of 0 and 1."""
    return (np.random.default_rng(seed).random(rows) < share).astype(np.float64)


def weigh(beside: Beside, fast: float, version: float, both: float, rows: int, seed: int = 0) -> None:
    """Rows on which each errs independently with this chance."""
    beside.weigh(*(coins(3 * seed + number, rows, share) for number, share in enumerate((fast, version, both))))


def promoted() -> Beside:
    """A first version that was no worse than the adapter."""
    made = Beside()
    made.promoted(first=True, version_error=0.2, fast_error=0.2)
    return made


@given(st.lists(EVENTS, max_size=30))
def test_whatever_comes_it_is_one_of_three_ways_and_what_it_holds_is_bounded(events: list[Any]) -> None:
    made = Beside()
    for event in events:
        play(made, *event)
        state = made.state_dict()
        assert state["way"] in WAYS
        assert (np.abs(state["sums"]) <= WORST_LOSS * MOST).all()
        assert (state["squares"] >= 0).all() and (state["squares"] <= WORST_LOSS**2 * MOST).all()


@given(st.lists(EVENTS, max_size=15), st.lists(EVENTS, max_size=15))
def test_its_state_goes_through_a_checkpoint_to_the_bit_and_on_as_if_never_stopped(
    before: list[Any], after: list[Any]
) -> None:
    made, other = Beside(), Beside()
    for event in before:
        play(made, *event)
    other.load_state_dict(checkpoint.decode(checkpoint.encode(made.state_dict())))
    for event in after:
        play(made, *event)
        play(other, *event)
    assert digest(made.state_dict()) == digest(other.state_dict())


@given(st.lists(EVENTS, max_size=10))
def test_a_state_is_a_copy(events: list[Any]) -> None:
    made = promoted()
    for event in events:
        play(made, *event)
    state = made.state_dict()
    before = digest(state)
    weigh(made, 0.9, 0.1, 0.5, 50)
    made.fast_reset()
    assert digest(state) == before


def test_a_way_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        Beside().load_state_dict({"way": "guess", "sums": np.zeros(2), "squares": np.zeros(2)})


def test_a_first_version_that_is_no_worse_answers_together_with_the_adapter() -> None:
    assert promoted().way == "both"


def test_so_does_one_of_which_nothing_is_known() -> None:
    for version, fast in ((math.nan, 0.1), (0.1, math.nan), (math.nan, math.nan)):
        made = Beside()
        made.promoted(first=True, version_error=version, fast_error=fast)
        assert made.way == "both"


def test_a_first_version_worse_than_the_adapter_leaves_it_answering_until_labels_speak() -> None:
    made = Beside()
    made.promoted(first=True, version_error=0.3, fast_error=0.1)
    assert made.way == "fast"
    # One row for the version does not outweigh what the adapter has in hand, a few do.
    made.weigh(np.ones(1), np.zeros(1), np.zeros(1))
    assert made.way == "fast"
    made.weigh(*(np.full(6, loss) for loss in (1.0, 0.0, 0.5)))
    assert made.way == "version"


def test_the_adapter_s_reset_leaves_the_version_answering_until_labels_speak() -> None:
    made = promoted()
    weigh(made, 0.05, 0.6, 0.3, 200)
    assert made.way == "fast"
    made.fast_reset()
    assert made.way == "version"
    made.weigh(np.zeros(1), np.ones(1), np.zeros(1))
    assert made.way == "version"
    made.weigh(*(np.full(6, loss) for loss in (0.0, 1.0, 0.5)))
    assert made.way == "fast"


def test_a_later_version_takes_away_what_the_adapter_had_in_hand_against_its_parent() -> None:
    made = Beside()
    made.promoted(first=True, version_error=0.3, fast_error=0.1)
    assert made.state_dict()["sums"][0] == CREDIT
    made.promoted(first=False, version_error=0.05, fast_error=0.1)
    assert made.way == "both" and made.state_dict()["sums"][0] == 0.0


def test_a_later_version_worse_than_the_adapter_changes_nothing() -> None:
    made = promoted()
    weigh(made, 0.05, 0.5, 0.3, 200)
    before = digest(made.state_dict())
    made.promoted(first=False, version_error=0.4, fast_error=0.1)
    assert made.way == "fast" and digest(made.state_dict()) == before


@given(st.integers(0, 300), st.sampled_from(["fast", "version"]))
def test_the_one_that_is_much_better_answers_within_200_labelled_rows(seed: int, better: str) -> None:
    made = promoted()
    shares = (0.05, 0.6) if better == "fast" else (0.6, 0.05)
    for part in range(10):
        weigh(made, *shares, 0.35, 20, seed=100 * seed + part)
    assert made.way == better


@given(st.integers(0, 300))
def test_a_changed_leader_is_followed_within_as_many_rows_as_it_remembers_twice(seed: int) -> None:
    made = promoted()
    weigh(made, 0.6, 0.05, 0.35, 2_000, seed=seed)
    assert made.way == "version"
    for part in range(20):
        weigh(made, 0.05, 0.6, 0.35, 20, seed=1_000 + 100 * seed + part)
    assert made.way == "fast"


@given(st.integers(0, 300))
def test_together_they_answer_where_together_they_err_least(seed: int) -> None:
    made = promoted()
    weigh(made, 0.4, 0.4, 0.1, 200, seed=seed)
    assert made.way == "both"


@given(st.sampled_from(["fast", "version"]), st.integers(0, 300))
def test_equal_evidence_brings_them_back_together(alone: str, seed: int) -> None:
    made = promoted()
    weigh(made, *((0.0, 1.0) if alone == "fast" else (1.0, 0.0)), 0.5, 20)
    assert made.way == alone
    ways = set()
    for part in range(100):
        weigh(made, 0.3, 0.3, 0.3, 20, seed=100 * seed + part)
        ways.add(made.way)
    assert "both" in ways


@given(st.lists(st.tuples(LOSSES, LOSSES), max_size=30), st.integers(0, 2))
def test_rows_on_which_one_is_not_known_say_nothing(losses: list[tuple[float, float]], missing: int) -> None:
    made = promoted()
    weigh(made, 0.3, 0.2, 0.2, 30)
    before = digest(made.state_dict())
    columns = list(np.asarray(losses, np.float64).reshape(-1, 2).T)
    columns.insert(missing, np.full(len(losses), np.nan))
    made.weigh(*columns)
    assert digest(made.state_dict()) == before


def test_unknown_rows_among_known_ones_are_as_if_they_had_not_come() -> None:
    made, other = promoted(), promoted()
    columns = [coins(seed, 60, 0.4) for seed in range(3)]
    made.weigh(*columns)
    other.weigh(*(np.insert(column, 30, [math.nan, math.inf]) for column in columns))
    assert digest(made.state_dict()) == digest(other.state_dict())


@given(st.floats(1e3, 1e300), st.integers(0, 100))
def test_one_huge_loss_weighs_no_more_than_a_few_rows(huge: float, seed: int) -> None:
    made = promoted()
    weigh(made, 0.05, 0.6, 0.35, 400, seed=seed)
    made.weigh(np.array([huge]), np.zeros(1), np.zeros(1))
    weigh(made, 0.05, 0.6, 0.35, 40, seed=seed + 1)
    assert made.way == "fast"


@given(st.integers(1, 60), st.integers(0, 100))
def test_how_labels_are_cut_into_batches_makes_no_difference_to_the_evidence(cut: int, seed: int) -> None:
    at_once, in_parts = promoted(), promoted()
    columns = [coins(3 * seed + number, 120, 0.3) for number in range(3)]
    at_once.weigh(*columns)
    for start in range(0, 120, cut):
        in_parts.weigh(*(column[start : start + cut] for column in columns))
    for part in ("sums", "squares"):
        np.testing.assert_allclose(at_once.state_dict()[part], in_parts.state_dict()[part], rtol=1e-9, atol=1e-12)
