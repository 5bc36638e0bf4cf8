"""What a task's outputs are scored by, row by row; shared by the burst and the gate."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.slow.rows import Array

Task = Literal["classification", "regression"]


def check_task(task: str) -> None:
    """Refuse a task that is neither classification nor regression.

    Raises:
        ValueError: it is neither.
    """
    if task not in ("classification", "regression"):
        raise ValueError(f"task {task!r} is unknown; use 'classification' or 'regression'")


def row_losses(output: Tensor, y: Array, task: Task) -> Tensor:
    """Loss of each row (B,): cross-entropy in nats, or squared error in squared units of the target.

    Args:
        output: logits (B, K), or predictions (B,) or (B, 1).
        y: classes (B,) int64, or targets (B,); on the host, because a class out of range must be found before it
            gets to a CUDA kernel, which it would abort together with the process's context.
        task: classification or regression.

    Raises:
        ValueError: the outputs' shape does not fit the task, or a label is not one of the model's classes.
    """
    target = torch.tensor(y, device=output.device)
    if task == "regression":
        if output.numel() != len(y):
            raise ValueError(
                f"regression on {len(y)} rows needs one output per row, (rows,) or (rows, 1); "
                f"the model gave {tuple(output.shape)}"
            )
        return F.mse_loss(output.reshape(len(y)), target, reduction="none")
    if output.ndim != 2:
        raise ValueError(f"classification needs logits (rows, classes); the model gave {tuple(output.shape)}")
    if len(y) and not 0 <= y.min() <= y.max() < output.shape[1]:
        raise ValueError(
            f"labels run from {y.min()} to {y.max()}, the model has classes 0 to {output.shape[1] - 1}; "
            "give the memory the model's number of classes"
        )
    return F.cross_entropy(output, target, reduction="none")
