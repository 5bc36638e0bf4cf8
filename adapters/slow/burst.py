"""The bounded burst: a fixed number of gradient steps on a private copy, the rate going to zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from adapters.slow import optimizers
from adapters.slow.losses import Task, check_task, row_losses
from adapters.slow.registry import SlowMethod
from adapters.slow.rows import Array
from adapters.slow.trainee import Given, Trainee

Reason = Literal["done", "stopped", "non-finite"]

PROBE_BATCHES = 4
"""Batches of the fixed sample on which the loss is taken before and after."""


class Memory(Protocol):
    """What a burst draws its rows from: a ``Replay`` or a ``Snapshot`` of one."""

    @property
    def reference_x(self) -> Array:
        """(r, *input_shape) reference exemplars; r may be 0."""

    @property
    def reference_y(self) -> Array:
        """(r,) their labels."""

    def sample(self, rng: np.random.Generator, n: int, reference_share: float) -> tuple[Array, Array]:
        """Draw ``n`` rows: x (n, *input_shape) and y (n,)."""


@dataclass(frozen=True, kw_only=True)
class BurstOptions:
    """How much a burst may do."""

    steps: int = 60
    """Gradient steps."""
    batch_size: int = 64
    """Rows of one gradient step."""
    optimizer: str = "prodigy"
    """sgd, adam, adamw, or any name of pytorch_optimizer."""
    lr: float | None = None
    """Learning rate at the first step; None: the optimiser's own, which is learning-rate-free for the default."""
    weight_decay: float = 0.0
    """Weight decay, as the optimiser defines it."""
    clip_norm: float = 1.0
    """Largest norm of the gradient over all moved parameters; a longer one is scaled down."""
    reference_share: float = 0.25
    """Share of each batch drawn from the protected reference exemplars."""

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name in ("steps", "batch_size", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0, or None for the optimiser's own")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be 0 or more")
        if not 0 <= self.reference_share <= 1:
            raise ValueError(f"reference_share is {self.reference_share}; it must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class BurstResult:
    """What a burst leaves behind."""

    delta: dict[str, Tensor] = field(repr=False)
    """New values (not differences) of the moved parameters, on the model's device; empty if not finite."""
    steps: int
    """Gradient steps made."""
    loss_before: float
    """Mean loss of the given model on a fixed sample of the memory (it is training loss: the gate judges)."""
    loss_after: float
    """Mean loss after the burst, same rows; NaN when the burst ended as non-finite."""
    reason: Reason


def _set_gradients(loss: Tensor, trainee: Trainee, clip_norm: float) -> bool:
    """Write the clipped gradient of ``loss``; False when it is not finite."""
    leaves = trainee.parameters
    # Asking for these gradients only: .grad of the shared parameters belongs to the served model.
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
    if all(gradient is None for gradient in gradients):
        raise ValueError("no parameter that may move takes part in the model's output; choose another slow method")
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
    trainee.scale_gradients()
    return bool(nn.utils.clip_grad_norm_(leaves, clip_norm).isfinite())


def run_burst(
    model: nn.Module,
    method: SlowMethod,
    replay: Memory,
    options: BurstOptions,
    *,
    task: Task,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    frozen: nn.Module | None = None,
) -> BurstResult:
    """Train what ``method`` may move on rows of ``replay``; ``model`` is never changed.

    Fresh optimiser state, gradient clipping, the rate falling linearly from its start to zero: what is learnt last is
    averaged rather than chased. The same seed, rows and model give the same result (on CUDA as far as the model's
    own kernels do).

    Args:
        model: classifier giving logits (B, K), or regressor giving (B,) or (B, 1).
        method: says which parameters may move.
        replay: rows to learn from; hand over a ``Snapshot`` when another thread goes on adding rows.
        options: how much may be done.
        task: cross-entropy for classification, squared error for regression.
        seed: of the order in which rows are drawn.
        stop: asked before each step; True ends the burst with what it has.
        frozen: the model as it was packed, for methods that keep near it; None: ``model`` itself.

    Returns:
        BurstResult: reason ``done``; ``stopped`` with the values so far; ``non-finite`` (a loss, gradient or parameter
        was) with an empty delta.

    Raises:
        ValueError: nothing can move, the memory is empty, the optimiser is unknown, or outputs and labels do not fit.
    """
    check_task(task)
    # The caller may sit in inference mode; a tensor made there could not be learnt from.
    with torch.inference_mode(False), torch.enable_grad():
        rng = np.random.default_rng(seed)
        trainee = method.begin(model, _given(model, frozen or model, replay, task, seed))
        leaves = trainee.parameters
        device = leaves[0].device
        groups = [{"params": group.parameters, "rate": group.rate} for group in trainee.groups]
        optimizer, lr = optimizers.build(options.optimizer, groups, lr=options.lr, weight_decay=options.weight_decay)

        def draw(batches: int) -> tuple[Array, Array]:
            return replay.sample(rng, batches * options.batch_size, options.reference_share)

        def mean_loss(x: Array, y: Array) -> Tensor:
            return row_losses(trainee.module(torch.from_numpy(x).to(device)), y, task).mean()

        probe = draw(PROBE_BATCHES)
        with torch.no_grad():
            before = float(mean_loss(*probe))
        optimizers.set_mode(optimizer, train=True)
        reason: Reason = "done"
        steps = 0
        while steps < options.steps:
            if stop():
                reason = "stopped"
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"] * (1 - steps / options.steps)
            loss = mean_loss(*draw(1))
            if trainee.penalty is not None:
                loss = loss + trainee.penalty()
            if not _set_gradients(loss, trainee, options.clip_norm):
                reason = "non-finite"
                break
            optimizer.step()
            steps += 1
        optimizers.set_mode(optimizer, train=False)
        with torch.no_grad():
            after = float(mean_loss(*probe))
            delta = trainee.values()
    if reason == "non-finite" or not (
        math.isfinite(after) and all(bool(new.isfinite().all()) for new in delta.values())
    ):
        return BurstResult(delta={}, steps=steps, loss_before=before, loss_after=math.nan, reason="non-finite")
    return BurstResult(delta=delta, steps=steps, loss_before=before, loss_after=after, reason=reason)


def _given(model: nn.Module, frozen: nn.Module, replay: Memory, task: Task, seed: int) -> Given:
    """What the method may know; what it draws does not change the order of the rows that are learnt from."""
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    own = np.random.default_rng([seed, 1])

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        x, y = replay.sample(own, rows, 0.0)
        return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)

    reference = (torch.from_numpy(replay.reference_x).to(device), torch.from_numpy(replay.reference_y).to(device))
    return Given(task=task, seed=seed, draw=draw, reference=reference, frozen=frozen)
