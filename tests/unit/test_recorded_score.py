from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.recorded.score import Run, poisson_interval, runs, score
from daemon.recorded.watch import Alarm

LIVE = np.ones(900, dtype=bool)


def test_a_delay_runs_from_the_change_to_the_next_alarm() -> None:
    judged = score([510, 515, 700], [500, 600, 800], 100, LIVE)
    assert judged.delays == [10, 100, None] and judged.missed == 1
    assert (judged.false_alarms, judged.rows) == (0, 400)


def test_alarms_before_the_first_change_are_false() -> None:
    judged = score([150, 300, 500], [500], 100, LIVE)
    assert (judged.false_alarms, judged.arl0, judged.delays) == (2, 200.0, [0])
    assert judged.low < 200.0 < judged.high


def test_without_a_change_all_alarms_are_false() -> None:
    assert score([150, 300, 999], [], 100, LIVE).arl0 == 300.0


def test_without_a_false_alarm_the_arl0_has_only_a_lower_bound() -> None:
    judged = score([], [], 100, LIVE)
    assert (judged.arl0, judged.high) == (math.inf, math.inf)
    assert judged.low == pytest.approx(900 / 3.6889, rel=1e-4)


def test_rows_that_could_not_alarm_do_not_count() -> None:
    live = LIVE.copy()
    live[:250] = False
    assert score([400], [600], 100, live).rows == 250


def test_a_change_at_the_first_row_leaves_nothing_to_measure_on() -> None:
    judged = score([120], [100], 100, LIVE)
    assert judged.rows == 0 and math.isnan(judged.arl0) and judged.delays == [20]


@pytest.mark.parametrize(("count", "low", "high"), [(0, 0.0, 3.6889), (1, 0.0253, 5.5716), (10, 4.7954, 18.3904)])
def test_the_interval_is_garwoods(count: int, low: float, high: float) -> None:
    assert poisson_interval(count) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_many_is_about_gaussian() -> None:
    low, high = poisson_interval(100_000)
    assert (100_000 - low, high - 100_000) == pytest.approx((620, 620), rel=0.01)


def test_alarms_in_close_succession_are_one_run() -> None:
    alarms = [Alarm(row, float(row)) for row in (10, 100, 190, 400)]
    assert runs(alarms, 1000.0) == [Run(10, 190, 3, 10.0), Run(400, 400, 1, 400.0)]


@pytest.mark.parametrize("change", [101, 190])
def test_a_known_change_ends_a_run(change: int) -> None:
    alarms = [Alarm(row, 0.0) for row in (10, 100, 190)]
    assert [run.first for run in runs(alarms, 1000.0, [change])] == [10, 190]


@given(st.sets(st.integers(0, 5000)), st.sets(st.integers(0, 5000)), st.floats(50, 1e5))
@settings(max_examples=60, deadline=None)
def test_runs_hold_every_alarm_once_and_in_order(rows: set[int], changes: set[int], arl0: float) -> None:
    found = runs([Alarm(row, 0.0) for row in sorted(rows)], arl0, sorted(changes))
    assert sum(run.count for run in found) == len(rows)
    for run in found:
        assert run.count == len([row for row in rows if run.first <= row <= run.last])
        assert not [change for change in changes if run.first < change <= run.last]
