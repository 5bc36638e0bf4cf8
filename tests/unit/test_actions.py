"""What the daemon does with the slow loop's outcomes, and what an operator may ask of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from daemon import checkpoint
from daemon.actions import Actions
from daemon.assembly import Worker
from daemon.burst import ENDED, Bench, Outcome, Result
from daemon.inspecting import digest
from daemon.versioning.keeper import NoKeeper
from daemon.versions import VersionError
from tests.unit.worlds import raw, record, source_rows, worker

ROWS = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Told(NoKeeper):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int | None]] = []
        self.records: list[dict[str, Any]] = []

    def decided(self, event: str, record: Any, *, version: int | None = None) -> None:
        self.events.append((event, version))
        self.records.append(dict(record))


def made(folder: Path, fast: str = "none", **changes: Any) -> tuple[Worker, Actions, Told]:
    """A worker to which labels come."""
    run = worker(folder, fast={"name": fast}, threads=1, **changes)
    told = Told()
    run.loop.actions.keeper = told
    run.loop.monitor.trust.label_came()
    return run, run.loop.actions, told


def gives(actions: Actions, outcome: Outcome | None) -> None:
    """The learner's next steps end with this."""
    actions.learner.step = lambda *given: outcome  # type: ignore[method-assign]


def better(value: float = 1.0, **more: Any) -> Outcome:
    delta = {"3.bias": torch.full((3,), value)}
    return Outcome("promoted", "better", delta, record={"method": "head", "gain": 0.2}, seconds=0.5, **more)


def counted(run: Worker) -> dict[str, float]:
    return {name: child._value.get() for name, child in run.telemetry.bursts.items() if child._value.get()}


# Outcomes.


def test_a_promoted_version_serves_is_counted_logged_and_told(tmp_path: Path) -> None:
    run, actions, told = made(tmp_path)
    gives(actions, better())
    run.loop.resident.versions.trigger = {"reasons": ["drift alarm"]}
    with capture_logs() as lines:
        assert actions.learn() == "promoted"
    current = run.loop.resident.current
    assert (current.number, current.parent, run.loop.tally.versions) == (1, 0, 1)
    assert torch.equal(run.loop.resident.version_model.get_parameter("3.bias"), torch.ones(3))
    assert told.events == [("promoted", 1)] and counted(run) == {"promoted": 1.0}
    assert told.records[0]["trigger"] == {"reasons": ["drift alarm"]} and told.records[0]["seconds"] == 0.5
    assert [line["version"] for line in lines if line["event"] == "version promoted"] == [1]


def test_one_over_the_frozen_model_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    run, actions, _ = made(tmp_path)
    run.loop.resident.promote({"0.bias": torch.ones(8)}, {})
    gives(actions, better(over_frozen=True))
    actions.learn()
    assert run.loop.resident.current.delta.keys() == {"3.bias"}
    gives(actions, Outcome("promoted", "better", {"0.bias": torch.zeros(8)}))
    actions.learn()
    assert run.loop.resident.current.delta.keys() == {"0.bias", "3.bias"}


@pytest.mark.parametrize(
    ("result", "event"),
    [
        ("rejected", "rejected"),
        ("declined", "rejected"),
        ("cancelled", "rejected"),
        ("failed", "failed"),
        ("overrun", "failed"),
        ("out_of_memory", "failed"),
        ("non_finite", "failed"),
    ],
)
def test_whatever_else_comes_of_a_look_is_counted_by_its_name_and_changes_no_model(
    tmp_path: Path, result: Any, event: str
) -> None:
    run, actions, told = made(tmp_path)
    before = digest(run.loop.resident.state_dict())
    gives(actions, Outcome(result, "because", record={"steps": 3}))
    assert actions.learn() == event
    assert digest(run.loop.resident.state_dict()) == before
    assert counted(run) == {result: 1.0} and told.events == [(result, None)]
    assert told.records[0]["reason"] == "because" and told.records[0]["steps"] == 3


def test_every_result_has_its_counter(tmp_path: Path) -> None:
    run, _, _ = made(tmp_path)
    assert set(get_args(Result)) == set(run.telemetry.bursts) and set(ENDED.values()) < set(get_args(Result))


# An operator, and labels that stop.


def test_nothing_is_learnt_while_an_operator_holds_a_version(tmp_path: Path) -> None:
    run, actions, told = made(tmp_path)
    run.loop.resident.versions.held = True
    gives(actions, better())
    assert actions.learn() == "idle" and run.loop.resident.current.number == 0
    actions.learner.ask()
    assert actions.learn() == "rejected" and not actions.learner.wanted
    assert told.events == [("cancelled", None)] and "holds the version" in told.records[0]["reason"]
    run.loop.resident.versions.held = False
    assert actions.learn() == "promoted"


def test_an_asked_look_is_given_up_where_no_labels_come(tmp_path: Path) -> None:
    run = worker(tmp_path, fast={"name": "none"})
    actions = run.loop.actions
    actions.learner.ask()
    assert actions.learn() == "rejected" and not actions.learner.busy and counted(run) == {"cancelled": 1.0}


