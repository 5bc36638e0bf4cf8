"""A fork whose parameters are computed, at each call, from fewer or smaller ones that are learnt."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn
from torch.func import functional_call

from adapters.slow.trainee import Group, Trainee, Values


class Reparametrised(nn.Module):
    """Calls a private fork with `weights` in place of its own. What is learnt is registered on this module."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self.twin = twin
        # Only this module's flag: the fork has its modes from `ready`.
        self.training = False

    @abstractmethod
    def weights(self) -> Values:
        """What takes the place of the fork's parameters, by their names in ``named_parameters()``; differentiable."""

    def learnt(self) -> list[nn.Parameter]:
        """What is learnt: the parameters registered beside the fork's."""
        return [leaf for name, leaf in self.named_parameters() if not name.startswith("twin.")]

    def forward(self, *inputs: Tensor) -> Tensor:
        """The fork's answer."""
        out: Tensor = functional_call(self.twin, self.weights(), inputs)
        return out


def trainee_of(module: Reparametrised, groups: list[Group] | None = None) -> Trainee:
    """Trainee whose result is what `Reparametrised.weights` computes in the end; differentiable where asked for."""
    return Trainee(module=module, groups=groups or [Group(module.learnt())], values=module.weights)
