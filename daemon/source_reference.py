"""What a bundle keeps of its source rows: moments, prior, exemplars, directions."""

from __future__ import annotations

import numpy as np
import torch

from adapters.reference import Reference

MOST_FEATURES = 64
"""Numbers a row that a detector of features gets at the most."""
AXES_ROWS = 4096
CLASS_PRIOR_ROWS = 10.0
"""Weight of all rows in the moments of one class, in rows."""


def make_reference(
    x: np.ndarray,
    y: np.ndarray,
    outputs: torch.Tensor,
    features: torch.Tensor | None,
    exemplars: np.ndarray,
    task: str,
    count: int,
) -> Reference:
    """Moments of inputs, features and outputs, class prior and exemplars of the source rows."""
    flat = torch.from_numpy(np.ascontiguousarray(x.reshape(len(x), -1)))
    if task == "classification":
        p_BK = outputs.float().softmax(1)
        prior = torch.from_numpy(np.bincount(y.astype(np.int64), minlength=count) / len(y)).float()
        entropy = float((-(p_BK * p_BK.clamp_min(1e-12).log()).sum(1) / np.log(max(2, count))).mean())
        error = float((outputs.argmax(1).numpy() != y).mean())
        labels = torch.from_numpy(y[exemplars].astype(np.int64))
    else:
        prior, entropy = None, 0.0
        error = float(((outputs.reshape(len(x), -1)[:, 0].numpy() - y) ** 2).mean())
        labels = torch.from_numpy(y[exemplars].astype(np.float32))
    by_class = (None, None) if features is None or task != "classification" else _by_class(outputs, features)
    return Reference(
        input_mean=flat.mean(0),
        input_var=flat.var(0, correction=0),
        feature_mean=None if features is None else features.float().mean(0),
        feature_var=None if features is None else features.float().var(0, correction=0),
        class_feature_mean=by_class[0],
        class_feature_var=by_class[1],
        feature_axes=None if features is None else _axes(features),
        class_prior=prior,
        exemplars_x=torch.from_numpy(np.ascontiguousarray(x[exemplars])),
        exemplars_y=labels,
        entropy=entropy,
        error=error,
        output_mean=float(outputs.float().mean()),
        output_var=float(outputs.float().var(correction=0)),
    )


def _by_class(outputs: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and variances (K, D) of ``features`` (N, D) by predicted class; scarce classes lean on all rows."""
    count = outputs.shape[1]
    predicted, values = outputs.argmax(1), features.float()
    rows = torch.bincount(predicted, minlength=count).float()[:, None]
    zeros = torch.zeros(count, values.shape[1])
    mean, variance = values.mean(0), values.var(0, correction=0)
    total = zeros.index_add(0, predicted, values)
    class_mean = (total + CLASS_PRIOR_ROWS * mean) / (rows + CLASS_PRIOR_ROWS)
    squares = zeros.index_add(0, predicted, (values - class_mean[predicted]).square())
    return class_mean, (squares + CLASS_PRIOR_ROWS * variance) / (rows + CLASS_PRIOR_ROWS)


def _axes(features: torch.Tensor) -> torch.Tensor | None:
    """Leading principal directions (R, D) of wide ``features`` (N, D); None where D is small."""
    if features.shape[1] <= MOST_FEATURES:
        return None
    values = features[:: max(1, len(features) // AXES_ROWS)].float()
    directions: torch.Tensor = torch.linalg.svd(values - values.mean(0), full_matrices=False)[2]
    return directions[: MOST_FEATURES - 1].contiguous()
