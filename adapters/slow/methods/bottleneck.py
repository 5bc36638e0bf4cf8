"""Small residual networks after the hidden layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from adapters.features import find_head
from adapters.slow.fork import apply_delta
from adapters.slow.inserted import BOTTLENECK, PARTS, fresh_bottlenecks, join_bottleneck, place_of
from adapters.slow.registry import SlowMethod, register
from adapters.slow.select import last_linear
from adapters.slow.trainee import Given, Trainee, of_clones, private_copy, seeded

BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)
"""Layers that get one bottleneck as a whole."""


@register("bottleneck")
class Bottleneck(SlowMethod):
    """Inserts h + U relu(D h + d) + u after each block or hidden layer and moves nothing else of the backbone.

    D maps the C channels to ``width`` and U back. U = 0 and u = 0 at the start, so the model answers as it did. It can
    learn what scales and shifts can't (mixing channels again, a nonlinear repair) and leaves every weight as trained.
    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, who train the head beside.

    By default one sits after every transformer layer and attention of torch, recurrent layer, convolution and linear
    layer (outside of these, and not the head); at the layer's output, before what normalises or squashes it. Unlike
    the other methods it costs time at serving: two small maps per layer, and torch's fused transformer kernel is off. A
    next burst on a version with bottlenecks goes on training them, whatever ``width`` and ``layers`` say.

    Args:
        width: hidden channels; a layer with fewer channels gets as many as it has.
        layers: names of the layers to follow, instead of the default.
        train_head: move the head's weight and bias beside, for labels whose meaning moved.
    """

    def __init__(self, width: int = 8, layers: Sequence[str] = (), train_head: bool = True) -> None:
        if width < 1:
            raise ValueError(f"width is {width}; it must be 1 or more")
        self.width, self.train_head = width, train_head
        self.layers = [layers] if isinstance(layers, str) else list(layers)

    def check(self, model: nn.Module) -> str | None:
        """Why nothing can be inserted; None when something can."""
        modules = dict(model.named_modules())
        for name in self.layers:
            if name not in modules:
                return self.refuse(f"the model has no layer {name!r}, which the option layers names")
            if place_of(modules[name]) is None:
                kind = type(modules[name]).__name__
                return self.refuse(f"layer {name!r} is a {kind}, whose channels aren't known; name one inside it")
        if not self._places(model):
            return self.refuse("the model has no hidden layer that can be followed by one; use 'head' or 'full'")
        return None

    def begin(self, model: nn.Module, given: Given) -> Trainee:
        """Insert those that the model hasn't yet, and clone all."""
        if (problem := self.check(model)) is not None:
            raise ValueError(problem)
        places = self._places(model)
        new = [name for name in places if not hasattr(model.get_submodule(name), BOTTLENECK)]
        start = apply_delta(model, fresh_bottlenecks(model, new, self.width, seeded(given)))
        own = dict(start.named_parameters())
        names = [join_bottleneck(layer, part) for layer in places for part in PARTS]
        head = last_linear(start) if self.train_head else {}
        return of_clones(*private_copy(start, {name: own[name] for name in names} | head))

    def _places(self, model: nn.Module) -> list[str]:
        """Layers to follow, and those that a bottleneck follows already."""
        head, found = find_head(model), []
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            default = name != head and not name.startswith(inside) and place_of(module) is not None
            if hasattr(module, BOTTLENECK) or (name in self.layers if self.layers else default):
                found.append(name)
            if isinstance(module, BLOCKS):
                inside += (f"{name}." if name else "",)
        return found
