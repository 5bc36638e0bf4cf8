"""ema_norm: statistics that follow the stream by an exponential moving average."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adapters.fast.core.base import FastAdapter
from adapters.fast.core.batch_statistics import batch_moments, values_per_channel
from adapters.fast.core.norm_layers import AdaptedBatchNorm, check_batch_norm, replace_batch_norms
from adapters.fast.core.registry import register
from adapters.reference import Reference


@register("ema_norm")
class EmaNorm(FastAdapter):
    """Every BatchNorm normalises with statistics that follow the stream; batch size one works.

    With m = 1 − exp(−B / memory_rows), where μ_B, σ²_B are mean and biased variance of a batch of B rows, the law of
    total variance of the mixture (old with weight 1 − m, batch with weight m) gives

        μ ← μ + m·(μ_B − μ),    σ² ← (1 − m)·σ² + m·σ²_B + m·(1 − m)·(μ_B − μ)²

    which is the moving average of E[x] and E[x²] without its cancellation. A row's weight falls by e every
    ``memory_rows`` rows whatever the batch size. Served at gain g: (1 − g)·source + g·(μ, σ²), as they were *before*
    the batch: predict first, then adapt, in one forward pass. At gain 0 the statistics go on following, so that a gain
    raised later finds them up to date; use `predict` where nothing should follow.

    With ``memory_rows=None`` it is the published form: ``momentum`` per batch, unbiased variances, and two forwards,
    the first normalised by the batch while the statistics move, the second, which is returned, by the moved ones. A
    layer with fewer than two values per channel does not move then.

    Starts at the source statistics. A channel whose new statistics would not be finite keeps the old ones. Can't do:
    class-sorted streams of more than about ``memory_rows`` rows a class; models without BatchNorm.

    Yuan et al., Robust Test-Time Adaptation in Dynamic Scenarios (RoTTA), CVPR 2023.
    """

    class Options(FastAdapter.Options):
        """Settings of the moving average."""

        memory_rows: float | None = Field(default=1000.0, gt=0.0)
        """Rows after which a row's weight has fallen by e; None: ``momentum`` per batch."""
        momentum: float = Field(default=0.1, gt=0.0, le=1.0)
        """Weight of each batch, whatever its size; used when ``memory_rows`` is None."""

    options: Options

    @classmethod
    def check(cls, model: nn.Module, reference: Reference | None = None) -> str | None:
        """Need a BatchNorm with running statistics."""
        return check_batch_norm(model)

    def _setup(self) -> None:
        self._followed = _Followed()
        replace_batch_norms(self.model, self._followed.layer)
        self._followed.join()

    def _gain_changed(self) -> None:
        self._followed.serve(self.gain)

    def _adapt(self, x: Tensor) -> Tensor:
        followed, rows = self._followed, self.options.memory_rows
        if rows is None:
            return self._adapt_first(x)
        followed.measuring = True
        try:
            outputs = super()._predict(x)
        finally:
            followed.measuring = False
        followed.follow(-math.expm1(-len(x) / rows))
        followed.serve(self.gain)
        return outputs

    def _adapt_first(self, x: Tensor) -> Tensor:
        followed = self._followed
        followed.normalising_by_batch = True
        try:
            super()._predict(x)
        finally:
            followed.normalising_by_batch = False
        followed.move(self.options.momentum)
        followed.serve(self.gain)
        return super()._predict(x)

    def _predict(self, x: Tensor) -> Tensor:
        if self.options.memory_rows is not None:
            return super()._predict(x)
        before = self._state()
        try:
            return self._adapt_first(x)
        finally:
            self._load(before)

    def _state(self) -> dict[str, Any]:
        return {"statistics": self._followed.now.clone()}

    def _load(self, state: dict[str, Any]) -> None:
        now = torch.as_tensor(state["statistics"])
        if now.shape != self._followed.now.shape:
            raise ValueError(f"statistics are {tuple(now.shape)}, not {tuple(self._followed.now.shape)}")
        self._followed.now.copy_(now)
        self._followed.serve(self.gain)


class _Followed:
    """The statistics of all layers in (2, C) tensors, means over variances, so that one update serves all layers.

    Layer by layer, the update of a small network would take longer than its forward pass.
    """

    def __init__(self) -> None:
        self.layers: list[_FollowedBatchNorm] = []
        self.measuring = False
        self.normalising_by_batch = False

    def layer(self, source: _BatchNorm) -> nn.Module:
        """Take a layer in."""
        self.layers.append(_FollowedBatchNorm(source, self))
        return self.layers[-1]

    def join(self) -> None:
        """Lay the statistics of all layers side by side; what the layers hold become views of them."""
        self.source = torch.stack(
            [
                torch.cat([layer.running_mean for layer in self.layers]),
                torch.cat([layer.running_var for layer in self.layers]),
            ]
        )
        self.now, self.served = self.source.clone(), self.source.clone()
        widths = [len(layer.running_mean) for layer in self.layers]
        views = (tensor.split(widths, dim=1) for tensor in (self.now, self.served))
        for layer, now, served in zip(self.layers, *views, strict=True):
            layer.running_mean, layer.running_var = now[0], now[1]
            layer.served_mean, layer.served_var = served[0], served[1]

    def follow(self, weight: float) -> None:
        """Move by ``weight`` to the measured moments of a population (biased variances)."""
        measured = self._measured()
        new = torch.lerp(self.now, measured, weight)
        new[1].addcmul_(step := measured[0] - self.now[0], step, value=weight * (1.0 - weight))
        self._accept(new)

    def move(self, momentum: float) -> None:
        """Move means and variances each by ``momentum``."""
        self._accept(torch.lerp(self.now, self._measured(), momentum))

    def _measured(self) -> Tensor:
        """Collect what the layers measured; one that the forward did not reach stays where it is."""
        pairs = [layer.measured or (layer.running_mean, layer.running_var) for layer in self.layers]
        for layer in self.layers:
            layer.measured = None
        means, variances = zip(*pairs, strict=True)
        return torch.cat([*means, *variances]).view_as(self.now).to(self.now.dtype)

    def _accept(self, new: Tensor) -> None:
        torch.where(new.isfinite().all(0), new, self.now, out=self.now)

    def serve(self, gain: float) -> None:
        """Mix source and followed statistics, exact at both ends."""
        torch.lerp(self.source, self.now, gain, out=self.served)


class _FollowedBatchNorm(AdaptedBatchNorm):
    """Normalises with what `_Followed` serves and measures for it when asked. ``running_*`` are the followed values."""

    served_mean: Tensor
    served_var: Tensor
    measured: tuple[Tensor, Tensor] | None

    def __init__(self, source: _BatchNorm, followed: _Followed) -> None:
        super().__init__(source)
        self.register_buffer("served_mean", None, persistent=False)
        self.register_buffer("served_var", None, persistent=False)
        self.measured = None
        self.followed = followed

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, ...)."""
        if self.followed.measuring:
            self.measured = batch_moments(x)
        elif self.followed.normalising_by_batch and (n := values_per_channel(x)) > 1:
            mean, var = batch_moments(x)
            self.measured = mean, var * (n / (n - 1))
            return self.normalise(x, mean, var)
        return self.normalise(x, self.served_mean, self.served_var)
