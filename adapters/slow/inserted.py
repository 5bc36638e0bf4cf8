"""What a delta may add to a model: modules under reserved names, called by hooks that `adapters.slow.fork` keeps.

A delta's names are those of the model's parameters, and these:

- ``LAYER.homeostat_bottleneck.{down,up}.{weight,bias}``: a `Bottleneck` after the layer called LAYER;
- ``offline::NAME``: the value that parameter NAME has in a second, offline model (`adapters.slow.offline`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence

BOTTLENECK = "homeostat_bottleneck"
OFFLINE = "offline::"
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")
"""Parameters of a bottleneck."""


class Place(NamedTuple):
    """What a layer gives out."""

    channels: int
    axes: int
    """Axes that follow the channels: 0 where they are the last one, 2 for a 2-D convolution."""


def place_of(layer: nn.Module) -> Place | None:
    """The channels of a layer that can hold a bottleneck; None where that is not known."""
    if isinstance(layer, _ConvNd):
        return Place(layer.out_channels, len(layer.kernel_size))
    if isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear):
        return Place(layer.out_features, 0)
    if isinstance(layer, nn.RNNBase):
        return Place((layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1), 0)
    if isinstance(layer, nn.MultiheadAttention):
        return Place(layer.embed_dim, 0)
    if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return Place(layer.self_attn.embed_dim, 0)
    return None


class _Affine(nn.Module):
    """An affine map of the channels. Not an ``nn.Linear``: the last of those in a model is its head."""

    def __init__(self, weight: Tensor, bias: Tensor, *, learnt: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=learnt)
        self.bias = nn.Parameter(bias, requires_grad=learnt)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.weight.ndim - 3]
        return convolve(x, self.weight, self.bias)


class Bottleneck(nn.Module):
    """h + up(relu(down(h))) over the channels of h: (..., C), or (B, C, *axes) with weights of as many axes of size 1.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019.
    """

    def __init__(self, values: Mapping[str, Tensor], *, learnt: bool) -> None:
        super().__init__()
        self.down = _Affine(values["down.weight"], values["down.bias"], learnt=learnt)
        self.up = _Affine(values["up.weight"], values["up.bias"], learnt=learnt)

    def forward(self, h: Tensor) -> Tensor:
        """Same shape as ``h``."""
        out: Tensor = h + self.up(F.relu(self.down(h)))
        return out


class CallBottleneck:
    """Forward hook. It finds its module through the hooked one, so that a copied hook calls the copy's."""

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        """The layer's output with its first tensor adapted: of a recurrent layer the sequence, not the last state."""
        module = layer.get_submodule(BOTTLENECK)
        if isinstance(output, Tensor):
            return module(output)
        if isinstance(output, PackedSequence):
            return output._replace(data=module(output.data))
        if type(output) is tuple and output:
            return (self(layer, inputs, output[0]), *output[1:])
        raise TypeError(
            f"a bottleneck sits on a {type(layer).__name__} that gives a {type(output).__name__}, not a tensor; "
            "name other layers with the option layers"
        )


def split_bottleneck(name: str) -> tuple[str, str] | None:
    """Layer and part that a bottleneck's parameter name says, ("layers.2", "up.bias"); None for other names."""
    head, found, part = name.rpartition(f"{BOTTLENECK}.")
    if not found or part not in PARTS or (head and not head.endswith(".")):
        return None
    return head.removesuffix("."), part


def join_bottleneck(layer: str, part: str) -> str:
    """Inverse of `split_bottleneck`."""
    return f"{layer}.{BOTTLENECK}.{part}" if layer else f"{BOTTLENECK}.{part}"


def shapes(place: Place, width: int) -> dict[str, tuple[int, ...]]:
    """The parts of a bottleneck of ``width`` at a place."""
    ones = (1,) * place.axes
    return {
        "down.weight": (width, place.channels, *ones),
        "down.bias": (width,),
        "up.weight": (place.channels, width, *ones),
        "up.bias": (place.channels,),
    }


