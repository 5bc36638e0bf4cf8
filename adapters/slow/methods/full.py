"""Every parameter, the head faster than the rest."""

from __future__ import annotations

import math

from torch import nn

from adapters.slow.registry import SelectingMethod, register
from adapters.slow.select import everything, last_linear
from adapters.slow.trainee import Given, Group, Trainee, of_clones, private_copy


@register("full")
class Full(SelectingMethod):
    """Moves every floating-point parameter, the head at the learning rate and the backbone at ``backbone_rate`` of it.

    A trained backbone moved at the head's rate forgets within a burst; moved slowly, it keeps up with the stream and
    keeps what it knew. Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a
    Pre-trained Model", ICCV 2023 (the slow learner; they use 0.01 to 0.1).

    The head is the last ``nn.Linear``. A model without one moves as a whole at ``backbone_rate``: all of it is what was
    trained. So does a weight that the head shares with another layer. It needs the most labels, memory (the model, its
    gradient and the optimiser's state) and the largest deltas: try ``norm_affine_head`` first. Running statistics
    stay.

    Args:
        backbone_rate: the backbone's share of the learning rate, in (0, 1].
    """

    missing = "the model has no floating-point parameters; there is nothing to learn"

    def __init__(self, backbone_rate: float = 0.1) -> None:
        if not (math.isfinite(backbone_rate) and 0 < backbone_rate <= 1):
            raise ValueError(f"backbone_rate is {backbone_rate}; it must be in (0, 1]")
        self.backbone_rate = backbone_rate

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Every floating-point parameter."""
        return everything(model)

    def begin(self, model: nn.Module, given: Given) -> Trainee:
        """Clone everything, in two groups."""
        module, moved = private_copy(model, self.parameters(model))
        head = last_linear(module)
        backbone = {id(value) for name, value in module.named_parameters(remove_duplicate=False) if name not in head}
        slow = [leaf for leaf in moved.values() if id(leaf) in backbone]
        fast = [leaf for leaf in moved.values() if id(leaf) not in backbone]
        groups = [Group(slow, self.backbone_rate), Group(fast)]
        return of_clones(module, moved, [group for group in groups if group.parameters])
