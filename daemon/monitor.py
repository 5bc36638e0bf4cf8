"""From measured rows to one reading: signal levels against their bands, calibrated detectors, the guards' evidence.

Two guards, one for each layer: *adapted against version* watches the fast adaptation (one that decides by itself stands
on the frozen model and is compared with that), *version against frozen* the slow one. A layer that is shown to be worse
than the one below it is taken away.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from daemon.guard import Guard, GuardLimits
from daemon.labels import Joined
from daemon.predicted import Predicted
from daemon.records import F32, F64
from daemon.runs import Runs
from daemon.signals import Level, blend, divergence
from daemon.trust import Trust
from daemon.watch import Watch

LEVEL_ROWS = 256
"""Memory of a signal's level, in rows; `homeostat pack` measures the bands for it."""
MEAN_ROWS = 4 * LEVEL_ROWS
"""Memory of the mean prediction, in rows."""
ERROR_ROWS = 128
"""Memory of the error level, in labelled rows."""
MIN_LABELS = 32
"""Labelled rows before the error speaks for the signals."""
COMPENSATED = ("feature_shift", "output_shift", "entropy")
"""Signals that adaptation can bring back; the input's own shift stays, whatever the model does."""


class Monitor:
    """Knows what is normal, and says how far from it the stream is."""

    def __init__(
        self,
        task: str,
        names: tuple[str, ...],
        calibration: dict[str, Any],
        *,
        guard: GuardLimits,
        detector: str,
        features: str | None = None,
        prior: np.ndarray | None,
        labelled: bool = False,
        decides: bool = False,
    ) -> None:
        self.task = task
        self.names = names
        self.decides = decides
        """Whether the fast adapter decides row by row what serves: then all that it answered is one function."""
        self._bands = calibration["bands"]
        self._loss_scale = float(calibration["loss_scale"])
        self.watch = Watch(names, task, calibration, detector, features)
        self.levels = {name: Level(LEVEL_ROWS) for name in names}
        # What the stream does is read from the model as it was, what serves from the answer that goes out.
        self._stream_levels = {name: Level(LEVEL_ROWS) for name in names} if decides else self.levels
        self.errors = {name: Level(ERROR_ROWS) for name in ("served", "adapted", "version", "frozen")}
        self._prior = None if prior is None else np.asarray(prior, np.float64)
        self._mean_p: F64 | None = None
        self._confidence, self._loss = Level(LEVEL_ROWS), Level(ERROR_ROWS)
        self.fast_guard = Guard(guard, prior=self._prior)
        self.slow_guard = Guard(guard, prior=self._prior)
        self.trust = Trust(self._prior, labelled=labelled)
        self._slow_runs = Runs()

    def observe(self, predicted: Predicted) -> str | None:
        """Take in one batch; returns the fast guard's reason when the adapted answers must not be used."""
        rows, adapted = predicted.base or predicted.rows, predicted.adapted_rows
        count = len(rows.prediction)
        for column, name in enumerate(self.names):
            self.levels[name].update(rows.signals[:, column])
        watched = predicted.watched or rows
        self.watch.rows(watched)
        if self.decides:
            for column, name in enumerate(self.names):
                self._stream_levels[name].update(watched.signals[:, column])
        if rows.mean_p is not None:
            self._confidence.update(rows.confidence)
        if rows.mean_p is not None and np.isfinite(rows.mean_p).all():
            self._mean_p = blend(self._mean_p, rows.mean_p, count, MEAN_ROWS)
        self.trust.observe(predicted, count)
        if adapted is None:
            return self.fast_guard.verdict()
        # One that decides by itself makes use of runs of classes: its mean prediction is no sign of a collapse.
        by, decided = predicted.changed_by, predicted.changed_by is not None
        finite = np.isfinite(adapted.prediction) & np.isfinite(adapted.confidence)
        self.fast_guard.observe(
            rows=count,
            # What it did not change is not its fault.
            finite=bool(finite.all() if by is None else finite[by > 0].all()),
            mean_p_served=None if decided else _double(adapted.mean_p),
            mean_p_frozen=None if decided else _double(predicted.version_mean_p),
        )
        # Labels are the truth: while they come, the proxy has no say.
        if predicted.proxy is not None and not self.trust.labels_come() and np.isfinite(predicted.proxy).all():
            self.fast_guard.proxy(np.clip(predicted.proxy / (4 * self._bands["feature_shift"]["scale"]), -1.0, 1.0))
        return self.fast_guard.verdict()

    def loss(self, prediction: F32, y: np.ndarray) -> F64:
        """Per-row loss: 0/1 error, or squared error over the reference variance; NaN where ``prediction`` is."""
        if self.task == "classification":
            wrong = (prediction != y).astype(np.float64)
        else:
            wrong = (prediction.astype(np.float64) - y) ** 2 / self._loss_scale
        return np.where(np.isfinite(prediction), wrong, np.nan)

    def labelled(self, joined: Joined, epoch: int, number: int, *, fast: bool) -> dict[str, F64]:
        """Take in newly labelled rows; returns the losses (n,) of what was served and of each layer.

        Evidence counts for the function that made the prediction: rows from before the last reset or promotion say
        nothing about what serves now.

        Args:
            joined: the rows.
            epoch: the present fast state.
            number: the present version.
            fast: whether the fast adaptation is what serves now.
        """
        self.trust.label_came()
        losses = {name: self.loss(getattr(joined, name), joined.y) for name in self.errors}
        self.watch.losses(losses["served"])
        now, same_version = joined.epoch == epoch, joined.number == number
        current = (joined.by_fast == fast) & (now if fast else same_version)
        if self.decides:
            current = now & same_version
        self.errors["served"].update(losses["served"][current])
        self._loss.update(self._surprise(joined, losses["served"])[current])
        self.errors["adapted"].update(losses["adapted"][now])
        self.errors["version"].update(losses["version"][same_version])
        self.errors["frozen"].update(losses["frozen"])
        harm = losses["adapted"] - losses["frozen" if self.decides else "version"]
        known = now & np.isfinite(harm)
        if known.any():
            self.fast_guard.paired(harm[known].clip(-1.0, 1.0))
            self.trust.weigh(joined.y[known], -harm[known].clip(-1.0, 1.0))
        harm = losses["version"] - losses["frozen"]
        known = same_version & np.isfinite(harm)
        if number and known.any():
            # A version is judged by all classes: one run of the class that it is bad at must not end it.
            self.slow_guard.paired(self._slow_runs.means(joined.y[known], harm[known].clip(-1.0, 1.0)))
        return losses

    def _surprise(self, joined: Joined, wrong: F64) -> F64:
        """(n,) Brier score of the emitted answer, (confidence - right)^2, or the loss of a regression."""
        if self.task == "regression":
            return wrong
        surprise: F64 = (joined.confidence.astype(np.float64) - (1.0 - wrong)) ** 2
        return surprise

    def trusted(self) -> bool:
        """Whether the fast adaptation may answer records; else it runs in shadow."""
        return self.fast_guard.verdict() is None and self.trust.earned()

    def deviations(self) -> dict[str, float]:
        """How far each level is above its reference, in units of its band; NaN before the first value."""
        return self._deviations(self.levels)

    def stream_deviations(self) -> dict[str, float]:
        """The same of the version's signals, whatever serves: what tells the kind of a shift."""
        return self._deviations(self._stream_levels)

    def _deviations(self, levels: dict[str, Level]) -> dict[str, float]:
        result = {}
        for name, level in levels.items():
            band = self._bands[name]
            result[name] = (level.value - band["mean"]) / band["band"] if level.rows >= LEVEL_ROWS / 4 else math.nan
        band = self._bands["error"]
        error = self.errors["served"]
        result["error"] = (error.value - band["mean"]) / band["band"] if error.rows >= MIN_LABELS else math.nan
        return result

    def value(self) -> tuple[float, str]:
        """The regulated variable in units of its band, and which signal it is.

        Labels are the truth: while there are any, the error alone decides. Without them it is the worst of the signals
        that adaptation can bring back. One-sided: better than the reference is not a disturbance. NaN when nothing is
        measured yet: the regulator then goes by what it had.
        """
        deviations = self.deviations()
        if math.isfinite(deviations["error"]):
            return max(0.0, deviations["error"]), "error"
        candidates = [(deviations[name], name) for name in COMPENSATED if name in deviations]
        finite = [pair for pair in candidates if math.isfinite(pair[0])]
        if not finite:
            return math.nan, "none"
        worst, name = max(finite)
        return max(0.0, worst), name

    def signals(self) -> dict[str, float]:
        """Current levels for the metrics."""
        values = {name: level.value for name, level in self.levels.items()}
        values["disagreement"] = self.trust.disagreement.value
        values["error"], values["loss"] = self.errors["served"].value, self._loss.value
        if self._prior is not None:
            values["confidence"] = self._confidence.value
            values["class_divergence"] = math.nan if self._mean_p is None else divergence(self._mean_p, self._prior)
        return values

    def evidence(self) -> dict[str, float]:
        """log10 of the e-values behind the guards."""
        fast, slow = self.fast_guard.evidence, self.slow_guard.evidence
        return {
            "harm": fast["harm_evidence"],
            "proxy_harm": fast["proxy_evidence"],
            "version_harm": slow["harm_evidence"],
        }

    def signal_names(self) -> list[str]:
        """Names of `signals`, known before the first batch."""
        return list(self.signals())

    def rebaseline(self, rows: int) -> None:
        """What is coming in now is the new normal for the detectors (not for the bands)."""
        self.watch.rebaseline(rows)

    def forget_fast(self) -> None:
        """The fast adaptation starts again from nothing: the evidence for and against it is void."""
        self.fast_guard.reset()
        self.trust.reset()
        self.errors["adapted"].reset()

    def forget_served(self) -> None:
        """Another function serves: what was measured of the one before doesn't count for it."""
        self.errors["served"].reset()
        self._loss.reset()
        for name in COMPENSATED:
            if name in self.levels:
                self.levels[name].reset()

    def forget_version(self) -> None:
        """The version changed, and with it everything above; an adapter that decides by itself stands beside it."""
        if not self.decides:
            self.forget_fast()
            self.trust.forget_failures()
        self.forget_served()
        self.slow_guard.reset()
        self._slow_runs.reset()
        self.errors["version"].reset()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "levels": {name: level.state_dict() for name, level in self.levels.items()},
            "stream_levels": {name: level.state_dict() for name, level in self._stream_levels.items()},
            "errors": {name: level.state_dict() for name, level in self.errors.items()},
            "mean_p": self._mean_p,
            "confidence": self._confidence.state_dict(),
            "loss": self._loss.state_dict(),
            "watch": self.watch.state_dict(),
            "fast_guard": self.fast_guard.state_dict(),
            "slow_guard": self.slow_guard.state_dict(),
            "trust": self.trust.state_dict(),
            "slow_runs": self._slow_runs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for name, level in self.levels.items():
            level.load_state_dict(state["levels"][name])
        for name, level in self._stream_levels.items():
            level.load_state_dict(state["stream_levels"][name])
        for name, level in self.errors.items():
            level.load_state_dict(state["errors"][name])
        self.watch.load_state_dict(state["watch"])
        self._mean_p = state["mean_p"]
        self._confidence.load_state_dict(state["confidence"])
        self._loss.load_state_dict(state["loss"])
        self.fast_guard.load_state_dict(state["fast_guard"])
        self.slow_guard.load_state_dict(state["slow_guard"])
        self.trust.load_state_dict(state["trust"])
        self._slow_runs.load_state_dict(state["slow_runs"])


def _double(mean_p: F32 | None) -> F64 | None:
    return None if mean_p is None else mean_p.astype(np.float64)
