"""When the guard trips. Apart from the guard itself, so that the settings need no numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardLimits:
    """When the guard trips. Levels are probabilities of a false trip between two resets; spans are in rows."""

    delta: float = 0.001
    """Level of the test on labelled rows: the chance that it ever trips though adapting does no harm."""
    proxy_delta: float = 0.0001
    """Level of the test on the label-free proxy."""
    collapse_rows: int = 2_000
    """Time constant of the window of mean predictions, in rows; nothing is judged before that many were seen."""
    collapse_ratio: float = 0.5
    """Entropy of the served mean prediction, as a share of what is expected, below which it has collapsed."""
    collapse_floor: float = 0.1
    """Expected normalised entropy below which nothing is judged: on a stream of one class all models look collapsed."""

    def __post_init__(self) -> None:
        for name in ("delta", "proxy_delta", "collapse_ratio", "collapse_floor"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number between 0 and 1")
        if self.collapse_rows < 1:
            raise ValueError(f"collapse_rows is {self.collapse_rows}: give at least 1 row")
