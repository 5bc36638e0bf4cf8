"""What a delta's names and values must be, to be stored or merged."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adapters.slow.inserted import OFFLINE, split_bottleneck


def base_of(name: str, base: Mapping[str, Tensor]) -> Tensor | None:
    """What a delta's value is relative to; None for an inserted module's.

    Raises:
        ValueError: the name is neither the base's nor reserved.
    """
    plain = name.removeprefix(OFFLINE)
    if plain in base:
        return base[plain]
    split = split_bottleneck(plain)
    if split is None or not any(known.startswith(f"{split[0]}." if split[0] else "") for known in base):
        raise ValueError(f"parameter {name!r} is not the base's; the delta was made for another architecture")
    return None


def checked(name: str, value: Tensor, own: Tensor | None) -> Tensor:
    """The value in its base's type.

    Raises:
        ValueError: another shape, or not finite.
    """
    if own is not None and value.shape != own.shape:
        raise ValueError(
            f"parameter {name!r} has shape {tuple(own.shape)} in the base and {tuple(value.shape)} in the delta; "
            "the delta was made for another architecture"
        )
    value = value if own is None else value.to(own.dtype)
    if not value.is_floating_point() or not bool(value.isfinite().all()):
        raise ValueError(f"parameter {name!r} has values that are not finite numbers")
    return value
