from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon import checkpoint, gauges
from daemon.packing import pack
from daemon.records import Labels
from daemon.shift_kind import KIND_ROWS, QUIET_ROWS, ShiftKind, ShiftTracker
from tests.unit.worlds import FACTORY, MemoryLabels, build, decoded, source_rows, worker

SIGNALS = ("input_shift", "feature_shift", "class_shift", "entropy", "prior", "error")


def quiet(**evidence: float) -> dict[str, float]:
    return dict.fromkeys(SIGNALS, 0.1) | evidence


@pytest.mark.parametrize(
    ("alarms", "evidence", "kind"),
    [
        (["class_shift"], quiet(), ShiftKind.COVARIATE),
        (["class_shift", "prior", "error"], quiet(), ShiftKind.COVARIATE),
        (["prior"], quiet(), ShiftKind.LABEL),
        (["prior", "input_shift", "error"], quiet(), ShiftKind.LABEL),
        (["prior"], quiet(class_shift=0.7), ShiftKind.COVARIATE),
        (["input_shift"], quiet(), ShiftKind.COVARIATE),
        (["input_shift"], quiet(prior=0.8), ShiftKind.LABEL),
        (["error"], quiet(), ShiftKind.CONCEPT),
        (["error"], quiet(class_shift=1.5), ShiftKind.COVARIATE),
        (["error"], quiet(class_shift=0.6), ShiftKind.COVARIATE),
        (["error"], quiet(prior=0.6), ShiftKind.LABEL),
    ],
)
def test_the_kind_follows_from_what_alarmed_and_what_nearly_did(
    alarms: list[str], evidence: dict[str, float], kind: ShiftKind
) -> None:
    tracker = ShiftTracker()
    assert tracker.observe(64, alarms, evidence)
    assert tracker.kind is kind


def test_a_slower_detector_may_still_correct_the_first_verdict() -> None:
    tracker = ShiftTracker()
    tracker.observe(64, ["error"], quiet())
    assert tracker.kind is ShiftKind.CONCEPT
    assert tracker.observe(64, ["class_shift"], quiet())
    assert tracker.kind is ShiftKind.COVARIATE


def test_the_next_shift_is_named_anew_while_an_old_alarm_still_rings() -> None:
    tracker = ShiftTracker()
    tracker.observe(64, ["prior"], quiet())
    for _ in range(KIND_ROWS // 64):
        tracker.observe(64, ["error"], quiet())
    assert tracker.kind is ShiftKind.CONCEPT
    assert tracker.observe(64, ["class_shift", "error"], quiet())
    assert tracker.kind is ShiftKind.COVARIATE


def test_the_name_stays_when_the_alarms_have_stopped() -> None:
    tracker = ShiftTracker()
    tracker.observe(64, ["prior"], quiet())
    assert not tracker.observe(KIND_ROWS, [], quiet(class_shift=0.9))
    assert tracker.kind is ShiftKind.LABEL


def test_a_shift_is_over_after_enough_rows_without_an_alarm() -> None:
    tracker = ShiftTracker()
    tracker.observe(64, ["prior"], quiet())
    assert not tracker.observe(QUIET_ROWS - 1, [], quiet())
    assert tracker.observe(1, [], quiet())
    assert tracker.kind is ShiftKind.NONE


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3000), st.sets(st.sampled_from(SIGNALS)), st.sampled_from(SIGNALS), st.floats(0, 2)),
        max_size=30,
    )
)
def test_a_kind_is_named_exactly_while_a_shift_lasts_and_survives_a_checkpoint(steps: list[Any]) -> None:
    tracker, since = ShiftTracker(), QUIET_ROWS
    for rows, alarms, name, share in steps:
        restored = ShiftTracker()
        restored.load_state_dict(checkpoint.decode(checkpoint.encode(tracker.state_dict())))
        changed = tracker.observe(rows, alarms, quiet(**{name: share}))
        assert restored.observe(rows, alarms, quiet(**{name: share})) == changed
        assert restored.kind is tracker.kind
        since = 0 if alarms else min(since + rows, QUIET_ROWS)
        assert (tracker.kind is ShiftKind.NONE) == (since >= QUIET_ROWS)


def planted(kind: ShiftKind, seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the source world in which one thing is another: the inputs, the classes' shares, or what they mean."""
    x, y = source_rows(8 * rows, seed=seed)
    if kind is ShiftKind.LABEL:
        keep = np.random.default_rng(seed).random(len(y)) < np.array([1.0, 0.15, 0.15])[y.astype(int)]
        x, y = x[keep], y[keep]
    x, y = x[:rows], y[:rows]
    if kind is ShiftKind.COVARIATE:
        x = x + np.array([1.5, 0.0, -1.5, 0.0], np.float32)
    if kind is ShiftKind.CONCEPT:
        y = (y + 1) % 3
    return x, y


@functools.cache
def known_well() -> Path:
    """A bundle of the same world with enough rows to tell its error and its signals."""
    folder = Path(tempfile.mkdtemp(prefix="homeostat-kinds-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    x, y = source_rows(6000, seed=1)
    pack(folder / "bundle", model=build(), factory=FACTORY, x=x, y=y, arl0=20_000, watch=("cusum",))
    return folder / "bundle"


@pytest.mark.parametrize("kind", [ShiftKind.COVARIATE, ShiftKind.LABEL, ShiftKind.CONCEPT])
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_planted_shift_is_named_in_the_metrics(tmp_path: Path, kind: ShiftKind, seed: int) -> None:
    made = worker(tmp_path, bundle=known_well())
    before, after = source_rows(512, seed=seed), planted(kind, seed + 100, 512)
    x, y = (np.concatenate(pair) for pair in zip(before, after, strict=True))
    made.loop.labels = MemoryLabels(Labels([str(row) for row in range(1024)], y.tolist(), [0.0] * 1024))
    for start in range(0, 512, 64):
        made.loop.process(decoded(x[start : start + 64], start))
    assert made.loop.monitor.watch.shift.kind is ShiftKind.NONE
    for start in range(512, 1024, 64):
        made.loop.process(decoded(x[start : start + 64], start))
    assert made.loop.monitor.watch.shift.kind is kind
    gauges.refresh(made.loop, None)
    assert {each: gauge._value.get() for each, gauge in made.telemetry.shift.items()}[kind] == 1.0
    assert sum(count._value.get() for (_, each), count in made.telemetry.drifts.items() if each == kind.value) > 0
