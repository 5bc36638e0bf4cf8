"""The scale and shift of normalisation layers, as one vector that an optimiser moves and a gain scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from adapters.fast.core.norm_layers import AdaptedBatchNorm

_NORMS = (_NormBase, AdaptedBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return weight and bias of every normalisation layer by name, a tied parameter once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _NORMS):
            for key, parameter in module.named_parameters(name, recurse=False):
                found.setdefault(id(parameter), (key, parameter))
    return dict(found.values())


def check_affine(model: nn.Module) -> str | None:
    """Say why scales and shifts can't be adapted: there must be some, of one floating-point type."""
    parameters = norm_parameters(model).values()
    if not parameters:
        return "it has no normalisation layer with scale and shift (affine); use 'lame'"
    if len(types := {str(parameter.dtype) for parameter in parameters}) > 1:
        return f"its normalisation layers have parameters of several types ({', '.join(sorted(types))}); convert to one"
    return None


class AffineParameters:
    """Three versions of the P norm-affine values: source, ``theta`` (learnt) and ``served``, the one in the model.

        served = source + g·(theta − source)

    ``theta`` (P,) has at least float32 precision; ``served`` is a list of parameters. Gradients are taken at
    ``served``, where the outputs come from; by the chain rule theta's are g times those.
    """

    def __init__(self, model: nn.Module) -> None:
        """Put own parameters in the place of the model's; the given tensors are not touched again."""
        given = list(norm_parameters(model).values())
        self._served = torch.cat([parameter.detach().flatten() for parameter in given])
        self._source = self._served.to(torch.promote_types(self._served.dtype, torch.float32), copy=True)
        self.theta = self._source.clone()
        parts = self._served.split([parameter.numel() for parameter in given])
        self.served = [nn.Parameter(part.view_as(old)) for part, old in zip(parts, given, strict=True)]
        swaps = {id(old): new for old, new in zip(given, self.served, strict=True)}
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if id(parameter) in swaps:
                    module.register_parameter(key, swaps[id(parameter)])

    def serve(self, gain: float) -> None:
        """Bring ``served`` up to date; exact at gain 0 and 1."""
        self._served.copy_(torch.lerp(self._source, self.theta, gain))

    def gradient(self, loss: Tensor, gain: float) -> Tensor:
        """Return the (P,) gradient of a 0-d loss with respect to theta."""
        parts = torch.autograd.grad(loss, self.served, allow_unused=True, materialize_grads=True)
        flat = torch.cat([part.flatten() for part in parts]).to(self.theta.dtype)
        return flat if gain == 1.0 else flat * gain
