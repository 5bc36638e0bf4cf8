"""Test-time adapters: cheap, at once, reversible.

    import adapters.fast as fast
    adapter = fast.build("tent", model, lr=1e-3)
    outputs = adapter(x)            # predicts, then adapts

Every module of this package is one method, found by its name; what they share is in ``core``. Classes are imported
when asked for (``from adapters.fast import Tent``).
"""

from __future__ import annotations

from adapters.fast.core.base import FastAdapter
from adapters.fast.core.deciding import DecidingAdapter
from adapters.fast.core.registry import build, class_named, get, names

__all__ = ["DecidingAdapter", "FastAdapter", "build", "get", "names"]


def __getattr__(name: str) -> type[FastAdapter]:
    """Return the adapter class called ``name``, importing its module when it is asked for."""
    found = class_named(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
