"""The model on its device: the frozen original, the promoted versions, and the fast adapter on top.

Three models in layers, each the safe ground of the next: *frozen* (as packed), *version* (frozen plus what the slow
loop promoted), *served* (version plus fast adaptation). While two layers are the same function, only one of them runs.
An adapter that decides by itself stays on the frozen model, whose source statistics it needs, through every promotion:
it stands beside the version, and late labels choose between them (`daemon.beside`).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import adapters.fast as fast
import adapters.slow as slow
from adapters.features import FeatureTap, find_head
from daemon.beside import Beside, join_version
from daemon.device import upload
from daemon.labels import numbers_of
from daemon.predicted import Predicted, sampled, scatter
from daemon.records import F32
from daemon.signals import Meter, Rows
from daemon.versions import Version, Versions


class Resident:
    """Predicts batches, owns versions, swaps them at batch boundaries."""

    def __init__(
        self,
        model: nn.Module,
        meter: Meter,
        *,
        task: str,
        reference: Any,
        fast_name: str,
        fast_options: dict[str, Any],
        device: torch.device,
        twin_share: float = 1.0,
        ring: int = 3,
        autocast: bool = False,
        head: str | None = None,
    ) -> None:
        self.frozen = model.to(device).eval()
        self.task = task
        self.device = device
        self.meter = meter
        self._reference = reference
        self._fast_name, self._fast_options = fast_name, fast_options
        self._twin_share = twin_share
        self._autocast = autocast
        self._head = head
        self._kind = "values" if task == "regression" else "logits"
        self.versions = Versions(ring, device)
        self._row = 0
        self.epoch = 0
        """Counts the fast states: evidence gathered on one says nothing about the next."""
        self.beside = Beside()
        self._outputs: Tensor | None = None
        self._mount(self.frozen)
        self._watch(self.frozen)

    def _mount(self, model: nn.Module) -> None:
        """Put a fresh fast adapter on a version."""
        options = {"head": self._head, **self._fast_options} if self._head else self._fast_options
        self.adapter = fast.build(self._fast_name, model, self._reference, **options)
        self.deciding = self.adapter if isinstance(self.adapter, fast.DecidingAdapter) else None
        """The adapter, where it decides by itself when to differ from the frozen model."""
        self.gain = 0.0
        """The controller's. A deciding adapter is served in full or not at all, and not by this."""
        self.adapter.gain = 0.0 if self.deciding is None else 1.0

    def _watch(self, version_model: nn.Module) -> None:
        self.version_model = version_model
        head = self._head or find_head(version_model)
        self._tap = FeatureTap(version_model, head) if head else None

    def predict(self, x: F32, *, adapt: bool, serve: bool, slots: NDArray[np.int64] | None = None) -> Predicted:
        """Answer ``x`` (B, *shape), then adapt when asked. Every output is the one before the update.

        Args:
            x: finite rows.
            adapt: whether the fast method may learn from them.
            serve: whether its answer goes out; else it runs in shadow, and only while it adapts.
            slots: (B,) whose fast state each row adapts; None: one state for all.
        """
        x_B, count = self._upload(x), len(x)
        if self.deciding is not None:
            return self._predict_deciding(self.deciding, x_B, adapt=adapt, serve=serve)
        # At gain 0 the adapter's answer is the version's, to the bit; it may still gather statistics.
        differs = self.adapter.gain > 0.0
        adapted, seconds = None, None
        if adapt or (serve and differs):
            started = time.monotonic()
            adapted = self._measure_adapted(x_B, slots, adapt=adapt)
            seconds = time.monotonic() - started if adapt else None
        sampled = self._sample(count)
        served_adapted = adapted is not None and differs and serve
        blank = np.full(count, np.nan, np.float32)
        weight = np.ones(count, np.float32)
        if served_adapted and adapted is not None:
            rows, version = adapted, blank
            if len(sampled):
                twin = self.measure_version(self._rows(x_B, sampled))
                version = scatter(blank, sampled, twin.prediction)
            weight[:] = 1.0 / self._twin_share
        else:
            rows = twin = adapted if adapted is not None and not differs else self.measure_version(x_B)
            version = rows.prediction
        predicted = Predicted(
            rows, blank, version, version, weight, self.current.number, served_adapted, adapt_seconds=seconds
        )
        if adapted is not None and differs:
            predicted.adapted, predicted.adapted_rows = adapted.prediction, adapted
            if len(sampled):
                column = self.meter.names.index("feature_shift")
                both = sampled if served_adapted else np.arange(count)
                predicted.proxy = adapted.signals[both, column] - twin.signals[:, column]
                predicted.version_mean_p = twin.mean_p
        self._row += count
        return self._with_frozen(predicted, x_B, sampled)

    def _with_frozen(self, predicted: Predicted, x_B: Tensor, sampled: np.ndarray | None = None) -> Predicted:
        """With the frozen model's answers to a sample of the rows, where it is not the version."""
        if self.current.number:
            sampled = self._sample(len(x_B)) if sampled is None else sampled
            predicted.weight[:] = 1.0 / self._twin_share
            predicted.frozen = np.full(len(x_B), np.nan, np.float32)
            if len(sampled):
                frozen = self.measure_frozen(self._rows(x_B, sampled))
                predicted.frozen = scatter(predicted.frozen, sampled, frozen.prediction)
        return predicted

    def _predict_deciding(self, adapter: fast.DecidingAdapter, x_B: Tensor, *, adapt: bool, serve: bool) -> Predicted:
        """The same with an adapter that decides by itself; it brings the frozen model's answers along."""
        first, started = adapter.numbered, time.monotonic()
        number, blank = self.current.number, np.full(len(x_B), np.nan, np.float32)
        rows = self._measure_adapted(x_B, None, adapt=adapt) if serve else self.measure_version(x_B)
        by, answer = np.zeros(len(x_B), np.int8), rows.prediction
        outputs = self._outputs if serve else None
        predicted = Predicted(rows, answer, answer, answer, np.ones(len(x_B), np.float32), number)
        if serve and (by := adapter.changed_by).any():
            seen = adapter.frozen
            predicted.version = predicted.frozen = blank if seen is None else seen.spread(len(x_B))
            predicted.weight[:] = 1.0 / adapter.frozen_share
            predicted.served_adapted, predicted.adapted_rows = True, rows
            if seen is not None:
                x = self._rows(x_B, seen.at)
                predicted.watched = self.meter.measure(x, seen.outputs, seen.features, kind=self._kind)
            if (by > 1).any():
                whole = seen is not None and len(seen.at) == len(x_B) and not (by & 1).any()
                predicted.base = predicted.watched if whole else self._measure_outputs(x_B, adapter.base_outputs)
        predicted.adapt_seconds = time.monotonic() - started if serve and adapt else None
        predicted.changed_by, predicted.first = by, first if serve else None
        self._row += len(x_B)
        if number and outputs is not None:
            own, features = self._plain(x_B)
            join_version(predicted, self.meter, x_B, outputs, own, features, self._kind, self.beside.way)
        elif number:
            predicted.adapted = blank
            return self._with_frozen(predicted, x_B)
        return predicted

    def learn(self, x: F32, y: NDArray[Any], places: NDArray[np.float32], epochs: NDArray[np.float32]) -> None:
        """Give late labels to a fast method that learns from them.

        Args:
            x: (n, *shape) rows as they were predicted.
            y: (n,) labels.
            places: (n,) their numbers in the fast state of that time, modulo `daemon.labels.PLACES`.
            epochs: (n,) which fast state that was.
        """
        if not self.adapter.labelled:
            return
        labels = torch.from_numpy(y.astype(np.float32 if self.task == "regression" else np.int64)).to(self.device)
        numbers = None
        if self.deciding is not None:
            numbers = torch.from_numpy(numbers_of(places, epochs == self.epoch, self.deciding.numbered))
        self.adapter.learn(self._upload(x), labels, numbers)

    def _measure_adapted(self, x_B: Tensor, slots: NDArray[np.int64] | None, *, adapt: bool) -> Rows:
        call = self.adapter.forward if adapt else self.adapter.predict
        given = None if slots is None else torch.from_numpy(slots)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            self._outputs = call(x_B, check_finite=False, slots=given)
        return self._measure_outputs(x_B, self._outputs)

    def _measure_outputs(self, x_B: Tensor, outputs: Tensor | None) -> Rows:
        assert outputs is not None
        kind = "probs" if self.adapter.outputs == "probs" else self._kind
        return self.meter.measure(x_B, outputs, self.adapter.features, kind=kind)

    def _sample(self, count: int) -> np.ndarray:
        return sampled(self._row, count, self._twin_share)

    def _rows(self, x_B: Tensor, index: np.ndarray) -> Tensor:
        return x_B if len(index) == len(x_B) else x_B[torch.from_numpy(index).to(self.device)]

    def measure_version(self, x: F32 | Tensor) -> Rows:
        """The current version's answer without fast adaptation: the safe one."""
        x_B = self._upload(x) if isinstance(x, np.ndarray) else x
        outputs, features = self._plain(x_B)
        return self.meter.measure(x_B, outputs, features, kind=self._kind)

    def measure_frozen(self, x: F32 | Tensor) -> Rows:
        """The frozen model's answer."""
        x_B = self._upload(x) if isinstance(x, np.ndarray) else x
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.meter.measure(x_B, self.frozen(x_B), None, kind=self._kind)

    def _plain(self, x_B: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            outputs = self.version_model(x_B)
        return outputs, None if self._tap is None else self._tap.features

    def _upload(self, x: F32) -> Tensor:
        return upload(x, self.device)

    def set_gain(self, gain: float) -> None:
        """The fast actuator, in [0, 1]."""
        self.gain = gain
        if self.deciding is None and gain != self.adapter.gain:
            self.adapter.gain = gain

    def set_alert(self, alert: bool) -> None:
        """Tell a deciding adapter whether the detectors see a shift."""
        if self.deciding is not None:
            self.deciding.alert = alert

    def reset_fast(self) -> None:
        """Forget all fast adaptation; the gain is the regulator's and stays."""
        self.adapter.reset()
        self.beside.fast_reset()
        self.epoch += 1

    @property
    def current(self) -> Version:
        """The version that serves; number 0 is the frozen model."""
        return self.versions.current

    def promote(self, delta: dict[str, Tensor], record: dict[str, Any], *, over_frozen: bool = False) -> Version:
        """Serve the current version (or the frozen model) plus ``delta`` from the next batch on; the old one is kept.

        Raises:
            ValueError: the delta does not fit the model; everything stays as it was.
        """
        model = slow.apply_delta(self.frozen, delta if over_frozen else {**self.current.delta, **delta})
        version = self.versions.add(delta, record, over_frozen=over_frozen)
        self._serve(model)
        return version

    def rollback(self, number: int = 0) -> Version:
        """Serve a version of the ring or a pinned one again, or the frozen model (0); the current one is kept.

        Raises:
            VersionError: there is no such version any more; everything stays as it was.
        """
        model = self._build(self.versions.find(number))
        version = self.versions.go_to(number)
        if not number:
            self.beside.restart()
        self._serve(model)
        return version

    def _build(self, version: Version) -> nn.Module:
        return slow.apply_delta(self.frozen, version.delta) if version.delta else self.frozen

    def _serve(self, model: nn.Module) -> None:
        if self._tap is not None:
            self._tap.close()
        self._watch(model)
        if self.deciding is None:
            self.epoch += 1
            self._mount(model)

    def state_dict(self) -> dict[str, Any]:
        """Versions and the fast state; the frozen weights are the bundle's."""
        return {
            **self.versions.state_dict(),
            "row": self._row,
            "epoch": self.epoch,
            "gain": self.gain,
            "fast": self.adapter.state_dict(),
            "beside": self.beside.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.versions.load_state_dict(state)
        self._row = int(state["row"])
        self._serve(self._build(self.current))
        self.epoch = int(state["epoch"])
        self.adapter.load_state_dict(state["fast"])
        self.beside.load_state_dict(state["beside"])
        self.set_gain(float(state["gain"]))
