"""The affine parameters of the normalisation layers."""

from __future__ import annotations

from torch import nn

from adapters.slow.registry import SelectingMethod, register
from adapters.slow.select import norm_affine


@register("norm_affine")
class NormAffine(SelectingMethod):
    """Moves scale a and shift b of every normalisation layer: a (h - mean) / std + b; mean and std stay as trained.

    The right choice when the inputs moved (ageing sensors, light) and the labels mean what they meant: about 1% of
    the weights, so it learns from few labels and forgets little. Frankle, Schwab, Morcos, "Training BatchNorm and
    Only BatchNorm", ICLR 2021.

    Can't serve a model without affine normalisation layers, and can't re-define the classes: that is ``head``.
    """

    missing = "the model has no normalisation layer with affine parameters; use 'head'"

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Scale and shift of every normalisation layer."""
        return norm_affine(model)
