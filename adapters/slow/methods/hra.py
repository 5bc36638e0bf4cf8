"""HRA: the inputs of the layers are turned by a chain of learnt reflections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapters.slow.lora_family.merged import ADAPTER, Adapted
from adapters.slow.lora_family.method import PeftMethod, whole
from adapters.slow.registry import register
from adapters.slow.trainee import Given


@register("hra")
class Hra(PeftMethod):
    """Moves the directions u_i of W' = W Π_i (I - 2 u_i u_iᵀ), |u_i| = 1: ``rank`` reflections of the inputs.

    Orthogonal as ``oft``'s rotation is, and of low rank as ``lora``. Reflections start as equal pairs, which cancel:
    so the start is the model only for an even ``rank``, and an odd one is refused unless ``allow_start_off``. Yuan,
    Liu, Xu, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
    NeurIPS 2024.

    Can't change lengths, that is a sensor's gain: ``lora`` or ``ia3``. The paper's variant with directions made
    orthogonal is not offered: it divides zero by zero at equal pairs.
    """

    peft_name = "HRA"
    min_columns = 2

    def __init__(
        self,
        *,
        rank: int = 8,
        train_head: bool = True,
        head: bool = False,
        layers: Sequence[str] = (),
        allow_start_off: bool = False,
    ) -> None:
        super().__init__(train_head=train_head, head=head, layers=layers, allow_start_off=allow_start_off)
        whole("rank", rank)
        if rank % 2 and not allow_start_off:
            raise ValueError(
                f"rank is {rank}; hra starts at the model only with an even rank, for its reflections cancel in pairs: "
                f"give {rank + 1}, or allow_start_off=True"
            )
        self.rank = rank

    def config(self, size: int, given: Given) -> dict[str, Any]:
        """Plain reflections; peft's own start, which warns at odd ranks, is drawn again."""
        return {"r": self.rank, "init_weights": False}

    def draw(self, item: Adapted, generator: torch.Generator) -> None:
        """Equal pairs of directions, and one alone when the rank is odd."""
        directions = item.layer.hra_u[ADAPTER]
        half = torch.randn(item.target.columns, (self.rank + 1) // 2, generator=generator)
        directions.copy_(half.repeat_interleave(2, 1)[:, : self.rank])

    def delta(self, item: Adapted) -> Tensor:
        """W R - W."""
        product: Tensor = item.layer.get_delta_weight(ADAPTER)
        return item.base_RC @ product.to(item.base_RC) - item.base_RC
