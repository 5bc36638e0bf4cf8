"""MoMo: momentum with the rate that a model of the loss allows."""

from __future__ import annotations

from typing import Any

import torch

from adapters.slow.optimizers.quick import Closure, Quick


class Momo(Quick):
    """Momentum SGD whose rate is cut where the loss left to lose is small: Polyak's step on an average of planes.

        d <- b d + (1 - b) g     f <- b f + (1 - b) loss     c <- b c + (1 - b) <g, p>     w = 1 - b^t
        h = f + <d, p> - c       p <- p - min(lr / w, max(h - low w, 0) / |d|²) d

    Schaipp, Ohana, Eickenberg, Defazio, Gower, "MoMo: Momentum Models for Adaptive Learning Rates", ICML 2024 (from
    zero averages, with their bias correction). ``lr`` is the largest rate, so too large a one is harmless where the
    loss can get near ``low``; too small a one is slow. Groups' ``rate`` is the metric: |d|² counts a group times it.

    The loss must be that of the gradients: where these are clipped to a share of their length, the same share of it.

    Args:
        params: what moves, or groups of it with a ``rate`` each.
        lr: largest rate.
        beta: of the averages.
        weight_decay: as a proximal step, p / (1 + lr weight_decay).
        low: the least that the loss can be; 0 for cross-entropy and squared error.
    """

    wants = "loss"

    def __init__(
        self, params: Any, lr: float = 1.0, beta: float = 0.9, weight_decay: float = 0.0, low: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "rate": 1.0, "weight_decay": weight_decay})
        self.beta, self.low = beta, low
        self.mean_loss = self.mean_plane = 0.0
        self.weight = 1.0

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """One step by the gradients and the loss that the closure gives."""
        loss, beta = self.loss_of(closure), self.beta
        planes, inner, norms = [], [], []
        for group, p, g in self.moving():
            state = self.state[p]
            if not state:
                state["d"] = torch.zeros_like(p)
            d = state["d"].mul_(beta).add_(g, alpha=1 - beta)
            planes.append((g * p).sum(dtype=torch.float64))
            inner.append((d * p).sum(dtype=torch.float64))
            norms.append((d * d).sum(dtype=torch.float64) * group["rate"])
        if not planes:
            return
        plane, product, norm = torch.stack([torch.stack(part).sum() for part in (planes, inner, norms)]).tolist()
        self.mean_loss = beta * self.mean_loss + (1 - beta) * loss
        self.mean_plane = beta * self.mean_plane + (1 - beta) * plane
        self.weight *= beta
        weight, lr = 1 - self.weight, self.base_lr()
        decay = 1 + lr * max(group["weight_decay"] for group in self.param_groups)
        left = decay * (self.mean_loss - self.mean_plane - self.low * weight) + product
        rate = min(lr / weight, max(left, 0.0) / norm) if norm > 0 else 0.0
        for group, p, _ in self.moving():
            p.add_(self.state[p]["d"], alpha=-rate * group["rate"])
            p.div_(1 + group["lr"] * group["weight_decay"])
