"""OFT: the inputs of the layers are turned by learnt rotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adapters.slow.lora_family.merged import ADAPTER, Adapted
from adapters.slow.lora_family.method import PeftMethod, whole
from adapters.slow.lora_family.targets import Target
from adapters.slow.registry import register
from adapters.slow.trainee import Given


@register("oft")
class Oft(PeftMethod):
    """Moves the block-diagonal rotation R of W' = W Rᵀ: R = (I + Q)⁻¹ (I - Q) blockwise, Q skew-symmetric, 0 at start.

    Angles between the outputs' weight vectors and their lengths stay, and with them what the layer tells apart: it
    can forget little. Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023.

    A block has the divisor of the layer's inputs that is nearest to ``block`` (all of them where their number is a
    prime). Inputs that are alone in a layer can't be turned; such layers stay. Can't change lengths, that is a
    sensor's gain: ``lora`` or ``ia3``. The rotation is computed exactly: peft's default is the first five terms of
    its series, which are no rotation any more once entries of Q come near 1 / block. peft's own layer for Conv2d with a
    kernel above 1 starts off the model (overlapping patches are added up); this one, on the weight, doesn't.
    """

    peft_name = "OFT"
    min_columns = 2

    def __init__(
        self,
        *,
        block: int = 16,
        train_head: bool = True,
        head: bool = False,
        layers: Sequence[str] = (),
        allow_start_off: bool = False,
    ) -> None:
        super().__init__(train_head=train_head, head=head, layers=layers, allow_start_off=allow_start_off)
        whole("block", block, 2)
        self.block = block

    def size(self, target: Target) -> int:
        """Inputs of one block."""
        divisors = [size for size in range(2, target.columns + 1) if target.columns % size == 0]
        return min(divisors, key=lambda size: abs(size - self.block))

    def config(self, size: int, given: Given) -> dict[str, Any]:
        """Exact rotations."""
        return {"r": 0, "oft_block_size": size, "use_cayley_neumann": False}

    def delta(self, item: Adapted) -> Tensor:
        """W Rᵀ - W."""
        rotation: Tensor = item.layer.get_delta_weight(ADAPTER)
        return item.base_RC @ rotation.to(item.base_RC).T - item.base_RC
