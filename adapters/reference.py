"""What is known about the source data when the source data itself is not there any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Moments, prior, exemplars and scores of the source data, stored beside the weights.

    Shapes: I values per flattened input, D penultimate features, K classes, N exemplars.
    """

    input_mean: Tensor
    """(I,) mean of each flattened input value."""
    input_var: Tensor
    """(I,) variance of each flattened input value."""
    feature_mean: Tensor | None
    """(D,) mean of the penultimate features; None when the model has no linear head."""
    feature_var: Tensor | None
    """(D,) variance of the penultimate features; None when the model has no linear head."""
    class_prior: Tensor | None
    """(K,) share of each class, sums to 1; None in regression."""
    exemplars_x: Tensor
    """(N, *input_shape) inputs of the exemplars."""
    exemplars_y: Tensor
    """(N,) labels (int64) or targets (float) of the exemplars."""
    entropy: float
    """Mean entropy of the predictions divided by ln K, in [0, 1]; 0 in regression."""
    error: float
    """Error rate (classification) or mean squared error (regression) on held-out source data."""
    class_feature_mean: Tensor | None = None
    """(K, D) mean of the features of the rows that the model puts into each class; None without features or classes."""
    class_feature_var: Tensor | None = None
    """(K, D) variance of the same."""
    feature_axes: Tensor | None = None
    """(R, D) leading principal directions of wide features, orthonormal; None where D is small."""
    class_distance: Tensor | None = None
    """(2,) mean and deviation, over held-out source rows, of a row's distance from its predicted class: the mean
    absolute z-score of its features, clipped; None where that was not measured."""
    output_mean: float = 0.0
    """Mean of the model's outputs on the source data."""
    output_var: float = 1.0
    """Variance of the model's outputs on the source data."""
    prepared: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What fast methods have computed from source rows when the bundle was packed: method, then name."""

    def __post_init__(self) -> None:
        """Refuse parts whose shapes do not belong together."""
        if self.input_mean.ndim != 1 or self.input_mean.shape != self.input_var.shape:
            raise ValueError(
                f"input_mean {tuple(self.input_mean.shape)} and input_var {tuple(self.input_var.shape)} must both be "
                "(I,), one value per flattened input value"
            )
        if (self.feature_mean is None) != (self.feature_var is None):
            raise ValueError("give feature_mean and feature_var together, or neither")
        if self.feature_mean is not None and self.feature_var is not None:
            shapes = tuple(self.feature_mean.shape), tuple(self.feature_var.shape)
            if len(shapes[0]) != 1 or shapes[0] != shapes[1]:
                raise ValueError(f"feature_mean {shapes[0]} and feature_var {shapes[1]} must both be (D,)")
        if self.class_prior is not None and self.class_prior.ndim != 1:
            raise ValueError(f"class_prior {tuple(self.class_prior.shape)} must be (K,), one share per class")
        if self.exemplars_x.shape[:1] != self.exemplars_y.shape[:1] or self.exemplars_y.ndim != 1:
            raise ValueError(
                f"exemplars_x {tuple(self.exemplars_x.shape)} and exemplars_y {tuple(self.exemplars_y.shape)} must "
                "have the same number of rows, and exemplars_y one value per row"
            )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return one tensor per part that is there, ready for safetensors; scores are 0-d float64."""
        tensors = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name == "prepared":
                tensors.update(_flat(value))
            elif value is not None:
                scalar = not isinstance(value, Tensor)
                tensors[part.name] = torch.tensor(value, dtype=torch.float64) if scalar else value.contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Reference:
        """Inverse of `to_tensors`; ValueError when a part is missing or unknown."""
        prepared = _nested(tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREPARED)}
        known = {part.name for part in fields(cls)} - {"prepared"}
        classes = {"class_feature_mean", "class_feature_var", "feature_axes", "class_distance"}
        optional = {"feature_mean", "feature_var", "class_prior"} | classes
        if missing := sorted(known - optional - tensors.keys()):
            raise ValueError(f"the reference lacks {', '.join(missing)}: pack the bundle again")
        if unknown := sorted(tensors.keys() - known):
            raise ValueError(f"the reference holds unknown parts {', '.join(unknown)}: made by a newer version?")
        return cls(
            input_mean=tensors["input_mean"],
            input_var=tensors["input_var"],
            feature_mean=tensors.get("feature_mean"),
            feature_var=tensors.get("feature_var"),
            class_prior=tensors.get("class_prior"),
            exemplars_x=tensors["exemplars_x"],
            exemplars_y=tensors["exemplars_y"],
            entropy=float(tensors["entropy"]),
            error=float(tensors["error"]),
            **{name: tensors.get(name) for name in classes},
            output_mean=float(tensors["output_mean"]),
            output_var=float(tensors["output_var"]),
            prepared=prepared,
        )

    def to(self, device: torch.device | str) -> Reference:
        """Return the same reference with every tensor on ``device``."""
        moved: dict[str, Any] = {
            part.name: value.to(device)
            for part in fields(self)
            if isinstance(value := getattr(self, part.name), Tensor)
        }
        moved["prepared"] = {
            method: {name: tensor.to(device) for name, tensor in tensors.items()}
            for method, tensors in self.prepared.items()
        }
        return replace(self, **moved)


_PREPARED = "prepared/"


def _flat(prepared: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all methods by ``prepared/<method>/<name>``; a name may hold more slashes."""
    return {
        f"{_PREPARED}{method}/{name}": tensor.contiguous()
        for method, tensors in prepared.items()
        for name, tensor in tensors.items()
    }


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Inverse of `_flat`; other tensors are left out."""
    nested: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_PREPARED):
            method, _, name = key.removeprefix(_PREPARED).partition("/")
            nested.setdefault(method, {})[name] = tensor
    return nested
