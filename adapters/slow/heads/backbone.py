"""The frozen part of a model: the features that go into its head, and a head of other values in its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from adapters.features import FeatureTap, find_head
from adapters.slow.fork import fork
from adapters.slow.heads.moments import F64
from adapters.slow.trainee import Values


def on_host(value: Tensor) -> F64:
    """A float64 copy on the host."""
    array: F64 = value.detach().to("cpu", torch.float64).numpy().copy()
    return array


def head_problem(model: nn.Module, needs_bias: str | None) -> str | None:
    """Why the model's head can't be replaced by one of other values, and what to do; None when it can.

    ``needs_bias`` is what to do without a bias; None when the head need not have one.
    """
    name = find_head(model)
    if name is None:
        return "the model has no nn.Linear layer to call its head; use 'norm_affine'"
    own = dict(model.get_submodule(name).named_parameters(recurse=False))
    if "weight" not in own:
        return (
            f"the weight of the head {name!r} is computed from other parameters (pruning, weight norm); make that "
            "permanent before packing, or use 'head'"
        )
    full = f"{name}.weight" if name else "weight"
    parameters = model.named_parameters(remove_duplicate=False)
    if tied := [other for other, value in parameters if value is own["weight"] and other != full]:
        return f"the head {name!r} shares its weight with {tied[0]!r}; use 'norm_affine'"
    if "bias" not in own and needs_bias is not None:
        return f"the head {name!r} has no bias; {needs_bias}"
    return None


class Backbone:
    """Features of a model's rows. It shares the model's tensors, and neither calls nor adds hooks of its own to it."""

    def __init__(self, model: nn.Module, classes: int | None, refuse: Callable[[str], str]) -> None:
        """``refuse`` makes the text of an error; ValueError when the head has not one output per class."""
        self._classes = classes
        self._refuse = refuse
        self._twin = fork(model, {}).eval()
        self._tap = FeatureTap(self._twin)
        prefix = f"{self._tap.head}." if self._tap.head else ""
        self._names = f"{prefix}weight", f"{prefix}bias"
        layer = self._twin.get_submodule(self._tap.head)
        own = {name: value.detach() for name, value in layer.named_parameters(recurse=False)}
        self.weight = own["weight"]
        """(T, D) of the head."""
        self.bias = own.get("bias")
        """(T,) of the head, if it has one."""
        self._seen = False
        if len(self.weight) != (classes or 1):
            wanted = "1, for regression" if classes is None else f"{classes}, one per class"
            raise ValueError(
                refuse(f"the head {self._tap.head!r} has {len(self.weight)} outputs; it must have {wanted}")
            )

    def __call__(self, x: Tensor) -> Tensor:
        """(B, D) features of x (B, *input_shape).

        Raises:
            ValueError: what goes into the head does not decide what the model answers.
        """
        with torch.inference_mode():
            output = self._twin(x.to(self.weight.device, self.weight.dtype if x.is_floating_point() else x.dtype))
            h, self._tap.latest = self._tap.features, None
            if h is None or len(h) != len(x):
                raise ValueError(self._refuse(f"the layer {self._tap.head!r} does not see one row per input"))
            if not self._seen:
                self._look_at(output, nn.functional.linear(h, self.weight, self.bias))
            return h

    def _look_at(self, output: Tensor, own: Tensor) -> None:
        """Refuse a model whose answer is not its head's: the layer defined last may not be the one called last."""
        if self._classes is None:
            # What follows the head, as a scale back to units, would have to be undone in the targets.
            same = output.numel() == len(own) and agree(output.reshape(-1).float(), own.reshape(-1).float())
        else:
            same = output.shape == own.shape and bool((output.argmax(1) == own.argmax(1)).float().mean() >= 0.99)
        if not same:
            raise ValueError(
                self._refuse(
                    f"the model's answer is not that of {self._tap.head!r}, its nn.Linear defined last; let the model "
                    "end in it, or use 'head'"
                )
            )
        self._seen = True

    def head_values(self, weight: F64 | None = None, bias: F64 | None = None) -> Values:
        """Values of the head by the model's names, by default its own; empty when they are not finite."""
        values = {}
        for name, own, new in zip(self._names, (self.weight, self.bias), (weight, bias), strict=True):
            if own is not None:
                values[name] = own.clone() if new is None else torch.from_numpy(new).to(own)
        return values if all(bool(value.isfinite().all()) for value in values.values()) else {}


def agree(left: Tensor, right: Tensor) -> bool:
    """Whether nearly all of two sets of numbers are equal but for rounding."""
    return bool(torch.isclose(left, right, rtol=1e-2, atol=1e-3).float().mean() >= 0.99)
