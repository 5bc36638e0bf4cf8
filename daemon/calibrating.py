"""Calibration of everything that a running daemon watches, on rows without drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import detectors
from daemon.errors import BundleError
from daemon.records import F32, F64
from daemon.watch import EARLY, ERROR, FEATURES, PRIOR, RISK, class_index, detector_names


def calibrate_watch(
    signals: Mapping[str, F64],
    losses: F64,
    predictions: F64,
    features: F32 | None,
    *,
    task: str,
    names: Sequence[str],
    features_name: str | None,
    arl0: float,
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Calibrations by detector and signal.

    Every detector watches alone; together, those of one daemon raise one false alarm in ``arl0`` rows (Bonferroni).
    Early warnings, which are no alarms, are held to the same rate each.

    Args:
        signals: each (N,), rows without drift in order of time.
        losses: (N,) losses of the answers to them.
        predictions: (N,) predicted classes or values.
        features: (N, R) what a detector of rows gets; None where there are none.
        task: ``classification`` or ``regression``.
        names: detectors of signals; the daemon runs with one of them.
        features_name: detector of rows, or None.
        arl0: mean rows between false alarms of all together.
        seed: of the simulated streams.
        progress: told what is under way.

    Raises:
        BundleError: a detector can't reach the rate on a signal.
    """
    values: dict[str, Any] = {**signals, ERROR: losses, RISK: losses, PRIOR: class_index(predictions)}
    if features is not None:
        values[FEATURES] = features
    found: dict[str, dict[str, dict[str, Any]]] = {}

    def add(name: str, signal: str, rate: float) -> None:
        if signal not in found.setdefault(name, {}):
            progress(f"calibration: {name} on {signal}")
            try:
                calibrated = detectors.calibrate(detectors.build(name), values[signal], arl0=rate, seed=seed)
            except ValueError as error:
                raise BundleError(f"{name} can't be calibrated on {signal}: {error}") from None
            found[name][signal] = calibrated.calibration()

    for name in names:
        watched = detector_names(tuple(signals), task, name, features_name)
        for signal, each in watched.items():
            add(each, signal, arl0 * len(watched))
    for signal in signals:
        if signal in EARLY:
            add("early_warning", signal, arl0)
    return found


def false_alarms(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """Of each calibration the ARL0 asked for, the one reached, and its 95% interval, in rows."""
    keys = ("arl0", "reached_arl0", "reached_low", "reached_high")
    return {
        name: {signal: [float(round(made[key])) for key in keys] for signal, made in signals.items()}
        for name, signals in found.items()
    }
