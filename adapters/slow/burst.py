"""The bounded burst: a fixed number of gradient steps on a private copy, the rate going to zero."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adapters.slow import optimizers
from adapters.slow.given import Memory, given_of
from adapters.slow.keeping.base import Settling
from adapters.slow.losses import Task, check_task, row_losses
from adapters.slow.memory_need import is_out_of_memory, needed_bytes
from adapters.slow.options import BurstOptions, BurstResult, Reason
from adapters.slow.pace import Pace
from adapters.slow.registry import SlowMethod
from adapters.slow.rows import Array
from adapters.slow.teacher import Taught
from adapters.slow.trainee import Given, Trainee, Values

__all__ = ["BurstOptions", "BurstResult", "Memory", "Reason", "run_burst"]

PROBE_BATCHES = 4
"""Batches of the fixed sample on which the loss is taken before and after."""
TINY = 1e-6
"""As clip_grad_norm_ has it: of a norm below it no share is taken."""


class _Step(NamedTuple):
    """The gradients of one step are written."""

    finite: bool
    loss: float
    """Loss of which the gradients are, after clipping."""
    norms: list[float]
    """Of each group's gradient, before clipping; empty where nobody asks."""


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
    unlabelled: Array | None = None,
    clock: Callable[[], float] = time.monotonic,
    rest: Callable[[float], None] = time.sleep,
) -> BurstResult:
    """Train what ``method`` may move on rows of ``replay``; ``model`` is never changed.

    Fresh optimiser state, gradient clipping, the rate falling linearly from its start to zero: what is learnt last is
    averaged rather than chased. The same seed, rows and model give the same result (on CUDA as far as the model's
    own kernels do), unless it ends by the clock.

    Args:
        model: classifier giving logits (B, K), or regressor giving (B,) or (B, 1).
        method: says which parameters may move.
        replay: rows to learn from; hand over a ``Snapshot`` when another thread goes on adding rows.
        options: how much may be done.
        task: cross-entropy for classification, squared error for regression.
        seed: of the order in which rows are drawn.
        stop: asked before each step and while resting; True ends the burst with what it has.
        frozen: the model as it was packed, for what keeps near it; None: ``model`` itself.
        unlabelled: (n, *input_shape) rows without labels, learnt by pseudo-labels (`Teacher`) beside the labelled ones
            or the reference exemplars; rows that are not finite are left out. Classification only.
        clock: seconds that only grow.
        rest: sleeps so many seconds.

    Returns:
        BurstResult: see ``BurstResult.reason``.

    Raises:
        ValueError: nothing can move, the memory is empty, the optimiser is unknown, or outputs and labels do not fit.
    """
    check_task(task)
    pace = Pace(options.seconds, options.duty, clock, rest, stop)
    burst: _Burst | None = None
    try:
        # The caller may sit in inference mode; a tensor made there could not be learnt from.
        with torch.inference_mode(False), torch.enable_grad():
            given = given_of(model, frozen or model, replay, task, seed)
            burst = _Burst(method.begin(model, given), given, replay, options, unlabelled)
            reason = burst.run(stop, pace)
            after, delta = burst.result()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason, after, delta = "out of memory", math.nan, {}
    if delta and not (math.isfinite(after) and all(bool(new.isfinite().all()) for new in delta.values())):
        reason = "non-finite"
    if reason in ("non-finite", "out of memory"):
        after, delta = math.nan, {}
    pace.mark()
    return BurstResult(
        delta=delta,
        steps=burst.steps if burst else 0,
        loss_before=burst.before if burst else math.nan,
        loss_after=after,
        reason=reason,
        seconds=pace.worked,
        pseudo_labels=burst.taught.believed if burst and burst.taught else 0,
    )


