"""The gas-sensor stream of the shared data, and a small model trained on its first segment."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from daemon.records import F32

FACTORY = "tests.models.gas:build"


def data_folder() -> Path:
    """``HOMEOSTAT_DATA``, else ``../shared/data`` beside the repository."""
    given = os.environ.get("HOMEOSTAT_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[2].parent / "shared" / "data"


def build() -> nn.Module:
    """128 features to 6 gases."""
    return nn.Sequential(
        nn.BatchNorm1d(128),
        nn.Linear(128, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 6),
    )


def load() -> tuple[F32, np.ndarray, np.ndarray]:
    """x (N, 128), y (N,), segment (N,), in the order of the months."""
    with np.load(data_folder() / "gas_drift.npz") as data:
        return data["x"].astype(np.float32), data["y"].astype(np.int64), data["segment"].astype(np.int64)


def train(x: F32, y: np.ndarray, seed: int = 0) -> nn.Module:
    """A minute's work of a field engineer: AdamW, 60 epochs, label smoothing."""
    torch.manual_seed(seed)
    model = build().train()
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(60):
        for chosen in torch.randperm(len(y)).split(64):
            if len(chosen) < 8:
                continue
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen], label_smoothing=0.05).backward()
            optimizer.step()
    return model.eval()
