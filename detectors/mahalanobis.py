"""Mahalanobis distance of the newest rows from the reference: mean, size and shape."""

from __future__ import annotations

from typing import Any

import numpy as np

from detectors.base import F64
from detectors.linear import GRID, bounded, exact, location_scale, steps
from detectors.registry import register
from detectors.rows import RowDetector
from detectors.windows import LONGEST, WINDOWS, Index, deviations, evidence, gauge

DIRECTIONS = 64
"""Leading directions of more columns than these; the rest counts by its length alone."""
SHAPED = 16
"""Most dimensions whose products are watched."""
FLOOR = 1e-3
"""Least variance of a direction, as a share of the mean one."""
EDGE = 0.995
"""Quantile of the reference's distances beyond which a row weighs no more."""
LARGEST_SIZE = 8.0
"""Deviations to which a row's size is cut."""


@register("mahalanobis")
class Mahalanobis(RowDetector):
    """Hotelling's statistic of the newest rows' mean, and the same of their size and shape, over windows of 4 to 512.

        z = C**-1/2 (x - mean)                              whitened by the reference; d = |z|
        mean:  z          size:  d**(2/3), standardised          shape:  K z z' / d**2 - I, for K = D <= 16
        z_w = |sum over the last w rows|**2 / w on a normal scale, for each of the three
        drift when the greatest max(z_w, 0)**2 / 2 > threshold

    The mean sees a shift in any direction, the size a change of the variance, the shape one of the correlations or of
    a single variance (for more than 16 columns only as far as it moves the size). Beyond 64 columns z is made of the
    64 leading directions, and the length of what is left of a row is a second size. C is the columns' correlation,
    shrunk towards a multiple of the unit matrix. d**(2/3) is nearly normal; the shape does not depend on d; and a
    row's z is cut at the distance that one in 200 rows of the reference exceeds: a single wild row can't weigh much.

    H. Hotelling, "Multivariate quality control", 1947; C. A. Lowry et al., "A multivariate exponentially weighted
    moving average control chart", Technometrics 34, 1992; O. Ledoit, M. Wolf, "A well-conditioned estimator for
    large-dimensional covariance matrices", Journal of Multivariate Analysis 88, 2004; D. E. Tyler, "A
    distribution-free M-estimator of multivariate scatter", Annals of Statistics 15, 1987 (the shape).

    ``warmup`` and the state: see ``RowDetector``. The default threshold gives about one false alarm in 10,000
    independent Gaussian rows with D = 5 when the detector is used alone with 500 rows of warm-up.
    """

    def __init__(self, threshold: float = 8.7, *, warmup: int = 500, warn_at: float = 0.7) -> None:
        super().__init__(threshold, warmup, warn_at)

    def options(self) -> dict[str, Any]:
        """All but the threshold."""
        return {"warmup": self._warmup, "warn_at": self._warn_at}

    def _learn(self, reference: F64) -> dict[str, F64]:
        mean, scale = location_scale(reference)
        whole = steps(reference, mean, scale)
        whitening, variances = _whitening(whole / GRID)
        z = np.rint(whole @ whitening)
        distances = np.sqrt(np.einsum("bk,bk->b", z, z))
        sizes = _sizes(whole, z, variances)
        learnt = {
            "location": mean,
            "scale": scale,
            "whitening": whitening,
            "variances": variances,
            "edge": np.clip(np.quantile(distances, [EDGE]), 1.0, LONGEST / 2.0),
            "sizes": np.stack([sizes.mean(0), np.maximum(sizes.std(0), 1e-9)]),
        }
        features = _made(reference, learnt)
        learnt["centre"] = np.rint(features.mean(0))
        features -= learnt["centre"]
        learnt["gauges"] = np.stack([gauge(features[:, part]) for part in _parts(whitening.shape)])
        return learnt

    def _adopt(self, learnt: dict[str, F64]) -> tuple[int, int]:
        columns, directions = learnt["whitening"].shape
        self._parts = _parts((columns, directions))
        width = self._parts[-1].stop
        expected = {
            "location": (columns,),
            "scale": (columns,),
            "variances": (directions,),
            "edge": (1,),
            "sizes": (2, 2 if directions < columns else 1),
            "centre": (width,),
            "gauges": (len(self._parts), len(WINDOWS), 4),
        }
        for name, shape in expected.items():
            if learnt[name].shape != shape:
                raise ValueError(f"{name} has shape {learnt[name].shape} in place of {shape}")
        self._gauges = learnt["gauges"]
        self._used = learnt
        return columns, width

    def _features(self, rows: F64) -> F64:
        features = _made(rows, self._used)
        features -= self._used["centre"]
        return features

    def _evidence(self, sums: F64, k: Index) -> F64:
        z = deviations(sums[:, self._parts[0]], self._gauges[0, k])
        for part, gauged in zip(self._parts[1:], self._gauges[1:, k], strict=True):
            np.maximum(z, deviations(sums[:, part], gauged), out=z)
        return evidence(z)