class _Burst:
    """One burst under way."""

    def __init__(
        self, trainee: Trainee, given: Given, replay: Memory, options: BurstOptions, unlabelled: Array | None
    ) -> None:
        self._trainee, self._replay, self._options, self._task = trainee, replay, options, given.task
        self._leaves = trainee.parameters
        self._device = self._leaves[0].device
        self._rows, self._trial_rows = np.random.default_rng(given.seed), np.random.default_rng([given.seed, 3])
        self.taught = Taught.of(unlabelled, trainee, given, options)
        groups = [{"params": group.parameters, "rate": group.rate} for group in trainee.groups]
        self._optimizer, self._lr = optimizers.build(
            options.optimizer, groups, lr=options.lr, weight_decay=options.weight_decay
        )
        self._wants = optimizers.wants(self._optimizer)
        self.steps = 0
        self.before = math.nan

    def run(self, stop: Callable[[], bool], pace: Pace) -> Reason:
        """Take the steps; why it ended."""
        options = self._options
        self._probe = self._draw(self._rows, PROBE_BATCHES)
        if options.memory_bytes is not None and self._need() > options.memory_bytes:
            return "out of memory"
        self.before = self._probe_loss()
        optimizers.set_mode(self._optimizer, train=True)
        pace.pause()
        while self.steps < options.steps:
            if stop():
                return "stopped"
            if pace.overrun:
                return "overrun"
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr * group["rate"] * (1 - self.steps / options.steps)
            if not self._step():
                return "non-finite"
            self.steps += 1
            pace.pause()
        return "done"

    def result(self) -> tuple[float, Values]:
        """Loss on the probe and the new values."""
        optimizers.set_mode(self._optimizer, train=False)
        with torch.no_grad():
            return self._probe_loss(), {name: value.detach() for name, value in self._trainee.values().items()}

    def _step(self) -> bool:
        """One gradient step; False when it was not made because the gradient is not finite."""
        trainee = self._trainee
        loss = self._mean_loss(*self._draw(self._rows))
        if trainee.penalty is not None:
            loss = loss + trainee.penalty()
        if self.taught is not None:
            loss = loss + self.taught.loss()
        step = self._set_gradients(loss)
        if not step.finite:
            return False
        settling = isinstance(trainee, Settling)
        old = [leaf.detach().clone() for leaf in self._leaves] if settling else []
        self._optimizer.step(self._closure(step))
        if isinstance(trainee, Settling):
            self._settle(trainee, old, step.norms)
        if self.taught is not None:
            self.taught.teacher.follow()
        return True

    def _closure(self, step: _Step) -> Callable[[], float] | None:
        """What the optimiser asks for beside the gradients."""
        if self._wants == "gradient":
            return None
        if self._wants == "loss":
            return lambda: step.loss
        rows = self._draw(self._trial_rows)

        def trial() -> float:
            with torch.no_grad():
                return float(self._mean_loss(*rows))

        return trial

    def _set_gradients(self, loss: Tensor) -> _Step:
        """Write the clipped gradient of ``loss``."""
        trainee, leaves, clip_norm = self._trainee, self._leaves, self._options.clip_norm
        # Asking for these gradients only: .grad of the shared parameters belongs to the served model.
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
        if all(gradient is None for gradient in gradients):
            raise ValueError("no parameter that may move takes part in the model's output; choose another slow method")
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        trainee.scale_gradients()
        norms = []
        if isinstance(trainee, Settling):
            norms = [_length([leaf.grad for leaf in group.parameters]) for group in trainee.groups]
        total, value = torch.stack(
            [nn.utils.clip_grad_norm_(leaves, clip_norm).float(), loss.detach().float()]
        ).tolist()
        clipped = min(1.0, clip_norm / (total + TINY))
        return _Step(math.isfinite(total) and math.isfinite(value), value * clipped, norms)

    @torch.no_grad()
    def _settle(self, trainee: Settling, old: list[Tensor], norms: list[float]) -> None:
        """Tell the trainee how far the step went."""
        before = dict(zip(self._leaves, old, strict=True))
        steps = [_length([leaf - before[leaf] for leaf in group.parameters]) for group in trainee.groups]
        trainee.after_step([step / norm if norm > 0 else 0.0 for step, norm in zip(steps, norms, strict=True)])

    def _draw(self, rng: np.random.Generator, batches: int = 1) -> tuple[Array, Array]:
        return self._replay.sample(rng, batches * self._options.batch_size, self._options.reference_share)

    def _mean_loss(self, x: Array, y: Array) -> Tensor:
        return row_losses(self._trainee.module(torch.from_numpy(x).to(self._device)), y, self._task).mean()

    @torch.no_grad()
    def _probe_loss(self) -> float:
        # Batch by batch: the probe must not take more memory than a step.
        batches = zip(*(np.array_split(column, PROBE_BATCHES) for column in self._probe), strict=True)
        return sum(float(self._mean_loss(x, y)) for x, y in batches) / PROBE_BATCHES

    def _need(self) -> int:
        rows = self._options.batch_size + (self.taught.rows if self.taught is not None else 0)
        return needed_bytes(self._trainee, torch.from_numpy(self._probe[0][:1]).to(self._device), rows)


def _length(tensors: list[Tensor] | list[Tensor | None]) -> float:
    """Euclidean length over all; a missing one is zero."""
    norms = [tensor.float().norm() for tensor in tensors if tensor is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0
