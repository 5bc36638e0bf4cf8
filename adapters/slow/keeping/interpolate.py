"""Interpolation: only a share of the way is gone."""

from __future__ import annotations

from torch import nn

from adapters.slow.keeping.base import Keeping, share_of, values_now, with_values
from adapters.slow.registry import register_keeping
from adapters.slow.trainee import Given, Trainee, Values


@register_keeping("interpolate")
class Interpolate(Keeping):
    """result = start + share (trained - start), by weight; start is the served model.

    Half the way keeps most of what the start knew and takes most of what was learnt, where the loss has no wall
    between both. Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models" (WiSE-FT), CVPR 2022. Burst after burst it
    is a momentum over versions.

    The burst's own loss after it is that of the trained end of the way; the gate judges what would be served.

    Args:
        share: of the way, in (0, 1]; 1 keeps nothing.
    """

    def __init__(self, share: float = 0.5) -> None:
        self.share = share_of("share", share, closed=True)

    def keep(self, model: nn.Module, given: Given, trainee: Trainee) -> Trainee:
        """Read off the point on the way."""
        start = values_now(trainee)

        def values() -> Values:
            return {name: start[name].lerp(new, self.share) for name, new in trainee.values().items()}

        return with_values(trainee, values)
