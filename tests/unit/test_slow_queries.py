from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.features import FeatureTap
from adapters.slow.queries import POINT_WIDTH, REASONS, Chosen, choose, sketch
from tests.models import gas

torch.set_num_threads(1)


def blobs(sizes: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows in as many far-away clusters, shuffled, and the cluster of each."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = rng.normal(size=(len(sizes), 5)) * 20
    return centres[which] + rng.normal(size=(len(which), 5)), which


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 40), width=st.integers(0, 4), n=st.integers(0, 50))
def test_whatever_the_numbers_are_n_different_usable_rows_come_with_their_chances(
    data: st.DataObject, rows: int, width: int, n: int
) -> None:
    points = np.array(data.draw(st.lists(numbers, min_size=rows * width, max_size=rows * width)))
    points = points.reshape(rows, width)
    doubt = np.array(data.draw(st.lists(numbers, min_size=rows, max_size=rows)))
    groups = np.array(data.draw(st.lists(numbers, min_size=rows, max_size=rows)))
    share = data.draw(st.floats(0, 1))
    found = choose(points, doubt, n, groups=groups, seed=3, doubt_share=share)
    usable = np.flatnonzero(np.isfinite(points).all(1))
    assert len(found.rows) == len(found.why) == min(n, len(usable))
    assert set(found.rows.tolist()) <= set(usable.tolist())
    assert (np.diff(found.rows) > 0).all()
    assert ((found.probability > 0) & (found.probability <= 1)).all()
    assert set(found.why) <= set(REASONS)
    again = choose(points, doubt, n, groups=groups, seed=3, doubt_share=share)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("doubt_share", [0.0, 0.25, 0.9])
def test_each_row_is_chosen_as_often_as_its_chance_says(doubt_share: float) -> None:
    points, groups = blobs((30, 20, 10))
    doubt = np.random.default_rng(1).random(60) ** 4
    draws, n = 1_500, 9
    counts, chances = np.zeros(60), np.full(60, np.nan)
    for seed in range(draws):
        found = choose(points, doubt, n, groups=groups, seed=seed, doubt_share=doubt_share)
        counts[found.rows] += 1
        chances[found.rows] = found.probability
    share = n * ((1 - doubt_share) / 60 + doubt_share * doubt / doubt.sum())
    if share.max() < 1:
        assert np.allclose(chances, share)
    assert chances.sum() == pytest.approx(n)
    # Five standard errors of a share of that many draws.
    assert (np.abs(counts / draws - chances) <= 5 * np.sqrt(chances * (1 - chances) / draws) + 1e-12).all()


def test_the_error_estimated_on_the_chosen_rows_is_right_on_average_and_that_of_the_doubtful_ones_is_not() -> None:
    points, groups = blobs((120, 60, 20))
    rng = np.random.default_rng(2)
    doubt = rng.random(200)
    wrong = rng.random(200) < doubt * 0.5
    estimates, plain = [], []
    for seed in range(600):
        found = choose(points, doubt, 20, groups=groups, seed=seed, doubt_share=0.6)
        estimates.append((wrong[found.rows] / found.probability).sum() / 200)
        plain.append(wrong[found.rows].mean())
    spread = 4 * np.std(estimates) / np.sqrt(600)
    assert abs(np.mean(estimates) - wrong.mean()) <= spread
    assert np.mean(plain) - wrong.mean() > spread


def test_the_clusters_get_their_shares_of_the_questions_far_more_evenly_than_from_blind_draws() -> None:
    off, off_blindly = 0.0, 0.0
    for seed in range(100):
        points, which = blobs((120, 60, 20), seed)
        found = choose(points, np.zeros(200), 10, seed=seed)
        blind = np.random.default_rng(seed).choice(200, 10, replace=False)
        off += np.square(np.bincount(which[found.rows], minlength=3) - [6, 3, 1]).sum()
        off_blindly += np.square(np.bincount(which[blind], minlength=3) - [6, 3, 1]).sum()
    assert off < off_blindly / 3


def test_the_questions_are_spread_over_the_window_where_only_time_tells_rows_apart() -> None:
    for seed in range(50):
        found = choose(np.zeros((200, 3)), np.zeros(200), 10, seed=seed)
        assert np.bincount(found.rows // 20, minlength=10).tolist() == [1] * 10


def test_far_out_rows_get_no_more_than_their_share() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 6))
    points[:10] *= 1e6
    for seed in range(50):
        found = choose(points, np.zeros(200), 20, seed=seed)
        assert (found.rows < 10).sum() <= 4
        assert found.why == ["representative"] * 20


