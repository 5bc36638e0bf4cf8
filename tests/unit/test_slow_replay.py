"""Invariants of the replay memory and of the held-back rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import adapters.slow as slow
from adapters.slow.store import half_serves
from adapters.slow.strata import Codes, age_band, cells, centres, priorities, survivors
from daemon import checkpoint

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


@settings(deadline=None, max_examples=50)
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


@settings(deadline=None, max_examples=50)
@given(stream=chunks, capacity=st.integers(1, 12), share=shares)
def test_a_row_keeps_its_own_label_and_segment(stream: list[Chunk], capacity: int, share: float) -> None:
    replay = make(capacity, share)
    feed(replay, stream)
    flat = [row for chunk in stream for row in chunk]
    rows = replay.rows()
    for x, y, segment in zip(rows.x[:, 0], rows.y, rows.segment, strict=True):
        assert flat[int(x)] == (y, segment)


@settings(deadline=None, max_examples=50)
@given(stream=chunks, capacity=st.integers(1, 12), share=shares)
def test_the_newest_rows_are_always_there(stream: list[Chunk], capacity: int, share: float) -> None:
    replay = make(capacity, share)
    offered = feed(replay, stream)
    newest = set(range(max(0, offered - round(share * capacity)), offered))
    assert newest <= set(replay.rows().x[:, 0].astype(int).tolist())


@settings(deadline=None, max_examples=50)
@given(stream=chunks, capacity=st.integers(1, 12), share=shares, seed=st.integers(0, 5))
def test_reference_exemplars_outlive_every_stream(stream: list[Chunk], capacity: int, share: float, seed: int) -> None:
    replay = make(capacity, share)
    feed(replay, stream)
    x, y = replay.sample(np.random.default_rng(seed), 40, 1.0)
    assert set(zip(x[:, 0].tolist(), y.tolist(), strict=True)) == {(-1.0, 0), (-2.0, 1)}
    assert not {-1.0, -2.0} & set(replay.rows().x[:, 0].tolist())


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=120),
    share=st.floats(0, 1),
    seed=st.integers(0, 3),
)
def test_on_every_level_a_group_loses_nothing_before_it_is_among_the_largest(
    rows: list[tuple[int, int, int]], share: float, seed: int
) -> None:
    levels = list(np.array(rows).T)
    keep = int(share * len(rows))
    kept = survivors(levels, keep, priorities(np.arange(len(rows)), seed))
    assert len(kept) == keep
    assert (np.diff(kept) > 0).all()
    offered: Counter[tuple[int, ...]] = Counter()
    held: Counter[tuple[int, ...]] = Counter()
    for depth in (1, 2, 3):
        offered.update(row[:depth] for row in rows)
        held.update(rows[index][:depth] for index in kept)
    for group in offered:
        siblings = [held[other] for other in offered if len(other) == len(group) and other[:-1] == group[:-1]]
        assert held[group] >= min(offered[group], max(siblings) - 1)


def test_a_rare_class_survives_a_flood_of_another() -> None:
    replay = make(40, 0.5)
    feed(replay, [[(2, 0)] * 10, [(0, 0)] * 2_000])
    assert Counter(replay.rows().y.tolist())[2] >= 9, "half of the balanced part, less what a pruning frees"


@settings(max_examples=60, deadline=None)
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
        ({"clusters": 0}, "clusters is 0"),
        ({"horizon_rows": 0}, "horizon_rows is 0"),
        ({"recency": 1.1}, "recency is 1.1"),
        ({"balance": -0.1}, "balance is -0.1"),
        ({"balance": 0.5, "classes": None}, "balance is 0.5; it is for classification"),
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


@settings(deadline=None, max_examples=50)
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


@settings(deadline=None, max_examples=50)
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


@settings(deadline=None, max_examples=50)
@given(stream=chunks, capacity=st.integers(1, 40), share=shares, cut=st.integers(0, 12))
def test_what_is_held_does_not_depend_on_the_batches(
    stream: list[Chunk], capacity: int, share: float, cut: int
) -> None:
    whole, parted = make(capacity, share), make(capacity, share)
    flat = [row for chunk in stream for row in chunk]
    feed(whole, [flat])
    first = feed(parted, [flat[:cut]])
    for row in flat[cut:]:
        first = feed(parted, [[row]], first)
    assert whole.rows().x.tolist() == parted.rows().x.tolist()


@given(capacity=st.integers(1, 300), share=shares, rows=st.integers(0, 700))
@settings(max_examples=40, deadline=None)
def test_a_full_memory_is_short_of_its_capacity_by_an_eighth_of_its_balanced_part_at_most(
    capacity: int, share: float, rows: int
) -> None:
    replay = make(capacity, share)
    feed(replay, [[(index % CLASSES, 0) for index in range(rows)]])
    step = (capacity - round(share * capacity)) // 8
    assert min(rows, capacity - step) <= len(replay) <= min(rows, capacity)


def modes(rows: int, rare: int, seed: int) -> F32:
    """One dense cloud, and ``rare`` rows of another one far from it, early in the stream."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 20)).astype(np.float32)
    x[50 : 50 + rare] += 8
    return x


