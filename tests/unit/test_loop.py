from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from daemon import checkpoint
from daemon.assembly import Worker, assemble, warm_up
from daemon.inspecting import digest
from daemon.records import Labels
from daemon.streams.simsource import SimLabels
from tests.unit.worlds import MemoryLabels, decoded, raw, record, records, settings, source_rows, worker


def state_but_counters(made: Worker) -> str:
    return digest({name: part for name, part in made.state_dict().items() if name != "tally"})


def adapting(folder: Path, **changes: object) -> Worker:
    """A worker whose fast adaptation learns, in shadow."""
    made = worker(folder, **{"fast": {"name": "ema_norm"}, **changes})
    made.loop.resident.set_gain(1.0)
    made.loop.adapt = True
    return made


def test_every_record_gets_one_answer_in_order(tmp_path: Path) -> None:
    made = worker(tmp_path)
    made.loop.process(raw(records(40)))
    assert [answer["id"] for answer in made.sink.answers] == [str(row) for row in range(40)]
    assert {answer["status"] for answer in made.sink.answers} == {"ok"}
    assert made.loop.positions == {"mem/0": 40}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39])
def test_one_bad_row_is_answered_as_invalid_and_reaches_neither_model_nor_statistics(
    tmp_path: Path, bad: float
) -> None:
    rows = records(32, labelled=True)
    with_bad = [*rows[:10], record("bad", [bad, 0, 0, 0], y=1), *rows[10:]]
    clean, dirty = adapting(tmp_path), adapting(tmp_path)
    clean.loop.process(raw(rows))
    dirty.loop.process(raw(with_bad))
    answers = dirty.sink.answers
    assert answers[10]["id"] == "bad" and answers[10]["status"] == "invalid_input"
    assert answers[:10] + answers[11:] == clean.sink.answers
    assert state_but_counters(dirty) == state_but_counters(clean)
    assert dirty.loop.tally.invalid == 1


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_batch_of_invalid_rows_alone_changes_nothing_but_counters(tmp_path: Path, task: str) -> None:
    made = worker(tmp_path, task=task)
    made.loop.resident.set_gain(1.0)
    made.loop.adapt = True
    before = state_but_counters(made)
    made.loop.process(raw([record(row, [float("nan")] * 4) for row in range(8)]))
    assert [answer["status"] for answer in made.sink.answers] == ["invalid_input"] * 8
    assert state_but_counters(made) == before
    assert made.loop.tally.invalid == 8 and made.loop.positions == {"mem/0": 8}


def test_a_poison_record_goes_to_the_dead_letters_with_its_origin_and_the_others_are_answered(tmp_path: Path) -> None:
    made = worker(tmp_path)
    rows = records(4)
    made.loop.process(raw([rows[0], b"{", *rows[1:]], first=100))
    assert [(letter.partition, letter.offset, letter.value) for letter in made.sink.dead] == [("mem/0", 101, b"{")]
    assert [answer["id"] for answer in made.sink.answers] == ["0", "1", "2", "3"]
    assert made.loop.positions == {"mem/0": 105}


def test_the_answers_of_a_batch_do_not_depend_on_its_own_labels(tmp_path: Path) -> None:
    x, y = source_rows(32)
    answers = []
    for shift in (0, 1):
        made = adapting(tmp_path)
        made.loop.process(raw([record(row, x[row], y=int(y[row] + shift) % 3) for row in range(32)]))
        answers.append(made.sink.values)
    assert answers[0] == answers[1]


METHODS = pytest.mark.parametrize("method", ["ema_norm", "auto"])


def answering(made: Worker) -> torch.nn.Module:
    """The module that runs while nothing is adapted."""
    resident = made.loop.resident
    return resident.frozen if resident.deciding is None else resident.deciding.model


@METHODS
def test_a_steady_world_costs_one_forward_a_batch(tmp_path: Path, method: str) -> None:
    made = worker(tmp_path, fast={"name": method})
    calls: list[int] = []
    answering(made).register_forward_hook(lambda *_: calls.append(1))
    for batch in range(5):
        made.loop.process(raw(records(16, seed=batch, first=16 * batch), first=16 * batch))
    assert len(calls) == 5 and made.loop.regulator.state.value == "steady"


@METHODS
def test_what_the_frozen_model_can_not_say_is_never_emitted(tmp_path: Path, method: str) -> None:
    made = worker(tmp_path, fast={"name": method})
    answering(made).register_forward_hook(
        lambda module, inputs, outputs: torch.where(inputs[0][:, :1] > 0, torch.nan, outputs)
    )
    x, _ = source_rows(20)
    made.loop.process(raw([record(row, x[row]) for row in range(20)]))
    for row, answer in enumerate(made.sink.answers):
        if x[row, 0] > 0:
            assert answer == {"id": str(row), "status": "invalid_input", "reason": "model_not_finite"}
        else:
            assert answer["status"] == "ok"


def test_a_version_that_is_not_finite_is_answered_by_the_frozen_model_and_withdrawn(tmp_path: Path) -> None:
    frozen, made = worker(tmp_path), worker(tmp_path)
    made.loop.resident.promote({"3.bias": torch.full((3,), torch.nan)}, {})
    rows = raw(records(16))
    frozen.loop.process(rows)
    made.loop.process(rows)
    assert [a["y"] for a in made.sink.answers] == [a["y"] for a in frozen.sink.answers]
    assert made.loop.resident.current.number == 0
    assert made.telemetry.trips["version_harm"]._value.get() == 1


