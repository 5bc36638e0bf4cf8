"""Drift detection with a known false-alarm rate. Knows numbers, nothing of models or of the daemon.

    >>> import numpy as np
    >>> import detectors
    >>> reference = np.random.default_rng(0).normal(20.0, 3.0, size=2000)
    >>> watch = detectors.calibrate(detectors.build("cusum"), reference, arl0=1000)
    >>> watch.update(20.5).drift
    False
    >>> len(watch.update_many(np.full(20, 26.0)))
    5

Importing this package needs numpy alone; what a detector needs beyond is imported when it is built.
"""

from __future__ import annotations

from detectors.base import Detector
from detectors.calibrated import Calibrated, calibrate
from detectors.registry import build, names, register

__all__ = ["Calibrated", "Detector", "build", "calibrate", "names", "register"]
