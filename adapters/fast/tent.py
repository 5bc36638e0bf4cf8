"""tent: test-time entropy minimisation."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from adapters.fast.core.affine import AffineParameters, check_affine
from adapters.fast.core.base import FastAdapter
from adapters.fast.core.norm_layers import MixedBatchNorm, Mode, replace_batch_norms
from adapters.fast.core.optim import make_optimizer
from adapters.fast.core.registry import register
from adapters.features import find_head
from adapters.reference import Reference


def softmax_entropy(logits_BK: Tensor) -> Tensor:
    """Return (B,) entropies in nats of the softmax of (B, K) logits."""
    log_p = logits_BK.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


@register("tent")
class Tent(FastAdapter):
    """One gradient step per batch on the mean entropy of the predictions; only norm scales and shifts move.

        L = mean_B H(softmax(z)),    θ = {γ, β of every normalisation layer}

    BatchNorm layers also normalise with the batch's statistics, with gradients through them; LayerNorm, GroupNorm and
    the like move in γ, β alone. Returns the logits of the forward made before the step (with ``steps`` > 1, before the
    first). At gain g: statistics as in `norm`, served θ₀ + g·(θ − θ₀), gradients through that, so g scales them too;
    at 0 no backward pass runs. A loss or gradient that is not finite skips the step: nothing changes then.

    Can't do: long class-sorted or single-class streams, where the least entropy is one answer for all; batches of one
    through BatchNorm over (B, C), which get the source statistics; regression.

    Wang et al., Tent: Fully Test-Time Adaptation by Entropy Minimization, ICLR 2021.
    """

    backward = True

    class Options(FastAdapter.Options):
        """Settings of Tent."""

        optimizer: str = "adam"
        """``sgd``, ``adam``, or any name of ``pytorch_optimizer``."""
        lr: float | None = Field(default=None, gt=0.0)
        """Learning rate; None: 1e-3 for sgd and adam, the library's own default for others."""
        betas: tuple[float, float] = (0.9, 0.999)
        """Decay of the first and second moments, for those that have them."""
        momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
        """Momentum, for those that have it."""
        weight_decay: float = Field(default=0.0, ge=0.0)
        """Pull of the scales and shifts to zero."""
        steps: int = Field(default=1, ge=1)
        """Gradient steps per batch."""

    options: Options

    @classmethod
    def check(cls, model: nn.Module, reference: Reference | None = None) -> str | None:
        """Need a scale or shift in a normalisation layer, and at least two classes."""
        if problem := check_affine(model):
            return problem
        head = find_head(model)
        if head is not None and model.get_submodule(head).out_features == 1:
            return "it has one output, whose entropy is constant; use 'ema_norm'"
        return None

    def _setup(self) -> None:
        self._mode = Mode()
        replace_batch_norms(self.model, lambda layer: MixedBatchNorm(layer, self._mode, differentiable=True))
        self._affine = AffineParameters(self.model)
        o = self.options
        self._optimizer = make_optimizer(
            self._affine.theta, o.optimizer, lr=o.lr, betas=o.betas, momentum=o.momentum, weight_decay=o.weight_decay
        )

    def _gain_changed(self) -> None:
        self._mode.gain = self.gain
        self._affine.serve(self.gain)

    def _adapt(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            rows = x.clone() if x.is_inference() else x  # autograd can't save a tensor of inference mode
            outputs = self._step(rows)
            features = self._tap.latest if self._tap else None
            for _ in range(self.options.steps - 1):
                self._step(rows)
        if self._tap:
            self._tap.latest = features
        return outputs

    def _step(self, x: Tensor) -> Tensor:
        logits = self._predict(x)
        loss = softmax_entropy(logits).mean()
        gradient = self._affine.gradient(loss, self.gain)
        with torch.no_grad():
            finite = (gradient.sum() + loss).isfinite()
            self._optimizer.step(gradient, wanted=finite)
            self._affine.serve(self.gain)
        return logits.detach()

    def _state(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def _load(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)
        self._affine.serve(self.gain)
