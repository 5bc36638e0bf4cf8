"""Which weight matrices of a model the adapters of the LoRA family change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from adapters.features import find_head

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class Target:
    """One weight, seen as a matrix of ``rows`` outputs by ``columns`` inputs."""

    name: str
    """The parameter's name in the model."""
    layer: str
    """The name of the module that it belongs to."""
    rows: int
    columns: int
    """Inputs of one output: channels / groups × kernel for a convolution."""
    bias: str | None
    """The parameter that is added to these outputs; None when there is none of their own."""


def own_weights(module: nn.Module) -> Iterator[tuple[str, str | None]]:
    """The module's own weight matrices and the bias of each, by their names in the module.

    Pruning and the older spectral norm keep the weight as ``weight_orig`` and compute the one that is used. Weights
    under ``torch.nn.utils.parametrize`` are not found: what moves there is not a matrix of the layer.
    """
    own = module._parameters
    if isinstance(module, LAYERS):
        found = [(name, "bias") for name in ("weight", "weight_orig")]
    elif isinstance(module, RECURRENT):
        found = [(name, name.replace("weight", "bias", 1)) for name in own if name.startswith("weight")]
    elif isinstance(module, nn.MultiheadAttention):
        # The bias is one vector for all three: only the joint projection has rows that are its entries.
        found = [("in_proj_weight", "in_proj_bias")]
        found += [(name, "") for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    else:
        found = []
    for name, bias in found:
        if own.get(name) is not None:
            yield name, bias if own.get(bias) is not None else None


def find_targets(
    model: nn.Module, *, head: bool = False, layers: Sequence[str] = (), min_columns: int = 1
) -> list[Target]:
    """The weight matrices that may be adapted, in the order of definition; a tied one under its first name.

    Args:
        model: any module; Linear, Conv1d to Conv3d (grouped ones too), RNN, GRU, LSTM and their cells, and
            MultiheadAttention are looked into.
        head: whether the weight of the last ``nn.Linear`` is one of them.
        layers: names of modules; those in them only. None given: everywhere.
        min_columns: narrower matrices are left out.
    """
    prefix = "" if head else find_head(model)
    skipped = set() if head or prefix is None else {id(p) for p in model.get_submodule(prefix).parameters()}
    targets = []
    for layer, module in model.named_modules():
        if layers and not any(layer == name or layer.startswith(f"{name}.") for name in layers):
            continue
        for name, bias in own_weights(module):
            weight = module.get_parameter(name)
            if id(weight) in skipped or not weight.is_floating_point() or weight.ndim < 2 or not weight.numel():
                continue
            skipped.add(id(weight))
            rows, columns = weight.shape[0], weight[0].numel()
            if columns >= min_columns:
                full = [None if own is None else f"{layer}.{own}".removeprefix(".") for own in (name, bias)]
                targets.append(Target(str(full[0]), layer, rows, columns, full[1]))
    return targets
