from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from daemon.streams import simmodel
from daemon.streams.simulator import CHUNK, DAY, LIFE, AgeingArray

ONSET = {event.name: event.row for event in AgeingArray.schedule()}


@pytest.fixture(scope="module")
def array() -> AgeingArray:
    return AgeingArray()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return simmodel.train()


@pytest.fixture
def model(weights: dict[str, Tensor]) -> nn.Module:
    module = simmodel.build()
    module.load_state_dict(weights)
    return module.eval()


def accuracy(model: nn.Module, array: AgeingArray, start: int, stop: int) -> float:
    x, y = array.rows(start, stop - start)
    with torch.no_grad():
        return float((model(torch.from_numpy(x)).argmax(1).numpy() == y).mean())


def with_statistics_of(model: nn.Module, x: np.ndarray) -> nn.Module:
    """A copy whose normalisation layers have the statistics of these rows, which takes no labels."""
    adapted = copy.deepcopy(model).train()
    for module in adapted.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 1.0
    with torch.no_grad():
        adapted(torch.from_numpy(x))
    return adapted.eval()


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, 3 * LIFE),
    counts=st.lists(st.integers(0, 1_500), min_size=1, max_size=6),
    seed=st.integers(0, 2**64 - 1),
    ageing=st.booleans(),
)
def test_any_split_of_a_read_gives_the_same_rows(start: int, counts: list[int], seed: int, ageing: bool) -> None:
    whole_x, whole_y = AgeingArray(seed, ageing=ageing).rows(start, sum(counts))
    resumed = AgeingArray(seed, ageing=ageing)
    parts, at = [], start
    for count in counts:
        parts.append(resumed.rows(at, count))
        at += count
    assert np.array_equal(np.concatenate([x for x, _ in parts]), whole_x)
    assert np.array_equal(np.concatenate([y for _, y in parts]), whole_y)


@settings(max_examples=40, deadline=None)
@given(starts=st.lists(st.integers(0, 3 * LIFE), min_size=2, max_size=12))
def test_what_was_read_before_changes_no_row(starts: list[int]) -> None:
    wandering = AgeingArray()
    for start in starts:
        x, y = wandering.rows(start, 40)
        fresh_x, fresh_y = AgeingArray().rows(start, 40)
        assert np.array_equal(x, fresh_x)
        assert np.array_equal(y, fresh_y)


def test_another_process_reads_the_same_rows(array: AgeingArray) -> None:
    script = (
        "import sys; from daemon.streams.simulator import AgeingArray; x, y = AgeingArray().rows(5_000, 700); "
        "sys.stdout.buffer.write(x.tobytes() + y.tobytes())"
    )
    there = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout
    x, y = array.rows(5_000, 700)
    assert there == x.tobytes() + y.tobytes()


def test_rows_have_the_promised_shapes_and_types(array: AgeingArray) -> None:
    for x, y in (array.rows(700, 33), array.source_data(33)):
        assert x.shape == (33, array.features)
        assert y.shape == (33,)
        assert x.dtype == np.float32
        assert y.dtype == np.int64
    x, y = array.rows(700, 0)
    assert x.shape == (0, array.features)
    assert y.shape == (0,)


def test_a_reader_may_overwrite_what_it_got(array: AgeingArray) -> None:
    x, y = array.rows(0, CHUNK)
    kept_x, kept_y = x.copy(), y.copy()
    x.fill(np.nan)
    y.fill(-1)
    again_x, again_y = array.rows(0, CHUNK)
    assert np.array_equal(again_x, kept_x)
    assert np.array_equal(again_y, kept_y)


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 2**40), seed=st.integers(0, 2**64 - 1))
def test_values_are_finite_and_classes_are_in_range(start: int, seed: int) -> None:
    x, y = AgeingArray(seed).rows(start, 64)
    assert np.isfinite(x).all()
    assert np.abs(x).max() < 20
    assert set(y.tolist()) <= set(range(AgeingArray.classes))


def test_a_whole_life_is_finite(array: AgeingArray) -> None:
    x, _ = array.rows(0, LIFE)
    assert np.isfinite(x).all()


def test_every_window_of_500_rows_shows_all_classes(array: AgeingArray) -> None:
    _, y = array.rows(0, 2 * LIFE)
    for wanted in range(array.classes):
        seen = np.flatnonzero(y == wanted)
        gaps = np.diff(np.concatenate([[-1], seen, [len(y)]]))
        assert gaps.max() <= 500


def test_classes_come_in_runs_of_about_eight_rows(array: AgeingArray) -> None:
    _, y = array.rows(0, LIFE)
    mean_run = len(y) / (1 + np.count_nonzero(np.diff(y)))
    assert 7.0 < mean_run < 9.0


def test_seeds_lives_and_draws_differ(array: AgeingArray) -> None:
    reads = [
        array.rows(0, 64),
        array.rows(LIFE, 64),
        AgeingArray(8).rows(0, 64),
        array.source_data(64),
        array.source_data(64, draw=1),
    ]
    for i, (x, _) in enumerate(reads):
        for other, _ in reads[:i]:
            assert not np.isclose(x, other).all(axis=1).any()


def test_large_seeds_that_differ_by_one_differ() -> None:
    assert not np.array_equal(AgeingArray(2**64 - 1).rows(0, 8)[0], AgeingArray(2**64 - 2).rows(0, 8)[0])


