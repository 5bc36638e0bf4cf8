"""What the methods of the LoRA family have in common."""

from __future__ import annotations

import difflib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapters.features import find_head
from adapters.slow.fork import fork
from adapters.slow.lora_family.merged import ADAPTER, Adapted, Merged, adapt, load, missing, working
from adapters.slow.lora_family.targets import Target, find_targets
from adapters.slow.registry import SlowMethod
from adapters.slow.reparametrised import trainee_of
from adapters.slow.select import parameters_of
from adapters.slow.trainee import Given, Group, Trainee, Values, ready, seeded

START_OFF = 1e-3
"""Largest change of a weight matrix at the start, as a share of its norm; rounding is below 1e-6 in float32."""


def whole(name: str, value: int, least: int = 1) -> None:
    """Refuse an option that is no whole number or below ``least``.

    Raises:
        ValueError: names the option.
    """
    at_least(name, value, least)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")


def at_least(name: str, value: float, least: float) -> None:
    """Refuse an option that is not finite or below ``least``.

    Raises:
        ValueError: names the option.
    """
    if not (isinstance(value, int | float) and least <= value < math.inf):
        raise ValueError(f"{name} is {value!r}; it must be a number, {least} or more")


class PeftMethod(SlowMethod):
    """Weights W that move as W' = merge(W, adapter): peft has the adapter's parameters, the result is plain weights.

    Every Linear, Conv1d to Conv3d (grouped too), RNN, GRU, LSTM and MultiheadAttention is adapted, a convolution's
    weight as a matrix of its outputs by its inputs under the kernel. The head is not: with ``train_head`` (the default)
    its weight and bias move as they are, without which ``ia3`` left 18% of swapped classes wrong and not 9%, and the
    kinds that mix inputs were no better; with ``head`` it is adapted as the others are.

    The result has the model's own names and shapes, so serving needs no peft and costs nothing.
    """

    peft_name: ClassVar[str]
    """What peft's configuration and model are called by, before ``Config`` and ``Model``."""
    min_columns: ClassVar[int] = 1
    """Matrices with fewer inputs can't be adapted by this kind."""
    together: ClassVar[bool] = False
    """Whether the layers share tensors, so that all are made at once and have one size."""

    def __init__(self, *, train_head: bool, head: bool, layers: Sequence[str], allow_start_off: bool) -> None:
        if (problem := missing(self.name)) is not None:
            raise ValueError(problem)
        if head and train_head:
            raise ValueError(
                f"slow method {self.name!r}: head=True adapts the head and train_head=True moves it as it is; "
                "choose one: for head=True give train_head=False too"
            )
        self.train_head, self.head, self.allow_start_off = train_head, head, allow_start_off
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)

    @abstractmethod
    def config(self, size: int, given: Given) -> dict[str, Any]:
        """Options of peft's configuration for the layers of this size, all but ``target_modules``."""

    @abstractmethod
    def delta(self, item: Adapted) -> Tensor:
        """W' - W, (rows, columns), with gradients."""

    def size(self, target: Target) -> int:
        """Rank or block size for this matrix; layers of one size are made together."""
        return 0

    def draw(self, item: Adapted, generator: torch.Generator) -> None:
        """Draw again what peft drew at random: from the burst's seed, not from the random numbers of the process."""

    def change(self, item: Adapted) -> Tensor:
        """W' - W as it is used, (rows, columns): zero at the start to the bit, unless ``allow_start_off``."""
        delta = self.delta(item).to(item.base_RC)
        return delta if item.offset_RC is None else delta - item.offset_RC

    def merge(self, item: Adapted, parameters: Mapping[str, nn.Parameter]) -> Values:
        """The new values of the matrix, and of what goes with it."""
        return {item.target.name: item.base_RC + self.change(item)}

    def groups(self, items: Sequence[Adapted]) -> list[Group]:
        """What moves, the head not counted."""
        return [Group([leaf for item in items for leaf in item.layer.parameters() if leaf.requires_grad])]

    def targets(self, model: nn.Module) -> list[Target]:
        """The matrices that are adapted."""
        return find_targets(model, head=self.head, layers=self.layers, min_columns=self.min_columns)

    def check(self, model: nn.Module) -> str | None:
        """Why nothing can be adapted; None when something can."""
        known = [name for name, _ in model.named_modules()]
        for name in self.layers:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                advice = f"did you mean {near[0]!r}?" if near else "see model.named_modules()"
                return self.refuse(f"layers has {name!r}, which the model has not; {advice}")
        if not self.targets(model):
            wide = f" of {self.min_columns} inputs or more" if self.min_columns > 1 else ""
            where = f" in {', '.join(self.layers)}" if self.layers else ""
            return self.refuse(
                f"the model has no hidden nn.Linear, nn.Conv1d to nn.Conv3d, recurrent or attention layer{wide}{where} "
                "to adapt; use 'head', or adapt the head itself with head=True, train_head=False"
            )
        return None

    def begin(self, model: nn.Module, given: Given) -> Trainee:
        """Put peft's layers beside a private copy; the head's clones beside them."""
        return self.trainee(*self.build(model, given))

    def trainee(self, items: Sequence[Adapted], module: Merged) -> Trainee:
        """What the burst is given: the adapters' groups and the head's."""
        moved = list(module.moved)
        return trainee_of(module, [*self.groups(items), *([Group(moved)] if moved else [])])

    def build(self, model: nn.Module, given: Given) -> tuple[list[Adapted], Merged]:
        """The adapted matrices, and the module that reads them.

        Raises:
            ValueError: the model can't be served, the package is missing, or the start is not the model.
        """
        if (problem := self.check(model)) is not None:
            raise ValueError(problem)
        peft = load(self.name)
        tuner = partial(getattr(peft, f"{self.peft_name}Model"), adapter_name=ADAPTER)
        targets = self.targets(model)
        by_size: dict[int, list[Target]] = {}
        for target in targets:
            by_size.setdefault(0 if self.together else self.size(target), []).append(target)
        made: dict[Target, Adapted] = {}
        for size, alike in by_size.items():
            config = partial(getattr(peft, f"{self.peft_name}Config"), **self.config(size, given))
            made |= {item.target: item for item in adapt(model, alike, tuner, config)}
        items = [made[target] for target in targets]
        generator = seeded(given)
        with torch.no_grad():
            for item in items:
                self.draw(item, generator)
            self.start(model, items, given)
        self._check_start(items)
        return items, Merged(ready(fork(model, {})), items, self.merge, self._head_clones(model))

    def start(self, model: nn.Module, items: Sequence[Adapted], given: Given) -> None:
        """Change how the adapters start, where the method has a choice of it."""

    def _head_clones(self, model: nn.Module) -> dict[str, nn.Parameter]:
        head = find_head(model) if self.train_head else None
        if head is None:
            return {}
        own = parameters_of(head, model.get_submodule(head))
        return {name: nn.Parameter(working(parameter).clone()) for name, parameter in own.items()}

    @torch.no_grad()
    def _check_start(self, items: Sequence[Adapted]) -> None:
        """Take rounding off the adapters' start; refuse one that is more than that away from the model."""
        for item in items:
            change = self.change(item)
            off = float(change.norm() / item.base_RC.norm().clamp(min=1e-12))
            if not math.isfinite(off) or (off > START_OFF and not self.allow_start_off):
                raise ValueError(
                    self.refuse(
                        f"the adapter of {item.target.name!r} starts {off:.2g} of the weights' norm away from the "
                        "model: the burst would begin by forgetting; choose other options, or give allow_start_off=True"
                    )
                )
            if 0 < off <= START_OFF:
                item.offset_RC = change if item.offset_RC is None else item.offset_RC + change
