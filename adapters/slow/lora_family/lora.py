"""What ``lora`` and ``dora`` share: a product of two thin matrices, B A."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adapters.slow.lora_family.merged import ADAPTER, Adapted
from adapters.slow.lora_family.method import PeftMethod, at_least, whole
from adapters.slow.lora_family.targets import Target
from adapters.slow.trainee import Given


class LowRank(PeftMethod):
    """(alpha / rank) B A with A (rank × columns) random and B (rows × rank) zero at the start; no dropout, ever."""

    peft_name = "Lora"

    rank: int
    alpha: float

    def set_rank(self, rank: int, alpha: float | None) -> None:
        """Take the two options; ``alpha`` is the rank when it is None.

        Raises:
            ValueError: names the one that is out of range.
        """
        whole("rank", rank)
        at_least("alpha", rank if alpha is None else alpha, 1e-6)
        self.rank, self.alpha = rank, rank if alpha is None else alpha

    def size(self, target: Target) -> int:
        """The rank, at most what a matrix of this shape can have."""
        return min(self.rank, target.rows, target.columns)

    def config(self, size: int, given: Given) -> dict[str, Any]:
        """A smaller rank keeps the asked scale, alpha / rank."""
        return {"r": size, "lora_alpha": self.alpha * size / self.rank, "lora_dropout": 0.0}

    def draw(self, item: Adapted, generator: torch.Generator) -> None:
        """A uniform with variance 1 / (3 columns), as the layers of torch start."""
        weight = self.factor_a(item)
        bound = 1 / math.sqrt(item.target.columns)
        weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)

    def factor_a(self, item: Adapted) -> torch.nn.Parameter:
        """A, (rank, columns)."""
        weight: torch.nn.Parameter = item.layer.lora_A[ADAPTER].weight
        return weight

    def factor_b(self, item: Adapted) -> torch.nn.Parameter:
        """B, (rows, rank)."""
        weight: torch.nn.Parameter = item.layer.lora_B[ADAPTER].weight
        return weight

    def product(self, item: Adapted) -> Tensor:
        """(alpha / rank) B A, (rows, columns)."""
        delta: Tensor = item.layer.get_delta_weight(ADAPTER)
        return delta

    def delta(self, item: Adapted) -> Tensor:
        """W' - W = (alpha / rank) B A."""
        return self.product(item)
