"""DoRA: length and direction of the weights apart, the direction moving at low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapters.slow.lora_family.lora import LowRank
from adapters.slow.lora_family.merged import ADAPTER, Adapted
from adapters.slow.registry import register
from adapters.slow.trainee import Given


@register("dora")
class Dora(LowRank):
    """Moves m, A and B of W' = m V / |V|, V = W + (alpha / rank) B A; |V| is the norm of each output's weights.

    m starts at |W| and B at 0, so the start is the model. As in the paper's section 4.3 the gradient does not go
    through |V|. An output without weights (a pruned channel) keeps the factor 1: zero by zero is no direction. Liu et
    al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024.

    Learns gains (m) and mixtures (A, B) apart, at the price of one more pass over W' than ``lora``.
    """

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        train_head: bool = True,
        head: bool = False,
        layers: Sequence[str] = (),
        allow_start_off: bool = False,
    ) -> None:
        super().__init__(train_head=train_head, head=head, layers=layers, allow_start_off=allow_start_off)
        self.set_rank(rank, alpha)

    def config(self, size: int, given: Given) -> dict[str, Any]:
        """As for ``lora``, with the lengths beside."""
        return {**super().config(size, given), "use_dora": True}

    def delta(self, item: Adapted) -> Tensor:
        """W' - W = m V / |V| - W."""
        moved = item.base_RC + self.product(item).to(item.base_RC)
        length = torch.linalg.vector_norm(moved.detach(), dim=1)
        magnitude = item.layer.lora_magnitude_vector[ADAPTER].weight.to(length)
        factor = torch.where(length > 0, magnitude / length.clamp(min=torch.finfo(length.dtype).tiny), 1.0)
        return factor[:, None] * moved - item.base_RC
