"""What a way of keeping is, and a method with ways of keeping in front of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from adapters.slow.trainee import Given, Trainee, Values


class Keeping(ABC):
    """Changes what a method's trainee leaves behind. Holds its options and no state of its own.

    Options are keyword arguments of its constructor, with defaults; a wrong value is a ValueError that names it.
    """

    name: ClassVar[str]

    def start(self, model: nn.Module) -> nn.Module:
        """The model that the method gets instead of the served ``model``, which is not changed."""
        return model

    @abstractmethod
    def keep(self, model: nn.Module, given: Given, trainee: Trainee) -> Trainee:
        """The trainee with this way of keeping; ``model`` is the served model and not changed.

        Raises:
            ValueError: what is given does not suffice.
        """


@dataclass(kw_only=True)
class Settling(Trainee):
    """A trainee that is set right after each step of the optimiser."""

    after_step: Callable[[Sequence[float]], None]
    """Called without gradients, with the effective learning rate of each group: the length of the step that its
    parameters made over the length of their gradient before clipping, 0 where there was none."""


def with_after_step(trainee: Trainee, after_step: Callable[[Sequence[float]], None]) -> Settling:
    """The trainee with ``after_step`` called first, then what it called before."""
    inner = trainee.after_step if isinstance(trainee, Settling) else None

    def both(lengths: Sequence[float]) -> None:
        after_step(lengths)
        if inner is not None:
            inner(lengths)

    given = {entry.name: getattr(trainee, entry.name) for entry in dataclasses.fields(Trainee)}
    return Settling(**given, after_step=both)


def with_values(trainee: Trainee, values: Callable[[], Values]) -> Trainee:
    """The trainee with another way to read off its result."""
    return dataclasses.replace(trainee, values=values)


@torch.no_grad()
def values_now(trainee: Trainee) -> Values:
    """Copies of what the result would be now."""
    return {name: value.detach().clone() for name, value in trainee.values().items()}


def share_of(option: str, value: float, *, closed: bool) -> float:
    """``value`` as it is.

    Raises:
        ValueError: it is not in [0, 1), or in (0, 1] where ``closed``.
    """
    if not (0 < value <= 1 if closed else 0 <= value < 1):
        raise ValueError(f"{option} is {value}; it must be in {'(0, 1]' if closed else '[0, 1)'}")
    return value


def begin(keepings: Sequence[Keeping], model: nn.Module, given: Given, make: Callable[[nn.Module], Trainee]) -> Trainee:
    """What ``make`` begins on the model as the keepings want it, kept by all of them, the last named first."""
    start = model
    for keeping in keepings:
        start = keeping.start(start)
    trainee = make(start)
    for keeping in reversed(keepings):
        trainee = keeping.keep(model, given, trainee)
    return trainee
