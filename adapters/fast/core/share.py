"""A second module over the same tensors: what an adapter may rebuild while the given model stays frozen."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def share(model: nn.Module) -> nn.Module:
    """Copy the module's structure, in eval mode, over the same tensor storage; tied tensors stay tied.

    Parameters of the copy need no gradient, so that autograd starts at the first adapted layer and never writes
    ``.grad`` of the given model. Hooks are left behind: they belong to whoever registered them. Those of
    `adapters.slow` are part of what a version computes, and stay.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = buffer
        for value in vars(module).values():
            if isinstance(value, Tensor):  # a plain attribute, for example a weight computed from its parametrisation
                memo[id(value)] = value.detach()
        for name in _HOOKS:
            table = getattr(module, name)
            ours = {key: hook for key, hook in table.items() if type(hook).__module__.startswith("adapters.slow")}
            memo[id(table)] = OrderedDict(ours)
    return copy.deepcopy(model, memo).eval()
