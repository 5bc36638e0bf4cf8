"""What a run amounts to: the numbers of the status line, the closing table and the report; part of the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from daemon.labels import Joined
from daemon.monitor import Monitor


@dataclass
class Score:
    """A running mean loss."""

    rows: float = 0.0
    total: float = 0.0

    def add(self, losses: np.ndarray, weights: np.ndarray | float = 1.0) -> None:
        """Take in (n,) losses with their weights; NaN rows are left out."""
        known = np.isfinite(losses)
        weight = np.broadcast_to(weights, losses.shape)[known]
        self.rows += float(weight.sum())
        self.total += float((losses[known] * weight).sum())

    @property
    def mean(self) -> float | None:
        """None before the first row."""
        return self.total / self.rows if self.rows else None


@dataclass
class Tally:
    """Counts since the state's beginning: a restart from a checkpoint goes on counting."""

    outputs: int = 0
    """Classes of the model, 0 for a regression: labels outside are refused."""
    records: int = 0
    invalid: int = 0
    dead: int = 0
    labels: int = 0
    labels_rejected: int = 0
    drifts: int = 0
    versions: int = 0
    guard_trips: int = 0
    served: Score = field(default_factory=Score)
    version: Score = field(default_factory=Score)
    frozen: Score = field(default_factory=Score)

    def batch(self, rows: int, invalid: int, dead: int) -> None:
        """Count one batch."""
        self.records += rows
        self.invalid += invalid
        self.dead += dead

    def usable(self, joined: Joined) -> Joined | None:
        """Without labels that can't be: not finite, or not one of the classes."""
        # A target beyond float32 would overflow in every loss.
        fine = np.abs(np.asarray(joined.y, np.float64)) < np.finfo(np.float32).max
        if self.outputs:
            fine &= (joined.y >= 0) & (joined.y < self.outputs) & (joined.y == np.floor(joined.y))
        self.labels_rejected += int((~fine).sum())
        if fine.all():
            return joined
        if not fine.any():
            return None
        return Joined(*(getattr(joined, item.name)[fine] for item in fields(Joined)))

    def score(self, monitor: Monitor, joined: Joined) -> None:
        """Score emitted answers, and the twins where they ran (weighted by one over their share)."""
        self.labels += len(joined)
        self.served.add(monitor.loss(joined.served, joined.y))
        self.version.add(monitor.loss(joined.version, joined.y), joined.weight)
        self.frozen.add(monitor.loss(joined.frozen, joined.y), joined.weight)

    def report(self) -> dict[str, Any]:
        """For the JSON report: counts, and errors by model."""
        plain = ("records", "invalid", "dead", "labels", "labels_rejected", "drifts", "versions", "guard_trips")
        result: dict[str, Any] = {name: getattr(self, name) for name in plain}
        for name in ("served", "version", "frozen"):
            score: Score = getattr(self, name)
            result[name] = {"error": score.mean, "rows": round(score.rows)}
        return result

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for name, value in state.items():
            setattr(self, name, Score(**value) if isinstance(value, dict) else value)
