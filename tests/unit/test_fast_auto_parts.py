"""What `auto` is made of: state machines over rows, each of which goes on from a stored state to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adapters.fast.core.arms import ARMS, Arms
from adapters.fast.core.class_distance import NearerToSource
from adapters.fast.core.class_runs import SURE, ClassRuns
from adapters.fast.core.contest import Contest
from adapters.fast.core.dependence import RowDependence
from adapters.fast.core.effective_rows import BLOCK_ROWS, EffectiveRows
from adapters.fast.core.recent import RecentRows
from adapters.fast.core.runs_arm import RunsArm
from adapters.fast.core.seen import F64, RunningMean
from adapters.fast.core.suspicion import Suspicion
from adapters.features import FeatureTap
from daemon.checkpoint import decode, encode
from tests.check_adapter import same
from tests.unit import auto_streams, blobs
from tests.unit.auto_streams import K, distance, sorted_classes

ROWS = 400


one_thread = auto_streams.one_thread


def calibrated(y: NDArray[np.int64], seed: int, apart: float = 1.5, bias: float = 0.0) -> F64:
    """(n, K) posteriors of unit Gaussians, one a class at the corners of a simplex, under equal shares.

    ``bias`` is added to the log odds of class 0, which then is no posterior any more.
    """
    x = np.random.default_rng(seed).normal(size=(len(y), K)) + apart * np.eye(K)[y]
    z = apart * x + bias * np.eye(K)[0]
    p: F64 = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@dataclass
class Machine:
    """A part of `auto` and how the rows of one stream are given to it; what it returns is compared too."""

    make: Callable[[], Any]
    feed: Callable[[Any, slice, int], Any]
    """Rows of the stream with this seed."""
    load: Callable[[Any, dict[str, Any]], None] = lambda part, state: part.load(state)


def _p(rows: slice, seed: int) -> F64:
    return calibrated(sorted_classes(ROWS, 1 + seed % 40, seed), seed)[rows]


def _values(rows: slice, seed: int, scale: float = 1.0) -> F64:
    return scale * np.random.default_rng(seed).normal(size=(ROWS, 2))[rows]


def _contest(contest: Contest, rows: slice, seed: int) -> None:
    contest.update(np.arange(ROWS)[rows], np.clip(_values(rows, seed)[:, 0], -1, 1), 1.0 + seed % 3)


def _arms(arms: Arms, rows: slice, seed: int) -> None:
    answers = np.random.default_rng(seed).integers(0, K, (len(ARMS), ROWS)).astype(np.float32)
    arms.predicted(rows.start, {name: answers[row, rows] for row, name in enumerate(ARMS)})
    arms.weigh(np.arange(rows.start, rows.stop), sorted_classes(ROWS, 3, seed)[rows], 1.0)


def _recent(recent: RecentRows, rows: slice, seed: int) -> Any:
    values = torch.from_numpy(_values(rows, seed)).float()
    recent.put(rows.start, values[:, :1], values)
    known = recent.take(np.arange(max(0, rows.stop - 20), rows.stop))
    return None if known is None else list(known)


def _dependence(dependence: RowDependence, rows: slice, seed: int) -> float:
    dependence.update(_values(rows, seed).astype(np.float32), sorted_classes(ROWS, 20, seed).astype(np.float32)[rows])
    return dependence.value


def _runs_arm(arm: RunsArm, rows: slice, seed: int) -> list[Any]:
    x, y = blobs.rows(ROWS, seed % 5)
    model = blobs.trained()
    with torch.inference_mode(), FeatureTap(model) as tap:
        p, features = model(x[y.argsort()][rows]).softmax(1).double().numpy(), tap.features
    arm.look(5.0 if rows.start % 2 else 1.0)
    return [arm.ratios(p, features, p.argmax(1).astype(np.float32)), arm.believed(1.0), arm.looking]


def _runs(runs: ClassRuns, rows: slice, seed: int) -> F64:
    return runs.update(_p(rows, seed))


MACHINES = {
    "effective rows": Machine(lambda: EffectiveRows(K), lambda part, rows, seed: part.update(_p(rows, seed))),
    "class runs": Machine(lambda: ClassRuns(np.full(K, 1 / K)), _runs),
    "dependence": Machine(RowDependence, _dependence),
    "arm of runs": Machine(lambda: RunsArm(np.full(blobs.CLASSES, 1 / blobs.CLASSES), distance()), _runs_arm),
    "nearer": Machine(NearerToSource, lambda part, rows, seed: part.update(*_values(rows, seed, 0.1).T)),
    "contest": Machine(Contest, _contest),
    "arms": Machine(lambda: Arms(classes=True, scale=1.0), _arms),
    "suspicion": Machine(
        lambda: Suspicion(distance()), lambda part, rows, seed: part.update(np.abs(_values(rows, seed)[:, 0]))
    ),
    "recent rows": Machine(RecentRows, _recent, lambda part, state: part.load(state, torch.device("cpu"))),
    "running mean": Machine(lambda: RunningMean(50.0), lambda part, rows, seed: part.update(_values(rows, seed)[:, 0])),
}
CUTS = st.lists(st.integers(0, ROWS), min_size=1, max_size=6).map(sorted)


def spans(cuts: list[int]) -> list[slice]:
    ends = [*cuts, ROWS]
    return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False) if stop > start]


@pytest.mark.parametrize("name", MACHINES)
@settings(max_examples=15, deadline=None)
@given(cuts=CUTS, restart=st.integers(0, 6), seed=st.integers(0, 1000))
def test_a_state_from_the_middle_goes_on_to_the_bit(name: str, cuts: list[int], restart: int, seed: int) -> None:
    machine = MACHINES[name]
    through = again = machine.make()
    for number, rows in enumerate(spans(cuts)):
        if number == restart:
            stored = encode(through.state())
            again = machine.make()
            machine.load(again, decode(stored))
            assert same(again.state(), decode(stored))
        expected = machine.feed(through, rows, seed)
        if again is not through:
            assert same(machine.feed(again, rows, seed), expected)
    assert same(again.state(), through.state())


@pytest.mark.parametrize("name", ["effective rows", "class runs", "nearer", "recent rows"])
@settings(max_examples=15, deadline=None)
@given(cuts=CUTS, seed=st.integers(0, 1000))
def test_how_the_rows_are_cut_into_calls_does_not_matter_to_the_bit(name: str, cuts: list[int], seed: int) -> None:
    machine = MACHINES[name]
    whole, parted = machine.make(), machine.make()
    outputs = machine.feed(whole, slice(0, ROWS), seed)
    parts = [machine.feed(parted, rows, seed) for rows in spans(cuts)]
    assert same(parted.state(), whole.state())
    if name == "class runs":
        assert same(np.concatenate(parts), outputs)


@settings(max_examples=15, deadline=None)
@given(cuts=CUTS, seed=st.integers(0, 1000))
def test_a_contest_is_the_same_up_to_rounding_however_the_labels_are_cut(cuts: list[int], seed: int) -> None:
    whole, parted = Contest(), Contest()
    numbers, benefit = np.arange(ROWS), np.clip(_values(slice(0, ROWS), seed)[:, 0] * 0.1, -1, 1)
    whole.update(numbers, benefit, 2.0)
    for rows in spans(cuts):
        parted.update(numbers[rows], benefit[rows], 2.0)
    one, other = whole.state(), parted.state()
    for name in ("verdict", "first", "total", "count"):
        assert one[name] == other[name]
    assert one["better"]["log_value"] == pytest.approx(other["better"]["log_value"], abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(0, 1000))
def test_a_running_mean_is_the_mean_until_its_memory_is_full(sizes: list[int], seed: int) -> None:
    mean, rng = RunningMean(1e6), np.random.default_rng(seed)
    parts = [rng.normal(size=size) for size in sizes]
    for part in parts:
        mean.update(np.append(part, np.nan))
    assert mean.value == pytest.approx(np.concatenate(parts).mean()) and mean.rows == sum(sizes)


# Effective rows.


@pytest.mark.parametrize("seed", range(5))
def test_independent_rows_are_worth_themselves_and_long_runs_one_row_a_block(seed: int) -> None:
    single, runs = EffectiveRows(K), EffectiveRows(K)
    single.update(calibrated(sorted_classes(2000, 1, seed), seed))
    runs.update(calibrated(sorted_classes(2000, 50, seed), seed, apart=4.0))
    assert single.value < 2.0 and runs.value > 10.0


def test_a_slow_change_of_the_whole_stream_is_not_taken_for_runs() -> None:
    effective, rng = EffectiveRows(1), np.random.default_rng(1)
    effective.update(rng.normal(size=(3000, 1)) + np.linspace(0, 5, 3000)[:, None])
    assert effective.value < 2.0


def test_constant_rows_and_rows_that_are_not_finite_leave_an_estimate() -> None:
    effective = EffectiveRows(K)
    effective.update(np.full((500, K), 1 / K))
    before = effective.state()
    effective.update(np.full((BLOCK_ROWS, K), np.nan))
    assert effective.value == 1.0 and same(effective.state(), before)


def test_effective_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="not \\(n, 4\\)"):
        EffectiveRows(4).load(EffectiveRows(K).state())


# Runs of classes.


def runs_after(p_BK: F64) -> tuple[float, float]:
    """Probability of runs at the end, and the largest on the way."""
    runs, largest = ClassRuns(np.full(p_BK.shape[1], 1 / p_BK.shape[1])), 0.0
    for part in np.array_split(p_BK, max(1, len(p_BK) // 32)):
        runs.update(part)
        largest = max(largest, runs.probability)
    return runs.probability, largest


def test_independent_rows_are_not_taken_for_runs_over_20_seeds() -> None:
    taken = [runs_after(calibrated(sorted_classes(1000, 1, seed), seed))[1] >= SURE for seed in range(20)]
    assert sum(taken) == 0


def test_a_model_that_comes_to_prefer_a_class_is_not_taken_for_runs_over_20_seeds() -> None:
    taken = []
    for seed in range(20):
        y = sorted_classes(1000, 1, seed)
        p = np.concatenate([calibrated(y[:400], seed), calibrated(y[400:], seed + 100, bias=3.0)])
        taken.append(runs_after(p)[1] >= SURE)
    assert sum(taken) <= 1


@pytest.mark.parametrize("length", [10, 30, 100])
def test_runs_are_found_and_their_prior_makes_fewer_errors(length: int) -> None:
    fewer = 0
    for seed in range(5):
        y = sorted_classes(1500, length, seed)
        p = calibrated(y, seed)
        ratios = ClassRuns(np.full(K, 1 / K)).update(p)
        assert ratios.any()
        plain, helped = (p.argmax(1) != y).mean(), ((np.log(p) + ratios).argmax(1) != y).mean()
        fewer += helped < 0.8 * plain
    assert fewer == 5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, ROWS - 1))
def test_what_runs_say_of_a_row_depends_on_the_rows_before_it_alone(seed: int, row: int) -> None:
    p, other = _p(slice(0, ROWS), seed), _p(slice(0, ROWS), seed)
    other[row:] = other[row:][::-1]
    one = ClassRuns(np.full(K, 1 / K)).update(p)
    two = ClassRuns(np.full(K, 1 / K)).update(other)
    assert same(one[: row + 1], two[: row + 1])


def test_rows_that_are_not_finite_say_nothing_of_runs() -> None:
    with_bad, without = ClassRuns(np.full(K, 1 / K)), ClassRuns(np.full(K, 1 / K))
    p = _p(slice(0, ROWS), 30)
    bad = np.insert(p, 200, np.nan, axis=0)
    ratios = with_bad.update(bad)
    assert not ratios[200].any() and same(np.delete(ratios, 200, axis=0), without.update(p))
    assert same(with_bad.state(), without.state())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certain_predictions_and_a_source_without_a_class_keep_runs_finite(value: float) -> None:
    runs = ClassRuns(np.array([1.0, 1e-6, 1e-6]))
    for kind in (0, 1, 0, 2):
        p = np.zeros((200, K))
        p[:, kind] = value or 1e-300  # a row of zeros but for one tiny value, as an underflow gives
        assert np.isfinite(runs.update(p)).all()
    assert 0.0 <= runs.probability <= 1.0


def test_runs_of_other_classes_are_refused_and_nothing_changes() -> None:
    runs = ClassRuns(np.full(4, 0.25))
    before = runs.state()
    with pytest.raises(ValueError, match="runs of"):
        runs.load(ClassRuns(np.full(K, 1 / K)).state())
    assert same(runs.state(), before)


def test_looking_begins_late_and_ends_late_and_an_end_forgets() -> None:
    machine, seen = MACHINES["arm of runs"], []
    arm = machine.make()
    for design_effect in (1.5, 2.5, 1.5, 1.2, 1.5):
        arm.look(design_effect)
        seen.append(arm.looking)
        if arm.looking:
            p = np.full((100, blobs.CLASSES), 1 / blobs.CLASSES)
            arm.ratios(p, torch.zeros(100, 16), np.zeros(100, np.float32))
    assert seen == [False, True, True, False, False]
    assert same(arm.state(), machine.make().state())


# Neighbouring rows that are alike.


def series(rows: int, memory: float, seed: int) -> NDArray[np.float32]:
    """(rows, 8) unit Gaussians, each feature an autoregression with this memory."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, 8))
    for row in range(1, rows):
        z[row] = memory * z[row - 1] + np.sqrt(1 - memory**2) * z[row]
    return z.astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_dependence_tells_a_series_from_rows_of_a_run_whatever_moved_the_class(seed: int, offset: float) -> None:
    y = sorted_classes(1500, 60, seed).astype(np.float32)
    values = []
    for memory in (0.0, 0.7):
        dependence = RowDependence()
        for part, classes in zip(np.array_split(series(1500, memory, seed), 30), np.array_split(y, 30), strict=True):
            dependence.update(part + np.float32(offset), classes)
        values.append(dependence.value)
    assert abs(values[0]) < 0.12 and values[1] > 0.5


@pytest.mark.parametrize("size", [1, 7, 64])
def test_dependence_hangs_little_on_how_rows_are_cut(size: int) -> None:
    whole, parted, z, y = RowDependence(), RowDependence(), series(600, 0.5, 3), np.zeros(600, np.float32)
    whole.update(z, y)
    for first in range(0, 600, size):
        parted.update(z[first : first + size], y[first : first + size])
    assert parted.value == pytest.approx(whole.value, abs=0.06)


def test_dependence_says_nothing_of_few_pairs_nor_breaks_on_rows_that_are_not_finite() -> None:
    dependence = RowDependence()
    dependence.update(series(50, 0.9, 1), np.zeros(50, np.float32))
    assert np.isnan(dependence.value)
    dependence.update(np.full((200, 8), np.inf, np.float32), np.zeros(200, np.float32))
    assert np.isfinite(dependence.value)
