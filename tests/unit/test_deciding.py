"""The daemon with an adapter that decides by itself what serves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from adapters.fast.auto import ALIGNED, MEMORY, RUNS, Auto
from daemon import checkpoint
from daemon.assembly import Worker, warm_up
from daemon.inspecting import digest
from daemon.labels import PLACES
from daemon.records import Labels
from daemon.regulator import State
from tests.unit.worlds import MemoryLabels, raw, record, source_rows, worker

ROWS = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on a model this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(folder: Path, **changes: Any) -> Worker:
    return worker(folder, **{"fast": {"name": "auto"}, "threads": 1, **changes})


def with_label_stream(folder: Path, **changes: Any) -> Worker:
    """A worker whose rows wait for labels that come beside the records."""
    run = made(folder, **changes)
    run.loop.labels = MemoryLabels()
    return run


def auto_of(run: Worker) -> Auto:
    adapter = run.loop.resident.deciding
    assert isinstance(adapter, Auto)
    return adapter


Shift = Callable[[np.ndarray], np.ndarray]


def off(x: np.ndarray) -> np.ndarray:
    return x + np.float32(2.0)


def same(x: np.ndarray) -> np.ndarray:
    return x


def feed(run: Worker, batches: int, shift: Shift = same, *, label: Callable[[int], int] | None = None) -> list[str]:
    """Process batches that go on with the stream; returns the state after each."""
    states = []
    for _ in range(batches):
        first = run.loop.positions.get("mem/0", 0)
        x, y = source_rows(ROWS, seed=1000 + first)
        more = [{} if label is None else {"y": label(int(value))} for value in y]
        run.loop.process(raw([record(first + row, value, **more[row]) for row, value in enumerate(shift(x))], first))
        states.append(run.loop.regulator.state.value)
    return states


def late(run: Worker, ids: range, y: list[int]) -> None:
    """Labels of these records, now."""
    run.loop.labels = MemoryLabels(Labels([str(name) for name in ids], list(y), [0.0] * len(y)))
    run.loop.idle()


def answered(run: Worker) -> dict[str, float]:
    return {by: child._value.get() for by, child in run.telemetry.answered.items()}


def trips(run: Worker) -> dict[str, float]:
    return {reason: child._value.get() for reason, child in run.telemetry.trips.items() if child._value.get()}


# The alert, and what serves.


def test_it_serves_from_the_first_row_and_is_given_every_one(tmp_path: Path) -> None:
    run = made(tmp_path)
    assert run.loop.adapt and run.loop.actions.trusted and run.loop.actions.decides
    assert set(feed(run, 10)) == {"steady"}
    assert auto_of(run).numbered == 10 * ROWS
    assert answered(run)["model"] == 10 * ROWS


def test_the_regulator_s_alarm_reaches_it_and_its_end_too(tmp_path: Path) -> None:
    run = made(tmp_path)
    feed(run, 5)
    assert auto_of(run).alert is False and not auto_of(run)._aligned.open
    alerts = [(state in ("fast", "slow"), auto_of(run).alert) for _ in range(30) for state in feed(run, 1, off)]
    assert all(state == alert for state, alert in alerts) and any(alert for _, alert in alerts)
    assert (auto_of(run).changed_by == ALIGNED).all()
    for _ in range(150):
        if feed(run, 1)[-1] == "steady" and not auto_of(run).changed_by.any():
            break
    assert auto_of(run).alert is False and not auto_of(run).changed_by.any()


def test_a_shift_is_answered_with_fewer_errors_and_every_row_is_counted_once(tmp_path: Path) -> None:
    # The BatchNorm's running statistics of this model are not those of its source rows.
    run, plain = made(tmp_path), made(tmp_path, fast={"name": "none"})
    for each in (run, plain):
        feed(each, 5)
        feed(each, 40, off)
        assert sum(answered(each).values()) == 45 * ROWS
    truth = np.concatenate([source_rows(ROWS, seed=1000 + ROWS * batch)[1] for batch in range(45)])
    errors = [np.mean([a["y"] for a in each.sink.answers] != truth) for each in (run, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert answered(run)["aligned"] > 20 * ROWS


def test_the_sample_of_rows_that_the_model_ran_on_stands_for_all(tmp_path: Path) -> None:
    # The frozen model sees every fourth segment of rows as a whole: those rows stand for the other three too.
    run = made(tmp_path)
    feed(run, 5)
    feed(run, 15, off)
    weight = 0.0
    for batch in range(16):
        x, _ = source_rows(ROWS, seed=batch)
        predicted = run.loop.resident.predict(off(x), adapt=True, serve=True)
        assert predicted.served_adapted
        weight += float(predicted.weight[np.isfinite(predicted.version)].sum())
    assert weight == pytest.approx(16 * ROWS, rel=0.1)


def test_rows_that_can_not_be_used_are_counted_for_nobody(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.loop.process(raw([record(row, [float("nan") if row % 4 == 0 else 0.5] * 4) for row in range(16)]))
    assert sum(answered(run).values()) == 12 == auto_of(run).numbered


def test_what_answers_is_logged_once_a_change(tmp_path: Path) -> None:
    run = made(tmp_path)
    with capture_logs() as lines:
        feed(run, 5)
        feed(run, 30, off)
    told = [(line["before"], line["ways"]) for line in lines if line["event"] == "answered by"]
    assert told == [(["model"], ["aligned"])]


def test_what_answers_to_and_fro_is_logged_ever_more_rarely_until_it_rests(tmp_path: Path) -> None:
    run = made(tmp_path)
    actions, rows = run.loop.actions, 64
    both = [SimpleNamespace(version=np.zeros(rows), changed_by=None, way=way, served_adapted=True) for way in "ab"]

    def lines(batches: int) -> int:
        with capture_logs() as found:
            for batch in range(batches):
                actions.answered(both[batch % 2])  # type: ignore[arg-type]
        return len([line for line in found if line["event"] == "answered by"])

    actions._telemetry.answered = defaultdict(lambda: run.telemetry.records_in)  # type: ignore[assignment]
    assert 8 <= lines(1_000) <= 12, "about the logarithm of the rows"
    for _ in range(8_000):
        actions.answered(both[1])  # type: ignore[arg-type]
    assert lines(4) >= 1


def test_another_adapter_s_rows_are_counted_as_adapted_or_the_model_s(tmp_path: Path) -> None:
    run = made(tmp_path, fast={"name": "ema_norm"})
    with capture_logs() as lines:
        feed(run, 5)
        feed(run, 30, off)
    counts = answered(run)
    assert counts["model"] + counts["adapted"] == 35 * ROWS == sum(counts.values())
    assert "answered by" not in {line["event"] for line in lines}


# Labels.


def test_labels_reach_the_rows_that_they_belong_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = with_label_stream(tmp_path), []
    monkeypatch.setattr(auto_of(run), "_learn_numbered", lambda x, y, numbers: given.append((x, y, numbers)))
    feed(run, 4)
    late(run, range(10, 74, 7), [1] * 10)
    (x, y, numbers), rows = given[0], list(range(10, 74, 7))
    assert numbers.tolist() == rows and y.tolist() == [1] * 10
    expected = np.concatenate([source_rows(ROWS, seed=1000 + ROWS * batch)[0] for batch in range(4)])[rows]
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-6)


def test_numbers_go_on_past_what_a_float_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = with_label_stream(tmp_path), []
    adapter = auto_of(run)
    start = 3 * PLACES - 48
    adapter.numbered = adapter._arms._end = start
    monkeypatch.setattr(adapter, "_learn_numbered", lambda x, y, numbers: given.append(numbers))
    feed(run, 4)
    late(run, range(4 * ROWS), [0] * (4 * ROWS))
    assert given[0].tolist() == list(range(start, start + 4 * ROWS))
    assert adapter.numbered == start + 4 * ROWS


def test_labels_from_before_a_reset_count_for_no_arm(tmp_path: Path) -> None:
    run = with_label_stream(tmp_path)
    feed(run, 4)
    run.loop.resident.reset_fast()
    run.loop.monitor.forget_fast()
    feed(run, 4)
    before = digest(auto_of(run)._arms.state())
    late(run, range(4 * ROWS), [0] * (4 * ROWS))
    assert digest(auto_of(run)._arms.state()) == before
    late(run, range(4 * ROWS, 8 * ROWS), [0] * (4 * ROWS))
    assert run.loop.tally.labels == 8 * ROWS


def test_labels_that_only_help_the_memory_bring_it_into_service(tmp_path: Path) -> None:
    run = made(tmp_path, slow={"enabled": False})
    feed(run, 60, label=lambda y: (y + 1) % 3)
    assert (auto_of(run).changed_by == MEMORY).all() and answered(run)["memory"] > 20 * ROWS
    served, frozen = run.loop.tally.served.mean, run.loop.tally.frozen.mean
    assert served is not None and frozen is not None and served < 0.7 * frozen


# The guard.


def harmed(run: Worker) -> None:
    """Labels that show the present adaptation to be worse than the version."""
    run.loop.monitor.fast_guard.paired(np.ones(100))


def test_evidence_of_harm_sends_it_to_fallback_and_after_the_cool_down_it_serves_again(tmp_path: Path) -> None:
    run = made(tmp_path, regulator={"cooldown_rows": 8 * ROWS})
    feed(run, 5)
    feed(run, 15, off)
    assert auto_of(run).changed_by.all()
    epoch = run.loop.resident.epoch
    harmed(run)
    # The batch at hand is answered by the version already.
    states = feed(run, 8, off)
    assert states == ["fallback"] * 8 and trips(run) == {"harm": 1.0}
    assert run.loop.resident.epoch == epoch + 1 and auto_of(run).numbered == 0
    assert answered(run)["aligned"] <= 15 * ROWS
    x, _ = source_rows(ROWS, seed=1000 + 27 * ROWS)
    expected = run.loop.resident.measure_version(off(x)).prediction
    assert [a["y"] for a in run.sink.answers[-ROWS:]] == expected.astype(int).tolist()
    states = feed(run, 30, off)
    assert "fallback" not in states[2:] and (auto_of(run).changed_by == ALIGNED).all()
    assert run.loop.actions.trusted and trips(run) == {"harm": 1.0}


def test_a_second_trip_cools_down_for_twice_as_long(tmp_path: Path) -> None:
    run = made(tmp_path, regulator={"cooldown_rows": 4 * ROWS})
    spans = []
    for _ in range(2):
        harmed(run)
        spans.append(sum(state == "fallback" for state in feed(run, 14)))
    assert spans[1] in (2 * spans[0], 2 * spans[0] - 1, 2 * spans[0] + 1) and spans[0] >= 4


def test_labels_of_rows_answered_in_fallback_count_for_no_later_row(tmp_path: Path) -> None:
    # In fallback the adapter's count stands still: those rows must not get the numbers of its next ones.
    run = with_label_stream(tmp_path, regulator={"cooldown_rows": 4 * ROWS})
    feed(run, 2)
    harmed(run)
    states = feed(run, 4)
    in_fallback = range(3 * ROWS, 6 * ROWS)
    assert states[:4] == ["fallback"] * 4
    feed(run, 10)
    assert auto_of(run).numbered > ROWS
    given: list[Any] = []
    auto_of(run)._learn_numbered = lambda x, y, numbers: given.append(numbers)
    late(run, in_fallback, [0] * len(in_fallback))
    assert given and (given[0] < 0).all()


def test_one_row_that_the_model_itself_can_not_answer_does_not_end_the_adaptation(tmp_path: Path) -> None:
    # The model's own NaN, which no way has changed, is not the adapter's; else one such record a cool-down would keep
    # the adaptation off.
    run = made(tmp_path)
    feed(run, 5)
    feed(run, 15, off)
    assert auto_of(run).changed_by.all()

    def with_one_huge(x: np.ndarray) -> np.ndarray:
        x = off(x)
        x[3] = 3e38
        return x

    assert feed(run, 1, with_one_huge)[-1] != "fallback"
    assert trips(run) == {}
    feed(run, 1, off)
    assert auto_of(run).changed_by.all()


def test_a_way_that_is_not_finite_is_never_emitted_and_trips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path)
    feed(run, 5)
    feed(run, 15, off)
    adapter = auto_of(run)
    choose = adapter._choose

    def broken(*args: Any, **named: Any) -> torch.Tensor:
        return choose(*args, **named) * torch.nan

    monkeypatch.setattr(adapter, "_choose", broken)
    assert feed(run, 1, off)[-1] == "fallback" and trips(run) == {"non_finite": 1.0}
    assert {answer["status"] for answer in run.sink.answers} == {"ok"}
    assert sum(answered(run).values()) == 21 * ROWS


# Versions.


def test_a_promoted_version_stands_beside_it_and_both_answer_together(tmp_path: Path) -> None:
    run = made(tmp_path)
    feed(run, 5)
    feed(run, 15, off)
    resident = run.loop.resident
    before, epoch, numbered = auto_of(run), resident.epoch, auto_of(run).numbered
    resident.promote({"3.bias": torch.tensor([0.5, 0.0, 0.0])}, {})
    resident.beside.promoted(first=True, version_error=0.1, fast_error=0.2)
    run.loop.monitor.forget_version()
    assert auto_of(run) is before and resident.epoch == epoch and before.numbered == numbered
    states = feed(run, 3, off)
    assert "fallback" not in states and before.numbered == numbered + 3 * ROWS
    x, _ = source_rows(512, seed=1000)
    predicted = resident.predict(x, adapt=False, serve=True)
    assert predicted.way == "both" and predicted.number == 1
    assert (predicted.version == resident.measure_version(x).prediction).all()
    known = np.isfinite(predicted.frozen)
    assert (predicted.frozen == resident.measure_frozen(x).prediction)[known].all() and known.any()
    assert predicted.both is not None and (predicted.rows.prediction == predicted.both).all()
    assert run.telemetry.answered["both"]._value.get() == 3 * ROWS


def test_a_reset_of_the_adaptation_leaves_the_version_to_answer(tmp_path: Path) -> None:
    run = made(tmp_path)
    feed(run, 2)
    resident = run.loop.resident
    resident.promote({"3.bias": torch.tensor([0.5, 0.0, 0.0])}, {})
    resident.beside.promoted(first=True, version_error=0.1, fast_error=0.2)
    resident.reset_fast()
    x, _ = source_rows(ROWS, seed=1000)
    predicted = resident.predict(x, adapt=False, serve=True)
    assert predicted.way == "version"
    assert (predicted.rows.prediction == resident.measure_version(x).prediction).all()


# A restart in the middle.


def harmed_after_a_shift(run: Worker) -> None:
    feed(run, 5)
    feed(run, 15, off)
    harmed(run)
    feed(run, 2, off)
    assert run.loop.regulator.state is State.FALLBACK


def shifted(run: Worker, batches: int) -> None:
    feed(run, 5)
    feed(run, batches, off)


def learnt(run: Worker) -> None:
    feed(run, 40, label=lambda y: (y + 1) % 3)
    assert (auto_of(run).changed_by == MEMORY).all()


def in_runs(run: Worker) -> None:
    """Rows of the source, each batch of one class."""
    for batch in range(30):
        first = run.loop.positions.get("mem/0", 0)
        x, y = source_rows(20 * ROWS, seed=batch)
        rows = x[y == batch % 3][:ROWS]
        assert len(rows) == ROWS
        run.loop.process(raw([record(first + row, value) for row, value in enumerate(rows)], first))
    assert (auto_of(run).changed_by == RUNS).any() and answered(run)["runs"] > 10 * ROWS


PHASES: dict[str, Callable[[Worker], Any]] = {
    "watch": lambda run: feed(run, 5),
    "shadow": lambda run: shifted(run, 3),
    "served": lambda run: shifted(run, 15),
    "runs": in_runs,
    "memory": learnt,
    "fallback": harmed_after_a_shift,
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_checkpoint_in_every_phase_goes_on_to_the_bit(tmp_path: Path, phase: str) -> None:
    slow = {"inline": True, "steps": 3, "min_labels": 32, "holdout_rows": 32, "optimizer": "sgd", "lr": 0.05}
    options: dict[str, Any] = {"slow": slow, "regulator": {"cooldown_rows": 4 * ROWS}}
    through = made(tmp_path, **options)
    PHASES[phase](through)
    body = checkpoint.encode(through.state_dict())
    again = made(tmp_path, **options)
    warm_up(again)
    again.load_state_dict(checkpoint.decode(body))
    warm_up(again)
    assert digest(again.state_dict()) == digest(through.state_dict())
    assert again.loop.actions.trusted == through.loop.actions.trusted
    again.loop.positions = dict(through.loop.positions)
    seen = len(through.sink.values)
    for each in (through, again):
        feed(each, 10, off)
        feed(each, 5, off, label=lambda y: y)
    assert again.sink.values == through.sink.values[seen:]
    assert digest(again.state_dict()) == digest(through.state_dict())


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_an_answer_does_not_depend_on_its_own_label(tmp_path: Path, task: str) -> None:
    answers = []
    for shift in (0, 1):
        run = worker(tmp_path, task=task, fast={"name": "auto"}, threads=1)
        x, y = source_rows(ROWS, task=task)
        rows = [record(row, x[row], y=(int(y[row]) + shift) % 3) for row in range(ROWS)]
        run.loop.process(raw(rows))
        answers.append(run.sink.values)
    assert answers[0] == answers[1]
