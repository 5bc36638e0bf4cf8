"""What answers are worth: intervals, recoveries, worst windows, the near future."""

from __future__ import annotations

import math

import numpy as np
import pytest

from daemon.evaluation.intervals import Interval, block_length, mean_interval
from daemon.evaluation.near import chance, label_memory, near_future, near_loss
from daemon.evaluation.recording import Recording
from daemon.evaluation.score import RECOVERY_ROWS, recovery, running_mean, worst_window


def errors(rows: int, memory: float, seed: int) -> np.ndarray:
    """Zeros and ones, one in 6.3, that come in runs: an autoregression above one."""
    rng = np.random.default_rng(seed)
    noise, z = rng.normal(size=rows + 200), np.zeros(rows + 200)
    for row in range(1, len(z)):
        z[row] = memory * z[row - 1] + noise[row]
    return (z[200:] * math.sqrt(1 - memory**2) > 1.0).astype(np.float64)


@pytest.mark.parametrize(("memory", "least"), [(0.0, 0.9), (0.8, 0.88)])
def test_intervals_cover_the_truth_also_where_errors_come_in_runs(memory: float, least: float) -> None:
    truth = 0.5 * math.erfc(1 / math.sqrt(2))
    found = [mean_interval(errors(800, memory, seed), seed=seed) for seed in range(120)]
    assert np.mean([each.low <= truth <= each.high for each in found]) >= least


def test_intervals_that_ignore_the_runs_would_not() -> None:
    truth = 0.5 * math.erfc(1 / math.sqrt(2))
    found = [mean_interval(errors(800, 0.8, seed), block=1, seed=seed) for seed in range(120)]
    assert np.mean([each.low <= truth <= each.high for each in found]) < 0.8


def test_blocks_grow_with_the_runs() -> None:
    short, long = (np.mean([block_length(errors(2_000, memory, seed)) for seed in range(20)]) for memory in (0.0, 0.9))
    assert short < 4 and long > 5 * short
    assert block_length(np.zeros(100)) == 1 and block_length(np.ones(3)) == 1


def test_an_interval_of_what_never_varies_is_a_point() -> None:
    assert mean_interval(np.zeros(50)) == Interval(0.0, 0.0, 0.0)
    assert math.isnan(mean_interval(np.empty(0)).mean)
    assert not Interval(0.0, 0.0, 0.0).excludes_zero() and Interval(-2.0, -3.0, -1.0).excludes_zero()


def test_the_same_blocks_are_drawn_for_the_same_rows() -> None:
    values = errors(500, 0.5, 0)
    twice = mean_interval(2 * values, block=20, seed=3)
    assert mean_interval(values, block=20, seed=3).scaled(2.0) == pytest.approx(twice)


def planted(back_after: int) -> np.ndarray:
    """A tenth wrong; after row 1,000 all, until ``back_after`` rows later it is a tenth again."""
    losses = (np.arange(3_000) % 10 == 0).astype(np.float64)
    losses[1_000 : 1_000 + back_after] = 1.0
    return losses


@pytest.mark.parametrize("back_after", [0, 50, 400])
def test_a_recovery_is_found_where_it_was_planted(back_after: int) -> None:
    found = recovery(planted(back_after), np.ones(3_000, bool), [1_000], 0)
    assert found.level == pytest.approx(0.1) and found.bound == pytest.approx(0.16)
    # Up to 6 more errors in 100 rows are within the bound.
    assert found.rows is not None and max(0, back_after - 8) <= found.rows <= back_after


def test_what_does_not_come_back_before_the_next_change_never_does() -> None:
    rows = np.ones(3_000, bool)
    assert recovery(planted(900), rows, [1_000, 1_500], 0).rows is None
    assert recovery(planted(900), rows, [1_000], 0).rows is not None


def test_a_regime_too_short_to_judge_is_not_judged() -> None:
    found = recovery(planted(0), np.ones(3_000, bool), [1_000, 1_000 + RECOVERY_ROWS - 1], 0)
    assert math.isnan(found.bound) and found.rows is None


def test_rows_without_a_label_count_for_nothing() -> None:
    losses, rows = planted(400), np.ones(3_000, bool)
    rows[1_000:1_400] = False
    assert recovery(losses, rows, [1_000], 0).rows == 400
    worst = worst_window(losses, rows, 100)
    assert worst is not None and worst.loss == pytest.approx(0.1)


