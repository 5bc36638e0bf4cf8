"""Who is measured: every detector of ours, those of river and frouros, and a blind one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

import detectors
from detectors import Calibrated
from detectors.base import Detector
from detectors.ensemble import ensemble
from tests.benchmarks import detect_rivals as rivals
from tests.benchmarks.detect_frouros import WRAPPED
from tests.benchmarks.detect_rivals import F64, EveryN, Raw, Restartable

Effort = Literal["full", "some", "slow", "least"]
"""How much of the time of the run a subject may take, see ``detect.EFFORT``."""
Kind = Literal["ours", "river", "frouros", "blind"]
RIVER_NAMES = {"adwin", "page_hinkley", "kswin", "ddm", "eddm", "fhddm", "hddm_a", "hddm_w"}
"""River's, behind this package's interface."""
SLOW = {"kswin", "hddm_a", "hddm_w"}
SLOW_RAW = {"river KSWIN"}
QUICK = {"adwin"}
"""Of river's."""
MANY = 6
"""Columns; of more only the quickest detectors are calibrated column by column."""
CRAWLING = {"frouros KSWIN", "frouros BOCD", "frouros IncrementalKSTest", "frouros STEPD"}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A detector as it takes part."""

    name: str
    kind: Kind
    calibrated: bool
    reads: str = "values"
    effort: Effort = "full"

    def serves(self, columns: int) -> bool:
        """Whether it is measured on rows of ``columns`` numbers (0: values).

        Raw ones read values alone. Most can't be calibrated column by column within the time of the run.
        """
        if not columns:
            return self.effort != "least"
        if self.kind == "blind" or self.reads == "rows":
            return True
        return self.calibrated and self.effort in (("full",) if columns > MANY else ("full", "some"))


@lru_cache
def subjects() -> dict[str, Subject]:
    """All of them by name, calibrated ones first."""
    made = []
    for name in detectors.names():
        detector = detectors.build(name)
        if detector.advisory:
            continue
        kind: Kind = "river" if name in RIVER_NAMES else "ours"
        effort: Effort = "slow" if name in SLOW else "full"
        if detector.reads == "rows" or (kind == "river" and name not in SLOW | QUICK):
            effort = "some"
        made.append(Subject(name=name, kind=kind, calibrated=True, reads=detector.reads, effort=effort))
    made.sort(key=lambda subject: (subject.kind, subject.reads, subject.name))
    if rivals.has_frouros():
        made += [
            Subject(
                name=f"{cls.name}, calibrated",
                kind="frouros",
                calibrated=True,
                effort="some",
            )
            for cls in WRAPPED.values()
        ]
    for name in rivals.RIVER:
        label = f"river {name.rpartition('.')[2]}"
        made.append(Subject(name=label, kind="river", calibrated=False, effort="slow" if label in SLOW_RAW else "full"))
    if rivals.has_frouros():
        for name in (*rivals.FROUROS, "IncrementalKSTest"):
            label = f"frouros {name}"
            made.append(
                Subject(name=label, kind="frouros", calibrated=False, effort="least" if label in CRAWLING else "some")
            )
    made.append(Subject(name="every n", kind="blind", calibrated=False))
    return {subject.name: subject for subject in made}


class Indexed:
    """Gives one-hot rows (B, K) to a detector of class indices."""

    def __init__(self, watch: Restartable) -> None:
        self._watch = watch

    def update_many(self, values: F64) -> list[int]:
        """Indices of the alarms."""
        return self._watch.update_many(indices(values))

    def reset(self) -> None:
        """As new."""
        self._watch.reset()


def indices(values: F64) -> F64:
    """Class indices (B, 1) of one-hot rows (B, K)."""
    return values.argmax(1).astype(np.float64)[:, None]


class AsRows:
    """Gives values (B,) to a detector of rows as (B, 1)."""

    def __init__(self, watch: Restartable) -> None:
        self._watch = watch

    def update_many(self, values: F64) -> list[int]:
        """Indices of the alarms."""
        return self._watch.update_many(values[:, None])

    def reset(self) -> None:
        """As new."""
        self._watch.reset()


def build(subject: Subject, reference: F64, arl0: float, seed: int, *, classes: bool = False) -> Restartable:
    """``subject`` ready for a stream like ``reference`` (N,) or (N, D); calibrated for ``arl0`` if it is to be.

    ``classes``: rows are one-hot. Detectors of values share out ``arl0`` among the columns.
    """
    if subject.kind == "blind":
        return EveryN(int(arl0), np.random.default_rng(seed))
    if not subject.calibrated:
        return _raw(subject, reference)
    detector = _detector(subject)
    if detector.reads == "rows":
        if reference.ndim == 1:
            return AsRows(_calibrated(detector, reference[:, None], arl0, seed))
        if classes and detector.name == "label_shift":
            return Indexed(_calibrated(detector, indices(reference), arl0, seed))
    elif reference.ndim == 2:
        return ensemble([detector], reference, arl0, how="bonferroni", seed=seed)
    return _calibrated(detector, reference, arl0, seed)


def _calibrated(detector: Detector, reference: F64, arl0: float, seed: int) -> Calibrated:
    # By way of the stored numbers, as a daemon does it.
    calibration = detectors.calibrate(detector, reference, arl0=arl0, seed=seed).calibration()
    return Calibrated.from_calibration(detector, calibration)


def _raw(subject: Subject, reference: F64) -> Raw:
    library, _, name = subject.name.partition(" ")
    if library == "river":
        return rivals.river_raw(name if name in rivals.RIVER else f"binary.{name}", reference)
    return rivals.frouros_raw(name, reference)


def _detector(subject: Subject) -> Detector:
    if subject.kind != "frouros":
        return detectors.build(subject.name)
    method = subject.name.removeprefix("frouros ").removesuffix(", calibrated")
    return WRAPPED[method]()
