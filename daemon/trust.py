"""Whether the fast adaptation has earned to answer records; until then it runs in shadow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from adapters.evidence import HarmEvidence
from daemon.predicted import Predicted
from daemon.records import F64
from daemon.runs import Runs
from daemon.signals import Level, blend, divergence

BENEFIT_LEVEL = 0.05
"""Chance that a fast adaptation that is no better gets served on labelled evidence."""
MIN_BENEFIT_LEVEL = 1e-6
"""Where that level ends after many failures; a promotion puts it back."""
LABEL_SILENCE_ROWS = 5_000
"""Rows without any label after which the stream counts as unlabelled."""
MAX_DIVERGENCE = 0.05
"""Jensen-Shannon divergence (bits) of the recent mean prediction from the class prior: above, classes come in runs."""
BALANCED_ROWS = 1_024
"""Rows for which that has to hold; also the memory of the mean prediction."""
MAX_UNPROVEN = 0.15
"""Share of the answers that an adaptation may change as long as no label shows that it helps."""
DISAGREEMENT_ROWS = 256
"""Memory of that share, in rows."""


class Trust:
    """Evidence for the fast adaptation.

    With labels it must be shown to be better than the version beneath it: an anytime-valid test of level
    ``BENEFIT_LEVEL``, in which a run of one class counts as one observation. What was served and then shown to harm has
    to show more the next time: the level is halved.

    Without labels nothing can prove it, so it may only correct at the edges: it is served while the answers of both
    models spread over the classes about as the reference does (the statistics of a run of one class are not those of
    the stream: Gong et al., NeurIPS 2022; Boudiaf et al., CVPR 2022) and while it changes few of them, which bounds
    the harm.
    """

    def __init__(self, prior: F64 | None, *, labelled: bool) -> None:
        self._prior = prior
        # A stream that has a label stream beside it counts as labelled before the first label has come.
        self._since_labels = 0 if labelled else LABEL_SILENCE_ROWS + 1
        self._bar = -math.log(BENEFIT_LEVEL)
        self._means: list[F64 | None] = [None, None]
        self._balanced_rows = 0
        self.disagreement = Level(DISAGREEMENT_ROWS)
        """Share of rows on which the adapted model and the version answer differently."""
        self._benefit = HarmEvidence()
        self._runs = Runs()

    def observe(self, predicted: Predicted, rows: int) -> None:
        """Take in one batch: how alike the layers answer, and how their answers spread."""
        self._since_labels += rows
        adapted = predicted.adapted_rows
        if adapted is not None:
            both = np.isfinite(predicted.version)
            self.disagreement.update((predicted.adapted != predicted.version)[both].astype(np.float64))
        if self._prior is None:
            self._balanced_rows += rows
            return
        version_p = predicted.version_mean_p if predicted.served_adapted else predicted.rows.mean_p
        for layer, mean_p in enumerate((version_p, None if adapted is None else adapted.mean_p)):
            if mean_p is not None and np.isfinite(mean_p).all():
                self._means[layer] = blend(self._means[layer], mean_p, rows, BALANCED_ROWS)
        known = [divergence(mean_p, self._prior) for mean_p in self._means if mean_p is not None]
        self._balanced_rows = self._balanced_rows + rows if known and max(known) <= MAX_DIVERGENCE else 0

    def label_came(self) -> None:
        """The stream is labelled."""
        self._since_labels = 0

    def labels_come(self) -> bool:
        """Whether the stream is labelled: a label came within the last ``LABEL_SILENCE_ROWS`` rows."""
        return self._since_labels <= LABEL_SILENCE_ROWS

    def weigh(self, y: np.ndarray, benefit: F64) -> None:
        """Take in (n,) labels and by how much less the adapted model lost on them than the version, in [-1, 1]."""
        self._benefit.update(self._runs.means(y, benefit))

    def earned(self) -> bool:
        """Whether it may answer."""
        if self.labels_come():
            return self._benefit.log_peak >= self._bar
        return self._balanced_rows >= BALANCED_ROWS and self.disagreement.value <= MAX_UNPROVEN

    def raise_bar(self) -> None:
        """It was served and shown to harm: more has to be shown before it is served again."""
        self._bar = min(self._bar + math.log(2), -math.log(MIN_BENEFIT_LEVEL))

    def forget_failures(self) -> None:
        """A new version begins with a clean slate."""
        self._bar = -math.log(BENEFIT_LEVEL)

    def reset(self) -> None:
        """The adaptation starts again from nothing, and so does the evidence for it."""
        self._benefit = HarmEvidence()
        self._runs.reset()
        self.disagreement.reset()
        self._means[1] = None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "since_labels": self._since_labels,
            "bar": self._bar,
            "means": list(self._means),
            "balanced_rows": self._balanced_rows,
            "disagreement": self.disagreement.state_dict(),
            "benefit": self._benefit.state_dict(),
            "runs": self._runs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._since_labels, self._bar = int(state["since_labels"]), float(state["bar"])
        self._means, self._balanced_rows = list(state["means"]), int(state["balanced_rows"])
        self.disagreement.load_state_dict(state["disagreement"])
        self._benefit.load_state_dict(state["benefit"])
        self._runs.load_state_dict(state["runs"])
