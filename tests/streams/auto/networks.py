"""Networks of more kinds than those of `tests.streams.sources`; each function is a factory for the daemon."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.models import gas
from tests.streams import sources
from tests.streams.sources import Standardise

GROUPS = 8


class Centred(nn.Module):
    """Brightness in [0, 1] to about unit deviation around 0: what stands in for a first normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) * 4.0


class StandardiseMoving(Standardise):
    """`Standardise`, but a column that never moved in training keeps its scale: dividing by 1e-6 would blow it up."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / torch.where(self.deviation > 1e-5, self.deviation, 1.0)


class StandardiseWindows(Standardise):
    """`Standardise` for windows (B, C, T): each step of each channel by its own moments."""

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__(channels * steps)
        self.mean = self.mean.view(channels, steps)
        self.deviation = self.deviation.view(channels, steps)


class Transformer(nn.Module):
    """Layers before their norms over learnt positions: tokens (B, T, W) are averaged before the head."""

    def __init__(self, patches: nn.Module, tokens: int, width: int, layers: int, classes: int) -> None:
        """``patches`` gives (B, W, ...), flattened to T tokens of ``width`` numbers."""
        super().__init__()
        self.patches = patches
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        outputs: Tensor = self.head(self.layers(tokens).mean(1))
        return outputs


def cifar_gn() -> nn.Module:
    """Images (B, 3, 32, 32) to 10 classes, normalised in groups of channels."""
    return nn.Sequential(
        Centred(), *_conv2d(3, 32, 4, 2), *_conv2d(32, 64, 3, 2), *_conv2d(64, 96), *_conv2d(96, 128, 3, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def cifar_transformer() -> nn.Module:
    """Images (B, 3, 32, 32) as 64 patches of 4 x 4 to 10 classes."""
    return Transformer(nn.Sequential(Centred(), nn.Conv2d(3, 48, 4, 4)), tokens=64, width=48, layers=2, classes=10)


def mnist_gn() -> nn.Module:
    """Digits (B, 1, 28, 28) to 10 classes, normalised in groups of channels."""
    return nn.Sequential(
        Centred(), *_conv2d(1, 16, 3, 2), *_conv2d(16, 32, 3, 2), *_conv2d(32, 64, 3, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def mnist_mlp() -> nn.Module:
    """Digits (B, 1, 28, 28) to 10 classes."""
    return nn.Sequential(nn.Flatten(), *_mlp(784, (128, 64), nn.BatchNorm1d), nn.Linear(64, 10))


def har_transformer() -> nn.Module:
    """Windows (B, 6, 64) as 16 patches of 4 steps to 5 activities."""
    return Transformer(
        nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Conv1d(6, 32, 4, 4)), tokens=16, width=32, layers=2, classes=5
    )


def har_mlp() -> nn.Module:
    """Windows (B, 6, 64) to 5 activities, without BatchNorm."""
    return nn.Sequential(StandardiseWindows(6, 64), nn.Flatten(), *_mlp(384, (64, 64), nn.LayerNorm), nn.Linear(64, 5))


def gas_plain() -> nn.Module:
    """128 features to 6 gases, without any normalisation."""
    return nn.Sequential(Standardise(128), *_mlp(128, (64, 32), None), nn.Linear(32, 6))


def insects_bn() -> nn.Module:
    """33 wing-beat features to 6 kinds of insects."""
    return nn.Sequential(nn.BatchNorm1d(33), *_mlp(33, (64, 64), nn.BatchNorm1d), nn.Linear(64, 6))


def elec2() -> nn.Module:
    """Six readings of an electricity market to whether its price goes up."""
    return nn.Sequential(StandardiseMoving(6), *_mlp(6, (32, 32), nn.BatchNorm1d), nn.Linear(32, 2))


har_cnn, insects_ln, gas_bn = sources.har_cnn, sources.insects_mlp, gas.build


def _conv2d(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.GroupNorm(GROUPS, outputs), nn.ReLU()]


def _mlp(inputs: int, widths: tuple[int, ...], norm: Callable[[int], nn.Module] | None) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), *([norm(width)] if norm else []), nn.ReLU()]
        inputs = width
    return layers
