"""Hypergradient: the rate follows the gradients' agreement."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adapters.slow.optimizers.quick import Closure, Quick


class Hypergradient(Quick):
    """Adam whose rate grows while the gradient goes on pointing along the last step, and falls when it turns back.

        u = m / (sqrt(v) + eps), corrected for their start     p <- p - lr a u
        a <- a exp(k cos(g, u of the step before)), within [1 / range, range]

    The derivative of the loss by the rate of the last step is -<g, u>. Baydin, Cornish, Rubio, Schmidt, Wood, "Online
    Learning Rate Adaptation with Hypergradient Descent", ICLR 2018, in its multiplicative form, here with the cosine,
    so that k is free of the loss's scale; bounds as in Wang, Wang, Li, "FedHyper", ICLR 2024. Adam's bounded steps keep
    a far too large first rate from ever leaving the finite numbers.

    Args:
        params: what moves, or groups of it with a ``rate`` each.
        lr: rate of the first step.
        weight_decay: decoupled, times the rate.
        growth: k.
        range_: how far the rate may go from ``lr``, as a factor either way.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        growth: float = 0.25,
        range_: float = 1e6,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(params, {"lr": lr, "rate": 1.0, "weight_decay": weight_decay})
        self.betas, self.growth, self.range_, self.eps = betas, growth, range_, eps
        self.factor = 1.0
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """One step by the gradients."""
        cosine = self._agreement()
        self.factor = min(max(self.factor * math.exp(self.growth * cosine), 1 / self.range_), self.range_)
        self.steps += 1
        for group, p, g in self.moving():
            u = direction(self.state[p], g, self.betas, self.eps)
            step = group["lr"] * self.factor
            if group["weight_decay"]:
                p.mul_(max(1 - group["weight_decay"] * step, 0.0))
            p.add_(u, alpha=-step)
            self.state[p]["u"] = u

    def _agreement(self) -> float:
        """cos(gradient, last step's direction) over all that moves; 0 before there is one."""
        sums: list[Tensor] = []
        for group, p, g in self.moving():
            if (u := self.state[p].get("u")) is not None:
                g, u = g.double(), u.double() * group["rate"]
                sums.append(torch.stack([(g * u).sum(), (g * g).sum(), (u * u).sum()]))
        if not sums:
            return 0.0
        product, gradient, step = torch.stack(sums).sum(0).tolist()
        length = math.sqrt(gradient) * math.sqrt(step)
        return product / length if length > 0 and math.isfinite(product) else 0.0


def direction(state: dict[str, Any], g: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's direction after taking in the gradient ``g``; its averages are kept in ``state``."""
    beta1, beta2 = betas
    if "m" not in state:
        state |= {"m": torch.zeros_like(g), "v": torch.zeros_like(g), "t": 0}
    state["t"] += 1
    state["m"].mul_(beta1).add_(g, alpha=1 - beta1)
    state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    m, v = state["m"] / (1 - beta1 ** state["t"]), state["v"] / (1 - beta2 ** state["t"])
    u: Tensor = m / (v.sqrt() + eps)
    return u
