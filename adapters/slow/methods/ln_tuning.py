"""LN tuning: the affine parameters of the normalisation layers of attention blocks."""

from __future__ import annotations

from torch import nn

from adapters.slow.registry import SelectingMethod, register
from adapters.slow.select import last_linear, parameters_of


@register("ln_tuning")
class LnTuning(SelectingMethod):
    """Moves scale and shift of every LayerNorm, RMSNorm and GroupNorm, and the head unless ``train_head`` is False.

    These have no running statistics, so what is learnt is not undone by a batch of another kind. Zhao et al., "Tuning
    LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", ICLR 2024. It is what peft calls by this
    name; the result being the parameters themselves, it needs nothing of the package.

    Can't serve a model that normalises over the batch or not at all: ``norm_affine`` is for all kinds.
    """

    missing = (
        "the model has no LayerNorm, RMSNorm or GroupNorm with affine parameters; "
        "use 'norm_affine', which also takes BatchNorm, or 'lora'"
    )

    def __init__(self, *, train_head: bool = True) -> None:
        self.train_head = train_head

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Scale and shift of the layers, then the head; nothing where there are no such layers."""
        found: dict[str, nn.Parameter] = {}
        for prefix, module in model.named_modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
                found |= parameters_of(prefix, module)
        return found | last_linear(model) if found and self.train_head else found
