"""Trial step: a step is kept only where it helps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adapters.slow.optimizers.hypergradient import direction
from adapters.slow.optimizers.quick import Closure, Quick


class TrialStep(Quick):
    """Takes Adam's step, looks at the loss of rows that the step was not made from, and takes it back if that is worse.

        try p - lr a u      better: keep it, a <- a grow      else: take it back, a <- a shrink, and forget m and v

    A homeostat's way (Ashby 1952): change at random strength, keep what brings the essential variable back. Each step
    costs two more forward passes. The same rows are looked at before and after, so their noise cancels; a loss that is
    not finite is worse than any. What is never kept never harms: with labels of no meaning the rate shrinks to nothing.

    Args:
        params: what moves, or groups of it with a ``rate`` each.
        lr: rate of the first trial.
        weight_decay: decoupled, times the rate; part of what is tried.
        grow: factor of the rate after a step that was kept.
        shrink: factor of the rate after one that was taken back.
    """

    wants = "trial"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        grow: float = 1.5,
        shrink: float = 0.4,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(params, {"lr": lr, "rate": 1.0, "weight_decay": weight_decay})
        self.betas, self.grow, self.shrink, self.eps = betas, grow, shrink, eps
        self.factor = 1.0
        self.kept = self.taken_back = 0

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """Try one step by the gradients; the closure gives the loss before and after."""
        moving = list(self.moving())
        # The closure may set gradients anew, so they are used before it is called a second time.
        before = self.loss_of(closure)
        old: list[Tensor] = []
        for group, p, g in moving:
            old.append(p.clone())
            step = group["lr"] * self.factor
            if group["weight_decay"]:
                p.mul_(max(1 - group["weight_decay"] * step, 0.0))
            p.add_(direction(self.state[p], g, self.betas, self.eps), alpha=-step)
        after = self.loss_of(closure)
        if after < before and math.isfinite(after):
            self.kept += 1
            self.factor = min(self.factor * self.grow, 1e12)
            return
        self.taken_back += 1
        self.factor = max(self.factor * self.shrink, 1e-12)
        for (_, p, _), value in zip(moving, old, strict=True):
            p.copy_(value)
            self.state[p].clear()