def layers_with_bottleneck(names: Iterable[str]) -> list[str]:
    """The layers whose bottleneck the parameter names speak of, in their order."""
    return list(dict.fromkeys(split[0] for name in names if (split := split_bottleneck(name))))


def attach_bottlenecks(twin: nn.Module, source: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Insert bottlenecks into ``twin``, which is changed, with copies of ``values`` by parameter name."""
    by_layer: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in values.items():
        layer_name, part = split_bottleneck(name) or ("", name)
        by_layer[layer_name][part] = value
    for layer_name, parts in by_layer.items():
        layer = _layer(twin, layer_name)
        place = place_of(layer)
        down = parts.get("down.weight")
        width = len(down) if down is not None and down.ndim else 0
        found = {part: tuple(value.shape) for part, value in parts.items()}
        if place is None or not width or found != shapes(place, width):
            told = "can't hold one" if place is None else f"takes {shapes(place, width or 8)}"
            raise ValueError(
                f"the delta's bottleneck at layer {layer_name!r} has {found}, and the layer, a {type(layer).__name__}, "
                f"{told}; the delta was made for another architecture"
            )
        own = next(layer.parameters())
        learnt = any(parameter.requires_grad for parameter in layer.parameters())
        layout = torch.contiguous_format  # the same before and after a checkpoint: kernels round differently by layout
        copies = {
            part: value.detach().to(own.device, own.dtype, copy=True, memory_format=layout)
            for part, value in parts.items()
        }
        layer.add_module(BOTTLENECK, Bottleneck(copies, learnt=learnt).train(layer.training))
        layer.register_forward_hook(CallBottleneck())
    for module in twin.modules():
        if isinstance(module, nn.TransformerEncoder):
            # With a padding mask it hands its layers nested tensors, which only the fused kernel takes; and the kernel
            # steps aside for a hook. Padded positions then come out as in training, and not as zeros.
            module.use_nested_tensor = False


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"the delta has a bottleneck for layer {name!r}, which the model doesn't have; "
            "the delta was made for another architecture"
        ) from None


def _attach_offline(twin: nn.Module, source: nn.Module, values: Mapping[str, Tensor]) -> None:
    from adapters.slow.offline import attach_offline

    attach_offline(twin, source, dict(values))


@dataclass(frozen=True)
class Kind:
    """One kind of reserved names."""

    owns: Callable[[str], bool]
    """Whether a parameter name is of this kind."""
    attach: Callable[[nn.Module, nn.Module, Mapping[str, Tensor]], None]
    """``attach(twin, source, values)``: put ``values`` into ``twin``, a fork of ``source`` with the plain values."""


KINDS = (
    Kind(lambda name: name.startswith(OFFLINE), _attach_offline),
    Kind(lambda name: split_bottleneck(name) is not None, attach_bottlenecks),
)
"""In the order in which they are asked: ``offline::a.homeostat_bottleneck.up.bias`` is the offline model's."""


def kind_of(name: str) -> Kind | None:
    """The kind that owns a name; None for a name that has to be a parameter's of the model."""
    return next((kind for kind in KINDS if kind.owns(name)), None)


def fresh_bottlenecks(model: nn.Module, layers: Iterable[str], width: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Values of new bottlenecks: ``up`` is zero, so that they change nothing yet; ``down`` as Kaiming et al. draw it.

    Never wider than the layer, where a full matrix would be as small.
    """
    values = {}
    for name in layers:
        place = place_of(layer := model.get_submodule(name))
        if place is None:
            raise ValueError(f"layer {name!r}, a {type(layer).__name__}, can't hold a bottleneck")
        for part, shape in shapes(place, min(width, place.channels)).items():
            value = torch.zeros(shape)
            if part == "down.weight":
                # Of the seeded generator on the host: the same on every device.
                value = torch.randn(shape, generator=draw) * (2 / place.channels) ** 0.5
            values[join_bottleneck(name, part)] = value
    return values
