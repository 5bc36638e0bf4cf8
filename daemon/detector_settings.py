"""Which detectors the settings may name, and whether a bundle was packed for them."""

from __future__ import annotations

from typing import Any

import detectors
from daemon.errors import SettingsError
from daemon.settings import Settings
from daemon.watch import ERROR, FEATURES


def of_signals() -> list[str]:
    """Detectors that a signal may be watched with."""
    built = {name: detectors.build(name) for name in detectors.names()}
    return [name for name, detector in built.items() if detector.reads == "values" and not detector.advisory]


def of_features() -> list[str]:
    """Detectors that may watch features."""
    built = {name: detectors.build(name) for name in detectors.names()}
    return [name for name, detector in built.items() if detector.reads == "rows" and detector.domain == "standard"]


def check_detectors(settings: Settings) -> None:
    """Raise ``SettingsError`` when a name is no detector for its place."""
    name, features = settings.detect.name, settings.detect.features
    problems = []
    if name not in ("cusum", "adwin") and name not in (known := of_signals()):
        problems.append(f"HOMEOSTAT_DETECT={name}: there is no such detector of a signal; there are {', '.join(known)}")
    if features is not None and features not in (known := of_features()):
        problem = f"there is no such detector of features; there are {', '.join(known)}"
        problems.append(f"HOMEOSTAT_DETECT__FEATURES={features}: {problem}")
    if problems:
        raise SettingsError(problems)


def check_calibrated(settings: Settings, kept: dict[str, Any]) -> None:
    """Raise ``SettingsError`` when the bundle's calibration (detector, then signal) lacks what the settings name."""
    name, features = settings.detect.name, settings.detect.features
    advice = "the bundle is not calibrated for it: pack it with the same setting"
    problems = []
    if ERROR not in kept.get(name, {}):
        own = ", ".join(sorted(other for other, signals in kept.items() if ERROR in signals))
        problems.append(f"HOMEOSTAT_DETECT={name}: {advice}, or use {own}")
    if features is not None and FEATURES not in kept.get(features, {}):
        problems.append(f"HOMEOSTAT_DETECT__FEATURES={features}: {advice}")
    if problems:
        raise SettingsError(problems)
