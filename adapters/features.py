"""Penultimate features: what goes into the last linear layer."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def find_head(model: nn.Module) -> str | None:
    """Return the name of the last ``nn.Linear`` in definition order, or None when there is none.

    The output projection of ``nn.MultiheadAttention`` does not count: it is used by its weights and never called.
    A model whose head is defined before its body needs the name given by hand.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    return names[-1] if names else None


class FeatureTap:
    """Records what goes into one layer of a model in its latest forward.

    Close it, or use it as a context manager, and the model is as it was.
    """

    def __init__(self, model: nn.Module, head: str | None = None) -> None:
        """Listen to the layer called ``head``, by default `find_head`; ValueError when there is no such layer."""
        name = find_head(model) if head is None else head
        if name is None:
            raise ValueError("the model has no nn.Linear layer to read features from: name a layer")
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            known = ", ".join(n for n, m in model.named_modules() if isinstance(m, nn.Linear)) or "none"
            raise ValueError(f"the model has no layer {name!r}; its linear layers: {known}") from None
        self.head = name
        self.latest: Tensor | None = None
        """The layer's input in the latest forward, as it was, detached."""
        self._handle = layer.register_forward_pre_hook(self._record)

    def _record(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.latest = inputs[0].detach()

    @property
    def features(self) -> Tensor | None:
        """(B, D) features of the latest forward: (B, T, D) is averaged over T; None before the first forward."""
        x = self.latest
        if x is None or x.ndim == 2:
            return x
        return x.flatten(1, -2).mean(1) if x.ndim > 2 else x.unsqueeze(0)

    def close(self) -> None:
        """Stop listening and forget the features. Safe to call twice."""
        self._handle.remove()
        self.latest = None

    def __enter__(self) -> FeatureTap:
        """Return the tap itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the tap."""
        self.close()
