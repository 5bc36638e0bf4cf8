"""Groups of different rates for optimisers that know one rate only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from adapters.slow.optimizers.quick import Closure, Quick


class Rescaled(Quick):
    """Runs an optimiser in the variables q with p = p0 + c q, where c is the ``rate`` of p's group.

    The D-Adaptation family takes the first group's rate for all groups, and Adafactor none at all. In q every
    parameter has the same rate, and the gradient is c times that by p: this is exact for any optimiser.

    Args:
        make: builds the optimiser from a list of parameters.
        groups: groups of parameters with a ``rate`` each.
    """

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], groups: Sequence[dict[str, Any]]) -> None:
        self._start = {p: p.detach().clone() for group in groups for p in group["params"]}
        self._q = {p: nn.Parameter(start.clone()) for p, start in self._start.items()}
        self.inner = make(list(self._q.values()))
        super().__init__(list(groups), {"lr": self.inner.param_groups[0].get("lr"), "rate": 1.0})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """One step by the gradients."""
        for q in self._q.values():
            q.grad = None
        for group, p, g in self.moving():
            self._q[p].grad = g * group["rate"]
        for inner in self.inner.param_groups:
            inner["lr"] = self.base_lr()
        self.inner.step()
        self._read()

    @torch.no_grad()
    def _read(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self._start[p] + group["rate"] * (self._q[p] - self._start[p]))

    def train(self) -> None:
        """For a schedule-free optimiser: parameters are about to be stepped."""
        self._switch("train")

    def eval(self) -> None:
        """For a schedule-free optimiser: parameters are about to be read."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        if callable(switch := getattr(self.inner, mode, None)):
            switch()
            self._read()


def follows_rates(make: Callable[[Any], torch.optim.Optimizer], lr: float) -> bool:
    """Whether each group of an optimiser moves by its own ``lr``; by three steps on a toy."""
    halves = [nn.Parameter(torch.zeros(4, 4, dtype=torch.float64)) for _ in range(2)]
    try:
        optimizer = make([{"params": [p], "lr": lr * rate} for p, rate in zip(halves, (1.0, 0.5), strict=True)])
        if callable(switch := getattr(optimizer, "train", None)):
            switch()
        for _ in range(3):
            for p in halves:
                p.grad = torch.linspace(1, 2, 16, dtype=torch.float64).view(4, 4)
            optimizer.step()
    except Exception:  # other people's optimisers raise anything; the change of variables needs less of them
        return False
    full, half = (p.detach() for p in halves)
    return bool(full.abs().sum() > 0) and torch.allclose(half, 0.5 * full, rtol=1e-6, atol=0.0)
