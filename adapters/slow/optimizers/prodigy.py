"""Prodigy: Adam whose rate is an estimate of the distance to the solution."""

from __future__ import annotations

import math
from typing import Any

import torch

from adapters.slow.optimizers.quick import Closure, Quick


class Prodigy(Quick):
    """Adam at the rate d, where d is the largest lower bound seen of the distance from the start to a solution.

        r <- sqrt(b2) r + (d/d0) d lr <g, p0 - p>        s <- sqrt(b2) s + (d/d0) d lr g
        m <- b1 m + (1 - b1) d g                          v <- b2 v + (1 - b2) d² g²
        d <- max(d, r / |s|_1)                            p <- p - lr d m / (sqrt(v) + d eps)

    Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", ICML 2024. Equal to
    pytorch_optimizer's for one group. That one takes the first group's rate for all groups; here a group of rate c
    moves as Prodigy does in the variables q, p = p0 + c q: a slow backbone is slow and the distance is still found.

    Args:
        params: what moves, or groups of it with a ``rate`` each.
        lr: multiple of d; 1 is the paper's.
        weight_decay: decoupled, times lr d.
        d0: the first distance; too small costs a few steps, too large can't be undone.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "rate": 1.0, "weight_decay": weight_decay})
        self.betas, self.d0, self.eps = betas, d0, eps
        self.d = d0
        self.numerator = 0.0

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """One step by the gradients."""
        beta1, beta2 = self.betas
        beta3 = math.sqrt(beta2)
        d, lr = self.d, self.base_lr()
        weight = d / self.d0 * d * lr
        inner, size = [], []
        for group, p, g in self.moving():
            state = self.state[p]
            if not state:
                state["start"] = p.clone()
                state |= {name: torch.zeros_like(p) for name in ("m", "v", "s")}
            inner.append(torch.sum(g * (state["start"] - p)))
            state["m"].mul_(beta1).add_(g, alpha=d * (1 - beta1))
            state["v"].mul_(beta2).addcmul_(g, g, value=d * d * (1 - beta2))
            state["s"].mul_(beta3).add_(g, alpha=weight * group["rate"])
            size.append(state["s"].abs().sum())
        if not inner:
            return
        # Both sums in one copy to the host.
        progress, total = torch.stack([_sum(inner), _sum(size)]).tolist()
        self.numerator = beta3 * self.numerator + weight * progress
        if total > 0 and math.isfinite(bound := self.numerator / total):
            self.d = max(d, bound)
        for group, p, _ in self.moving():
            state, step = self.state[p], d * group["lr"]
            if group["weight_decay"]:
                p.mul_(1 - group["weight_decay"] * step)
            p.addcdiv_(state["m"], state["v"].sqrt().add_(self.d * self.eps), value=-step)


def _sum(values: list[torch.Tensor]) -> torch.Tensor:
    """0-d float32 sum of 0-d tensors, which may lie on several devices."""
    return torch.stack([value.to(values[0].device, torch.float32) for value in values]).sum()