@pytest.mark.parametrize("seed", range(3))
def test_a_rare_mode_within_a_class_survives_where_chance_loses_it(seed: int) -> None:
    held = {}
    for clusters in (1, 16):
        replay = slow.Replay((20,), 200, classes=2, seed=seed, clusters=clusters)
        for part in np.array_split(modes(8_000, 12, seed), 200):
            replay.add(part, np.zeros(len(part)))
        held[clusters] = int((replay.rows().x.mean(axis=1) > 4).sum())
    assert held[16] >= held[1] + 3


def test_neither_only_the_newest_nor_only_the_oldest_rows_survive() -> None:
    replay = slow.Replay((1,), 200, classes=CLASSES, seed=0, clusters=1)
    for start in range(0, 51_200, 64):
        feed(replay, [[(0, 0)] * 64], start)
    ages = 51_200 - replay.rows().x[:, 0].astype(int)
    held = np.bincount(age_band(ages[ages > 100], 200), minlength=8)
    assert held[:8].min() >= 3
    assert held.max() <= 40


def test_octaves_of_age_double() -> None:
    assert age_band(np.array([0, 9, 10, 29, 30, 69, 70]), 10).tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_rows_beyond_the_horizon_leave_first() -> None:
    replay = slow.Replay((1,), 100, classes=CLASSES, seed=0, horizon_rows=150)
    first = feed(replay, [[(1, 0)] * 40])
    first = feed(replay, [[(0, 0)] * 120], first)
    assert (replay.rows().y == 1).sum() >= 15
    feed(replay, [[(0, 0)] * 100], first)
    assert set(replay.rows().y.tolist()) == {0}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(16,), (3, 4, 4)])
def test_bytes_bound_the_memory_with_the_exemplars(half: bool, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, *shape)).astype(np.float32)
    replay = slow.Replay(
        shape, 10**6, classes=2, seed=0, reference_x=x, reference_y=[0] * 50, max_bytes=40_000, half=half
    )
    size = replay.bytes
    assert 39_000 < size <= 40_000
    for _ in range(20):
        replay.add(x, [1] * 50)
    assert replay.bytes == size
    assert replay.half == half


def test_half_precision_holds_more_rows_in_the_same_bytes() -> None:
    x = np.random.default_rng(0).normal(size=(20, 1_000))
    rows = {
        half: slow.Replay(
            (1_000,), 10**6, classes=2, seed=0, reference_x=x, reference_y=[0] * 20, max_bytes=10**6, half=half
        ).capacity_rows
        for half in (False, True)
    }
    assert 1.8 < rows[True] / rows[False] < 2


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes is 100; the reference exemplars take 120"):
        slow.Replay((1,), 10, classes=2, seed=0, reference_x=[[0.0]] * 6, reference_y=[0] * 6, max_bytes=100)


def test_a_row_beyond_half_precision_widens_the_memory_within_its_bytes() -> None:
    x = np.random.default_rng(0).normal(size=(60, 50)).astype(np.float32)
    arguments: dict[str, Any] = {"classes": 2, "seed": 0, "reference_x": x[:5], "reference_y": [0] * 5}
    replay = slow.Replay((50,), 1_000, **arguments, max_bytes=10_000, half=True)
    replay.add(x, [1] * 60)
    assert replay.half
    replay.add([[1e6] * 50], [0])
    assert not replay.half
    assert replay.bytes <= 10_000
    assert replay.rows().x[-1].tolist() == [1e6] * 50, "nothing is cut off"
    assert np.allclose(replay.rows().x[-2], x[-1], atol=2e-3)
    restored = slow.Replay((50,), 1_000, **arguments, max_bytes=10_000, half=True)
    restored.load_state_dict(checkpoint.decode(checkpoint.encode(replay.state_dict())))
    assert not restored.half
    assert equal(restored.state_dict(), replay.state_dict())