def test_it_is_not_where_pseudo_labels_are_allowed(tmp_path: Path) -> None:
    run = worker(tmp_path, fast={"name": "none"}, slow={"pseudo_labels": True})
    run.loop.actions.learner.ask()
    assert run.loop.actions.learn() == "busy" and run.loop.actions.learner.wanted


def test_an_error_of_before_the_labels_stopped_is_no_reason_to_look(tmp_path: Path) -> None:
    given: list[float] = []
    run = worker(tmp_path, fast={"name": "none"})
    run.loop.monitor.errors["served"].update(np.full(100, 0.9))
    run.loop.actions.learner.step = lambda model, number, error: given.append(error)  # type: ignore[assignment, method-assign, func-returns-value]
    run.loop.actions.learn()
    run.loop.monitor.trust.label_came()
    run.loop.actions.learn()
    assert math.isnan(given[0]) and given[1] == pytest.approx(0.9)


def test_switched_off_nothing_is_learnt(tmp_path: Path) -> None:
    _, actions, told = made(tmp_path, slow={"enabled": False})
    gives(actions, better())
    assert actions.learn() == "idle" and told.events == []


def test_a_rollback_ends_the_look_under_way_and_the_controller_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, actions, _ = made(tmp_path)
    run.loop.resident.promote({"3.bias": torch.ones(3)}, {})
    monkeypatch.setattr(Bench, "run", lambda self, job: better())
    actions.learner.ask()
    actions.rollback(0)
    assert run.loop.resident.current.number == 0 and not actions.learner.wanted
    assert actions.learn() == "rejected" and run.loop.resident.current.number == 0
    assert actions.learn() == "idle"


def test_a_version_that_is_not_kept_is_refused_and_nothing_ends(tmp_path: Path) -> None:
    run, actions, _ = made(tmp_path)
    actions.learner.ask()
    before = digest(run.loop.resident.state_dict())
    with pytest.raises(VersionError, match="version 7 is not kept"):
        actions.rollback(7)
    assert actions.learner.wanted and digest(run.loop.resident.state_dict()) == before


def test_a_harmful_version_is_withdrawn_to_its_parent_and_told(tmp_path: Path) -> None:
    run, actions, told = made(tmp_path)
    for value in (1.0, 2.0):
        run.loop.resident.promote({"3.bias": torch.full((3,), value)}, {})
    actions.version_harm = True
    assert actions.take_trip() == "version_harm" and run.loop.resident.current.number == 1
    assert told.events == [("withdrawn", 2)] and run.telemetry.trips["version_harm"]._value.get() == 1
    assert actions.take_trip() is None


# A version beside an adapter that decides by itself.


def shifted(run: Worker, batches: int, first: int = 0, turn: int = 0) -> None:
    """Batches with their labels inside; ``turn`` renames the classes."""
    for number in range(first, first + batches):
        x, y = source_rows(ROWS, seed=number)
        more = [{"y": int(label + turn) % 3} for label in y]
        values = [record(number * ROWS + row, x[row], **more[row]) for row in range(ROWS)]
        run.loop.process(raw(values, number * ROWS))


def answered(run: Worker) -> dict[str, float]:
    return {by: child._value.get() for by, child in run.telemetry.answered.items() if child._value.get()}


def test_a_first_version_no_worse_than_the_adapter_answers_together_with_it(tmp_path: Path) -> None:
    run, _, _ = made(tmp_path, "auto", slow={"enabled": False})
    adapter = run.loop.resident.adapter
    shifted(run, 4)
    run.loop.resident.promote({"3.bias": run.loop.resident.frozen[3].bias.clone()}, {})
    run.loop.resident.beside.promoted(first=True, version_error=0.1, fast_error=0.1)
    shifted(run, 1, first=4)
    assert run.loop.resident.adapter is adapter
    assert answered(run) == {"model": 4.0 * ROWS, "both": 1.0 * ROWS}


def test_the_comparison_hears_of_a_promotion_with_both_errors(tmp_path: Path) -> None:
    run, actions, _ = made(tmp_path, "auto")
    run.loop.monitor.errors["adapted"].update(np.full(50, 0.1))
    gives(actions, better(error=0.4))
    assert actions.learn() == "promoted" and run.loop.resident.beside.way == "fast"
    gives(actions, better(error=0.05))
    assert actions.learn() == "promoted" and run.loop.resident.beside.way == "both"
    actions.rollback(0)
    assert run.loop.resident.beside.way == "fast"


def test_the_adapter_keeps_its_state_through_promotion_and_rollback(tmp_path: Path) -> None:
    run, actions, _ = made(tmp_path, "auto")
    shifted(run, 6)
    before, epoch = digest(run.loop.resident.adapter.state_dict()), run.loop.resident.epoch
    gives(actions, better())
    actions.learn()
    actions.rollback(0)
    assert digest(run.loop.resident.adapter.state_dict()) == before and run.loop.resident.epoch == epoch


