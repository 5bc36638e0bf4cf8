"""Invariants of rows held back in blocks; those of the newest rows alone are with the replay memory's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adapters.slow as slow
from daemon import checkpoint


def make(capacity: int, stride: int, block: int, max_queries: int = 8) -> slow.Holdout:
    return slow.Holdout((1,), capacity, classes=4, stride=stride, block_rows=block, max_queries=max_queries)


def give(holdout: slow.Holdout, first: int, size: int) -> slow.Rows:
    serial = np.arange(first, first + size)
    return holdout.add(serial[:, None], serial % 4, serial % 3)


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 20), max_size=12),
    capacity=st.integers(1, 10),
    stride=st.integers(1, 4),
    block=st.integers(1, 5),
)
def test_each_row_is_held_back_or_learnt_from_once_and_the_newest_blocks_stay(
    sizes: list[int], capacity: int, stride: int, block: int
) -> None:
    holdout = make(capacity, stride, block)
    learnt: list[int] = []
    first = 0
    for size in sizes:
        out = give(holdout, first, size)
        assert (out.y == out.x[:, 0] % 4).all()
        assert (out.segment == out.x[:, 0] % 3).all()
        assert (np.diff(out.x[:, 0]) > 0).all(), "oldest first"
        learnt += out.x[:, 0].astype(int).tolist()
        first += size
        kept = [serial for serial in range(first) if serial // block % stride == 0][-capacity:]
        assert holdout.rows().x[:, 0].tolist() == kept == holdout.arrivals.tolist()
        assert sorted(learnt + kept) == list(range(first))


def test_with_a_stride_the_newest_rows_are_learnt_from_at_once_and_the_span_is_longer() -> None:
    spans = {}
    for stride in (1, 4):
        holdout = make(48, stride, 16)
        out = give(holdout, 0, 1_000)
        spans[stride] = 1_000 - holdout.arrivals[0]
        newest = out.x[:, 0].max()
        assert newest == (999 if stride == 4 else 1_000 - 48 - 1)
    assert spans[4] >= 3 * spans[1]


def test_unusable_rows_have_no_number() -> None:
    holdout = make(10, 2, 2)
    out = holdout.add([[0.0], [np.nan], [1.0], [2.0], [3.0]], [0, 0, 9, 1, 2])
    assert holdout.arrivals.tolist() == [0, 1]
    assert holdout.rows().x[:, 0].tolist() == [0.0, 2.0]
    assert out.x[:, 0].tolist() == [3.0]
    assert holdout.dropped == 2


@settings(deadline=None, max_examples=50)
@given(
    steps=st.lists(st.one_of(st.just("look"), st.integers(0, 9)), max_size=20),
    cut=st.integers(0, 20),
    stride=st.integers(1, 3),
)
def test_a_restored_set_goes_on_bit_by_bit_through_a_checkpoint(steps: list[str | int], cut: int, stride: int) -> None:
    first = 0

    def play(holdouts: list[slow.Holdout], part: list[str | int]) -> None:
        nonlocal first
        for step in part:
            for holdout in holdouts:
                if isinstance(step, str):
                    holdout.look()
                else:
                    give(holdout, first, step)
            first += 0 if isinstance(step, str) else step

    original, restored = make(5, stride, 3, 2), make(5, stride, 3, 2)
    play([original], steps[:cut])
    restored.load_state_dict(checkpoint.decode(checkpoint.encode(original.state_dict())))
    play([original, restored], steps[cut:])
    assert checkpoint.encode(original.state_dict()) == checkpoint.encode(restored.state_dict())
    assert (original.queries, original.stale) == (restored.queries, restored.stale)


def test_a_state_without_arrivals_is_refused() -> None:
    state = make(5, 1, 1).state_dict()
    del state["arrivals"]
    with pytest.raises(ValueError, match="start it empty"):
        make(5, 1, 1).load_state_dict(state)


@pytest.mark.parametrize("arguments", [{"stride": 0}, {"block_rows": 0}])
def test_wrong_blocks_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="stride is"):
        slow.Holdout((1,), 5, classes=2, **arguments)
