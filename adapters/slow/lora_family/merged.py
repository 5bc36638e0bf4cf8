"""A model that reads its weights through peft's layers, and training it.

peft puts its layers into a model in place of the model's own. That serves some kinds of layer and not others (no Conv1d
for IA3 or VeRA), marks the shared parameters as frozen, writes some initialisations into the shared weights, and is
passed over without a word where a module is used by its weights and never called (attention's output projection, the
fast path of transformer layers). Here peft adapts a *bank* of plain linear layers instead, one for each weight matrix
of the model, and the model is called with the weights W' that come out: every kind serves every layer, what is trained
is what is served, and nothing of the model is touched. The price is one W' per layer and step, in time and memory.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.slow.lora_family.targets import Target
from adapters.slow.reparametrised import Reparametrised
from adapters.slow.trainee import Values

ADAPTER = "default"
"""The name that peft knows the one adapter of each layer by."""


def missing(method: str) -> str | None:
    """What to install where peft is not; None where it is. Imports nothing."""
    if importlib.util.find_spec("peft") is None:
        return f"slow method {method!r} needs the extra: pip install homeostat[peft]"
    return None


def load(method: str) -> Any:
    """The package, imported at the first call: about ten seconds of one core, for it brings transformers.

    Raises:
        ValueError: it is not installed, or can't be imported.
    """
    if (problem := missing(method)) is not None:
        raise ValueError(problem)
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        problem = (
            f"slow method {method!r}: peft can't be imported ({error}); run: pip install --upgrade homeostat[peft]"
        )
        raise ValueError(problem) from error


@dataclass(eq=False)
class Adapted:
    """One weight matrix and peft's layer for it."""

    target: Target
    layer: Any
    """peft's layer around a linear layer with these weights."""
    base_RC: Tensor
    """The weights as they are served, (rows, columns), in float32 or float64."""
    offset_RC: Tensor | None = None
    """What the adapter makes of itself at its start, taken off; None for nothing."""


def working(tensor: Tensor) -> Tensor:
    """The tensor in the precision that it is trained in: half precision would round small steps away."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def adapt(
    model: nn.Module, targets: Sequence[Target], tuner: Callable[[nn.Module, Any], Any], config: Callable[..., Any]
) -> list[Adapted]:
    """Layers of peft for ``targets``, made by one call of ``tuner``: the layers may share tensors.

    Args:
        model: whose weights they are; shared, not changed.
        targets: the weights.
        tuner: one of peft's models, as ``LoraModel``, with its adapter's name bound.
        config: gives peft's configuration when it is called with ``target_modules``.
    """
    bank, bases = nn.ModuleDict(), []
    for number, target in enumerate(targets):
        weight = model.get_parameter(target.name)
        # Made on no device: its own start would be drawn from the random numbers of the process.
        layer = nn.Linear(target.columns, target.rows, bias=False, device="meta")
        base_RC = working(weight).reshape(target.rows, target.columns)
        # Always float32: some of peft's layers make tensors of that type whatever the weight's is.
        layer.weight = nn.Parameter(base_RC.float(), requires_grad=False)
        bank[f"w{number}"] = layer
        bases.append(base_RC)
    # What peft draws comes from the random numbers of the process; they go on as if it hadn't.
    with torch.random.fork_rng(devices=[]):
        tuner(bank, config(target_modules=list(bank)))
    return [Adapted(*parts) for parts in zip(targets, bank.children(), bases, strict=True)]


class Merged(Reparametrised):
    """The model with the weights that come out of peft's layers: (B, *input_shape) to the model's outputs."""

    def __init__(
        self,
        twin: nn.Module,
        adapted: Sequence[Adapted],
        merge: Callable[[Adapted, Mapping[str, nn.Parameter]], Values],
        moved: Mapping[str, nn.Parameter],
    ) -> None:
        """Adapt ``adapted`` by ``merge``; ``moved`` are other parameters, by their names, that move as they are."""
        super().__init__(twin)
        self.moved = nn.ParameterList(moved.values())
        self._names = list(moved)
        self._merge = merge
        self._like = dict(twin.named_parameters(remove_duplicate=False))
        self.keep(adapted)

    def keep(self, adapted: Sequence[Adapted]) -> None:
        """Adapt these, and leave the weights of all others as they are served."""
        self.layers = nn.ModuleList(item.layer for item in adapted)
        self._adapted = list(adapted)

    def weights(self) -> Values:
        """All new values by the model's names, in its shapes and types; differentiable where gradients are on."""
        made = {name: leaf.clone() for name, leaf in zip(self._names, self.moved, strict=True)}
        for item in self._adapted:
            made |= self._merge(item, self._like)
        return {name: new.reshape(self._like[name].shape).to(self._like[name]) for name, new in made.items()}
