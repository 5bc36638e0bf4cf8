"""alpha_norm: a fixed mixture of source and batch statistics."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from adapters.fast.core.base import FastAdapter
from adapters.fast.core.norm_layers import MixedBatchNorm, Mode, check_batch_norm, replace_batch_norms
from adapters.fast.core.registry import register
from adapters.reference import Reference


@register("alpha_norm")
class AlphaNorm(FastAdapter):
    """Every BatchNorm mixes the batch's statistics into the source's with a small weight (α-BN).

        μ = (1 − g·α)·μ_s + g·α·μ_B,    σ² = (1 − g·α)·σ²_s + g·α·σ²_B, unbiased σ²_B

    α is the weight of the *batch*, as in the published implementations (the paper writes it for the source); g is the
    gain. No gradient, no state. The source keeps most of the weight, so small and correlated batches do less harm than
    with `norm`, and compensate less. A channel with fewer than two values gets the source statistics.

    You et al., Test-time Batch Statistics Calibration for Covariate Shift, 2021. Its loss part is not used here.
    """

    class Options(FastAdapter.Options):
        """Settings of α-BN."""

        alpha: float = Field(default=0.1, ge=0.0, le=1.0)
        """Weight of the batch statistics."""

    options: Options

    @classmethod
    def check(cls, model: nn.Module, reference: Reference | None = None) -> str | None:
        """Need a BatchNorm with running statistics."""
        return check_batch_norm(model)

    def _setup(self) -> None:
        self._mode = Mode()
        alpha = self.options.alpha
        replace_batch_norms(self.model, lambda layer: MixedBatchNorm(layer, self._mode, share=alpha, unbiased=True))

    def _gain_changed(self) -> None:
        self._mode.gain = self.gain
