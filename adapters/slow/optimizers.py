"""Optimisers by name: torch's plain ones at once, every other one from pytorch_optimizer when it is first asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

_TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
}


def find(name: str) -> Callable[..., Any]:
    """The optimiser's class (or a constructor with our default rate) by name, in any case of letters.

    The first name that is not sgd, adam or adamw imports pytorch_optimizer, which takes about three seconds.

    Raises:
        ValueError: no such optimiser.
    """
    key = name.lower()
    if key in _TORCH:
        return _TORCH[key]
    import pytorch_optimizer

    try:
        found: Callable[..., Any] = pytorch_optimizer.load_optimizer(key)
    except (NotImplementedError, ImportError) as error:
        known = sorted({*_TORCH, *pytorch_optimizer.get_supported_optimizers()})
        near = difflib.get_close_matches(key, known, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "use prodigy, adamw, sgd or a pytorch_optimizer name"
        raise ValueError(f"optimizer {name!r} can't be used ({error}); {advice}") from None
    return found


def build(
    name: str, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]], *, lr: float | None, weight_decay: float
) -> tuple[torch.optim.Optimizer, float]:
    """A fresh optimiser over ``parameters`` and the learning rate that it starts at.

    Args:
        name: sgd (momentum 0.9), adam, adamw, or a name of pytorch_optimizer.
        parameters: what moves, or groups of it as torch's optimisers take them.
        lr: learning rate; None takes the optimiser's own (1 for the learning-rate-free ones, 0.01 for sgd, 0.001
            for adam and adamw).
        weight_decay: as the optimiser defines it.

    Raises:
        ValueError: no such optimiser, one that needs more than parameters and a rate, or one without a rate of its own.
    """
    make = find(name)
    rate = {} if lr is None else {"lr": lr}
    try:
        optimizer: torch.optim.Optimizer = make(parameters, weight_decay=weight_decay, **rate)
    except Exception as error:  # other people's constructors raise anything from AttributeError to RuntimeError
        raise ValueError(f"optimizer {name!r} can't be built from parameters and a learning rate: {error}") from error
    start = optimizer.param_groups[0].get("lr")
    if not isinstance(start, float | int):
        raise ValueError(f"optimizer {name!r} has no default learning rate; set one")
    return optimizer, float(start)


def check(name: str, *, lr: float | None = None, weight_decay: float = 0.0) -> str | None:
    """Why the optimiser can't serve a burst, None if it can; by a step on a toy parameter of each rank.

    Some of the library's need a closure, second derivatives or matrices only, which shows at the first step. Called
    at start, it finds that then, and not at the first drift, weeks later. It also pays for the imports: any first
    optimiser of a process makes torch import its compiler, which takes seconds.
    """
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer, _ = build(name, parameters, lr=lr, weight_decay=weight_decay)
    except ValueError as error:
        return str(error)
    try:
        set_mode(optimizer, train=True)
        optimizer.step()
        set_mode(optimizer, train=False)
    except Exception as error:  # as above
        return f"optimizer {name!r} needs more than gradients ({error}); use prodigy, adamw or sgd"
    return None


def set_mode(optimizer: torch.optim.Optimizer, *, train: bool) -> None:
    """Tell a schedule-free optimiser whether the parameters are about to be stepped or read; no-op for the others."""
    if callable(switch := getattr(optimizer, "train" if train else "eval", None)):
        switch()
