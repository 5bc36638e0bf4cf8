"""What a burst draws its rows from, and what it tells its method."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from adapters.slow.losses import Task
from adapters.slow.rows import Array
from adapters.slow.trainee import Given


class Memory(Protocol):
    """What a burst draws its rows from: a ``Replay`` or a ``Snapshot`` of one."""

    @property
    def reference_x(self) -> Array:
        """(r, *input_shape) reference exemplars; r may be 0."""

    @property
    def reference_y(self) -> Array:
        """(r,) their labels."""

    def sample(self, rng: np.random.Generator, n: int, reference_share: float) -> tuple[Array, Array]:
        """Draw ``n`` rows: x (n, *input_shape) and y (n,)."""


def given_of(model: nn.Module, frozen: nn.Module, replay: Memory, task: Task, seed: int) -> Given:
    """What the method may know; what it draws does not change the order of the rows that are learnt from."""
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    own = np.random.default_rng([seed, 1])

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        x, y = replay.sample(own, rows, 0.0)
        return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)

    reference = (torch.from_numpy(replay.reference_x).to(device), torch.from_numpy(replay.reference_y).to(device))
    return Given(task=task, seed=seed, draw=draw, reference=reference, frozen=frozen)
