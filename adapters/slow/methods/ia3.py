"""(IA)³: the outputs of the layers, or their inputs, times learnt factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adapters.slow.lora_family.merged import ADAPTER, Adapted, working
from adapters.slow.lora_family.method import PeftMethod
from adapters.slow.registry import register
from adapters.slow.trainee import Given, Values


@register("ia3")
class Ia3(PeftMethod):
    """Moves a factor l for each output of a layer: W' = l ⊙ W, b' = l ⊙ b; l starts at 1.

    The fewest parameters of the family: one per channel. With ``inputs`` the factors are those of the layer's inputs,
    W' = W ⊙ l and the bias stays, as the paper has it in the second layer of a feed-forward block; right where sensors
    change their gain. Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning", NeurIPS 2022.

    Can't mix channels or shift them: that is ``lora``, and ``norm_affine`` or ``film``.
    """

    peft_name = "IA3"

    def __init__(
        self,
        *,
        inputs: bool = False,
        train_head: bool = True,
        head: bool = False,
        layers: Sequence[str] = (),
        allow_start_off: bool = False,
    ) -> None:
        super().__init__(train_head=train_head, head=head, layers=layers, allow_start_off=allow_start_off)
        self.inputs = inputs

    def config(self, size: int, given: Given) -> dict[str, Any]:
        """A layer whose inputs are scaled is called a feed-forward one; the pattern is that of the bank's names."""
        return {"feedforward_modules": "w[0-9]+" if self.inputs else []}

    def delta(self, item: Adapted) -> Tensor:
        """(l - 1) ⊙ W."""
        factors: Tensor = item.layer.ia3_l[ADAPTER]
        return (factors - 1) * item.base_RC

    def merge(self, item: Adapted, parameters: Mapping[str, nn.Parameter]) -> Values:
        """The weight, and the bias that is added before the outputs are scaled."""
        values = super().merge(item, parameters)
        if not self.inputs and item.target.bias is not None:
            bias = working(parameters[item.target.bias])
            values[item.target.bias] = bias * item.layer.ia3_l[ADAPTER].reshape(bias.shape)
        return values
