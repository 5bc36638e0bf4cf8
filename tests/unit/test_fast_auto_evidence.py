"""What `auto` goes by: class distances, suspicions, contests by labels, and the rows that it remembers for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.fast.core.arms import WINDOW_ROWS, Arms
from adapters.fast.core.class_distance import BLOCK_ROWS as NEARER_BLOCK
from adapters.fast.core.class_distance import MARGIN, NearerToSource
from adapters.fast.core.contest import Contest
from adapters.fast.core.recent import RECENT_ROWS, RecentRows
from adapters.fast.core.suspicion import Suspicion
from adapters.features import FeatureTap
from daemon.checkpoint import decode, encode
from tests.check_adapter import same
from tests.unit import auto_streams, blobs
from tests.unit.auto_streams import distance, sorted_classes

one_thread = auto_streams.one_thread

# The class distance, and whose is less.


def test_the_class_distance_does_not_see_other_shares_of_the_classes_but_a_shift() -> None:
    measure, model = distance(), blobs.trained()
    x, y = blobs.rows(2000, seed=7)

    def mean(rows: torch.Tensor) -> float:
        with torch.inference_mode(), FeatureTap(model) as tap:
            predicted = model(rows).argmax(1)
            assert tap.features is not None
            return float(measure(tap.features, predicted).mean())

    # What it is not blind to: the level differs between classes by less than a shift moves it.
    of_classes = [mean(x[y == kind]) for kind in range(blobs.CLASSES)]
    assert max(of_classes) < 1.25 * measure.level < mean(x + 3.0)


def test_nearer_needs_a_margin_and_an_end_of_it_needs_half() -> None:
    nearer = NearerToSource()
    verdicts = []
    for value in (0.5 * MARGIN, 2 * MARGIN, 0.75 * MARGIN, 0.2 * MARGIN):
        nearer.restart() if value == 0.5 * MARGIN else None
        rows = np.full(NEARER_BLOCK * 40, value)
        nearer.update(rows, np.zeros_like(rows))
        verdicts.append(nearer.verdict)
    assert verdicts == [False, True, True, False]


def test_features_that_come_nearer_while_the_answers_become_doubtful_do_not_win() -> None:
    nearer = NearerToSource()
    nearer.update(np.full(400, 0.1), np.full(400, -0.1))
    assert not nearer.verdict


def test_sureness_alone_does_not_win() -> None:
    nearer = NearerToSource()
    nearer.update(np.full(400, -0.01), np.full(400, 0.5))
    assert not nearer.verdict


def test_noise_rarely_wins_over_20_seeds() -> None:
    won = 0
    for seed in range(20):
        nearer = NearerToSource()
        for part in np.array_split(np.random.default_rng(seed).normal(scale=0.05, size=(2000, 2)), 60):
            nearer.update(*part.T)
            won += nearer.verdict
    assert won == 0


def test_rows_without_a_distance_count_as_nothing_gained() -> None:
    nearer = NearerToSource()
    nearer.update(np.full(400, np.nan), np.full(400, 1.0))
    assert not nearer.verdict and nearer.state()["mean"] == 0.0


# Suspicion.


def test_rows_like_the_source_are_not_suspected_and_farther_ones_are() -> None:
    measure, rng = distance(), np.random.default_rng(2)
    suspicion, suspected = Suspicion(measure), 0
    for _ in range(60):
        suspicion.update(measure.level + measure.spread * rng.normal(size=32))
        suspected += suspicion.shifted(1.0)
    assert suspected == 0 and not suspicion.shifted_again(1.0)
    suspicion.update(measure.level + 2.0 * measure.spread + rng.normal(size=64) * measure.spread)
    assert suspicion.shifted(1.0) and suspicion.shifted_again(1.0)
    assert not suspicion.shifted(100.0)  # few independent rows prove nothing


def test_rows_nearer_than_the_source_s_are_no_shift() -> None:
    suspicion = Suspicion(distance())
    suspicion.update(np.zeros(500))
    assert not suspicion.shifted(1.0)


# Arms and contests.


def one_arm(answers: dict[str, Any], first: int = 0, arms: Arms | None = None) -> Arms:
    made = arms or Arms(classes=True, scale=1.0)
    rows = {name: np.asarray(values, np.float32) for name, values in answers.items()}
    made.predicted(first, {"base": next(iter(rows.values())), **rows})
    return made


def test_an_arm_that_is_better_wins_and_one_that_is_worse_loses() -> None:
    y = sorted_classes(600, 1, 1)
    arms = one_arm({"frozen": np.where(np.arange(600) % 3, y, -1), "aligned": y})
    arms.weigh(np.arange(600), y, 1.0)
    assert {name: contest.verdict for name, contest in arms.contests.items()} == {"aligned": 1, "runs": 0, "memory": 0}
    arms = one_arm({"frozen": y, "aligned": np.where(np.arange(600) % 3, y, -1)})
    arms.weigh(np.arange(600), y, 1.0)
    assert arms.contests["aligned"].verdict == -1


def test_no_better_arm_wins_more_often_than_its_level_over_200_seeds() -> None:
    wins = 0
    for seed in range(200):
        contest, rng = Contest(), np.random.default_rng(seed)
        contest.update(np.arange(400), rng.choice([-1.0, 0.0, 1.0], 400))
        wins += contest.verdict != 0
    # Each of both tests has the level 0.05: 20 in the mean, and 3 standard deviations more.
    assert wins <= 33


def test_what_was_better_and_then_worse_has_to_show_more() -> None:
    contest = Contest()
    bars = []
    for benefit in (1.0, -1.0, 1.0, -1.0):
        contest.update(np.arange(200), np.full(200, benefit))
        bars.append(contest.state()["bar"])
    assert bars[0] < bars[1] == bars[2] < bars[3]


def test_rows_that_stand_close_together_are_few_observations() -> None:
    single, run = Contest(), Contest()
    single.update(np.arange(160), np.full(160, 0.01))
    run.update(np.arange(160), np.full(160, 0.01), 16.0)
    assert single.state()["better"]["rows"] == 159 and run.state()["better"]["rows"] == 9


@pytest.mark.parametrize("numbers", [[-1, -5], [600, 10**9], []])
def test_labels_of_rows_that_are_not_in_the_window_say_nothing(numbers: list[int]) -> None:
    y = np.zeros(600, np.int64)
    arms = one_arm({"frozen": y + 1, "aligned": y})
    before = arms.state()
    arms.weigh(np.array(numbers, np.int64), np.zeros(len(numbers), np.int64), 1.0)
    assert same(arms.state(), before)


def test_rows_that_left_the_window_are_not_taken_for_those_in_their_places() -> None:
    y = np.arange(100)
    arms = one_arm({"frozen": np.arange(WINDOW_ROWS), "aligned": np.full(WINDOW_ROWS, -1)})
    one_arm({"frozen": np.full(100, -1), "aligned": y}, WINDOW_ROWS, arms)
    before = arms.state()
    arms.weigh(np.arange(100), y, 1.0)
    assert same(arms.state(), before)
    arms.weigh(np.arange(WINDOW_ROWS, WINDOW_ROWS + 100), y, 1.0)
    assert arms.contests["aligned"].verdict == 1


def test_a_batch_larger_than_the_window_keeps_its_newest_rows() -> None:
    rows = WINDOW_ROWS + 300
    arms = one_arm({"frozen": np.arange(rows) + 1, "aligned": np.arange(rows)})
    arms.weigh(np.arange(rows - 100, rows), np.arange(rows - 100, rows), 1.0)
    assert arms.contests["aligned"].verdict == 1
    restored = Arms(classes=True, scale=1.0)
    restored.load(decode(encode(arms.state())))
    assert same(restored.state(), arms.state())


def test_an_arm_that_is_forgotten_begins_anew() -> None:
    y = np.zeros(600, np.int64)
    arms = one_arm({"frozen": y + 1, "aligned": y})
    arms.weigh(np.arange(300), y[:300], 1.0)
    arms.forget("aligned")
    arms.weigh(np.arange(300, 600), y[300:], 1.0)
    assert arms.contests["aligned"].verdict == 0


def test_values_are_compared_by_their_squared_errors_and_one_wild_label_counts_for_one() -> None:
    arms = Arms(classes=False, scale=1.0)
    arms.predicted(0, {"base": np.zeros(200, np.float32), "frozen": np.full(200, 1.0, np.float32),
                       "aligned": np.zeros(200, np.float32)})  # fmt: skip
    arms.weigh(np.array([0]), np.array([1e30]), 1.0)
    arms.weigh(np.arange(1, 200), np.linspace(-0.01, 0.01, 199), 1.0)
    assert arms.contests["aligned"].verdict == 1


# Recent rows.


def put(recent: RecentRows, first: int, count: int) -> None:
    numbers = torch.arange(first, first + count).float()[:, None]
    recent.put(first, numbers, numbers.expand(-1, 2))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.integers(0, 20_000), st.integers(1, 50))
def test_what_is_taken_is_what_was_put_under_that_number_or_nothing(sizes: list[int], asked: int, n: int) -> None:
    recent, end = RecentRows(), 0
    for size in sizes:
        put(recent, end, size)
        end += size
    numbers = np.arange(asked, asked + n)
    known = recent.take(numbers)
    assert (known is not None) == (max(0, end - RECENT_ROWS) <= asked and asked + n <= end)
    if known is not None:
        assert known[0][:, 0].tolist() == known[1][:, 0].tolist() == numbers.tolist()


def test_rows_from_before_a_gap_are_not_given() -> None:
    recent = RecentRows()
    put(recent, 0, 100)
    put(recent, 200, 100)
    assert recent.take(np.array([50])) is None and recent.take(np.array([150])) is None
    assert recent.take(np.array([-1])) is None and recent.take(np.zeros(0, np.int64)) is None
    known = recent.take(np.array([299, 200, 200]))
    assert known is not None and known[0][:, 0].tolist() == [299, 200, 200]


def test_wide_features_are_held_for_fewer_rows() -> None:
    recent, wide = RecentRows(), torch.zeros(64, 100_000)
    for first in range(0, 256, 64):
        recent.put(first, torch.zeros(64, 2), wide)
    assert recent.take(np.array([0])) is None and recent.take(np.array([255])) is not None


def test_a_restored_ring_goes_on_where_the_model_is() -> None:
    # A checkpoint comes back on the host; `meta` stands for a GPU, which refuses indices of tensors elsewhere.
    recent, restored = RecentRows(), RecentRows()
    put(recent, 0, 10)
    restored.load(decode(encode(recent.state())), torch.device("meta"))
    known = restored.take(np.array([2]))
    assert known is not None and known[0].device.type == known[1].device.type == "meta"
