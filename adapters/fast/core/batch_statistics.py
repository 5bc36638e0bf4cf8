"""Normalising by a mixture of source and batch statistics, with its gradient, without a pass too many.

The forward of a training-mode BatchNorm takes four to six times as long on a CPU as one in eval mode, and
``torch.var_mean`` over several dimensions ten times. Two passes for the moments and then an eval-mode BatchNorm take
half to a third of that, for the same numbers up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL = 8192
"""Values below which one call costs more than its arithmetic."""


def one_call(x: Tensor) -> bool:
    """Whether torch's own kernels are the fastest for x: (B, C), little data, or not on a CPU."""
    return x.ndim == 2 or x.numel() < _SMALL or x.device.type != "cpu"


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, (C,) each, of x (B, C, ...) over all but the channels. No gradient."""
    dims = [0, *range(2, x.ndim)]
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var
    if one_call(x):
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, var
    mean = x.mean(dims, keepdim=True)
    return mean.flatten(), (x - mean).square_().mean(dims)


def mixed_statistics(x: Tensor, mean_C: Tensor, var_C: Tensor, share: float, unbiased: bool) -> tuple[Tensor, ...]:
    """Return (1 − share)·source + share·batch as mean and variance, then the batch's mean; (C,) each."""
    n = values_per_channel(x)
    mean_B, var_B = batch_moments(x)
    if unbiased:
        var_B = var_B * (n / (n - 1))
    # statistics are float32 also where activations are half precision
    mean_B, var_B = mean_B.to(mean_C.dtype), var_B.to(var_C.dtype)
    return torch.lerp(mean_C, mean_B, share), torch.lerp(var_C, var_B, share), mean_B


def values_per_channel(x: Tensor) -> int:
    """Return how many values of x (B, C, ...) share one mean."""
    return x.numel() // max(x.shape[1], 1)


class MixedNormalisation(torch.autograd.Function):
    """y = (x − m)/√(v + ε)·γ + β with m, v from `mixed_statistics`, differentiable in x, γ and β.

    With r = 1/√(v + ε), n values per channel, share s, κ = n/(n − 1) for unbiased variances else 1:

        ∂L/∂β = Σ ∂L/∂y,    ∂L/∂γ = Σ ∂L/∂y·(x − m)·r
        ∂L/∂x = γ·r·(∂L/∂y − s/n·∂L/∂β − s·κ/n·r·(x − μ_B)·∂L/∂γ)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean_C: Tensor,
        var_C: Tensor,
        share: float,
        unbiased: bool,
        eps: float,
    ) -> Tensor:
        """Normalise x (B, C, ...)."""
        mean, var, mean_B = mixed_statistics(x, mean_C, var_C, share, unbiased)
        ctx.save_for_backward(x, weight, mean, var, mean_B)
        ctx.share, ctx.unbiased, ctx.eps = share, unbiased, eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of x, γ and β."""
        x, weight, mean, var, mean_B = ctx.saved_tensors
        r = torch.rsqrt(var + ctx.eps)
        plain = ctx.share == 1.0 and not ctx.unbiased  # batch statistics alone: torch's formula is all of it
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, mean, var, mean, r, plain, ctx.eps, [ctx.needs_input_grad[0], True, True]
        )
        if ctx.needs_input_grad[0] and not plain:
            n = values_per_channel(x)
            outer = r * (ctx.share / n) if weight is None else weight * r * (ctx.share / n)
            slope = outer * r * grad_weight * (n / (n - 1) if ctx.unbiased else 1.0)
            # an eval-mode BatchNorm of variance 1 and ε 0 is the cheapest affine map per channel
            grad_x -= F.batch_norm(x, mean_B, torch.ones_like(var), slope, outer * grad_bias, False, 0.0, 0.0)
        affine = (
            g if needed else None for g, needed in zip((grad_weight, grad_bias), ctx.needs_input_grad[1:3], strict=True)
        )
        return grad_x, *affine, None, None, None, None, None
