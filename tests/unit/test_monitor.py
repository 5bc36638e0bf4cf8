from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from daemon import checkpoint
from daemon.inspecting import digest
from daemon.labels import Joined
from daemon.monitor import MIN_LABELS, Monitor
from daemon.predicted import Predicted
from daemon.trust import LABEL_SILENCE_ROWS
from tests.unit.worlds import source_rows, worker


def labelled(rows: int, *, adapted_wrong: bool = False, version_wrong: bool = False) -> Joined:
    # Classes take turns, so that every row is a run of its own.
    right = (np.arange(rows) % 2).astype(np.float32)
    adapted, version = (1 - right if adapted_wrong else right), (1 - right if version_wrong else right)
    x, zeros, ones = np.zeros((rows, 4), np.float32), np.zeros(rows, np.float32), np.ones(rows, np.float32)
    return Joined(
        x, right.astype(np.float64), version, adapted, version, right, ones, zeros, zeros, zeros, ones, zeros, zeros
    )


@pytest.fixture
def monitor(tmp_path: Path) -> Monitor:
    return worker(tmp_path, fast={"name": "ema_norm"}).loop.monitor


def predicted(folder: Path, rows: int) -> Predicted:
    return worker(folder).loop.resident.predict(source_rows(rows)[0], adapt=False, serve=False)


def test_before_anything_is_measured_the_reading_is_unknown(monitor: Monitor) -> None:
    value, source = monitor.value()
    assert np.isnan(value) and source == "none"


def test_labels_decide_over_the_signals_once_there_are_enough(tmp_path: Path, monitor: Monitor) -> None:
    monitor.observe(predicted(tmp_path, 300))
    assert monitor.value()[1] in ("feature_shift", "entropy")
    monitor.labelled(labelled(2 * MIN_LABELS, version_wrong=True), 0, 0, fast=False)
    value, source = monitor.value()
    assert source == "error" and value > 1


def test_better_than_the_reference_is_no_disturbance(monitor: Monitor) -> None:
    monitor.labelled(labelled(2 * MIN_LABELS), 0, 0, fast=False)
    assert monitor.value() == (0.0, "error")


def test_labels_earn_trust_for_an_adaptation_that_is_better_and_for_no_other(monitor: Monitor) -> None:
    monitor.labelled(labelled(64), 0, 0, fast=False)
    assert not monitor.trusted()
    monitor.labelled(labelled(64, version_wrong=True), 0, 0, fast=False)
    assert monitor.trusted()


def test_labels_show_harm(monitor: Monitor) -> None:
    monitor.labelled(labelled(200, adapted_wrong=True), 0, 0, fast=True)
    assert monitor.fast_guard.verdict() == "harm" and not monitor.trusted()
    monitor.forget_fast()
    assert monitor.fast_guard.verdict() is None


def test_rows_of_an_earlier_fast_state_are_no_evidence(monitor: Monitor) -> None:
    monitor.labelled(labelled(200, adapted_wrong=True), 1, 0, fast=True)
    assert monitor.fast_guard.verdict() is None


def test_a_version_worse_than_the_frozen_model_is_found_out(monitor: Monitor) -> None:
    rows = labelled(200, version_wrong=True)
    rows.number = np.ones(200, np.float32)
    monitor.labelled(rows, 0, 1, fast=False)
    assert monitor.slow_guard.verdict() is not None


def test_each_failure_raises_the_bar(monitor: Monitor) -> None:
    for _ in range(40):
        monitor.trust.raise_bar()
    monitor.labelled(labelled(10, version_wrong=True), 0, 0, fast=False)
    assert not monitor.trusted()


def test_after_a_long_silence_the_stream_counts_as_unlabelled(tmp_path: Path, monitor: Monitor) -> None:
    assert not monitor.trust.labels_come()
    monitor.labelled(labelled(1), 0, 0, fast=False)
    assert monitor.trust.labels_come()
    batch = predicted(tmp_path, 1000)
    for _ in range(LABEL_SILENCE_ROWS // 1000 + 1):
        monitor.observe(batch)
    assert not monitor.trust.labels_come()


def test_its_state_goes_through_a_checkpoint_to_the_bit(tmp_path: Path, monitor: Monitor) -> None:
    monitor.observe(predicted(tmp_path, 300))
    monitor.labelled(labelled(64, version_wrong=True), 0, 0, fast=False)
    other = worker(tmp_path).loop.monitor
    other.load_state_dict(checkpoint.decode(checkpoint.encode(monitor.state_dict())))
    assert digest(other.state_dict()) == digest(monitor.state_dict()) and other.trusted() == monitor.trusted()
