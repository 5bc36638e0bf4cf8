"""What a burst trains: a private copy of the model, and how its result is read off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapters.slow.fork import fork
from adapters.slow.losses import Task

Values = dict[str, Tensor]
"""A delta: new values (not differences) by name, as `adapters.slow.fork.apply_delta` takes them."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a burst may know beside the model."""

    task: Task
    seed: int
    draw: Callable[[int], tuple[Tensor, Tensor]] = field(repr=False)
    """``draw(n)``: n rows of the memory, x (n, *input_shape) and y (n,), on the model's device."""
    reference: tuple[Tensor, Tensor] = field(repr=False)
    """The reference exemplars, x (r, *input_shape) and y (r,), on the model's device; r may be 0."""
    frozen: nn.Module = field(repr=False)
    """The model as it was packed; the served model itself while nothing was promoted."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    parameters: list[nn.Parameter]
    rate: float = 1.0
    """Multiple of the burst's learning rate."""


def _nothing() -> None:
    pass


@dataclass(kw_only=True)
class Trainee:
    """A private copy in training; the served model shares every tensor that does not move and is never changed."""

    module: nn.Module
    """To call, (B, *input_shape) to the model's outputs; in eval mode."""
    groups: list[Group]
    values: Callable[[], Values]
    """Reads off the result, by the names of the served model; called without gradients, more than once perhaps."""
    scale_gradients: Callable[[], None] = _nothing
    """Called when the gradients are there and before they are clipped, to mask or scale them in place."""
    penalty: Callable[[], Tensor] | None = None
    """A term added to each step's mean loss."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that moves."""
        return [parameter for group in self.groups for parameter in group.parameters]


def private_copy(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Fork ``model`` with clones of ``parameters`` to train; the module and the clones.

    It is in eval mode, so running statistics are used and not moved, and dropout is off.
    """
    moved = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    return ready(fork(model, moved)), moved


def ready(twin: nn.Module) -> nn.Module:
    """Put a fork into eval mode, in a way in which it can be trained."""
    twin.eval()
    for module in twin.modules():
        if isinstance(module, nn.RNNBase):
            # cuDNN refuses the backward pass of a recurrent layer in eval mode; without dropout both modes are equal.
            module.dropout = 0.0
            module.train()
    return twin


def of_clones(module: nn.Module, moved: dict[str, nn.Parameter], groups: list[Group] | None = None) -> Trainee:
    """Trainee whose result is the clones themselves; all at one rate unless ``groups`` say otherwise."""

    def values() -> Values:
        return {name: leaf.detach().clone() for name, leaf in moved.items()}

    return Trainee(module=module, groups=groups or [Group(list(moved.values()))], values=values)


def seeded(given: Given) -> torch.Generator:
    """A generator on the host for what a method draws at its start."""
    return torch.Generator().manual_seed(given.seed)
