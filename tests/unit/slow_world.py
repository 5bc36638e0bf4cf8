"""A small trained classifier, its drifted stream, and memories that stand still: for the tests of the slow loop."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from adapters.slow import Snapshot

INPUTS, CLASSES = 32, 5
F32, I64 = NDArray[np.float32], NDArray[np.int64]
CENTRES = np.random.default_rng(99).normal(size=(CLASSES, INPUTS)) * 0.7
MIX = np.random.default_rng(5).normal(size=(INPUTS, INPUTS)) * 0.25


def draw(seed: int, rows: int) -> tuple[F32, I64]:
    """Five Gaussian classes, told apart at about 3% of errors."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows)
    return (CENTRES[y] + rng.normal(size=(rows, INPUTS))).astype(np.float32), y


def mixed(x: F32) -> F32:
    """Sensors that bleed into each other: about 20% of errors for the trained model."""
    return (x + x @ MIX).astype(np.float32)


def shifted(x: F32) -> F32:
    """An offset towards class 1: about 55% of errors, most rows answered as class 1."""
    return (x + 1.2 * CENTRES[1]).astype(np.float32)


def trained() -> nn.Module:
    """In eval mode, gradients off: as a daemon serves it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(INPUTS, 32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip
    x, y = (torch.from_numpy(column) for column in draw(1, 3_000))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for start in range(0, 150 * 64, 64):
        rows = torch.arange(start, start + 64) % len(y)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    net.zero_grad(set_to_none=True)
    return net.eval().requires_grad_(False)


def memory(x: F32, y: NDArray[np.generic], reference: int = 200) -> Snapshot:
    """Rows to learn from, and reference exemplars of the undrifted world."""
    return Snapshot(x, y, *draw(2, reference))


def answers(net: nn.Module, x: F32) -> I64:
    with torch.inference_mode():
        return net(torch.from_numpy(x)).argmax(1).numpy()


def error(net: nn.Module, x: F32, y: I64) -> float:
    return float((answers(net, x) != y).mean())
