"""VeRA: learnt factors around one pair of random matrices that all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adapters.slow.lora_family.merged import ADAPTER, Adapted
from adapters.slow.lora_family.method import PeftMethod, at_least, whole
from adapters.slow.registry import register
from adapters.slow.trainee import Given


@register("vera")
class Vera(PeftMethod):
    """Moves b and d of W' = W + diag(b) B diag(d) A; A (rank × columns) and B (rows × rank) are random and stay.

    b starts at 0 and d at ``d_initial``, so the start is the model. One pair A, B, drawn from the burst's seed and as
    large as the largest layer, serves all layers by its leading parts. Rows + rank parameters per layer: a tenth of
    ``lora``'s on wide layers. Kopiczko, Blankevoort, Asano, "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024.

    The rank costs little here and wants to be larger than that of ``lora``.
    """

    peft_name = "Vera"
    together = True

    def __init__(
        self,
        *,
        rank: int = 32,
        d_initial: float = 0.1,
        train_head: bool = True,
        head: bool = False,
        layers: Sequence[str] = (),
        allow_start_off: bool = False,
    ) -> None:
        super().__init__(train_head=train_head, head=head, layers=layers, allow_start_off=allow_start_off)
        whole("rank", rank)
        at_least("d_initial", d_initial, 1e-6)
        self.rank, self.d_initial = rank, d_initial

    def config(self, size: int, given: Given) -> dict[str, Any]:
        """The shared pair comes from the burst's seed."""
        return {"r": self.rank, "d_initial": self.d_initial, "projection_prng_key": given.seed}

    def delta(self, item: Adapted) -> Tensor:
        """diag(b) B diag(d) A."""
        delta: Tensor = item.layer.get_delta_weight(ADAPTER)
        return delta