def test_half_precision_serves_only_what_it_does_not_blur() -> None:
    rng = np.random.default_rng(0)
    standard = rng.normal(size=(50, 4)).astype(np.float32)
    assert half_serves(standard)
    assert half_serves(np.concatenate((standard, np.full((50, 1), 3.0, np.float32)), axis=1)), "an input that stands"
    assert not half_serves(standard + 1_000)
    assert not half_serves(standard * 1e5)
    assert not half_serves(standard[:1])


def test_a_state_goes_through_a_checkpoint_to_the_bit() -> None:
    x = np.random.default_rng(0).normal(size=(500, 20)).astype(np.float32)
    original, restored = (slow.Replay((20,), 100, classes=CLASSES, seed=seed) for seed in (0, 1))
    original.add(x, np.arange(500) % CLASSES, np.arange(500) // 100 * -(2**40))
    body = checkpoint.encode(original.state_dict())
    restored.load_state_dict(checkpoint.decode(body))
    assert checkpoint.encode(restored.state_dict()) == body
    for replay in (original, restored):
        replay.add(x, np.arange(500) % 2)
    assert checkpoint.encode(restored.state_dict()) == checkpoint.encode(original.state_dict())


def skewed(**options: Any) -> slow.Replay:
    """90 rows of class 0, then 10 of class 1; the newest 20 are the recent part."""
    replay = slow.Replay((1,), 200, classes=3, seed=0, recent_share=0.1, **options)
    replay.add(np.arange(100)[:, None], np.arange(100) // 90)
    return replay


@pytest.mark.parametrize(("balance", "expected"), [(0.0, 0.1), (0.5, 0.3), (1.0, 0.5)])
def test_a_balanced_draw_gives_each_class_held_its_share(balance: float, expected: float) -> None:
    _, y = skewed(balance=balance).sample(np.random.default_rng(0), 4_000, 0.0)
    assert (y == 1).mean() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("recency", [0.25, 1.0])
def test_a_share_of_a_draw_is_from_the_newest_rows(recency: float) -> None:
    replay = skewed(recency=recency)
    x, _ = replay.sample(np.random.default_rng(0), 4_000, 0.0)
    assert (x[:, 0] >= 80).mean() == pytest.approx(recency + (1 - recency) * 0.2, abs=0.03)
    assert x.min() >= (80 if recency == 1 else 0)


@settings(deadline=None, max_examples=50)
@given(recency=st.floats(0, 1), balance=st.floats(0, 1), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_snapshot_draws_what_the_memory_draws(recency: float, balance: float, share: float, seed: int) -> None:
    x = np.arange(30, dtype=np.float32)[:, None]
    replay = slow.Replay(
        (1,), 20, classes=3, seed=0, reference_x=-x - 1, reference_y=x[:, 0] % 3, recency=recency, balance=balance
    )
    replay.add(x, x[:, 0] % 2)
    left, right = (memory.sample(np.random.default_rng(seed), 16, share) for memory in (replay, replay.snapshot()))
    assert np.array_equal(left[0], right[0])
    assert np.array_equal(left[1], right[1])
    assert left[0].dtype == np.float32
    assert len(left[0]) == 16


def test_a_draw_is_float32_whatever_is_kept_and_pinning_is_left_out_without_cuda() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    replay = slow.Replay((3,), 20, classes=2, seed=0, reference_x=x, reference_y=[0] * 20, half=True, pinned=True)
    replay.add(x, [1] * 20)
    assert replay.half
    snapshot = replay.snapshot()
    assert snapshot.pinned == torch.cuda.is_available()
    assert snapshot.sample(np.random.default_rng(0), 4, 0.5)[0].dtype == replay.rows().x.dtype == np.float32


def test_codes_are_finite_for_hostile_rows_and_ignore_inputs_that_never_move() -> None:
    reference = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    reference[:, 3] = 7
    codes = Codes(reference)
    x = reference[:2].copy()
    x[1, 3] = 9
    assert np.allclose(codes(x)[1], codes(reference[1:2])[0], atol=1e-4)
    assert np.isfinite(codes(np.full((2, 40), 3e38, np.float32) * np.array([[1], [-1]], np.float32))).all()


def test_a_centre_is_found_in_a_small_group_far_off_and_equal_rows_make_one() -> None:
    codes = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    codes[:5] += 30
    found = centres(codes, 8, np.random.default_rng(0))
    assert len(found) == 8
    among = cells(codes, found)
    assert set(among[:5]).isdisjoint(among[5:])
    assert len(centres(np.ones((9, 4), np.float32), 8, np.random.default_rng(0))) == 1