def test_an_adapter_that_is_not_finite_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, made = worker(tmp_path), adapting(tmp_path)
    made.loop.actions.trusted = True
    adapter = made.loop.resident.adapter
    monkeypatch.setattr(type(adapter), "_adapt", lambda self, x: torch.full((len(x), 3), torch.nan))
    rows = raw(records(16))
    frozen.loop.process(rows)
    made.loop.process(rows)
    assert [a["y"] for a in made.sink.answers] == [a["y"] for a in frozen.sink.answers]
    assert made.telemetry.trips["non_finite"]._value.get() == 1


def test_with_labels_the_adapted_answers_stay_in_the_shadow_until_they_are_shown_to_be_better(tmp_path: Path) -> None:
    made, plain = adapting(tmp_path), worker(tmp_path, fast={"name": "none"})
    # What adapts on shifted rows answers otherwise, and the labels are the unadapted model's own: never better.
    for batch in range(10):
        x, _ = source_rows(32, seed=batch)
        x = x + 2
        y = plain.loop.resident.predict(x, adapt=False, serve=False).version
        rows = [record(32 * batch + row, x[row], y=int(y[row])) for row in range(32)]
        made.loop.adapt = True
        made.loop.process(raw(rows, 32 * batch))
        plain.loop.process(raw(rows, 32 * batch))
        assert not made.loop.actions.trusted
    assert [a["y"] for a in made.sink.answers] == [a["y"] for a in plain.sink.answers]


def test_what_was_answered_before_a_restart_is_not_answered_again(tmp_path: Path) -> None:
    made = worker(tmp_path)
    made.loop.emit_from = {"mem/0": 20}
    made.loop.process(raw(records(16)))
    assert made.sink.answers == []
    made.loop.process(raw([*records(8, first=16), b"{"], first=16))
    assert [answer["id"] for answer in made.sink.answers] == ["20", "21", "22", "23"]
    assert made.loop.emit_from == {} and len(made.sink.dead) == 1


def test_an_idle_stream_reads_no_more_of_endless_labels_than_the_window_holds(tmp_path: Path) -> None:
    made = worker(tmp_path, label_window=1000)
    made.loop.labels = labels = SimLabels("sim://ageing")
    labels.open(None)
    made.loop.idle()
    made.loop.idle()
    assert labels.positions() == {"sim-labels/0": 2 * SimLabels.CHUNK}
    assert made.loop.tally.labels == 0


def test_an_alarm_raised_by_labels_of_an_idle_stream_is_a_drift_at_the_next_batch(tmp_path: Path) -> None:
    made = worker(tmp_path)
    made.loop.labels = MemoryLabels()
    x, y = source_rows(128, seed=6)
    made.loop.process(decoded(x))
    assert made.loop.tally.drifts == 0
    wrong = [(int(label) + 1) % 3 for label in y]
    made.loop.labels = MemoryLabels(Labels([str(row) for row in range(128)], wrong, [0.0] * 128))
    made.loop.idle()
    assert made.loop.monitor.watch.alarms == ["error", "risk"]
    made.loop.process(decoded(x[:16], 128))
    assert made.telemetry.drifts["error", "concept"]._value.get() == 1
    assert made.loop.monitor.watch.alarms == []


def test_labels_that_can_not_be_are_refused_and_taught_to_nobody(tmp_path: Path) -> None:
    made = worker(tmp_path)
    x, _ = source_rows(4)
    made.loop.process(raw([record(row, x[row], y=y) for row, y in enumerate((0, 3, -1, 1))]))
    assert (made.loop.tally.labels, made.loop.tally.labels_rejected) == (2, 2)
    assert len(made.loop.actions.learner.holdout) == 2


def simulated(folder: Path) -> Worker:
    return worker(
        folder,
        fast={"name": "ema_norm", "memory_rows": 100},
        slow={"inline": True, "steps": 3, "min_labels": 32, "holdout_rows": 32, "optimizer": "sgd", "lr": 0.05},
        regulator={"patience_rows": 32},
    )


def test_a_state_from_the_middle_of_a_run_continues_to_the_bit(tmp_path: Path) -> None:
    through = simulated(tmp_path)
    batches = [raw(records(32, seed=n, labelled=True, shift=0.15 * n, first=32 * n), 32 * n) for n in range(40)]
    for batch in batches[:20]:
        through.loop.process(batch)
    body = checkpoint.encode(through.state_dict())
    again = simulated(tmp_path)
    warm_up(again)
    again.load_state_dict(checkpoint.decode(body))
    warm_up(again)
    assert digest(again.state_dict()) == digest(through.state_dict())
    seen = len(through.sink.values)
    for batch in batches[20:]:
        through.loop.process(batch)
        again.loop.process(batch)
    assert again.sink.values == through.sink.values[seen:]
    assert digest(again.state_dict()) == digest(through.state_dict())
    assert sum(child._value.get() for child in through.telemetry.bursts.values()) >= 1


def test_a_regression_runs_from_file_to_file(tmp_path: Path) -> None:
    from daemon.service import Service

    x, y = source_rows(100, task="regression", seed=3)
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(record(n, x[n], y=float(y[n])) for n in range(100)) + b"\n")
    made = assemble(settings(tmp_path, "regression", sink=f"file:{tmp_path / 'out.jsonl'}"))
    service = Service(made)
    try:
        service.start()
        assert service.run() == 0
    finally:
        service.close()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 100
    mean = made.loop.tally.served.mean
    assert mean is not None and mean < 0.1 and made.loop.tally.labels == 100


def test_warming_up_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    made = worker(tmp_path)
    before = digest(made.state_dict())
    warm_up(made)
    assert digest(made.state_dict()) == before


def test_probabilities_are_in_the_answers_when_asked_for(tmp_path: Path) -> None:
    made = worker(tmp_path, probabilities=True)
    made.loop.process(raw(records(5)))
    assert all(np.isclose(sum(answer["p"]), 1, atol=1e-3) for answer in made.sink.answers)
