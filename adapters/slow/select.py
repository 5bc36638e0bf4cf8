"""Finds the parameters that the methods move, by their name in ``state_dict``."""

from __future__ import annotations

from torch import nn

from adapters.features import find_head

NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight is (out, in, *kernel)."""


def parameters_of(prefix: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's floating-point parameters under their full names; quantised ones can't be learnt."""
    named = module.named_parameters(prefix=prefix)
    return {name: parameter for name, parameter in named if parameter.is_floating_point()}


def norm_affine(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scale and shift of every normalisation layer, in the order of definition; empty when there are none."""
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, NORMS):
            found |= parameters_of(prefix, module)
    return found


def last_linear(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weight and bias of the model's head, the ``nn.Linear`` defined last; empty when there is none."""
    head = find_head(model)
    return {} if head is None else parameters_of(head, model.get_submodule(head))


def everything(model: nn.Module) -> dict[str, nn.Parameter]:
    """All floating-point parameters, each once."""
    return parameters_of("", model)


def hidden_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolution layers but the head, in the order of definition."""
    head = find_head(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS) and name != head}
