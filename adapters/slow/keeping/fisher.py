"""Fisher anchor: what the reference answers hang on is held back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapters.slow.keeping.base import Keeping, values_now, with_after_step
from adapters.slow.losses import row_losses
from adapters.slow.registry import register_keeping
from adapters.slow.trainee import Given, Trainee

ROWS = 256
"""Most reference rows that the Fisher information is taken from: one backward pass each."""


@register_keeping("fisher")
class Fisher(Keeping):
    """Adds strength * sum_i F_i (theta_i - theta0_i)² to the loss; F is large where the reference answers hang on i.

    F is the diagonal empirical Fisher, the mean over reference rows of the squared gradient of the row's loss, divided
    by the mean squared gradient by the outputs. So a strength means the same on every model, however sure it is of its
    rows: with 1, moving the reference's outputs by 1 (a logit, a unit of the target) costs about 1 of loss.
    Kirkpatrick et al., "Overcoming Catastrophic Forgetting in Neural Networks", PNAS 2017.

    theta0 is the frozen model's value where what trains is the model's own parameter; where it stands for one (a
    low-rank factor, a scale), it is where the burst starts, at the served model.

    The term is not put into the gradient, where a step of length a diverges once a * strength * F is above 1. After
    each step of the optimiser the parameters are drawn back by the implicit step instead,
    theta <- theta0 + (theta - theta0) / (1 + 2 a strength F), which stays between both at any strength; a is the
    length of the optimiser's step over that of the gradient.

    Needs reference exemplars.

    Args:
        strength: 0 or more.
        rows: reference rows used, at most 256.
    """

    def __init__(self, strength: float = 1.0, rows: int = 128) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength is {strength}; it must be 0 or more, and finite")
        if not 1 <= rows <= ROWS:
            raise ValueError(f"rows is {rows}; it must be in [1, {ROWS}]")
        self.strength, self.rows = strength, rows

    def keep(self, model: nn.Module, given: Given, trainee: Trainee) -> Trainee:
        """Draw back after each step."""
        anchors = _anchors(trainee, given.frozen)
        information = fisher(trainee, given, self.rows)

        def drawn_back(lengths: Sequence[float]) -> None:
            for group, length in zip(trainee.groups, lengths, strict=True):
                for leaf in group.parameters:
                    pull = 1 / (1 + 2 * length * self.strength * information[leaf])
                    leaf.copy_(anchors[leaf].lerp(leaf, pull.to(leaf.dtype)))

        return with_after_step(trainee, drawn_back)


def _anchors(trainee: Trainee, frozen: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Where each leaf is drawn to."""
    known = dict(frozen.named_parameters(remove_duplicate=False))
    anchors = {leaf: leaf.detach().clone() for leaf in trainee.parameters}
    values = values_now(trainee)
    for name, parameter in trainee.module.named_parameters(remove_duplicate=False):
        old = known.get(name)
        own = parameter in anchors and name in values and torch.equal(values[name], parameter)
        if own and old is not None and old.shape == parameter.shape:
            anchors[parameter] = old.detach().to(parameter.device, parameter.dtype, copy=True)
    return anchors


def fisher(trainee: Trainee, given: Given, rows: int) -> dict[nn.Parameter, Tensor]:
    """F by leaf, of its shape: how many squared units of output a squared unit of the leaf moves, on the reference.

    Raises:
        ValueError: there are no reference exemplars.
    """
    x, y = given.reference
    if not len(x):
        raise ValueError("'fisher' needs reference exemplars to measure what to hold; pack some, or leave it out")
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(given.seed))[:rows].to(x.device)
    leaves = trainee.parameters
    total = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
    by_output = torch.zeros((), device=x.device)
    flip = 1.0
    with torch.enable_grad():
        for row in chosen:
            output = trainee.module(x[row : row + 1])
            loss = row_losses(output, y[row : row + 1].cpu().numpy(), given.task).sum()
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            if not gradient.abs().max() > 1e-6:
                # The row is answered perfectly, so its loss says nothing: any direction of the outputs stands in.
                gradient, flip = torch.full_like(gradient, flip * 1e-3), -flip
            parts = torch.autograd.grad(output, leaves, gradient, allow_unused=True)
            if not all(bool(part.isfinite().all()) for part in (gradient, *parts) if part is not None):
                continue
            by_output += gradient.float().square().sum()
            for sum_, part in zip(total, parts, strict=True):
                if part is not None:
                    sum_ += part.float().square()
    return {leaf: sum_ / by_output.clamp(min=1e-30) for leaf, sum_ in zip(leaves, total, strict=True)}
