"""Chi-square distance of the newest predicted labels from the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np

from detectors.base import F64
from detectors.linear import GRID, bounded, exact, location_scale, steps
from detectors.registry import register
from detectors.rows import RowDetector
from detectors.windows import LONGEST, WINDOWS, Index, deviations, evidence, gauge

MOST_CLASSES = 256
"""A reference of whole numbers with more different values than these is taken for a quantity."""
ROWS_PER_CLASS = 5
"""Fewest rows for each different value, on average, for the values to be class indices."""
FLOOR = 1e-3
"""Least variance of a direction, as a share of the mean one."""
EDGE = 0.995
"""Quantile of the reference's distances beyond which a row weighs no more."""


@register("label_shift")
class LabelShift(RowDetector):
    """Chi-square distance of the mean prediction from the reference's, over windows of 4 to 512 rows.

        S_w = sum of p - mean p over the last w rows;  z_w = S_w' C^-1 S_w / w on a normal scale
        drift when max_w max(z_w, 0)**2 / 2 > threshold

    Rows are class probabilities (K,), one-hot labels, or one class index; C is the reference's covariance of them, so
    that for one-hot rows this is Pearson's chi-square. An index counts as one-hot over the classes of the reference,
    all others together as one more; a reference of other numbers than such indices is watched for its mean.

    Notices a change of the predicted prior. A covariate shift moves the predictions too: which of the two it is, this
    number does not say (``daemon`` tells them apart by other evidence). Under a pure label shift the predicted prior
    is the true one times the classifier's confusion matrix, and moves whenever that matrix is invertible.

    Z. C. Lipton, Y.-X. Wang, A. Smola, "Detecting and correcting for label shift with black box predictors", ICML 2018.

    The values are read as they are, without prewhitening: labels that come in runs widen the scale of the longer
    windows instead (``detectors.windows.growth``). A single row weighs no more than one at the edge of the reference.
    ``warmup`` and the state: see ``RowDetector``. The default threshold gives about one false alarm in 10,000
    independent Gaussian rows with D = 5 when the detector is used alone with 500 rows of warm-up.
    """

    domain = "raw"
    assumes_independence = False

    def __init__(self, threshold: float = 7.6, *, warmup: int = 500, warn_at: float = 0.7) -> None:
        super().__init__(threshold, warmup, warn_at)

    def options(self) -> dict[str, Any]:
        """All but the threshold."""
        return {"warmup": self._warmup, "warn_at": self._warn_at}

    def _learn(self, reference: F64) -> dict[str, F64]:
        classes = _classes(reference)
        rows = _one_hot(reference, classes)
        mean, scale = location_scale(rows)
        if classes.size:
            # Half a row of each class, so that one that was never seen has a distance too.
            mean = (rows.sum(0) + 0.5) / (len(rows) + 0.5 * rows.shape[1])
            scale = np.sqrt(mean)
            whitening = exact(np.eye(mean.size))
        else:
            # One scale for all columns: rows that sum to one then still do, up to a constant.
            scale = np.full_like(scale, scale.max())
            whitening = _whitening(steps(rows, mean, scale) / GRID)
        z = np.rint(steps(rows, mean, scale) @ whitening)
        distances = np.sqrt(np.einsum("bk,bk->b", z, z))
        edge = np.clip(np.quantile(distances, [EDGE]), 1.0, LONGEST / 2.0)
        features = bounded(z, float(edge[0]))
        centre = np.rint(features.mean(0))
        return {
            "classes": classes,
            "location": mean,
            "scale": scale,
            "whitening": whitening,
            "edge": edge,
            "centre": centre,
            "gauge": gauge(features - centre),
        }

    def _adopt(self, learnt: dict[str, F64]) -> tuple[int, int]:
        self._classes, self._location, self._scale = learnt["classes"], learnt["location"], learnt["scale"]
        self._whitening, self._edge = learnt["whitening"], float(learnt["edge"].item())
        self._centre, self._gauge = learnt["centre"], learnt["gauge"]
        width = self._location.size
        shapes = [array.shape for array in (self._scale, self._whitening, self._centre, self._gauge)]
        if shapes != [(width,), (width, width), (width,), (len(WINDOWS), 4)]:
            raise ValueError(f"shapes {shapes} for {width} classes")
        if self._classes.size and self._classes.shape != (width - 1,):
            raise ValueError(f"{self._classes.size} classes and one more for the unknown ones are not {width}")
        return 1 if self._classes.size else width, width

    def _features(self, rows: F64) -> F64:
        z = steps(_one_hot(rows, self._classes), self._location, self._scale) @ self._whitening
        features = bounded(np.rint(z, out=z), self._edge)
        features -= self._centre
        return features

    def _evidence(self, sums: F64, k: Index) -> F64:
        return evidence(deviations(sums, self._gauge[k]))


def _classes(reference: F64) -> F64:
    """The class indices (K,) in ``reference`` (N, D), sorted; none if its rows are no class indices."""
    if reference.shape[1] > 1 or (np.rint(reference) != reference).any():
        return np.empty(0)
    values = np.unique(reference)
    return values if values.size <= min(MOST_CLASSES, len(reference) / ROWS_PER_CLASS) else np.empty(0)


def _one_hot(rows: F64, classes: F64) -> F64:
    """Class indices ``rows`` (B, 1) as (B, K + 1), the last for an unknown one; other rows as they are."""
    if not classes.size:
        return rows
    known = rows == classes
    return np.concatenate((known, ~known.any(1, keepdims=True)), axis=1).astype(np.float64)


def _whitening(p: F64) -> F64:
    """Map (K, K) of ``p`` (N, K), with mean zero, to unit variance in each direction that varies in it.

    A direction without variance, as that of the sum of probabilities, is not scaled up: what never moves stays zero.
    """
    variances, directions = np.linalg.eigh(p.T @ p / len(p))
    return exact(directions / np.sqrt(np.maximum(variances, max(FLOOR * float(variances.mean()), 1e-12))))