def _parts(shape: tuple[int, ...]) -> list[slice]:
    """Which features are the mean's, the size's and, if it is watched, the shape's, for a whitening of ``shape``."""
    columns, directions = shape
    sized = directions + (2 if directions < columns else 1)
    parts = [slice(0, directions), slice(directions, sized)]
    if 2 <= directions <= SHAPED:
        parts.append(slice(sized, sized + directions * (directions + 1) // 2))
    return parts


def _whitening(x: F64) -> tuple[F64, F64]:
    """Of standardised ``x`` (N, D): the map (D, K) to K = min(D, 64) white directions, and their variances (K,)."""
    rows, columns = x.shape
    covariance = x.T @ x / rows
    level = max(float(np.trace(covariance)) / columns, 1e-9)
    unit = level * np.eye(columns)
    apart = float(np.square(covariance - unit).sum())
    fourth = float(np.square(np.square(x).sum(1)).sum()) / rows
    noise = (fourth - float(np.square(covariance).sum())) / rows
    shrinkage = min(1.0, noise / apart) if apart > 0.0 else 1.0
    variances, directions = np.linalg.eigh((1.0 - shrinkage) * covariance + shrinkage * unit)
    variances = np.maximum(variances[-DIRECTIONS:], FLOOR * level)
    return exact(directions[:, -DIRECTIONS:] / np.sqrt(variances)), variances


def _sizes(whole: F64, z: F64, variances: F64) -> F64:
    """Cube roots of the squared lengths of ``z`` (B, K), and of what is left of ``whole`` (B, D) where K < D."""
    lengths = [np.einsum("bk,bk->b", z, z)]
    if z.shape[1] < whole.shape[1]:
        left = np.einsum("bd,bd->b", whole, whole) - (z * z * variances).sum(1)
        lengths.append(np.maximum(left, 0.0))
    sizes: F64 = np.cbrt(np.stack(lengths, axis=1))
    return sizes


def _made(rows: F64, learnt: dict[str, F64]) -> F64:
    """Features (B, R) of ``rows`` (B, D) before their mean is taken away."""
    whole = steps(rows, learnt["location"], learnt["scale"])
    z = np.rint(whole @ learnt["whitening"])
    parts = _parts(learnt["whitening"].shape)
    features = np.empty((len(rows), parts[-1].stop))
    features[:, parts[0]] = bounded(z, float(learnt["edge"][0]))
    mean, deviation = learnt["sizes"]
    size = (_sizes(whole, z, learnt["variances"]) - mean) / deviation
    np.rint(np.clip(size, -LARGEST_SIZE, LARGEST_SIZE) * GRID, out=features[:, parts[1]])
    if len(parts) == 3:
        directions = z.shape[1]
        lengths = np.einsum("bk,bk->b", z, z)
        z *= np.sqrt(directions / np.maximum(lengths, 1.0))[:, None]
        first, second = np.triu_indices(directions)
        # A product off the diagonal stands for two entries of the matrix.
        weights = np.where(first == second, GRID, np.sqrt(2.0) * GRID)
        np.rint(z[:, first] * z[:, second] * weights, out=features[:, parts[2]])
    return features
