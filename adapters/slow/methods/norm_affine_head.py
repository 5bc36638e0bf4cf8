"""The affine parameters of the normalisation layers together with the head."""

from __future__ import annotations

from torch import nn

from adapters.slow.registry import SelectingMethod, register
from adapters.slow.select import last_linear, norm_affine


@register("norm_affine_head")
class NormAffineHead(SelectingMethod):
    """Moves what ``norm_affine`` and ``head`` move, as far as the model has it; the default.

    One configuration for input drift and concept change alike. It costs more labels than ``head`` where only the
    labels' meaning moved. A model without normalisation layers is served as by ``head``, one without a linear layer
    as by ``norm_affine``.
    """

    missing = "the model has neither a normalisation layer with affine parameters nor an nn.Linear layer; add either"

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Scale and shift of every normalisation layer, weight and bias of the last linear layer."""
        return norm_affine(model) | last_linear(model)
