"""Answers beside the ones that go out, to know how good another model would be on the stream itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

from adapters.evidence import HarmEvidence
from daemon.monitor import Monitor
from daemon.records import F32, F64
from daemon.resident import Resident

log = structlog.get_logger("homeostat.bundle")

ALPHA = 0.001
"""The chance that a model which is no worse is shown to be worse."""
SAMPLE = 64
"""Rows of a batch that are answered in shadow."""
AGREE = 0.01
"""Squared difference of two regressions, in variances of the reference, below which they agree."""


@dataclass
class Shadow:
    """A successor that answers nobody yet, compared with what does."""

    resident: Resident
    """Of the successor."""
    monitor: Monitor
    """Of the one that answers: both are measured by its loss."""
    rows: int = 0
    agree: float = 0.0
    labels: int = 0
    error: float = 0.0
    served: float = 0.0
    broken: bool = False
    """It failed, or answered something that is not finite."""
    evidence: HarmEvidence = field(default_factory=HarmEvidence)

    def seen(self, x: F32, served: F32) -> None:
        """A batch ``x`` (B, *shape) was answered by ``served`` (B,)."""
        x, served = x[:SAMPLE], served[:SAMPLE]
        own = self._answer(x)
        self.rows += len(x)
        if self.monitor.task == "classification":
            self.agree += float((own == served).sum())
        else:
            self.agree += float((self.monitor.loss(own, served.astype(np.float64)) < AGREE).sum())

    def labelled(self, x: F32, y: np.ndarray, served: F64) -> None:
        """Labels ``y`` (n,) came for rows ``x`` (n, *shape), whose answers' losses are ``served`` (n,)."""
        losses = self.monitor.loss(self._answer(x), y)
        known = np.isfinite(losses) & np.isfinite(served)
        self.labels += int(known.sum())
        self.error += float(losses[known].sum())
        self.served += float(served[known].sum())
        self.evidence.update((losses[known] - served[known]).clip(-1.0, 1.0))

    def _answer(self, x: F32) -> F32:
        try:
            rows = self.resident.measure_frozen(x)
        except Exception:
            # Whatever is wrong with it must not end what works.
            log.exception("the model in shadow failed")
            self.broken = True
            return np.full(len(x), np.nan, np.float32)
        self.broken = self.broken or not rows.finite()
        return rows.prediction

    def problem(self) -> str | None:
        """Why it must not take over."""
        if self.broken:
            return "it failed, or answered what is not finite"
        if self.evidence.log_peak >= -math.log(ALPHA):
            return f"its error is {self.error / self.labels:.4f} where that of the answers is {self._mean():.4f}"
        return None

    def _mean(self) -> float:
        return self.served / self.labels if self.labels else math.nan

    def record(self) -> dict[str, Any]:
        """What was compared, for the journal."""
        return {
            "rows": self.rows,
            "agreement": round(self.agree / self.rows, 4) if self.rows else None,
            "labels": self.labels,
            "error": round(self.error / self.labels, 4) if self.labels else None,
            "served_error": round(self._mean(), 4) if self.labels else None,
        }
