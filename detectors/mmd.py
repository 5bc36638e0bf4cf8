"""Maximum mean discrepancy of the newest rows from the reference, on random Fourier features."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detectors.base import F64
from detectors.linear import GRID, LARGEST, exact, location_scale, steps
from detectors.registry import register
from detectors.rows import RowDetector
from detectors.windows import LONGEST, WINDOWS, Index, deviations, evidence, gauge

TURN = 4096
"""Steps of a full turn: a feature's angle is rounded to 0.0015 radians."""
AMPLITUDE = LONGEST / 2.0
"""Norm of a row's embedding, in steps: less its mean it is at most twice as long."""
HOSTS = ("cpu", "mps")
"""Kinds of torch device whose rows are projected by numpy."""
MEDIAN_ROWS = 300
"""Rows of the reference whose distances give the bandwidth."""


@register("mmd")
class MMD(RowDetector):
    """Distance between the mean embeddings of a window and of the reference, over windows of 4 to 512 rows.

        phi(x) = sqrt(2 / R) [cos(w_i x), sin(w_i x)]       i = 1 .. R / 2,  w_i ~ N(0, I / bandwidth**2)
        S_w = sum of phi(x) - mean phi over the last w rows;  z_w = ||S_w||**2 / w on a normal scale
        drift when max_w max(z_w, 0)**2 / 2 > threshold

    Notices any lasting change of the distribution: mean, variance, correlation, shape. A Gaussian kernel sees a change
    of all columns sooner than one of a single column among many. Columns are standardised by the reference first.
    The features are bounded, so that a single wild row can't weigh much.

    A. Rahimi, B. Recht, "Random features for large-scale kernel machines", NeurIPS 2007. A. Gretton et al., "A kernel
    two-sample test", JMLR 13, 2012. N. Keriven, D. Garreau, I. Poli, "NEWMA: a new method for scalable model-free
    online change-point detection", IEEE Transactions on Signal Processing 68, 2020 (the features in place of the
    kernel). S. Wei, Y. Xie, "Online kernel CUSUM for change-point detection", 2022 (the scan over windows). The normal
    scale is ours: see ``detectors.windows.gauge``.

    ``features`` is R, even; ``bandwidth`` the kernel's, in deviations of a column, by default the median distance
    between rows of the reference; ``seed`` draws the w_i. The default threshold gives about one false alarm in 10,000
    independent Gaussian rows with D = 5 when the detector is used alone with 500 rows of warm-up.

    Tensors on an accelerator are projected there, in float64, and only the angles (B, R / 2), two bytes each, are
    copied to the host; where there is no float64 (Apple's), and during a warm-up, the rows are.
    """

    def __init__(
        self,
        threshold: float = 7.4,
        *,
        features: int = 96,
        bandwidth: float | None = None,
        seed: int = 0,
        warmup: int = 500,
        warn_at: float = 0.7,
    ) -> None:
        if features < 2 or features % 2:
            raise ValueError(f"features must be an even number of at least 2, got {features}")
        if bandwidth is not None and not 0.0 < bandwidth < float("inf"):
            raise ValueError(f"bandwidth must be a finite number above 0, or None for the median, got {bandwidth!r}")
        self._size, self._bandwidth, self._seed = int(features), bandwidth, int(seed)
        super().__init__(threshold, warmup, warn_at)

    def options(self) -> dict[str, Any]:
        """All but the threshold."""
        return {
            "features": self._size,
            "bandwidth": self._bandwidth,
            "seed": self._seed,
            "warmup": self._warmup,
            "warn_at": self._warn_at,
        }

    def update_many(self, values: Any) -> list[int]:
        """Read rows (B, D); indices of the alarms. Raises ``ValueError`` if one is not finite or not D long."""
        if not (self._given and hasattr(values, "detach") and values.device.type not in HOSTS):
            return super().update_many(values)
        rows = values.detach().double().reshape(len(values), -1)
        if not len(rows):
            return []
        self._check_columns(rows.shape[1])
        angles = self._project(rows)
        if not bool(rows.isfinite().all()):
            raise ValueError("mmd needs finite values: drop the other rows first, as Calibrated does")
        return self._read(angles, len(angles))

    def _project(self, rows: Any) -> NDArray[np.int16]:
        """Angles (B, R / 2) of ``rows`` (B, D), a tensor: as ``_angles``, on its device."""
        bound = LARGEST / GRID * self._scale
        location, bound, scale, projection = (
            rows.new_tensor(array) for array in (self._location, bound, GRID / self._scale, self._projection)
        )
        whole = ((rows - location).clamp(-bound, bound) * scale).round()
        angles: NDArray[np.int16] = ((whole @ projection).floor() % TURN).short().cpu().numpy()
        return angles

    def _learn(self, reference: F64) -> dict[str, F64]:
        mean, scale = location_scale(reference)
        rng = np.random.default_rng(self._seed)
        few = rng.permutation(reference)[:MEDIAN_ROWS]
        bandwidth = self._bandwidth or _median_distance(steps(few, mean, scale) / GRID)
        frequencies = rng.normal(size=(reference.shape[1], self._size // 2)) / bandwidth
        projection = exact(frequencies * (TURN / (2.0 * np.pi) / GRID))
        embedded = _embedded(_angles(reference, mean, scale, projection))
        centre = np.rint(embedded.mean(0))
        return {
            "location": mean,
            "scale": scale,
            "projection": projection,
            "centre": centre,
            "gauge": gauge(embedded - centre),
        }

    def _adopt(self, learnt: dict[str, F64]) -> tuple[int, int]:
        self._location, self._scale, self._projection = learnt["location"], learnt["scale"], learnt["projection"]
        self._centre, self._gauge = learnt["centre"], learnt["gauge"]
        columns = self._location.size
        shapes = [array.shape for array in (self._scale, self._projection, self._centre, self._gauge)]
        if shapes != [(columns,), (columns, self._size // 2), (self._size,), (len(WINDOWS), 4)]:
            raise ValueError(f"shapes {shapes} for {self._size} features of {columns} columns")
        return columns, self._size

    def _features(self, rows: NDArray[Any]) -> F64:
        angles = rows if rows.dtype == np.int16 else _angles(rows, self._location, self._scale, self._projection)
        features = _embedded(angles)
        features -= self._centre
        return features

    def _evidence(self, sums: F64, k: Index) -> F64:
        return evidence(deviations(sums, self._gauge[k]))


def _angles(rows: F64, location: F64, scale: F64, projection: F64) -> NDArray[np.int16]:
    """Projections (B, R / 2) of ``rows`` (B, D) in steps of a turn, from 0 to ``TURN`` - 1."""
    turned = steps(rows, location, scale) @ projection
    return (np.floor(turned, out=turned).astype(np.int64) & (TURN - 1)).astype(np.int16)


def _embedded(angles: NDArray[Any]) -> F64:
    """Cosines, then sines, of ``angles`` (B, R / 2): whole numbers (B, R), so that each row has norm ``AMPLITUDE``."""
    half = angles.shape[1]
    features = np.empty((len(angles), 2 * half))
    cosine = _cosines(half)
    np.take(cosine, angles, out=features[:, :half], mode="clip")
    np.take(cosine, (angles - TURN // 4) & (TURN - 1), out=features[:, half:], mode="clip")
    return features


@cache
def _cosines(half: int) -> F64:
    """Cosines of all steps of a turn (TURN,), in whole numbers, for R / 2 = ``half``."""
    table: F64 = np.rint(AMPLITUDE / np.sqrt(half) * np.cos(2.0 * np.pi / TURN * np.arange(TURN)))
    return table


def _median_distance(rows: F64) -> float:
    """Median Euclidean distance between two of ``rows`` (N, D); 1 if most are equal."""
    squares = np.einsum("nd,nd->n", rows, rows)
    distances = squares[:, None] + squares - 2.0 * (rows @ rows.T)
    median = float(np.median(distances[np.triu_indices(len(rows), 1)]))
    return float(np.sqrt(median)) if median > 1e-6 else 1.0
