"""The history is bounded, in order, and always covers the whole run."""

from __future__ import annotations

import itertools
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.page.history import History, Sample

values = st.floats(0, 1) | st.just(math.nan)
samples = st.builds(Sample, values, values, st.integers(0, 4))


@given(st.integers(2, 9), st.lists(st.tuples(st.floats(0, 5), samples), min_size=1, max_size=120))
def test_it_is_bounded_ordered_and_covers_the_whole_run(capacity: int, steps: list[tuple[float, Sample]]) -> None:
    history, at, times = History(capacity), 0.0, []
    for step, sample in steps:
        at += step
        times.append(at)
        history.add(at, sample)
        points = history.points()
        assert len(points) <= capacity
        assert (points[0].first, points[-1].last) == (times[0], at)
        assert sum(point.samples for point in points) == len(times)
        assert all(point.first <= point.last for point in points)
        assert all(one.last <= other.first for one, other in itertools.pairwise(points))
        assert {point.samples for point in points[:-1]} <= {history.width} and points[-1].samples <= history.width


@given(st.lists(samples, min_size=1, max_size=60))
def test_a_point_is_the_mean_of_what_was_known_and_the_highest_state(given_samples: list[Sample]) -> None:
    history = History(4)
    for at, sample in enumerate(given_samples):
        history.add(float(at), sample)
    first = 0
    for point in history.points():
        part = given_samples[first : first + point.samples]
        first += point.samples
        assert point.rank == max(sample.rank for sample in part)
        for name in ("served", "frozen"):
            finite = [value for sample in part if math.isfinite(value := getattr(sample, name))]
            found = getattr(point, name)
            assert found == pytest.approx(sum(finite) / len(finite)) if finite else found is None


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.floats(0, 9), st.sampled_from(["drift", "promoted", "frozen"])), max_size=60),
)
def test_marks_are_bounded_in_order_and_none_is_forgotten(most: int, steps: list[tuple[float, str]]) -> None:
    history, at = History(marks=most), 0.0
    for step, kind in steps:
        at += step
        history.mark(at, kind)
    marks = history.marks()
    assert len(marks) <= most and [mark.at for mark in marks] == sorted(mark.at for mark in marks)
    if most >= 3:  # room for one of each kind
        for kind in ("drift", "promoted", "frozen"):
            assert sum(mark.count for mark in marks if mark.kind == kind) == sum(one == kind for _, one in steps)


def test_the_newest_version_keeps_its_number_where_marks_become_one() -> None:
    history = History(marks=1)
    history.mark(1.0, "promoted", 1)
    history.mark(2.0, "promoted", 2)
    assert [(mark.version, mark.count) for mark in history.marks()] == [(2, 2)]


def test_a_reader_sees_whole_points_while_one_writes() -> None:
    history, over = History(16), threading.Event()

    def write() -> None:
        at = 0.0
        while not over.is_set():
            at += 1.0
            history.add(at, Sample(0.5, 0.25, 1))
            history.mark(at, "drift")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            assert all(point.served in (None, 0.5) for point in history.points())
            assert len(history.marks()) <= history.most_marks
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("room", [{"capacity": 1}, {"marks": 0}])
def test_no_room_is_refused(room: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give at least"):
        History(**room)
