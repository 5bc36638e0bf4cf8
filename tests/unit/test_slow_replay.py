"""Invariants of the replay memory and of the held-back rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import adapters.slow as slow
from adapters.slow.strata import BalancedSlots

CLASSES = 4
F32 = NDArray[np.float32]

Chunk = list[tuple[int, int]]
"""Rows as (class, segment)."""
chunks = st.lists(st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, 1)), max_size=12), max_size=12)
shares = st.sampled_from([0.0, 0.3, 0.5, 1.0])


def feed(replay: slow.Replay, stream: list[Chunk], first: int = 0) -> int:
    """Add rows whose x is their serial number; the next number."""
    for chunk in stream:
        x = np.arange(first, first + len(chunk), dtype=np.float32)[:, None]
        y, segment = np.array(chunk, int).reshape(-1, 2).T
        replay.add(x, y, segment)
        first += len(chunk)
    return first


def make(capacity: int, share: float, seed: int = 0) -> slow.Replay:
    return slow.Replay(
        (1,), capacity, classes=CLASSES, seed=seed, reference_x=[[-1.0], [-2.0]], reference_y=[0, 1], recent_share=share
    )


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    return np.array_equal(left, right)


@given(stream=chunks, capacity=st.integers(1, 12), share=shares)
def test_the_memory_is_bounded_holds_each_row_once_and_takes_all_while_there_is_room(
    stream: list[Chunk], capacity: int, share: float
) -> None:
    replay = make(capacity, share)
    size = replay.bytes
    offered = feed(replay, stream)
    serials = replay.rows().x[:, 0].tolist()
    assert len(replay) == len(serials) == len(set(serials)) == min(offered, capacity)
    assert replay.bytes == size


@given(stream=chunks, capacity=st.integers(1, 12), share=shares)
def test_a_row_keeps_its_own_label_and_segment(stream: list[Chunk], capacity: int, share: float) -> None:
    replay = make(capacity, share)
    feed(replay, stream)
    flat = [row for chunk in stream for row in chunk]
    rows = replay.rows()
    for x, y, segment in zip(rows.x[:, 0], rows.y, rows.segment, strict=True):
        assert flat[int(x)] == (y, segment)


@given(stream=chunks, capacity=st.integers(1, 12), share=shares)
def test_the_newest_rows_are_always_there(stream: list[Chunk], capacity: int, share: float) -> None:
    replay = make(capacity, share)
    offered = feed(replay, stream)
    newest = set(range(max(0, offered - round(share * capacity)), offered))
    assert newest <= set(replay.rows().x[:, 0].astype(int).tolist())


@given(stream=chunks, capacity=st.integers(1, 12), share=shares, seed=st.integers(0, 5))
def test_reference_exemplars_outlive_every_stream(stream: list[Chunk], capacity: int, share: float, seed: int) -> None:
    replay = make(capacity, share)
    feed(replay, stream)
    x, y = replay.sample(np.random.default_rng(seed), 40, 1.0)
    assert set(zip(x[:, 0].tolist(), y.tolist(), strict=True)) == {(-1.0, 0), (-2.0, 1)}
    assert not {-1.0, -2.0} & set(replay.rows().x[:, 0].tolist())


@given(
    strata=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=150),
    capacity=st.integers(1, 12),
    seed=st.integers(0, 3),
)
def test_a_stratum_holds_all_it_was_offered_or_is_at_most_one_row_behind_the_largest(
    strata: list[tuple[int, int]], capacity: int, seed: int
) -> None:
    slots = BalancedSlots(capacity, seed)
    offered: Counter[tuple[int, int]] = Counter()
    owner: dict[int, tuple[int, int]] = {}
    for stratum in strata:
        slot = slots.place(stratum)
        assert 0 <= slot < capacity
        owner[slot] = stratum
        offered[stratum] += 1
        sizes = slots.sizes()
        assert sizes == Counter(owner.values())
        largest = max(sizes.values())
        assert all(sizes.get(key, 0) >= min(count, largest - 1) for key, count in offered.items())


def test_a_rare_class_survives_a_flood_of_another() -> None:
    replay = make(40, 0.5)
    feed(replay, [[(2, 0)] * 10, [(0, 0)] * 2_000])
    assert Counter(replay.rows().y.tolist()) == {2: 10, 0: 30}


@settings(max_examples=60)
@given(before=chunks, after=chunks, capacity=st.integers(1, 12), share=shares)
def test_a_restored_memory_goes_on_bit_by_bit(
    before: list[Chunk], after: list[Chunk], capacity: int, share: float
) -> None:
    original = make(capacity, share, seed=1)
    offered = feed(original, before)
    restored = make(capacity, share, seed=2)
    restored.load_state_dict(original.state_dict())
    feed(original, after, offered)
    feed(restored, after, offered)
    assert equal(original.state_dict(), restored.state_dict())
    drawn = [replay.sample(np.random.default_rng(3), 20, 0.25) for replay in (original, restored, original.snapshot())]
    assert all(np.array_equal(x, drawn[0][0]) and np.array_equal(y, drawn[0][1]) for x, y in drawn)


def test_a_state_is_a_copy_of_plain_values() -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        return type(value) in (int, float, str, bytes, bool, type(None), np.ndarray)

    replay, holdout = make(4, 0.5), slow.Holdout((1,), 2, classes=CLASSES)
    feed(replay, [[(0, 0)] * 9])
    holdout.add([[1.0]], [0])
    states = replay.state_dict(), holdout.state_dict()
    assert all(plain(state) for state in states)
    frozen = states[0]["x"].copy(), states[1]["x"].copy()
    feed(replay, [[(1, 0)] * 9], first=100)
    holdout.add([[2.0]] * 3, [0] * 3)
    assert np.array_equal(states[0]["x"], frozen[0])
    assert np.array_equal(states[1]["x"], frozen[1])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(5, 0.5), "capacity_rows 4, this one 5"),
        (make(4, 1.0), "recent_rows 2, this one 4"),
        (slow.Replay((1,), 4, classes=CLASSES, seed=0), "reference_crc"),
        (slow.Replay((2,), 4, classes=CLASSES, seed=0, reference_x=[[-1.0, -2.0]], reference_y=[0]), "reference_crc"),
    ],
)
def test_a_state_of_another_memory_is_refused(other: slow.Replay, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(make(4, 0.5).state_dict())


def test_a_state_with_other_inputs_is_refused() -> None:
    state = slow.Replay((1,), 4, classes=2, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"inputs of shape \(1,\), this one \(2,\)"):
        slow.Replay((2,), 4, classes=2, seed=0).load_state_dict(state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_a_row_that_is_not_finite_never_enters(bad: float) -> None:
    replay = make(10, 0.5)
    assert replay.add([[1.0], [bad], [2.0]], [0, 1, 2]) == 2
    assert replay.rows().x[:, 0].tolist() == [1.0, 2.0]
    assert replay.dropped == 1


@pytest.mark.parametrize("bad", [-1, CLASSES, 0.5, np.nan, 2**40])
def test_a_label_that_is_not_a_class_never_enters(bad: float) -> None:
    replay, holdout = make(10, 0.5), slow.Holdout((1,), 5, classes=CLASSES)
    assert replay.add([[1.0], [2.0]], [3, bad]) == 1
    holdout.add([[1.0], [2.0]], [3, bad])
    assert replay.rows().y.tolist() == holdout.rows().y.tolist() == [3]
    assert replay.dropped == holdout.dropped == 1


def test_regression_keeps_real_targets_and_drops_those_beyond_float32() -> None:
    replay = slow.Replay((1,), 10, classes=None, seed=0)
    replay.add([[1.0], [2.0], [3.0]], [0.25, 1e300, -4.5])
    assert replay.rows().y.tolist() == [0.25, -4.5]
    assert replay.rows().y.dtype == np.float32


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 16), (1.0, 64)])
def test_the_reference_share_is_exact(share: float, expected: int) -> None:
    replay = make(10, 0.5)
    feed(replay, [[(0, 0)] * 30])
    x, _ = replay.sample(np.random.default_rng(0), 64, share)
    assert (x < 0).sum() == expected


def test_every_row_is_drawn_while_the_recent_part_is_not_yet_full_and_after() -> None:
    replay = make(6, 0.5)
    first = 0
    for count in (2, 1, 2, 4):
        first = feed(replay, [[(0, 0)] * count], first)
        x, _ = replay.sample(np.random.default_rng(0), 300, 0.0)
        assert set(x[:, 0].tolist()) == set(replay.rows().x[:, 0].tolist())


def test_an_empty_memory_draws_from_the_reference_and_without_one_says_what_to_do() -> None:
    x, _ = make(3, 0.5).sample(np.random.default_rng(0), 5, 0.0)
    assert (x < 0).all()
    with pytest.raises(ValueError, match="add labelled rows"):
        slow.Replay((1,), 3, classes=2, seed=0).sample(np.random.default_rng(0), 5, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity_rows": 0}, "capacity_rows is 0"),
        ({"recent_share": 1.5}, "recent_share is 1.5"),
        ({"classes": 1}, "classes is 1"),
        ({"reference_x": [[1.0]]}, "go together"),
        ({"reference_x": [[np.nan]], "reference_y": [0]}, "1 reference exemplars are not finite"),
        ({"reference_x": [[1.0]], "reference_y": [7]}, "1 reference exemplars"),
        ({"reference_x": [1.0], "reference_y": [0]}, "x has shape"),
    ],
)
def test_wrong_arguments_are_refused_with_their_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slow.Replay(**({"input_shape": (1,), "capacity_rows": 4, "classes": 2, "seed": 0} | arguments))


def test_rows_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\); it must be \(rows, \*\(1,\)\)"):
        make(3, 0.5).add(np.zeros((2, 3)), [0, 0])
    with pytest.raises(ValueError, match=r"y has shape \(1,\)"):
        make(3, 0.5).add(np.zeros((2, 1)), [0])


@given(sizes=st.lists(st.integers(0, 9), max_size=10), capacity=st.integers(1, 8))
def test_held_back_rows_are_the_newest_and_leave_once_in_order(sizes: list[int], capacity: int) -> None:
    holdout = slow.Holdout((1,), capacity, classes=CLASSES)
    left: list[float] = []
    first = 0
    for size in sizes:
        serial = np.arange(first, first + size)
        out = holdout.add(serial[:, None], serial % CLASSES, serial % 3)
        assert (out.y == out.x[:, 0] % CLASSES).all()
        assert (out.segment == out.x[:, 0] % 3).all()
        left += out.x[:, 0].tolist()
        first += size
        assert left + holdout.rows().x[:, 0].tolist() == list(range(first))
        assert len(holdout) == min(first, capacity)


def holdout_of(rows: int, max_queries: int) -> slow.Holdout:
    holdout = slow.Holdout((1,), rows, classes=2, max_queries=max_queries)
    holdout.add(np.zeros((rows, 1)), [0] * rows)
    return holdout


def test_a_held_back_set_goes_stale_and_fresh_rows_revive_it() -> None:
    holdout = holdout_of(4, max_queries=2)
    assert [holdout.look(), holdout.look()] == [1, 2]
    assert holdout.stale
    holdout.add(np.ones((3, 1)), [0] * 3)
    assert holdout.stale, "the row that was looked at twice is still there"
    holdout.add(np.ones((1, 1)), [0])
    assert not holdout.stale
    assert holdout.queries == 0


def test_a_refused_look_costs_the_fresh_rows_nothing() -> None:
    holdout = holdout_of(2, max_queries=1)
    holdout.look()
    holdout.add(np.ones((1, 1)), [0])
    assert [holdout.look() for _ in range(5)] == [2] * 5
    holdout.add(np.ones((1, 1)), [0])
    assert holdout.look() == 1


def test_an_empty_held_back_set_is_not_stale() -> None:
    holdout = slow.Holdout((1,), 4, classes=2)
    assert (holdout.queries, holdout.stale, len(holdout)) == (0, False, 0)


@given(
    steps=st.lists(st.one_of(st.just("look"), st.integers(0, 5)), max_size=20),
    cut=st.integers(0, 20),
)
def test_restored_held_back_rows_go_on_bit_by_bit(steps: list[str | int], cut: int) -> None:
    def play(holdout: slow.Holdout, part: list[str | int]) -> None:
        for step in part:
            if isinstance(step, str):
                holdout.look()
            else:
                holdout.add(np.full((step, 1), step), [1] * step)

    original = slow.Holdout((1,), 4, classes=2, max_queries=2)
    play(original, steps[:cut])
    restored = slow.Holdout((1,), 4, classes=2, max_queries=2)
    restored.load_state_dict(original.state_dict())
    play(original, steps[cut:])
    play(restored, steps[cut:])
    assert equal(original.state_dict(), restored.state_dict())
    assert (original.queries, original.stale) == (restored.queries, restored.stale)


def test_held_back_rows_of_another_size_or_shape_are_refused() -> None:
    state = holdout_of(4, max_queries=2).state_dict()
    for shape, rows in (((1,), 3), ((2,), 4)):
        with pytest.raises(ValueError, match="start it empty"):
            slow.Holdout(shape, rows, classes=2).load_state_dict(state)
    with pytest.raises(ValueError, match="max_queries 0"):
        slow.Holdout((1,), 4, classes=2, max_queries=0)