def test_labels_bring_a_much_better_version_to_answer_alone(tmp_path: Path) -> None:
    run, _, _ = made(tmp_path, "auto", slow={"enabled": False})
    frozen = run.loop.resident.frozen
    # Renamed classes: the head's rows in another order are right, and the adapter's memory needs longer.
    order = torch.tensor([2, 0, 1])
    run.loop.resident.promote({"3.weight": frozen[3].weight[order], "3.bias": frozen[3].bias[order]}, {})
    shifted(run, 12, turn=1)
    assert run.loop.resident.beside.way in ("version", "both")
    assert answered(run).get("version", 0.0) > 0
    served = [answer["y"] for answer in run.sink.answers[-4 * ROWS :]]
    truth = np.concatenate([(source_rows(ROWS, seed=number)[1] + 1) % 3 for number in range(8, 12)])
    assert np.mean(served != truth) < 0.25


def test_a_version_that_is_not_finite_never_reaches_an_answer_beside_the_adapter(tmp_path: Path) -> None:
    run, _, told = made(tmp_path, "auto", slow={"enabled": False})
    run.loop.resident.promote({"3.bias": torch.full((3,), math.nan)}, {})
    run.loop.resident.beside.fast_reset()
    shifted(run, 3)
    assert {answer["status"] for answer in run.sink.answers} == {"ok"}
    assert run.loop.resident.current.number == 0 and told.events == [("withdrawn", 1)]


# End to end.


SLOW: dict[str, Any] = {
    "inline": True,
    "steps": 30,
    "min_labels": 64,
    "holdout_rows": 64,
    "optimizer": "adam",
    "lr": 0.05,
}


@pytest.mark.parametrize("fast", ["none", "auto"])
@pytest.mark.parametrize("slow", ["norm_affine_head", "lda_head"])
def test_a_change_of_concept_is_learnt_end_to_end(tmp_path: Path, fast: str, slow: str) -> None:
    run, _, told = made(tmp_path, fast, slow={**SLOW, "name": slow})
    shifted(run, 10)
    assert run.loop.resident.current.number == 0
    shifted(run, 40, first=10, turn=1)
    assert run.loop.resident.current.number >= 1 and ("promoted", 1) in told.events
    truth = np.concatenate([(source_rows(ROWS, seed=number)[1] + 1) % 3 for number in range(40, 50)])
    served = np.mean([answer["y"] for answer in run.sink.answers[-10 * ROWS :]] != truth)
    frozen = run.loop.tally.frozen.mean
    assert frozen is not None and served < 0.45 < 0.7 < frozen


@pytest.mark.parametrize("cut", [12, 20, 33])
def test_a_checkpoint_amid_all_of_it_goes_on_to_the_bit(tmp_path: Path, cut: int) -> None:
    through, _, _ = made(tmp_path, "auto", slow=SLOW)
    shifted(through, 10)
    shifted(through, cut - 10, first=10, turn=1)
    body = checkpoint.encode(through.state_dict())
    again, _, _ = made(tmp_path, "auto", slow=SLOW)
    again.load_state_dict(checkpoint.decode(body))
    assert digest(again.state_dict()) == digest(through.state_dict())
    seen = len(through.sink.values)
    for each in (through, again):
        shifted(each, 15, first=cut, turn=1)
    assert again.sink.values == through.sink.values[seen:]
    assert digest(again.state_dict()) == digest(through.state_dict())


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("label", [1e300, -1e300, 1e38])
def test_a_hostile_target_changes_no_answer_and_no_memory(tmp_path: Path, label: float) -> None:
    run, actions, _ = made(tmp_path, "auto", task="regression", slow=SLOW)
    x, y = source_rows(40 * ROWS, seed=5, task="regression")
    for number in range(40):
        rows = range(number * ROWS, (number + 1) * ROWS)
        targets = [label if row % 16 == 3 else float(y[row]) for row in rows]
        values = [record(row, x[row], y=target) for row, target in zip(rows, targets, strict=True)]
        run.loop.process(raw(values, number * ROWS))
    assert all(math.isfinite(answer["y"]) for answer in run.sink.answers)
    assert np.isfinite(actions.learner.holdout.rows().y).all()
    served = np.array([answer["y"] for answer in run.sink.answers])
    assert np.mean((served - y) ** 2) < 0.5 * np.var(y)


@pytest.mark.parametrize("label", [-1, 3, 99, 2**40])
def test_labels_that_are_no_class_teach_nothing(tmp_path: Path, label: int) -> None:
    run, actions, told = made(tmp_path, slow=SLOW)
    x, _ = source_rows(ROWS)
    for number in range(20):
        run.loop.process(raw([record(number * ROWS + row, x[row], y=label) for row in range(ROWS)], number * ROWS))
    assert len(actions.learner.holdout) == 0 and told.events == [] and run.loop.tally.labels_rejected == 20 * ROWS


def test_a_stream_of_one_class_and_one_row_is_survived(tmp_path: Path) -> None:
    run, _, told = made(tmp_path, "auto", slow=SLOW)
    for number in range(40):
        values = [record(number * ROWS + row, [0.5] * 4, y=2) for row in range(ROWS)]
        run.loop.process(raw(values, number * ROWS))
    assert {answer["status"] for answer in run.sink.answers} == {"ok"}
    assert not {"failed", "out_of_memory", "overrun"} & {event for event, _ in told.events}