def test_a_longer_draw_of_source_data_begins_with_the_shorter(array: AgeingArray) -> None:
    assert np.array_equal(array.source_data(2_000, draw=3)[0][:900], array.source_data(900, draw=3)[0])


def test_the_schedule_rises_through_the_lives_and_begins_calm() -> None:
    events = AgeingArray.schedule(3)
    rows = [event.row for event in events]
    assert rows == sorted(set(rows))
    assert rows[0] == 3_000
    assert rows[-1] == 3 * LIFE
    assert [event.name for event in events] == 3 * list(ONSET)
    assert all(event.description for event in events)


def test_nothing_ages_before_the_first_event(array: AgeingArray) -> None:
    calm = AgeingArray(ageing=False)
    first = ONSET["drift"]
    assert np.array_equal(array.rows(0, first)[0], calm.rows(0, first)[0])
    assert not np.array_equal(array.rows(first, CHUNK)[0], calm.rows(first, CHUNK)[0])


def test_the_fresh_array_after_a_replacement_reads_as_the_first_did(array: AgeingArray) -> None:
    days = 6 * DAY  # whole days, so that the daily cycle of humidity has the same share in all three means
    before = array.rows(0, days)[0].mean(axis=0)
    aged = array.rows(LIFE - days, days)[0].mean(axis=0)
    after = array.rows(LIFE, days)[0].mean(axis=0)
    assert np.abs(after - before).max() < 0.1
    assert np.abs(aged - before).max() > 0.5


def test_exactly_one_sensor_dies(array: AgeingArray) -> None:
    spread = array.rows(ONSET["dead-sensor"] + 1_000, 1_000)[0].std(axis=0)
    assert np.count_nonzero(spread < 0.2) == 1
    assert array.rows(ONSET["dead-sensor"] - 1_000, 1_000)[0].std(axis=0).min() > 0.2


def test_the_label_swap_changes_labels_and_no_reading() -> None:
    aged, calm = AgeingArray(), AgeingArray(ageing=False)
    start = ONSET["label-swap"]
    _, y = aged.rows(start - 500, LIFE + 500 - start + 500)
    _, unswapped = calm.rows(start - 500, LIFE + 500 - start + 500)
    exchanged = np.array([0, 2, 1, 3])
    assert np.array_equal(y[:500], unswapped[:500])
    assert np.array_equal(y[500:-500], exchanged[unswapped[500:-500]])
    assert np.array_equal(y[-500:], unswapped[-500:])


def test_a_fresh_array_is_classified_well(model: nn.Module, array: AgeingArray) -> None:
    assert accuracy(model, array, 0, ONSET["drift"]) >= 0.95
    assert accuracy(model, array, LIFE, LIFE + ONSET["drift"]) >= 0.95


def test_an_array_that_does_not_age_is_classified_well_for_ever(model: nn.Module) -> None:
    steady = AgeingArray(ageing=False)
    assert accuracy(model, steady, 5 * LIFE + 10_000, 5 * LIFE + 18_000) >= 0.95


def test_an_aged_array_defeats_the_frozen_model(model: nn.Module, array: AgeingArray) -> None:
    assert accuracy(model, array, ONSET["dead-sensor"] + 500, ONSET["label-swap"]) < 0.80


def test_new_statistics_repair_most_of_the_ageing_but_not_the_swap(model: nn.Module, array: AgeingArray) -> None:
    fresh = accuracy(model, array, 0, ONSET["drift"])
    start, swap = ONSET["dry-again"], ONSET["label-swap"]
    adapted = with_statistics_of(model, array.rows(start, swap - start)[0])
    lost = fresh - accuracy(model, array, start, swap)
    assert fresh - accuracy(adapted, array, start, swap) < 0.5 * lost
    assert accuracy(adapted, array, swap, swap + 1_000) < 0.60


def test_training_is_repeatable_and_leaves_the_global_random_state() -> None:
    torch.manual_seed(123)
    first = simmodel.train(3, rows=512, epochs=1)
    drawn = torch.rand(4)
    second = simmodel.train(3, rows=512, epochs=1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(123)
    assert torch.equal(drawn, torch.rand(4))


def test_the_classifier_head_reads_the_features() -> None:
    module = simmodel.build()
    head = module.get_submodule("classifier")
    assert isinstance(head, nn.Linear)
    assert (head.in_features, head.out_features) == (32, AgeingArray.classes)
    assert module(torch.zeros(2, AgeingArray.features)).shape == (2, AgeingArray.classes)


def test_the_simulator_needs_no_torch() -> None:
    script = "import sys; import daemon.streams.simulator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed is"):
        AgeingArray(seed)


@pytest.mark.parametrize(("start", "count"), [(-1, 5), (0, -5)])
def test_a_negative_read_is_refused(array: AgeingArray, start: int, count: int) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        array.rows(start, count)


def test_a_negative_draw_is_refused(array: AgeingArray) -> None:
    with pytest.raises(ValueError, match="draw is -1"):
        array.source_data(5, draw=-1)


@pytest.mark.parametrize(("rows", "batch"), [(100, 128), (100, 1)])
def test_training_refuses_a_batch_that_does_not_fit(rows: int, batch: int) -> None:
    with pytest.raises(ValueError, match="batch must be at least 2"):
        simmodel.train(rows=rows, batch=batch)
