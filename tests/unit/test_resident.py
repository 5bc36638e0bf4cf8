from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from daemon import checkpoint
from daemon.device import choose_device
from daemon.inspecting import digest
from daemon.resident import Resident
from daemon.versions import VersionError
from tests.unit.worlds import source_rows, worker


def resident(folder: Path, **changes: object) -> Resident:
    return worker(folder, **{"fast": {"name": "ema_norm"}, **changes}).loop.resident


def test_a_promoted_version_answers_from_the_next_batch_on_and_a_rollback_takes_it_away(tmp_path: Path) -> None:
    made = resident(tmp_path)
    x, _ = source_rows(16)
    before = made.predict(x, adapt=False, serve=False).version
    version = made.promote({"3.bias": torch.tensor([0.0, 1e6, 0.0])}, {"rows": 3})
    assert version.number == 1 and version.record == {"rows": 3, "parent": 0}
    after = made.predict(x, adapt=False, serve=False)
    assert (after.version == 1).all() and np.array_equal(after.frozen, before)
    assert made.rollback().number == 0
    assert np.array_equal(made.predict(x, adapt=False, serve=False).version, before)


def test_a_version_builds_on_the_one_before_and_numbers_are_never_used_twice(tmp_path: Path) -> None:
    made = resident(tmp_path)
    made.promote({"3.bias": torch.zeros(3)}, {})
    second = made.promote({"0.bias": torch.zeros(8)}, {})
    assert sorted(second.delta) == ["0.bias", "3.bias"] and second.number == 2
    made.rollback()
    assert made.promote({"0.bias": torch.ones(8)}, {}).number == 3


def test_the_ring_keeps_the_newest_versions(tmp_path: Path) -> None:
    made = resident(tmp_path, versions=3)
    for _ in range(6):
        made.promote({"3.bias": torch.zeros(3)}, {})
    assert [version.number for version in made.versions.ring] == [3, 4, 5] and made.current.number == 6


def test_any_kept_version_is_served_again_to_the_bit(tmp_path: Path) -> None:
    made = resident(tmp_path)
    x, _ = source_rows(16)
    answers = {0: made.measure_version(x).signals}
    for number in (1, 2, 3):
        made.promote({"3.bias": torch.full((3,), float(number)) * torch.arange(3)}, {})
        answers[number] = made.measure_version(x).signals
    made.versions.pin(1)
    for number in (1, 3, 0, 2):
        before = made.epoch
        assert made.rollback(number).number == number == made.current.number and made.epoch == before + 1
        assert np.array_equal(made.measure_version(x).signals, answers[number])


def test_a_version_that_is_not_there_or_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    made = resident(tmp_path)
    made.promote({"3.bias": torch.ones(3)}, {})
    before, model = digest(made.state_dict()), made.version_model
    with pytest.raises(VersionError, match="version 9 is not kept; there are 0, 1"):
        made.rollback(9)
    with pytest.raises(ValueError, match="has shape"):
        made.promote({"3.bias": torch.ones(4)}, {})
    assert digest(made.state_dict()) == before and made.version_model is model


def test_the_frozen_model_is_never_changed(tmp_path: Path) -> None:
    made = resident(tmp_path, fast={"name": "tent", "lr": 0.1})
    before = digest(made.frozen.state_dict())
    made.set_gain(1.0)
    for seed in range(5):
        made.predict(source_rows(32, seed=seed)[0] + 1, adapt=True, serve=True)
    made.promote({"3.bias": torch.ones(3)}, {})
    made.predict(source_rows(32)[0], adapt=True, serve=True)
    assert digest(made.frozen.state_dict()) == before


def test_replaced_versions_leave_no_hook_behind(tmp_path: Path) -> None:
    made = resident(tmp_path)

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in made.frozen.modules())

    before = hooks()
    for _ in range(5):
        made.promote({"3.bias": torch.zeros(3)}, {})
        made.rollback()
    assert hooks() == before


@pytest.mark.parametrize(("gain", "adapt", "serve", "forwards"), [(0, False, True, 1), (1, False, False, 1)])
def test_while_nothing_differs_only_one_model_runs(
    tmp_path: Path, gain: float, adapt: bool, serve: bool, forwards: int
) -> None:
    made = resident(tmp_path)
    made.set_gain(gain)
    calls: list[int] = []
    made.frozen.register_forward_hook(lambda *_: calls.append(1))
    predicted = made.predict(source_rows(8)[0], adapt=adapt, serve=serve)
    assert len(calls) == forwards and not predicted.served_adapted
    assert np.array_equal(predicted.frozen, predicted.version)


def test_in_the_shadow_the_version_answers(tmp_path: Path) -> None:
    made = resident(tmp_path)
    made.set_gain(1.0)
    for seed in range(5):
        shadow = made.predict(source_rows(32, seed=seed)[0] + 2, adapt=True, serve=False)
    assert not shadow.served_adapted and np.array_equal(shadow.rows.prediction, shadow.version)
    assert np.isfinite(shadow.adapted).all()


def test_twins_run_on_their_share_of_the_rows_and_are_weighted_by_it(tmp_path: Path) -> None:
    made = resident(tmp_path, twin_share=0.25)
    made.set_gain(1.0)
    ran = 0
    for seed in range(40):
        predicted = made.predict(source_rows(50, seed=seed)[0], adapt=True, serve=True)
        ran += int(np.isfinite(predicted.version).sum())
        assert predicted.served_adapted and (predicted.weight == 4).all()
    assert 400 < ran < 600


def test_its_state_goes_through_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    made, other = resident(tmp_path), resident(tmp_path)
    for value in (1.0, 2.0):
        made.promote({"3.bias": torch.full((3,), value)}, {"gain": 0.1})
    made.versions.pin(1)
    made.versions.held, made.versions.trigger = True, {"reasons": ["drift alarm"]}
    made.set_gain(0.5)
    made.predict(source_rows(32)[0] + 1, adapt=True, serve=True)
    other.load_state_dict(checkpoint.decode(checkpoint.encode(made.state_dict())))
    assert digest(other.state_dict()) == digest(made.state_dict())
    x = source_rows(32, seed=4)[0]
    assert np.array_equal(
        made.predict(x, adapt=True, serve=True).rows.signals, other.predict(x, adapt=True, serve=True).rows.signals
    )


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            choose_device("cuda")
