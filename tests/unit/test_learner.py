from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapters.slow as slow
from daemon import checkpoint
from daemon.inspecting import digest
from daemon.labels import Joined
from daemon.learner import Learner, Outcome
from tests.unit.worlds import source_rows, worker


def learner(folder: Path, **changes: Any) -> tuple[Learner, Any]:
    options = {"inline": True, "steps": 2, "min_labels": 32, "holdout_rows": 32, "optimizer": "sgd", "lr": 0.01}
    made = worker(folder, slow={**options, **changes})
    return made.loop.actions.learner, made.loop.resident.frozen


def joined(rows: int, seed: int = 1) -> Joined:
    x, y = source_rows(rows, seed=seed)
    blank = np.zeros(rows, np.float32)
    return Joined(x, y, *[blank] * 10)


def test_a_wanted_burst_waits_for_labels_enough(tmp_path: Path) -> None:
    made, model = learner(tmp_path)
    made.ask()
    made.add(joined(40))
    assert made.step(model, 0) is None and made.busy
    made.add(joined(40, seed=2))
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result in ("promoted", "rejected") and not made.busy


def test_the_next_burst_waits_for_new_labels(tmp_path: Path) -> None:
    made, model = learner(tmp_path)
    made.add(joined(100))
    made.ask()
    assert made.step(model, 0) is not None
    made.ask()
    assert made.step(model, 0) is None and made.busy
    made.add(joined(32, seed=3))
    assert made.step(model, 0) is not None


def test_only_a_promoted_candidate_comes_with_weights(tmp_path: Path) -> None:
    made, model = learner(tmp_path, lr=1e-9)
    made.add(joined(100))
    made.ask()
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result == "rejected" and outcome.delta == {} and outcome.reason


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyError, ZeroDivisionError])
def test_a_burst_that_breaks_fails_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise error("out of luck")

    monkeypatch.setattr(slow, "run_burst", broken)
    made, model = learner(tmp_path)
    made.add(joined(100))
    made.ask()
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result == "failed"
    assert error.__name__ in outcome.reason and "out of luck" in outcome.reason


def beside(made: Learner, model: Any) -> threading.Thread:
    """A burst beside the stream, started and finished, but not handed over yet."""
    made.add(joined(100))
    made.ask()
    assert made.step(model, 0) is None and made.busy
    thread = made._thread
    assert thread is not None
    thread.join(60)
    return thread


def test_a_burst_beside_the_stream_is_handed_over_at_a_later_batch(tmp_path: Path) -> None:
    made, model = learner(tmp_path, inline=False)
    beside(made, model)
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result in ("promoted", "rejected") and not made.busy


def test_what_finished_before_it_saw_its_cancellation_is_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = learner(tmp_path, inline=False)
    monkeypatch.setattr(made, "_run", lambda *job: Outcome("promoted", "better", {"3.bias": model[3].bias}))
    beside(made, model)
    made.cancel()
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result == "cancelled" and outcome.delta == {}


def test_a_running_burst_is_wanted_again_after_a_restart(tmp_path: Path) -> None:
    made, model = learner(tmp_path, inline=False)
    beside(made, model)
    assert made.state_dict()["wanted"] is True


def test_its_state_goes_through_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    made, model = learner(tmp_path)
    made.add(joined(100))
    made.ask()
    made.step(model, 0)
    other, _ = learner(tmp_path)
    other.load_state_dict(checkpoint.decode(checkpoint.encode(made.state_dict())))
    assert digest(other.state_dict()) == digest(made.state_dict())
    for each in (made, other):
        each.add(joined(64, seed=9))
        each.ask()
    first, second = made.step(model, 0), other.step(model, 0)
    assert first is not None and second is not None
    assert (first.result, first.record) == (second.result, second.record)
