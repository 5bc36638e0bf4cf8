"""BatchNorm layers whose statistics may come from the batch, and the model surgery that puts them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adapters.fast.core.batch_statistics import MixedNormalisation, mixed_statistics, one_call, values_per_channel


@dataclass(slots=True)
class Mode:
    """What all adapted layers of one model look up: set once, not layer by layer."""

    gain: float = 1.0


class AdaptedBatchNorm(nn.Module):
    """Takes the place of one BatchNorm in eval mode: same parameters, same source statistics, same result."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, source: _BatchNorm) -> None:
        """Share the tensors of ``source``, which must have running statistics."""
        super().__init__()
        self.register_parameter("weight", source.weight)
        self.register_parameter("bias", source.bias)
        self.register_buffer("running_mean", source.running_mean)
        self.register_buffer("running_var", source.running_var)
        self.eps = source.eps

    def normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalise x (B, C, ...) with the given (C,) statistics, then scale and shift."""
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the source statistics."""
        return self.normalise(x, self.running_mean, self.running_var)


class MixedBatchNorm(AdaptedBatchNorm):
    """Normalises with (1 − s)·source + s·batch statistics, s = gain·share; stateless.

    A batch with fewer than two values per channel has no variance: it gets the source statistics.
    ``unbiased`` takes the unbiased batch variance. ``differentiable`` lets gradients flow, through the batch
    statistics too.
    """

    def __init__(
        self,
        source: _BatchNorm,
        mode: Mode,
        *,
        share: float = 1.0,
        unbiased: bool = False,
        differentiable: bool = False,
    ) -> None:
        """Put the layer in the place of ``source``."""
        super().__init__(source)
        self.mode = mode
        self.share = share
        self.unbiased = unbiased
        self.differentiable = differentiable

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, ...)."""
        share = self.mode.gain * self.share
        if share == 0.0 or values_per_channel(x) < 2:
            return super().forward(x)
        if share == 1.0 and not self.unbiased and one_call(x):
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        source = self.running_mean, self.running_var
        if not self.differentiable:
            mean, var, _ = mixed_statistics(x, *source, share, self.unbiased)
            return self.normalise(x, mean, var)
        y: Tensor = MixedNormalisation.apply(x, self.weight, self.bias, *source, share, self.unbiased, self.eps)
        return y


def adaptable(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm with source statistics to compensate."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def replace_batch_norms(model: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> None:
    """Put ``make(layer)`` in the place of every adaptable BatchNorm; a layer used twice stays one layer."""
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm) and adaptable(child):
                if child not in made:
                    made[child] = make(child)
                setattr(parent, name, made[child])


def check_batch_norm(model: nn.Module) -> str | None:
    """Say why statistics can't be adapted: there must be a BatchNorm inside that keeps running statistics."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module is not model]
    if not layers:
        return "it has no BatchNorm layer; use 'tent' with LayerNorm or GroupNorm layers, or 'lame'"
    if not any(map(adaptable, layers)):
        return (
            "its BatchNorm layers keep no running statistics (track_running_stats=False), so they always normalise by "
            "the batch and there is nothing to compensate; use 'tent' or 'lame'"
        )
    return None
