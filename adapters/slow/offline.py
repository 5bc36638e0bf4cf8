"""A second, slower model beside a version: both predict (the `lae` way of keeping)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "offline::"


class Offline:
    """Forward hook on a model's root: the answer of both, the surer one for each class.

    Logits (B, K): the log of the element-wise maximum of both models' probabilities, renormalised (Gao et al., "A
    Unified Continual Learning Framework with General Parameter-Efficient Tuning", ICCV 2023). One output per row, (B,)
    or (B, 1), as regression has: the mean. Costs a second forward pass.

    The second model is no submodule, so the model's parameters and their names stay as they are. Nothing ever changes
    it: copies of the hooked model share it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, root: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """(B, K), (B,) or (B, 1), as ``output``."""
        with torch.no_grad():
            other: Tensor = self.module(*inputs)
        if output.ndim != 2 or output.shape[1] == 1:
            return (output + other) / 2
        return torch.maximum(output.log_softmax(1), other.log_softmax(1)).log_softmax(1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Offline:
        return self


def offline_of(model: nn.Module) -> nn.Module | None:
    """The offline model beside ``model``; None when it has none. Not to be changed."""
    hooks = model._forward_hooks.values()
    return next((hook.module for hook in hooks if isinstance(hook, Offline)), None)


def detach_offline(twin: nn.Module) -> None:
    """Take the offline model away from ``twin``, which answers alone from then on."""
    for key, hook in list(twin._forward_hooks.items()):
        if isinstance(hook, Offline):
            del twin._forward_hooks[key]


def attach_offline(twin: nn.Module, source: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give ``twin`` an offline model: that of ``source``, or ``source`` itself, with ``values`` in place.

    Args:
        twin: changed; an offline model that it has is replaced.
        source: the model that the delta is applied to; not changed, its other tensors are shared.
        values: by parameter name, with or without ``offline::`` before it.

    Raises:
        ValueError: a name is not the model's, or a shape differs.
    """
    from adapters.slow.fork import apply_delta, fork

    base = offline_of(source)
    if base is None:
        base = fork(source, {})
    plain = {name.removeprefix(PREFIX): value for name, value in values.items()}
    other = apply_delta(base, plain).eval()
    detach_offline(twin)
    twin.register_forward_hook(Offline(other))
