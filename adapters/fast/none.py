"""The frozen model behind the adapters' interface: the baseline, and the choice for "detect only"."""

from __future__ import annotations

from adapters.fast.core.base import FastAdapter
from adapters.fast.core.registry import register


@register("none")
class NoAdapter(FastAdapter):
    """Never adapts: the outputs are those of the frozen model at every gain. Serves every model."""

    def _setup(self) -> None:
        """Nothing moves."""

    @property
    def saturated(self) -> bool:
        """Always: it has no authority to begin with."""
        return True
