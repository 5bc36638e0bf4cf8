"""The label join: each label meets its own row, never early, never twice, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from daemon.checkpoint import decode, encode
from daemon.labels import FACTS, LabelJoin
from daemon.records import Labels


def predicted(join: LabelJoin, first: int, count: int, now: float | None = None) -> None:
    rows = np.arange(first, first + count, dtype=np.float32)
    ones = np.ones(count, np.float32)
    facts = np.stack((rows, rows, rows + 0.5, rows - 0.5, *[ones] * (len(FACTS) - 4)), 1)
    ids = [str(row) for row in range(first, first + count)]
    join.predicted(ids, rows[:, None], facts, float(first + count - 1) if now is None else now)


def offer(join: LabelJoin, *labels: tuple[str, int, float]) -> None:
    join.offer(Labels([name for name, _, _ in labels], [y for _, y, _ in labels], [time for _, _, time in labels]))


def joined_rows(join: LabelJoin) -> list[tuple[float, int]]:
    found = join.due()
    return [] if found is None else list(zip(found.served.tolist(), found.y.tolist(), strict=True))


def test_a_label_brings_back_its_own_row() -> None:
    join = LabelJoin((1,), 100, 1 << 20)
    predicted(join, 0, 10)
    offer(join, ("3", 7, 0.0))
    found = join.due()
    assert found is not None and found.y.tolist() == [7]
    assert found.x.tolist() == [[3.0]] and found.served.tolist() == [3.0]
    assert found.version.tolist() == [3.5] and found.frozen.tolist() == [2.5]


def test_a_label_is_held_until_the_stream_reaches_its_time() -> None:
    join = LabelJoin((1,), 100, 1 << 20)
    predicted(join, 0, 10)
    offer(join, ("3", 7, 15.0))
    assert joined_rows(join) == [] and not join.wants_more()
    predicted(join, 10, 6)
    assert joined_rows(join) == [(3.0, 7)] and join.wants_more()


def test_a_stream_that_stands_still_is_due_by_the_clock() -> None:
    join = LabelJoin((1,), 100, 1 << 20)
    predicted(join, 0, 10)
    offer(join, ("3", 7, 15.0))
    found = join.due(by=20.0)
    assert found is not None and found.y.tolist() == [7]


def test_a_label_whose_record_is_not_read_yet_waits_for_it() -> None:
    join = LabelJoin((1,), 100, 1 << 20)
    predicted(join, 0, 5)
    offer(join, ("8", 1, 0.0))
    assert joined_rows(join) == [] and join.late == 0
    predicted(join, 5, 5)
    assert joined_rows(join) == [(8.0, 1)]


def test_a_second_label_for_a_row_is_not_learnt_twice() -> None:
    join = LabelJoin((1,), 100, 1 << 20)
    predicted(join, 0, 5)
    offer(join, ("2", 1, 0.0), ("2", 0, 0.0))
    assert joined_rows(join) == [(2.0, 1)]
    assert joined_rows(join) == []


def test_a_repeated_id_belongs_to_its_newest_row() -> None:
    join = LabelJoin((1,), 4, 1 << 20)
    predicted(join, 0, 2)
    predicted(join, 0, 2)
    predicted(join, 10, 2)
    offer(join, ("0", 1, 0.0))
    assert joined_rows(join) == [(0.0, 1)]


def test_labels_that_come_too_late_are_counted() -> None:
    join = LabelJoin((1,), 4, 1 << 20)
    predicted(join, 0, 20)
    offer(join, *((str(row), 0, 0.0) for row in range(10)))
    assert joined_rows(join) == []
    assert join.late == 6, "four may still wait for their record, the window's worth"


def test_the_window_shrinks_to_the_memory_allowed() -> None:
    join = LabelJoin((1_000,), 10_000, 1 << 20)
    assert join.window * (4_000 + 64) <= 1 << 20 < (join.window + 1) * (4_000 + 64)


def test_a_batch_larger_than_the_window_keeps_its_newest_rows() -> None:
    join = LabelJoin((1,), 4, 1 << 20)
    predicted(join, 0, 10)
    offer(join, ("9", 1, 0.0), ("6", 2, 0.0), ("5", 3, 0.0))
    assert joined_rows(join) == [(9.0, 1), (6.0, 2)]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("rows"), st.integers(1, 7)),
        st.tuples(st.just("labels"), st.lists(st.integers(0, 60), max_size=6)),
    ),
    max_size=25,
)


@given(steps, st.integers(0, 24))
def test_every_label_meets_its_row_at_most_once_and_a_restart_changes_nothing(steps: list[Any], cut: int) -> None:
    def run(restart: bool) -> list[tuple[float, int]]:
        join, first, seen = LabelJoin((1,), 16, 1 << 20), 0, []
        for number, (kind, what) in enumerate(steps):
            if restart and number == cut:
                state = decode(encode(join.state_dict()))
                join = LabelJoin((1,), 16, 1 << 20)
                join.load_state_dict(state)
            if kind == "rows":
                predicted(join, first, what)
                first += what
            else:
                offer(join, *((str(row), row, float(row + 2)) for row in what))
            seen += joined_rows(join)
        return seen

    seen = run(restart=False)
    assert all(row == y for row, y in seen)
    assert len({row for row, _ in seen}) == len(seen)
    assert run(restart=True) == seen
