"""A model whose layers are kept at the moments that they had on source data, with a memory of any length.

Layers are BatchNorms where the model has them, whose statistics then follow the stream; else what comes out of its
other normalisation layers, or else of its linear and convolution layers, is shifted and scaled channel by channel. No
gradient: what gradient steps on the scales and shifts of these layers look for is had in closed form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adapters.fast.core.batch_statistics import at_least_single, batch_moments
from adapters.fast.core.norm_layers import AdaptedBatchNorm, adaptable, norm_layers
from adapters.fast.core.share import share
from adapters.features import FeatureTap

_ROWS_AT_ONCE = 256
_FLOOR = 1e-3
"""Least deviation of a channel, as a share of its layer's, below which it is not scaled up."""
APART, LEAST_EXEMPLARS = 0.5, 32
"""Mean step of the means, in deviations, or of the logarithm of the variances, from a BatchNorm's running statistics to
the source rows', from which on these are not taken for the same; and how many rows that takes."""
_CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm, nn.Linear)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Follower(nn.Module):
    """Moments (C,) of one layer's channels: those of the stream so far, and what they would be with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_of_batch = 0.0
        """Share of the batch in the moments that it is normalised with."""
        self.mean: Tensor
        self.var: Tensor
        self.next: tuple[Tensor, Tensor] | None = None
        """The moments with the latest batch; taken over by `AlignedModel.keep`."""

    def start(self, mean: Tensor, var: Tensor) -> None:
        """Begin with the source's moments."""
        self.source = at_least_single(mean).clone(), at_least_single(var).clone()
        self.mean, self.var = self.source

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (C,) mean and variance to normalise x (B, C, ...) with: of the stream and, by its share, of x."""
        weight = self.weight_of_batch
        if weight == 0.0:
            return self.mean, self.var
        mean, var = batch_moments(x)
        step = mean - self.mean
        # The variance of a mixture: within, and between the two means.
        new_var = torch.lerp(self.var, var, weight).addcmul_(step, step, value=weight * (1.0 - weight))
        self.next = torch.add(self.mean, step, alpha=weight), new_var
        return self.next


class _AlignedBatchNorm(_Follower):
    """A BatchNorm that normalises with the moments that it follows.

    Where its running statistics are plainly not the moments of the source rows, which a model may have learnt to live
    with, the stream is brought to those rows' moments instead, and then normalised as ever.
    """

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__()
        self.layer = AdaptedBatchNorm(source)
        self._gathered: list[tuple[int, Tensor, Tensor]] | None = None
        self._apart = False
        self.start(self.layer.running_mean, self.layer.running_var)

    def gather(self) -> None:
        """From now until `settle`, note the moments of what comes in."""
        self._gathered = []

    def settle(self) -> None:
        """Compare what was noted of source rows with the running statistics."""
        gathered, self._gathered = self._gathered, None
        if not gathered:
            return
        mean, var = _pooled(gathered)
        own_mean, own_var = self.source
        step = ((mean - own_mean).abs() / (own_var + self.layer.eps).sqrt()).mean()
        ratio = ((var + self.layer.eps) / (own_var + self.layer.eps)).log().abs().mean()
        self._apart = bool(torch.maximum(step, ratio) > APART)
        if self._apart:
            self.start(mean, var)

    def forward(self, x: Tensor) -> Tensor:
        if self._gathered is not None:
            self._gathered.append((len(x), *batch_moments(x)))
            return self.layer(x)  # type: ignore[no-any-return]
        mean, var = self.moments(x)
        if self._apart:
            # ((x − mean)·k + source mean − running mean) / running deviation, as one normalisation.
            layer, eps = self.layer, self.layer.eps
            k_squared = (self.source[1] + eps) / (var + eps)
            mean = mean - (self.source[0] - layer.running_mean) * k_squared.rsqrt()
            var = (layer.running_var + eps) / k_squared - eps
        return self.layer.normalise(x, mean, var)


def _pooled(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of all rows, from the rows, mean and variance of each part."""
    rows = torch.tensor([count for count, _, _ in parts], dtype=torch.float32)
    weight = (rows / rows.sum()).unsqueeze(1).to(parts[0][1])
    means, variances = (torch.stack([part[k] for part in parts]) for k in (1, 2))  # type: ignore[misc]
    mean = (weight * means).sum(0)
    return mean, (weight * (variances + (means - mean).square())).sum(0)


class _AlignedOutput(_Follower):
    """Gives the outputs of a layer of another kind the source's moments back, channel by channel.

    A hook, not a module in the layer's place: a transformer reads the parameters of its layers, and with a hook on one
    of them it takes no short cut past it.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._last = isinstance(layer, _CHANNELS_LAST)
        self._gathered: list[tuple[int, Tensor, Tensor]] | None = []
        layer.register_forward_hook(self._hook)

    @property
    def seen(self) -> bool:
        """Whether source rows came through the layer."""
        return bool(self._gathered)

    def _hook(self, layer: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        values = y.flatten(0, -2) if self._last else y
        if self._gathered is not None:
            self._gathered.append((len(values), *batch_moments(values)))
            return y
        mean, var = self.moments(values)
        scale = ((self.source[1] + self._floor) / (var + self._floor)).sqrt()
        shift = torch.addcmul(self.source[0], mean, scale, value=-1.0)
        shape = (-1,) if self._last else (-1, *[1] * (y.ndim - 2))
        return torch.addcmul(shift.to(y.dtype).view(shape), y, scale.to(y.dtype).view(shape))

    def settle(self) -> None:
        """Take the mean of what was gathered on source rows for the source's moments."""
        gathered, self._gathered = self._gathered, None
        if not gathered:
            return
        self.start(*_pooled(gathered))
        self._floor = _FLOOR**2 * self.source[1].mean() + torch.finfo(torch.float32).tiny


