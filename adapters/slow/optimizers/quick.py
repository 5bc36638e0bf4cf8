"""Optimisers that start at once: torch's own make the process import its compiler, four seconds and 100 MB."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Any]
"""Gives the loss, a float or a 0-d tensor, at the parameters as they are when it is called."""


class Quick(torch.optim.Optimizer):
    """An optimiser of torch's without what marks its methods for torch's compiler, which a burst never uses.

    The mark is put on at the first call, by importing ``torch._dynamo``. In the daemon that import fell into the first
    burst, or beside the first label, on a core that serving needs.
    """

    wants: str = "gradient"
    """What `step` needs beside the gradients: ``gradient`` nothing; ``loss`` a closure that gives the loss of which
    the gradients are; ``trial`` a closure that gives the loss of some rows at the parameters as they are."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's does."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def moving(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Group, parameter and gradient of all that have a gradient and a rate above 0."""
        for group in self.param_groups:
            if group["rate"] > 0:
                yield from ((group, p, p.grad) for p in group["params"] if p.grad is not None)

    def base_lr(self) -> float:
        """The learning rate without the groups' ``rate``; 0 when nothing may move."""
        return next((float(group["lr"] / group["rate"]) for group in self.param_groups if group["rate"] > 0), 0.0)

    def loss_of(self, closure: Closure | None) -> float:
        """What ``closure`` gives.

        Raises:
            ValueError: there is none.
        """
        if closure is None:
            raise ValueError(f"{type(self).__name__}.step needs a closure that gives the loss")
        with torch.enable_grad():
            return float(closure())


class Sgd(Quick, torch.optim.SGD):
    """torch's SGD."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """One step."""
        inspect.unwrap(torch.optim.SGD.step)(self, closure)


class Adam(Quick, torch.optim.Adam):
    """torch's Adam."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """One step."""
        inspect.unwrap(torch.optim.Adam.step)(self, closure)


class AdamW(Quick, torch.optim.AdamW):
    """torch's AdamW."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """One step."""
        inspect.unwrap(torch.optim.AdamW.step)(self, closure)
