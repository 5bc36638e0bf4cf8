"""Optimisers by name: ours and torch's plain ones at once, every other from pytorch_optimizer when it is asked for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from adapters.slow.optimizers.hypergradient import Hypergradient
from adapters.slow.optimizers.momo import Momo
from adapters.slow.optimizers.prodigy import Prodigy
from adapters.slow.optimizers.quick import Adam, AdamW, Closure, Quick, Sgd
from adapters.slow.optimizers.rescaled import Rescaled, follows_rates
from adapters.slow.optimizers.trial_step import TrialStep

__all__ = ["Closure", "Quick", "build", "check", "find", "set_mode", "wants"]

_OURS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(Sgd, lr=1e-2, momentum=0.9),
    "adam": partial(Adam, lr=1e-3),
    "adamw": partial(AdamW, lr=1e-3),
    "prodigy": Prodigy,
    "momo": Momo,
    "hypergradient": Hypergradient,
    "trial_step": TrialStep,
}


def find(name: str) -> Callable[..., Any]:
    """The optimiser's class (or a constructor with our default rate) by name, in any case of letters.

    The first name that is not ours or torch's imports pytorch_optimizer and torch's compiler: five seconds.

    Raises:
        ValueError: no such optimiser.
    """
    key = name.lower()
    if key in _OURS:
        return _OURS[key]
    import pytorch_optimizer

    try:
        found: Callable[..., Any] = pytorch_optimizer.load_optimizer(key)
    except (NotImplementedError, ImportError) as error:
        known = sorted({*_OURS, *pytorch_optimizer.get_supported_optimizers()})
        near = difflib.get_close_matches(key, known, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "use prodigy, adamw, sgd or a pytorch_optimizer name"
        raise ValueError(f"optimizer {name!r} can't be used ({error}); {advice}") from None
    return found


def build(
    name: str, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]], *, lr: float | None, weight_decay: float
) -> tuple[torch.optim.Optimizer, float]:
    """A fresh optimiser over ``parameters`` and the learning rate that it starts at.

    Args:
        name: prodigy, momo, hypergradient, trial_step, sgd (momentum 0.9), adam, adamw, or a name of pytorch_optimizer.
        parameters: what moves, or groups of it as torch's optimisers take them, with a ``rate`` each: multiply the
            learning rate by it before each step. Groups of different rates work with every optimiser.
        lr: learning rate; None takes the optimiser's own (1 for the learning-rate-free ones, 0.01 for sgd and
            trial_step, 0.001 for adam, adamw and hypergradient).
        weight_decay: as the optimiser defines it.

    Raises:
        ValueError: no such optimiser, one that needs more than parameters and a rate, or one without a rate of its own.
    """
    found = find(name)
    make: Callable[[Any], torch.optim.Optimizer] = partial(
        found, weight_decay=weight_decay, **({} if lr is None else {"lr": lr})
    )
    plain = [p for p in parameters if not isinstance(p, dict)]
    groups: list[dict[str, Any]] = [{"rate": 1.0, **p} for p in parameters if isinstance(p, dict)]
    if plain:
        groups.append({"params": plain, "rate": 1.0})
    for group in groups:
        if not 0 <= group["rate"] < math.inf:
            raise ValueError(f"rate is {group['rate']}; it must be 0 or more, and finite")
    try:
        optimizer = make(groups)
        start = optimizer.param_groups[0].get("lr")
        differ = any(group["rate"] != 1.0 for group in groups)
        if differ and name.lower() not in _OURS and isinstance(start, float | int) and not follows_rates(make, start):
            optimizer = Rescaled(make, groups)
    except Exception as error:  # other people's constructors raise anything from AttributeError to RuntimeError
        raise ValueError(f"optimizer {name!r} can't be built from parameters and a learning rate: {error}") from error
    if not isinstance(start, float | int):
        raise ValueError(f"optimizer {name!r} has no default learning rate; set one")
    return optimizer, float(start)


def wants(optimizer: torch.optim.Optimizer) -> str:
    """What its ``step`` needs beside the gradients, see `Quick.wants`."""
    return optimizer.wants if isinstance(optimizer, Quick) else "gradient"


def check(name: str, *, lr: float | None = None, weight_decay: float = 0.0) -> str | None:
    """Why the optimiser can't serve a burst, None if it can; by a step on a toy parameter of each rank.

    Some of the library's need a closure, second derivatives or matrices only, which shows at the first step. Called
    at start, it finds that then, and not at the first drift, weeks later. It also pays for the library's imports.
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
        optimizer.step(None if wants(optimizer) == "gradient" else lambda: 1.0)
        set_mode(optimizer, train=False)
    except Exception as error:  # as above
        return f"optimizer {name!r} needs more than gradients ({error}); use prodigy, adamw or sgd"
    return None


def set_mode(optimizer: torch.optim.Optimizer, *, train: bool) -> None:
    """Tell a schedule-free optimiser whether the parameters are about to be stepped or read; no-op for the others."""
    if callable(switch := getattr(optimizer, "train" if train else "eval", None)):
        switch()