def check_aligned(model: nn.Module, exemplars: Tensor | None, head: str | None) -> str | None:
    """Say why no layer of ``model`` can be aligned; None when some can."""
    if any(map(adaptable, model.modules())):
        return None
    if exemplars is None or not len(exemplars):
        return "it has no BatchNorm, and without exemplars of the source the moments of other layers are not known"
    return None if _others(model, head) else "it has no layer whose channels could be aligned"


class AlignedModel:
    """The model with moments that follow the stream; the given one is not touched.

    Args:
        model: in any mode; its tensors are shared.
        exemplars: (N, *input_shape) source rows, only needed where the model has no BatchNorm.
        head: name of the layer whose input are the features, or None.
    """

    def __init__(self, model: nn.Module, exemplars: Tensor | None, head: str | None) -> None:
        self.model = share(model)
        self._layers: list[_Follower] = []
        if any(map(adaptable, self.model.modules())):
            own = {name: _AlignedBatchNorm(layer) for name, layer in _batch_norms(self.model).items()}
            self._replace(own)
            if exemplars is not None and len(exemplars) >= LEAST_EXEMPLARS:
                for norm in own.values():
                    norm.gather()
                self._run_all(exemplars)
                for norm in own.values():
                    norm.settle()
        elif exemplars is not None and len(exemplars):
            hooks = [_AlignedOutput(layer) for layer in _others(self.model, head).values()]
            self._run_all(exemplars)
            self._layers += [hook for hook in hooks if hook.seen]
            for hook in hooks:
                hook.settle()
        self.tap = FeatureTap(self.model, head) if head else None

    def _run_all(self, x: Tensor) -> None:
        with torch.inference_mode():
            for part in x.split(_ROWS_AT_ONCE):
                self.model(part)

    def _replace(self, layers: dict[str, _AlignedBatchNorm]) -> None:
        made: dict[nn.Module, _AlignedBatchNorm] = {}
        for name, follower in layers.items():
            inner = self.model.get_submodule(name)
            if inner not in made:
                made[inner] = follower
                self._layers.append(follower)
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, made[inner])

    def __call__(self, x: Tensor, weight: float) -> Tensor:
        """Outputs (B, K) for x; ``weight`` in [0, 1) is the share of x in the moments that normalise it."""
        for layer in self._layers:
            layer.weight_of_batch, layer.next = weight, None
        outputs: Tensor = self.model(x)
        return outputs

    @property
    def features(self) -> Tensor | None:
        """(B, D) features of the latest call."""
        return None if self.tap is None else self.tap.features

    def keep(self) -> bool:
        """Go on from the moments of the latest call; False, with nothing changed, when they are not finite."""
        new = [(layer, layer.next) for layer in self._layers if layer.next is not None]
        if not new:
            return True
        total = torch.stack([mean.sum() + var.sum() for _, (mean, var) in new]).sum()
        if not bool(total.isfinite()):
            return False
        for layer, moments in new:
            layer.mean, layer.var = moments
            layer.next = None
        return True

    def reset(self) -> None:
        """Go back to the source's moments."""
        for layer in self._layers:
            (layer.mean, layer.var), layer.next = layer.source, None

    def state(self) -> list[dict[str, Tensor]]:
        """Return a copy of all moments."""
        return [{"mean": layer.mean.clone(), "var": layer.var.clone()} for layer in self._layers]

    def load(self, state: list[dict[str, Tensor]]) -> None:
        """Restore what `state` gave; ValueError when it belongs to another model."""
        if len(state) != len(self._layers):
            raise ValueError(f"moments of {len(state)} layers, not {len(self._layers)}")
        loaded = []
        for layer, part in zip(self._layers, state, strict=True):
            mean, var = (torch.as_tensor(part[name]).to(layer.mean, copy=True) for name in ("mean", "var"))
            if mean.shape != layer.mean.shape or var.shape != layer.var.shape:
                raise ValueError(f"moments {tuple(mean.shape)}, not {tuple(layer.mean.shape)}")
            loaded.append((layer, mean, var))
        for layer, mean, var in loaded:
            layer.mean, layer.var, layer.next = mean, var, None


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    named = model.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in named if isinstance(layer, _BatchNorm) and adaptable(layer)}


def _others(model: nn.Module, head: str | None) -> dict[str, nn.Module]:
    """Normalisation layers without source statistics, else linear and convolution layers before the head."""
    norms = {name: layer for name, layer in norm_layers(model) if name}
    if norms:
        return norms
    attention = [name for name, layer in model.named_modules() if isinstance(layer, nn.MultiheadAttention)]
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _PLAIN) and name not in ("", head) and not any(name.startswith(a) for a in attention)
    }