def test_the_worst_window_is_where_it_was_planted() -> None:
    losses = np.zeros(1_000)
    losses[600:650] = 1.0
    found = worst_window(losses, np.ones(1_000, bool), 100)
    assert found is not None and found.loss == 0.5 and 550 <= found.row <= 600 and found.rows == 100
    short = worst_window(losses[600:620], np.ones(20, bool), 100)
    assert short is not None and (short.row, short.rows, short.loss) == (0, 20, 1.0)
    assert worst_window(losses, np.zeros(1_000, bool), 100) is None


def test_the_running_mean_stands_at_its_last_row() -> None:
    ends, means = running_mean(np.array([1.0, 9.0, 3.0, 5.0]), np.array([True, False, True, True]), 2)
    assert ends.tolist() == [2.0, 3.0] and means.tolist() == [2.0, 4.0]


def recorded(y: np.ndarray) -> Recording:
    return Recording(x=np.zeros((len(y), 2), np.float32), y=y, times_s=np.arange(len(y), dtype=np.float64))


def passes(runs: int, length: int, classes: int = 4) -> np.ndarray:
    """Classes in runs, each ``length`` rows long, in a random order without repeats."""
    rng, found = np.random.default_rng(0), [0]
    for _ in range(runs - 1):
        found.append((found[-1] + int(rng.integers(1, classes))) % classes)
    return np.repeat(found, length).astype(np.int64)


@pytest.mark.parametrize("length", [10, 60, 500])
def test_a_copied_label_is_worth_nothing_in_the_near_future(length: int) -> None:
    recording = recorded(passes(10_000 // length, length))
    naive = (recording.y[1:] == recording.y[:-1]).mean()
    assert naive >= 0.9, "copying looks good where labels come in runs"
    near = near_future(recording, 50)
    assert len(near.asks) >= 8 and near.skipped >= 0.4 * length
    copied = {at: (recording.y[at] != recording.y[rows]).astype(np.float64) for at, rows in near.asks.items()}
    asked = {at: np.full(len(rows), recording.y[at], np.float32) for at, rows in near.asks.items()}
    loss, level = near_loss(near, asked, copied), chance(near, recording, 1.0)
    assert loss is not None and level is not None
    assert loss >= level - 1e-9, "never better than chance, for then it would pay to know the neighbourhood"
    assert length > 60 or loss < level + 0.1
    known = {at: np.zeros(len(rows)) for at, rows in near.asks.items()}
    assert near_loss(near, asked, known) == 0.0


def test_what_is_asked_lies_ahead_of_what_was_seen() -> None:
    recording = recorded(passes(200, 50))
    near = near_future(recording, 64)
    for at, rows in near.asks.items():
        assert (at + 1) % 64 == 0, "at the end of a batch, so that all rows up to it are answered"
        assert rows.min() > at + near.skipped and len(set(rows.tolist())) == len(rows)
        assert (np.diff(rows) < 0).any(), "shuffled"


def test_labels_without_an_order_have_no_memory() -> None:
    rng = np.random.default_rng(0)
    assert label_memory(recorded(rng.integers(4, size=5_000))) == 1
    assert label_memory(recorded(rng.normal(size=5_000))) == 1
    assert label_memory(recorded(np.repeat([0, 1], 500))) <= 250


def test_the_best_constant_sets_the_level_for_targets() -> None:
    y = np.random.default_rng(0).normal(size=4_000)
    recording = recorded(y)
    near, level = near_future(recording, 64), chance(near_future(recording, 64), recording, 1.0)
    assert level is not None and level == pytest.approx(1.0, abs=0.2)
    for constant in (-1.0, 0.0, 0.5):
        losses = {at: np.square(y[rows] - constant) for at, rows in near.asks.items()}
        asked = {at: np.full(len(rows), constant, np.float32) for at, rows in near.asks.items()}
        loss = near_loss(near, asked, losses)
        assert loss is not None and loss >= level - 1e-9


def test_one_class_alone_has_no_near_future() -> None:
    near = near_future(recorded(np.zeros(2_000, np.int64)), 64)
    assert near.asks == {} and near_loss(near, {}, {}) is None and chance(near, recorded(np.zeros(9)), 1.0) is None
