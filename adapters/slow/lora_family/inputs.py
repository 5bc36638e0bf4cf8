"""What the layers of a model are fed: the second moments of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.slow.fork import fork
from adapters.slow.lora_family.targets import Target
from adapters.slow.trainee import ready

CHUNK = 32
"""Rows at a time: a convolution's inputs are as many times larger as its kernel has places."""
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """(n, columns): what each output of a layer is made from; of a convolution, its inputs under the kernel."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.reshape(-1, x.shape[-1])
    dimensions = len(module.kernel_size)
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    channels = module.in_channels // module.groups
    columns = module.weight[0].numel()
    # A convolution with the identity's rows for kernels copies each place under the kernel into a channel of its own.
    copies = torch.eye(columns, dtype=x.dtype, device=x.device).reshape(columns, channels, *module.kernel_size)
    places = [
        CONVOLUTIONS[dimensions](part, copies, None, module.stride, padding, module.dilation)
        for part in x.split(channels, dim=-1 - dimensions)
    ]
    return torch.cat([place.movedim(-1 - dimensions, -1).reshape(-1, columns) for place in places])


def fed(target: Target) -> bool:
    """Whether the module's input is what this weight is applied to: not for states and the deeper recurrent layers."""
    own = target.name.rpartition(".")[2]
    return own in ("weight", "weight_orig", "in_proj_weight", "weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")


@torch.no_grad()
def second_moments(model: nn.Module, targets: Sequence[Target], x: Tensor) -> dict[str, Tensor]:
    """Σ x xᵀ in float64, (columns, columns), by the target's name; without those whose input is not seen.

    Rows that are not finite, in the model's input or in the layer's, are left out. Not seen are the state of a
    recurrent layer, its deeper layers' inputs, and modules that are used by their weights and not called.

    Args:
        model: not changed; a fork of it is called.
        targets: the weights.
        x: (n, *input_shape).
    """
    twin = ready(fork(model, {}))
    for module in twin.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Alone its own flag: it keeps to the modules one by one, and their dropout is off.
            module.training = True
    sums: dict[str, Tensor] = {}

    def watch(target: Target) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            # Attention's first input is the query, of which the projection is one third.
            given = inputs[0] if inputs else next(iter(named.values()))
            if not isinstance(given, Tensor) or not given.is_floating_point():
                return
            rows = patches(module, given.detach()).double()
            rows = rows[rows.isfinite().all(1)]
            if rows.shape[1] == target.columns:
                sums[target.name] = sums.get(target.name, 0) + rows.T @ rows

        return hook

    for target in targets:
        if fed(target):
            twin.get_submodule(target.layer).register_forward_pre_hook(watch(target), with_kwargs=True)
    for part in x[x.flatten(1).isfinite().all(1)].split(CHUNK):
        twin(part)
    return sums
