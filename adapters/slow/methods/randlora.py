"""RandLoRA: learnt factors around random bases whose sum has full rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adapters.slow.lora_family.merged import ADAPTER, Adapted
from adapters.slow.lora_family.method import PeftMethod, at_least, whole
from adapters.slow.registry import register
from adapters.slow.trainee import Given

SCALE = 4.0
"""alpha / rank."""


@register("randlora")
class RandLora(PeftMethod):
    """Moves the diagonals Λ_j, Γ_j of W' = W + (alpha / rank) Σ_j B_j Λ_j A Γ_j; the bases A, B_j are random and stay.

    Λ starts at 0, so the start is the model. With min(rows, columns) / rank bases the sum has full rank, for changes
    that no low rank holds. Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    ICLR 2025.

    ``alpha`` is 4 × rank unless given. With peft's default of 640, 80 × and 20 × at ranks 8 and 32, bursts of Adam at a
    rate of 0.05 ended at 100 and 3 times the loss that they began with on layers of 256, for the product's gradient
    grows with the scale and with the width; at 4 × none ended above, and at 1 × small rates learn half as much.
    """

    peft_name = "RandLora"
    together = True

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
        whole("rank", rank)
        self.rank, self.alpha = rank, SCALE * rank if alpha is None else alpha
        at_least("alpha", self.alpha, 1e-6)

    def config(self, size: int, given: Given) -> dict[str, Any]:
        """The bases come from the burst's seed."""
        return {"r": self.rank, "randlora_alpha": self.alpha, "projection_prng_key": given.seed}

    def delta(self, item: Adapted) -> Tensor:
        """(alpha / rank) Σ_j B_j Λ_j A Γ_j."""
        delta: Tensor = item.layer.get_delta_weight(ADAPTER)
        return delta
