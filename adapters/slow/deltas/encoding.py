"""Deltas as small tensors to ship, with no code in them, and back.

Each parameter is stored as the smallest of these that gives it back to ``TOLERANCE`` times its largest magnitude
(sparse and dense: to the bit), under ``KIND.PART/NAME``:

    nothing                          it is the base's
    sparse.index, sparse.value       elements that differ from the base
    row_scale.scale                  value = scale[:, None] * base, the base as (out, rest)
    low_rank.up, low_rank.down       value = base + up @ down
    scaled_low_rank.{scale,up,down}  value = scale[:, None] * base + up @ down
    dense.value                      the value itself
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from adapters.slow.deltas import factors
from adapters.slow.deltas.entries import base_of, checked
from adapters.slow.deltas.factors import Factors
from adapters.slow.deltas.merging import merge
from adapters.slow.inserted import OFFLINE

__all__ = ["TOLERANCE", "decode", "encode", "merge", "nbytes"]

TOLERANCE = 1e-6
KINDS = {
    "sparse": {"index", "value"},
    "row_scale": {"scale"},
    "low_rank": {"up", "down"},
    "scaled_low_rank": {"scale", "up", "down"},
    "dense": {"value"},
}


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors, without their names."""
    return sum(tensor.nbytes for tensor in tensors.values())


def encode(delta: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The delta as tensors for a safetensors file; on the host.

    Args:
        delta: new values by parameter name; reserved names (`adapters.slow.inserted`) too.
        base: the frozen model's parameters by name, which the receiver has as well.

    Raises:
        ValueError: a name or shape is not the base's, or a value is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for name, given in delta.items():
        own = base_of(name, base)
        value = checked(name, given.detach().cpu(), own)
        if own is None:
            tensors[f"dense.value/{name}"] = value.contiguous().clone()
            continue
        own = own.detach().cpu()
        index = (value != own).flatten().nonzero().flatten()
        # An offline model that equals the base is not the same as none.
        if len(index) or name.startswith(OFFLINE):
            for part, tensor in _smallest(value, own, index).items():
                tensors[f"{part}/{name}"] = tensor
    return tensors


def decode(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The delta that `encode` was given, without what is the base's anyway; on the host, in the base's types.

    Raises:
        ValueError: an entry is not one that `encode` makes for this base; the message names it.
    """
    parts: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in tensors.items():
        label, slash, name = key.partition("/")
        kind, _, part = label.partition(".")
        if not slash or part not in KINDS.get(kind, ()):
            raise ValueError(f"entry {key!r} is not of a delta: it must be KIND.PART/NAME with KIND in {list(KINDS)}")
        parts[name][kind][part] = tensor.detach().cpu()
    delta = {}
    for name, kinds in parts.items():
        own = base_of(name, base)
        if len(kinds) > 1:
            raise ValueError(f"parameter {name!r} is there as {' and as '.join(kinds)}; it can be there once")
        ((kind, found),) = kinds.items()
        if missing := KINDS[kind] - found.keys():
            raise ValueError(f"parameter {name!r} is {kind} without its {', '.join(sorted(missing))}")
        for part, tensor in found.items():
            if part != "index" and not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
                raise ValueError(f"entry '{kind}.{part}/{name}' holds values that are not finite numbers")
        if own is None and kind != "dense":
            raise ValueError(f"parameter {name!r} is {kind}, and the base has none that it could be relative to")
        value = found["value"] if kind == "dense" or own is None else _decoded(name, kind, found, own.detach().cpu())
        delta[name] = checked(name, value.clone(), own)
    return delta


def _matrix(x: Tensor) -> Tensor:
    return x.double().reshape(len(x), -1)


def _smallest(value: Tensor, own: Tensor, index: Tensor) -> dict[str, Tensor]:
    small = index.to(torch.int32 if value.numel() < 2**31 else torch.int64)
    best = {"sparse.index": small, "sparse.value": value.flatten()[index]}
    if nbytes(best) >= value.nbytes and value.numel():
        best = {"dense.value": value.contiguous().clone()}
    if value.ndim < 2 or len(index) == 0:
        return best
    tolerance = TOLERANCE * float(value.abs().max())
    found = factors.find(_matrix(value), _matrix(own), tolerance, limit=math.ceil(nbytes(best) / 4))
    if found is None or _error(value, _rebuilt(found, own)) > tolerance:
        return best
    kind = "row_scale" if found.up is None else "low_rank" if found.scale is None else "scaled_low_rank"
    return {
        f"{kind}.{part}": tensor.float().contiguous() for part, tensor in found._asdict().items() if tensor is not None
    }


def _error(value: Tensor, other: Tensor) -> float:
    return float((value.double() - other.double()).abs().max())


def _rebuilt(found: Factors, own: Tensor) -> Tensor:
    return found.product(_matrix(own)).to(own.dtype).reshape(own.shape)


def _decoded(name: str, kind: str, found: Mapping[str, Tensor], own: Tensor) -> Tensor:
    """The value; ValueError where the parts don't fit the base or each other."""
    shapes = {part: tuple(tensor.shape) for part, tensor in found.items()}
    wrong = f"parameter {name!r} is {kind} with {shapes}, which doesn't fit its shape {tuple(own.shape)}"
    if kind == "sparse":
        index, value = found["index"], found["value"]
        if index.ndim != 1 or value.shape != index.shape or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(wrong)
        index = index.long()
        if len(index) and (index[0] < 0 or index[-1] >= own.numel() or bool((index.diff() <= 0).any())):
            raise ValueError(f"entry 'sparse.index/{name}' must rise from 0 or more to below {own.numel()}")
        return own.flatten().index_copy(0, index, value.to(own.dtype)).reshape(own.shape)
    if own.ndim < 2 or not own.numel():
        raise ValueError(wrong)
    m, n = _matrix(own).shape
    rank = found["up"].shape[-1] if "up" in found and found["up"].ndim else 0
    if shapes != {part: {"scale": (m,), "up": (m, rank), "down": (rank, n)}[part] for part in found}:
        raise ValueError(wrong)
    doubles = {part: tensor.double() for part, tensor in found.items()}
    return _rebuilt(Factors(doubles.get("scale"), doubles.get("up"), doubles.get("down")), own)