def test_doubtful_rows_are_asked_for_more_often_and_say_so() -> None:
    points, _ = blobs((200,))
    doubt = np.where(np.arange(200) % 20 == 0, 0.9, 0.01)
    counts = {"uncertain": 0, "representative": 0}
    for seed in range(100):
        found = choose(points, doubt, 10, seed=seed, doubt_share=0.5)
        for row, why in zip(found.rows.tolist(), found.why, strict=True):
            counts[why] += 1
            assert (why == "uncertain") == (row % 20 == 0)
    # One row in twenty, and nearly half of the questions.
    assert 400 < counts["uncertain"] < 500


def test_no_doubt_at_all_is_a_doubt_about_all_alike() -> None:
    points, _ = blobs((50,))
    found = choose(points, np.zeros(50), 5, seed=0, doubt_share=1.0)
    assert np.allclose(found.probability, 0.1)
    assert np.allclose(choose(points, np.full(50, np.nan), 5, seed=0, doubt_share=1.0).probability, 0.1)


@pytest.mark.parametrize(
    ("points", "doubt", "options", "problem"),
    [
        (np.zeros((3, 2, 1)), np.zeros(3), {}, r"points has shape \(3, 2, 1\)"),
        (np.zeros((3, 2)), np.zeros(4), {}, r"doubt \(4,\)"),
        (np.zeros((3, 2)), np.zeros(3), {"groups": [1]}, r"groups has shape \(1,\)"),
        (np.zeros((3, 2)), np.zeros(3), {"doubt_share": 1.5}, "doubt_share 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(
    points: np.ndarray, doubt: np.ndarray, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        choose(points, doubt, 1, seed=0, **options)


def test_a_sketch_is_short_keeps_distances_about_and_is_always_the_same() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3, 16, 17)).astype(np.float32)
    short = sketch(x)
    assert short.shape == (60, POINT_WIDTH)
    assert np.array_equal(short, sketch(x.copy()))
    ratio = [np.square(short[a] - short[a + 1]).sum() / np.square(x[a] - x[a + 1]).sum() for a in range(59)]
    assert np.mean(ratio) == pytest.approx(1, abs=0.15)
    assert np.array_equal(sketch(x[:, 0, :2, :3]), x[:, 0, :2, :3].reshape(60, 6))
    assert not np.isfinite(sketch(np.full((1, 100), 3e38, np.float32))).all()


def test_on_the_ageing_gas_sensors_a_head_learns_more_from_these_labels_than_from_blind_ones() -> None:
    """Wrong answers, about the rest of each window, of a head that knows a few exemplars and a tenth of the window."""
    if not (gas.data_folder() / "gas_drift.npz").is_file():
        pytest.skip(f"gas_drift.npz is not in {gas.data_folder()}; set HOMEOSTAT_DATA to the folder of the data")
    x, y, segment = gas.load()
    trained = np.flatnonzero(segment == 1)
    model = gas.train(x[trained], y[trained])
    with FeatureTap(model) as tap, torch.inference_mode():
        p = model(torch.from_numpy(x)).softmax(1).numpy()
        assert tap.features is not None
        features = tap.features.numpy().astype(np.float64)
    known = features[trained]
    features = (features - known.mean(0)) / known.std(0)
    exemplars = np.concatenate([trained[y[trained] == label][:8] for label in range(6)])
    wrong = {"blind": 0, "asked": 0}
    stream = np.flatnonzero(segment > 1)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for window in np.split(stream[: 31 * 200], 31):
            doubt, groups = 1 - p[window].max(1), p[window].argmax(1)
            found: Chosen = choose(features[window], doubt, 20, groups=groups, seed=[seed, int(window[0])])
            for name, rows in (("asked", found.rows), ("blind", rng.choice(200, 20, replace=False))):
                learnt = np.concatenate((exemplars, np.repeat(window[rows], 10)))
                means = np.stack([features[learnt[y[learnt] == label]].mean(0) for label in range(6)])
                rest = np.setdiff1d(window, window[rows])
                away = np.square(features[rest][:, None] - means).sum(2)
                wrong[name] += int((away.argmin(1) != y[rest]).sum())
    assert wrong["asked"] < 0.95 * wrong["blind"], wrong
