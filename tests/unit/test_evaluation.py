"""Replays: order, delays, what is bit-equal, what the baselines do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daemon.assembly import assemble
from daemon.bundle import Bundle, open_bundle
from daemon.evaluation.answers import Frozen, same_as_frozen
from daemon.evaluation.baselines import RefusedError, replay_baseline
from daemon.evaluation.measure import Backwards
from daemon.evaluation.recording import Clock, ReplayLabels, ReplaySource, revealed
from daemon.evaluation.replay import Plan, Recording, Replayed, replay
from daemon.records import Labels
from daemon.settings import Settings
from tests.unit.worlds import FACTORY, MemoryLabels, MemorySink, bundle, settings, source_rows

ROWS, CHANGE = 2_592, 1_000
PLAN = Plan(batch_rows=32, delay=100)


def stream(rows: int = ROWS, *, shift: float = 0.0, seed: int = 3) -> Recording:
    """Source rows, which from row `CHANGE` on are moved and have their classes exchanged."""
    x, y = source_rows(rows, seed=seed)
    labels = y.astype(np.int64)
    if shift:
        x[CHANGE:] += shift
        labels[CHANGE:] = (labels[CHANGE:] + 1) % 3
    return Recording(x=x, y=labels, times_s=np.arange(rows, dtype=np.float64), changes=(CHANGE,))


@pytest.fixture(scope="module")
def packed() -> Bundle:
    return open_bundle(bundle(), FACTORY)


@pytest.fixture
def given(tmp_path: Path) -> Settings:
    return settings(tmp_path)


def run(name: str, given: Settings, packed: Bundle, recording: Recording, plan: Plan = PLAN, **more: Any) -> Replayed:
    if name == "homeostat":
        return replay(given, packed, recording, plan, **more)
    return replay_baseline(name, given, packed, recording, plan, **more)


@pytest.mark.parametrize("name", ["homeostat", "blind copy", "periodic refit", "error_memory"])
def test_a_label_changes_no_answer_before_its_time(name: str, given: Settings, packed: Bundle) -> None:
    recording = stream(shift=2.0)
    other = recording.y.copy()
    turned = 1_050
    other[turned:] = (other[turned:] + 1) % 3
    answers = [
        run(name, given, packed, each, refit_rows=100) if name == "periodic refit" else run(name, given, packed, each)
        for each in (recording, replace(recording, y=other))
    ]
    # The first batch that begins more than the delay after the row whose label differs.
    first = next(start for start in range(0, ROWS, PLAN.batch_rows) if start - PLAN.delay > turned)
    for column in ("prediction", "confidence"):
        one, two = (getattr(each, column) for each in answers)
        np.testing.assert_array_equal(one[:first], two[:first])
    differs = answers[0].prediction[first:] != answers[1].prediction[first:]
    assert differs.any(), "labels have no effect at all: nothing was tested"


def test_a_label_is_known_when_the_row_a_delay_later_is_answered() -> None:
    clock = Clock(stream(50), Plan(delay=10))
    assert [clock.due(answered).tolist() for answered in (5, 10, 11, 14)] == [[], [], [0], [1, 2, 3]]
    immediate = Clock(stream(50), Plan(delay=0))
    assert immediate.due(4).tolist() == [0, 1, 2, 3], "with no delay at all it still follows its own answer"


def test_labels_keep_their_delay_whatever_the_times_say() -> None:
    recording = replace(stream(50), times_s=np.zeros(50))
    labels = ReplayLabels(recording, Plan(delay=10))
    labels.answered(10)
    assert labels.at_end() and not len(labels.poll())
    labels.answered(12)
    assert not labels.at_end() and labels.poll().ids == ["0", "1"]


def test_fewer_labels_are_among_the_more_and_unknown_ones_never_come() -> None:
    recording = stream()
    recording.y[:200] = -1
    few, many = (revealed(recording, Plan(label_share=share, seed=5)) for share in (0.1, 0.4))
    assert not few[~many].any() and few.sum() == pytest.approx(240, abs=50) and many.sum() > 3 * few.sum()
    assert not many[:200].any()
    assert (revealed(recording, Plan(label_share=0.4, seed=6)) != many).any()
    assert revealed(recording, Plan()).sum() == ROWS - 200


def test_a_plan_or_a_recording_that_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="label_share=1.5"):
        Plan(label_share=1.5)
    with pytest.raises(ValueError, match="5 rows of x with 4 of y"):
        Recording(x=np.zeros((5, 4), np.float32), y=np.zeros(4, np.int64), times_s=np.zeros(5))


def test_records_carry_no_label() -> None:
    raw = ReplaySource(stream()).batch(slice(0, 32))
    assert raw.batch is not None and set(raw.batch.y) == {None}


def test_in_a_steady_world_all_answers_are_the_frozen_models_to_the_bit(given: Settings, packed: Bundle) -> None:
    result = run("homeostat", given, packed, stream(640))
    assert result.same.all() and not result.adapted.any() and not result.backward.any()
    assert set(result.states) == {"steady"} and len(result.states) == 640 / PLAN.batch_rows
    assert result.source_error == result.frozen_source_error


def test_one_bit_is_a_difference(given: Settings, packed: Bundle) -> None:
    frozen = run("frozen", given, packed, stream())
    moved = replace(frozen, confidence=frozen.confidence.copy())
    moved.confidence[7] = np.nextafter(moved.confidence[7], np.float32(2))
    assert frozen.same.all()
    assert np.flatnonzero(~same_as_frozen(moved, frozen)).tolist() == [7]


def test_what_adapts_is_not_called_the_same(given: Settings, packed: Bundle) -> None:
    result = run("homeostat", given, packed, stream(shift=2.0))
    assert result.adapted.any() and not result.same[result.adapted].all()
    assert result.same[~result.adapted].all()
    assert any("decision" in text for _, text in result.decisions)
    assert all(row % PLAN.batch_rows == PLAN.batch_rows - 1 for row, _ in result.decisions)


def test_a_replay_is_the_same_every_time(given: Settings, packed: Bundle) -> None:
    first, second = (run("homeostat", given, packed, stream(shift=2.0)) for _ in range(2))
    np.testing.assert_array_equal(first.prediction, second.prediction)
    np.testing.assert_array_equal(first.confidence, second.confidence)
    assert first.decisions == second.decisions and first.states == second.states


def test_the_daemon_itself_gives_the_same_answers(tmp_path: Path, given: Settings, packed: Bundle) -> None:
    recording = stream(shift=2.0)
    slow = {**given.slow.model_dump(), "inline": True}
    worker = assemble(settings(tmp_path, slow=slow, labels=f"file:{tmp_path / 'labels.jsonl'}"))
    sink = worker.loop.sink = MemorySink()
    source = ReplaySource(recording)
    for start in range(0, ROWS, PLAN.batch_rows):
        known = np.arange(max(0, start - PLAN.delay), max(0, start + PLAN.batch_rows - PLAN.delay))
        late = Labels([str(row) for row in known], recording.y[known].tolist(), [float("-inf")] * len(known))
        worker.loop.labels = MemoryLabels(late)
        worker.loop.process(source.batch(slice(start, start + PLAN.batch_rows)))
    result = run("homeostat", given, packed, recording)
    assert [answer["y"] for answer in sink.answers] == result.prediction.astype(int).tolist()
    assert [answer["version"] > 0 for answer in sink.answers] == [
        bool(each) for each in result.adapted & np.array([answer["version"] > 0 for answer in sink.answers])
    ]


def test_without_labels_the_daemon_has_no_label_stream(tmp_path: Path, packed: Bundle) -> None:
    recording, plan = stream(shift=2.0), replace(PLAN, label_share=0.0)
    unlabelled = settings(tmp_path)
    worker = assemble(unlabelled)
    sink = worker.loop.sink = MemorySink()
    source = ReplaySource(recording)
    for start in range(0, ROWS, PLAN.batch_rows):
        worker.loop.process(source.batch(slice(start, start + PLAN.batch_rows)))
    result = run("homeostat", unlabelled, packed, recording, plan)
    assert [answer["y"] for answer in sink.answers] == result.prediction.astype(int).tolist()
    other = run("homeostat", unlabelled, packed, replace(recording, y=(recording.y + 1) % 3), plan)
    np.testing.assert_array_equal(result.confidence, other.confidence)


def test_the_blind_copy_answers_with_the_newest_label_that_is_known(given: Settings, packed: Bundle) -> None:
    recording = stream()
    result = run("blind copy", given, packed, recording)
    newest = np.arange(ROWS) // 32 * 32 - PLAN.delay - 1
    expected = np.where(newest >= 0, recording.y[newest.clip(0)], result.prediction[0])
    np.testing.assert_array_equal(result.prediction, expected.astype(np.float32))
    assert result.source_error is None


def test_the_periodic_refit_learns_what_the_labels_say(given: Settings, packed: Bundle) -> None:
    recording = stream(3_200, shift=2.0)
    result = run("periodic refit", given, packed, recording, refit_rows=200)
    frozen = run("frozen", given, packed, recording)
    late = slice(2_400, None)
    assert (result.prediction != recording.y)[late].mean() < (frozen.prediction != recording.y)[late].mean() - 0.2
    first_fit = next(start for start in range(0, 3_200, 32) if start - PLAN.delay >= 200)
    assert result.same[:first_fit].all() and not result.same[first_fit:].all()
    assert result.slow_seconds > 0 and not result.backward.any(), "it learns beside the stream"


def test_backward_passes_are_counted_not_declared(given: Settings, packed: Bundle) -> None:
    recording = stream(320)
    assert run("tent", given, packed, recording).backward.all()
    assert not run("norm", given, packed, recording).backward.any()
    before = torch.autograd.backward, torch.autograd.grad
    counter, leaf = Backwards(), torch.ones(2, requires_grad=True)
    with counter.counting():
        (leaf * 2).sum().backward()
        torch.autograd.grad((leaf * 3).sum(), leaf)
        with counter.paused():
            (leaf * 2).sum().backward()
    assert counter.count == 2 and before == (torch.autograd.backward, torch.autograd.grad)


def test_a_method_that_can_not_serve_the_model_says_why(given: Settings, packed: Bundle) -> None:
    with pytest.raises(RefusedError, match="rna can't serve this model: .*pack"):
        run("rna", given, packed, stream(64))


@pytest.mark.parametrize("name", ["homeostat", "frozen", "blind copy", "norm"])
def test_rows_that_are_not_finite_are_not_answered_by_anybody(name: str, given: Settings, packed: Bundle) -> None:
    recording = stream(320)
    recording.x[[3, 64, 65]] = np.nan
    result = run(name, given, packed, recording)
    assert np.flatnonzero(np.isnan(result.prediction)).tolist() == [3, 64, 65]
    wrong = Frozen(given, packed).loss(result.prediction, recording.y)
    assert wrong[[3, 64, 65]].tolist() == [1.0, 1.0, 1.0]


def test_being_asked_changes_nothing(given: Settings, packed: Bundle) -> None:
    recording = stream(shift=2.0)
    asks = {row: np.arange(row + 1, row + 200) for row in (319, 959, 1_599)}
    for name in ("homeostat", "error_memory", "lame"):
        asked, plain = (run(name, given, packed, recording, asks=each) for each in (asks, None))
        np.testing.assert_array_equal(asked.confidence, plain.confidence)
        np.testing.assert_array_equal(asked.prediction, plain.prediction)
        assert sorted(asked.asked) == sorted(asks)
        assert all(np.isfinite(asked.asked[row]).all() for row in asks)
    frozen = run("frozen", given, packed, recording, asks=asks)
    assert all((frozen.asked[row] == frozen.prediction[asks[row]]).all() for row in asks)


def test_what_is_asked_is_answered_by_what_serves_then(given: Settings, packed: Bundle) -> None:
    recording = stream(shift=2.0)
    result = run("homeostat", given, packed, recording, asks={ROWS - 33: np.arange(ROWS - 32, ROWS)})
    frozen = run("frozen", given, packed, recording)
    last = slice(ROWS - 32, None)
    assert (result.prediction[last] != frozen.prediction[last]).any(), "the world was to be changed enough to adapt to"
    assert (result.asked[ROWS - 33] == result.prediction[last]).mean() > 0.9


def test_the_bundle_is_left_as_it_was(given: Settings, packed: Bundle) -> None:
    before = {name: value.clone() for name, value in packed.model.state_dict().items()}
    for name in ("homeostat", "periodic refit", "tent"):
        run(name, given, packed, stream(shift=2.0))
    assert all(torch.equal(before[name], value) for name, value in packed.model.state_dict().items())
    assert not packed.model[3]._forward_hooks and not packed.model[3]._forward_pre_hooks  # type: ignore[index]


def test_a_regression_is_replayed_too(tmp_path: Path) -> None:
    packed = open_bundle(bundle("regression"), "tests.unit.worlds:build_regression")
    given = settings(tmp_path, "regression")
    x, y = source_rows(ROWS, seed=3, task="regression")
    recording = Recording(x=x, y=y, times_s=np.arange(ROWS, dtype=np.float64))
    twin = Frozen(given, packed)
    for name in ("homeostat", "frozen", "blind copy", "periodic refit"):
        result = run(name, given, packed, recording)
        loss = twin.loss(result.prediction, y)
        assert loss.mean() < 0.2 if name != "blind copy" else loss.mean() > 1.0
    assert json.dumps(result.source_error) != "null"
