"""How a model does on rows, one by one: what the gate compares."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from adapters.slow.fork import fork
from adapters.slow.gate.intervals import F64
from adapters.slow.losses import Task, row_losses
from adapters.slow.rows import Array


class Scores(NamedTuple):
    """Of one model on some rows."""

    loss: F64
    """(n,) cross-entropy or squared error."""
    wrong: F64
    """(n,) 0 or 1; zeros for regression."""
    classes: int
    """Width of the outputs; 0 without rows."""

    @property
    def finite(self) -> bool:
        """Whether the model answered every row."""
        return bool(np.isfinite(self.loss).all())


def still(model: nn.Module) -> tuple[nn.Module, torch.device]:
    """A twin in eval mode over the same tensors, and where it runs: no mode changes, no statistic moves."""
    twin = fork(model, {}).eval()
    first = next((tensor for tensor in (*twin.parameters(), *twin.buffers())), None)
    return twin, torch.device("cpu") if first is None else first.device


def score(model: nn.Module, x: Array, y: Array, task: Task, batch_rows: int) -> Scores:
    """Run rows through ``model``; x (n, *input_shape) and y (n,) as `columns` gives them."""
    twin, device = still(model)
    losses, wrongs, classes = [np.zeros(0)], [np.zeros(0)], 0
    with torch.inference_mode():
        for start in range(0, len(y), batch_rows):
            labels = y[start : start + batch_rows]
            output = twin(torch.tensor(x[start : start + batch_rows], device=device))
            losses.append(row_losses(output, labels, task).double().cpu().numpy())
            if task == "classification":
                wrongs.append((output.argmax(dim=1).cpu().numpy() != labels).astype(np.float64))
                classes = output.shape[1]
            else:
                wrongs.append(np.zeros(len(labels)))
    return Scores(np.concatenate(losses), np.concatenate(wrongs), classes)


def columns(x: ArrayLike | None, y: ArrayLike | None, task: Task) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows and labels as arrays of the task's types; empty for None.

    Raises:
        ValueError: they are not equally many.
    """
    x = np.ascontiguousarray([] if x is None else x, dtype=np.float32)
    y = np.ascontiguousarray([] if y is None else y, dtype=np.int64 if task == "classification" else np.float32)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} rows of x have {len(y)} labels; each row needs one")
    return x, y
