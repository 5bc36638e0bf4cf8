"""The head: the last linear layer."""

from __future__ import annotations

from torch import nn

from adapters.slow.registry import SelectingMethod, register
from adapters.slow.select import last_linear


@register("head")
class Head(SelectingMethod):
    """Moves the weight and bias of the last ``nn.Linear``: z = W h(x) + b, the features h stay.

    The right choice when the meaning of the labels moved (concept change, swapped or re-defined classes) and the
    features still tell the classes apart. Kirichenko, Izmailov, Wilson, "Last Layer Re-Training is Sufficient for
    Robustness to Spurious Correlations", ICLR 2023.

    Can't repair features: a sensor whose gain drifted before a nonlinearity needs ``norm_affine``. "Last" is in
    the order of definition, which is that of the calls in a plain model.
    """

    missing = "the model has no nn.Linear layer to call its head; use 'norm_affine', or end the model in nn.Linear"

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Weight and bias of the last linear layer."""
        return last_linear(model)
