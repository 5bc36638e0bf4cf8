"""Deltas averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters.slow.deltas.entries import base_of, checked
from adapters.slow.inserted import OFFLINE, PARTS


def merge(
    deltas: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The weighted mean of whole values, never of factors: the mean of products is not the product of means.

    A delta that leaves a parameter out counts with the base's value. Bottlenecks are factors, so they are put beside
    each other, widths adding up, and the merged one gives exactly the mean of what they give; equal ones stay as
    they are. A delta without an offline model counts with its own values for that.

    Args:
        deltas: at least one, all over the same base.
        base: the frozen model's parameters by name.
        weights: one per delta, 0 or more; None for equal ones. They are scaled to sum to 1.

    Raises:
        ValueError: there is nothing to merge, weights don't fit, or a delta is not of this base or not finite.
    """
    shares = [1.0] * len(deltas) if weights is None else list(weights)
    if not deltas or len(shares) != len(deltas):
        raise ValueError(f"{len(deltas)} deltas have {len(shares)} weights; there must be at least one, with one each")
    if not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) == 0:
        raise ValueError(f"weights are {shares}; they must be finite, 0 or more, and not all 0")
    shares = [share / sum(shares) for share in shares]
    whole = []
    for delta in deltas:
        host = {name: value.detach().cpu() for name, value in delta.items()}
        whole.append({name: checked(name, value, base_of(name, base)) for name, value in host.items()})
    names = list(dict.fromkeys(name for delta in whole for name in delta))
    if any(name.startswith(OFFLINE) for name in names):
        names = list(dict.fromkeys([*names, *(OFFLINE + n for n in names if not n.startswith(OFFLINE))]))
    merged: dict[str, Tensor] = {}
    for name in names:
        values = [_value_in(delta, name, base) for delta in whole]
        if base_of(name, base) is not None:
            dtype = next(value.dtype for value in values if value is not None)
            terms = [share * value.double() for share, value in zip(shares, values, strict=True) if value is not None]
            merged[name] = torch.stack(terms).sum(0).to(dtype)
        elif name not in merged:
            merged |= _side_by_side(name, whole, shares, base)
    return merged


def _value_in(delta: Mapping[str, Tensor], name: str, base: Mapping[str, Tensor]) -> Tensor | None:
    """What a delta means for a name; None for a bottleneck that it doesn't have."""
    if name in delta:
        return delta[name]
    if name.startswith(OFFLINE) and not any(other.startswith(OFFLINE) for other in delta):
        return _value_in(delta, name.removeprefix(OFFLINE), base)
    own = base_of(name, base)
    return None if own is None else own.detach().cpu()


def _side_by_side(
    name: str, deltas: Sequence[Mapping[str, Tensor]], shares: Sequence[float], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All parts of the bottleneck that ``name`` is of: hidden channels beside each other, what they give weighted."""
    stem = next(name.removesuffix(part) for part in PARTS if name.endswith(part))
    found: list[tuple[float, dict[str, Tensor]]] = []
    for delta, share in zip(deltas, shares, strict=True):
        parts = {part: value for part in PARTS if (value := _value_in(delta, stem + part, base)) is not None}
        if parts and len(parts) < len(PARTS):
            raise ValueError(f"the bottleneck {stem.rstrip('.')!r} has only {', '.join(parts)} in one of the deltas")
        if parts:
            found.append((share, parts))
    first = found[0][1]
    shape = [len(first["up.bias"]), *first["down.weight"].shape[1:]]
    if any([len(parts["up.bias"]), *parts["down.weight"].shape[1:]] != shape for _, parts in found):
        raise ValueError(f"the bottlenecks {stem.rstrip('.')!r} are of layers of different shapes")
    alike = all(torch.equal(parts[part], first[part]) for _, parts in found for part in ("down.weight", "down.bias"))
    ups = [(share * parts["up.weight"].double()).to(parts["up.weight"].dtype) for share, parts in found]
    bias = torch.stack([share * parts["up.bias"].double() for share, parts in found]).sum(0)
    down = [first] if alike else [parts for _, parts in found]
    return {
        f"{stem}down.weight": torch.cat([parts["down.weight"] for parts in down]),
        f"{stem}down.bias": torch.cat([parts["down.bias"] for parts in down]),
        f"{stem}up.weight": torch.stack(ups).sum(0) if alike else torch.cat(ups, dim=1),
        f"{stem}up.bias": bias.to(first["up.bias"].dtype),
    }
