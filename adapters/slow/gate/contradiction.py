"""Which classes' reference exemplars the new labels contradict, so that no model could satisfy both."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adapters.features import FeatureTap, find_head
from adapters.slow.gate.blocks import Blocks
from adapters.slow.gate.intervals import block_interval
from adapters.slow.gate.scores import still
from adapters.slow.rows import Array

NEAR = 0.9
"""A new row is like an exemplar when it lies as near to one as this share of the exemplars does to another."""
CLEAR = 0.2
"""By how much the labels of such rows must disagree more often than those of the exemplars among themselves."""
LEVEL = 0.05
"""Chance to call any class contradicted that is not."""


def contradicted(
    served: nn.Module, x_new: Array, y_new: Array, x_ref: Array, y_ref: Array, blocks: Blocks, batch_rows: int
) -> tuple[int, ...]:
    """Classes that a concept change has taken the reference's labels from.

    Each new row is given its nearest exemplar in the served model's features (without a linear head, in its inputs).
    Of the rows that are as near as exemplars are to each other, in features and in inputs both, the share is counted
    whose label is not the exemplar's: surely ``CLEAR`` higher than among the exemplars of that class, by the same
    blocks as the gate. Rows that only the model confuses, because their inputs have moved, lie far off in the inputs
    and don't count: there a candidate may learn the new and keep the old.
    """
    if not blocks.number or len(y_ref) < 2:
        return ()
    new_in, ref_in = _standard(torch.from_numpy(x_new).flatten(1), torch.from_numpy(x_ref).flatten(1))
    new_out, ref_out = _standard(_features(served, x_new, batch_rows), _features(served, x_ref, batch_rows))
    exemplar, close = _nearest(new_out, ref_out)
    near = close & _nearest(new_in, ref_in)[1]
    among = y_ref[_others(ref_out)[1].numpy()] != y_ref
    other = (y_ref[exemplar] != y_new).astype(np.float64)
    classes = [int(label) for label in np.unique(y_ref)]
    found = []
    for label in classes:
        base = (float(among[y_ref == label].sum()) + 1) / (int((y_ref == label).sum()) + 2)
        sums, sizes = blocks.sums(other - base - CLEAR, near & (y_ref[exemplar] == label))
        if block_interval(sums, sizes, LEVEL / len(classes)).low > 0:
            found.append(label)
    return tuple(found)


def _features(model: nn.Module, x: Array, batch_rows: int) -> Tensor:
    """Penultimate features (n, D) on the host; the inputs themselves where the model has no linear head."""
    if find_head(model) is None:
        return torch.from_numpy(x).flatten(1)
    twin, device = still(model)
    found = []
    with torch.inference_mode(), FeatureTap(twin) as tap:
        for chunk in torch.from_numpy(x).split(batch_rows):
            twin(chunk.to(device))
            if tap.features is not None:
                found.append(tap.features.float().flatten(1).cpu())
    rows = sum(len(features) for features in found)
    return torch.cat(found) if rows == len(x) else torch.from_numpy(x).flatten(1)


def _standard(new: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    mean, spread = reference.mean(0), reference.std(0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    return (new - mean) / spread, (reference - mean) / spread


def _others(reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest other exemplar, and which it is."""
    apart = torch.cdist(reference, reference)
    apart.fill_diagonal_(torch.inf)
    nearest = apart.min(1)
    return nearest.values, nearest.indices


def _nearest(new: Tensor, reference: Tensor) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The nearest exemplar of each new row, and whether it is near."""
    usual = torch.quantile(_others(reference)[0].double(), NEAR)
    nearest = torch.cdist(new, reference).min(1)
    return nearest.indices.numpy(), (nearest.values.double() <= usual).numpy()
