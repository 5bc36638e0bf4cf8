"""What the daemon is compared with: the frozen model, copied labels, refitting by the clock, fast methods unguarded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

import adapters.fast as fast
import adapters.slow as slow
from adapters.slow import optimizers
from adapters.slow.snapshot import Snapshot
from daemon.bundle import Bundle
from daemon.evaluation.answers import (
    Frozen,
    Progress,
    Replayed,
    answers,
    asked_in_batches,
    empty,
    frozen_answers,
    same_as_frozen,
    write_rows,
)
from daemon.evaluation.measure import Backwards, Memory, Stopwatch
from daemon.evaluation.recording import I64, Clock, Plan, Recording, batches
from daemon.records import F32
from daemon.settings import Settings
from daemon.signals import Rows
from daemon.streams.codecs import encode_predictions

FROZEN, BLIND, REFIT = "frozen", "blind copy", "periodic refit"
REFIT_ROWS = 500
"""Newly labelled rows between two fits."""


class RefusedError(ValueError):
    """A method can't serve this model; the message says why."""


class Baseline(Protocol):
    """Answers a stream without the daemon."""

    adapts: bool
    """Whether it ever answers by anything but the frozen model."""
    has_model: bool
    """Whether it answers inputs at all, so that it can be asked about the source."""

    def answer(self, x: F32) -> Rows:
        """Answer (B, *shape) rows as they came, then learn what can be learnt from them."""

    def ask(self, x: F32) -> F32:
        """(n,) predictions for finite rows (n, *shape), without learning."""

    def learn(self, x: F32, y: NDArray[Any]) -> None:
        """Take late labels, in the hot path."""

    def study(self, x: F32, y: NDArray[Any]) -> None:
        """Take late labels, beside the stream."""


class _Plain:
    """What most baselines don't do."""

    adapts = has_model = True

    def learn(self, x: F32, y: NDArray[Any]) -> None:
        """Nothing."""

    def study(self, x: F32, y: NDArray[Any]) -> None:
        """Nothing."""


class FrozenModel(_Plain):
    """The model as it was packed."""

    adapts = False

    def __init__(self, twin: Frozen) -> None:
        self.answer = twin.answer

    def ask(self, x: F32) -> F32:
        """As ever."""
        return self.answer(x).prediction


class BlindCopy(_Plain):
    """The newest label that is known answers every row: what looks like learning where labels come in runs.

    Before the first label it is the reference's commonest class, or the mean of its outputs.
    """

    has_model = False

    def __init__(self, twin: Frozen) -> None:
        prior = twin.reference.class_prior
        self._newest = twin.reference.output_mean if prior is None else float(prior.argmax())

    def answer(self, x: F32) -> Rows:
        """The newest label, whatever the rows are."""
        prediction = self.ask(x)
        return Rows(prediction, np.zeros_like(prediction), np.empty((len(x), 0), np.float32), None)

    def ask(self, x: F32) -> F32:
        """The newest label."""
        return np.full(len(x), self._newest, np.float32)

    def learn(self, x: F32, y: NDArray[Any]) -> None:
        """Keep the last."""
        self._newest = float(y[-1])


class Refit(_Plain):
    """Every ``every`` labels the frozen model is fitted anew to all labels so far and the reference exemplars, and the
    fit is served, whatever it is worth: what a nightly job does. What may move is what the slow loop may move.
    """

    def __init__(self, twin: Frozen, settings: Settings, every: int, seed: int) -> None:
        given = settings.slow
        try:
            self._method = slow.get(given.name)
            problem = self._method.check(twin.model) or optimizers.check(given.optimizer, lr=given.lr)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise RefusedError(problem)
        self._options = slow.BurstOptions(
            steps=given.steps,
            batch_size=given.batch_rows,
            optimizer=given.optimizer,
            lr=given.lr,
            reference_share=given.reference_share,
        )
        self._twin, self._every, self._seed = twin, every, seed
        self._model = twin.model
        self._x: list[F32] = []
        self._y: list[NDArray[Any]] = []
        self._fresh = self._fits = 0

    def answer(self, x: F32) -> Rows:
        """By the latest fit."""
        with torch.inference_mode():
            return answers(self._model(self._twin.upload(x)), self._twin.kind)

    def ask(self, x: F32) -> F32:
        """By the latest fit."""
        return self.answer(x).prediction

    def study(self, x: F32, y: NDArray[Any]) -> None:
        """Keep the rows; fit when there are enough new ones."""
        usable = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
        self._x.append(x[usable])
        self._y.append(y[usable])
        self._fresh += int(usable.sum())
        if self._fresh < self._every:
            return
        self._fresh, self._fits = 0, self._fits + 1
        reference, dtype = self._twin.reference, np.int64 if self._twin.task == "classification" else np.float32
        memory = Snapshot(
            np.concatenate(self._x),
            np.concatenate(self._y).astype(dtype),
            reference.exemplars_x.cpu().numpy(),
            reference.exemplars_y.cpu().numpy().astype(dtype),
        )
        task: slow.Task = "regression" if self._twin.task == "regression" else "classification"
        seed = 1_000 * self._seed + self._fits
        fit = slow.run_burst(self._twin.model, self._method, memory, self._options, task=task, seed=seed)
        if fit.delta:
            self._model = slow.apply_delta(self._twin.model, fit.delta)


class RawMethod(_Plain):
    """A fast method as a user of the library runs it: at full gain on every batch, its answer served, no guard."""

    def __init__(self, twin: Frozen, name: str, head: str | None) -> None:
        self._twin = twin
        model = copy.deepcopy(twin.model)
        try:
            self._adapter = fast.build(name, model, twin.reference, **({"head": head} if head else {}))
        except ValueError as error:
            raise RefusedError(str(error)) from None
        self._kind = "probs" if self._adapter.outputs == "probs" else twin.kind

    def answer(self, x: F32) -> Rows:
        """Predict, then adapt."""
        return answers(self._adapter(self._twin.upload(x)).detach(), self._kind)

    def ask(self, x: F32) -> F32:
        """Predict only."""
        return answers(self._adapter.predict(self._twin.upload(x)), self._kind).prediction

    def learn(self, x: F32, y: NDArray[Any]) -> None:
        """For methods that learn from labels."""
        if self._adapter.labelled:
            dtype = np.float32 if self._twin.task == "regression" else np.int64
            self._adapter.learn(self._twin.upload(x), torch.from_numpy(y.astype(dtype)).to(self._twin.device))


def baseline(name: str, twin: Frozen, settings: Settings, head: str | None, plan: Plan, refit_rows: int) -> Baseline:
    """The baseline called ``name``; any other name is a fast method's.

    Raises:
        RefusedError: it can't serve this model.
    """
    if name == FROZEN:
        return FrozenModel(twin)
    if name == BLIND:
        return BlindCopy(twin)
    if name == REFIT:
        return Refit(twin, settings, refit_rows, plan.seed)
    return RawMethod(twin, name, head)


def replay_baseline(
    name: str,
    settings: Settings,
    bundle: Bundle,
    recording: Recording,
    plan: Plan,
    *,
    refit_rows: int = REFIT_ROWS,
    progress: Progress | None = None,
    frozen: Replayed | None = None,
    asks: Mapping[int, I64] | None = None,
) -> Replayed:
    """Replay ``recording`` through a baseline, as `daemon.evaluation.replay.replay` does through the daemon.

    Before a batch it gets the labels that are known: those of rows more than ``delay`` rows before the batch. An
    answer that is not finite is not sent, and neither is one to a row that is not.

    Raises:
        RefusedError: it can't serve this model.
    """
    torch.manual_seed(plan.seed)
    torch.set_num_threads(settings.threads)
    twin = Frozen(settings, bundle)
    if name == REFIT:
        optimizers.check(settings.slow.optimizer, lr=settings.slow.lr)  # imports that are not the method's memory
    memory = Memory(twin.device)
    model = baseline(name, twin, settings, bundle.manifest.head, plan, refit_rows)
    result, clock, pending = empty(len(recording)), Clock(recording, plan), sorted((asks or {}).items())
    watch, aside, backwards = Stopwatch(), Stopwatch(), Backwards()
    with backwards.counting():
        for part in batches(len(recording), plan.batch_rows):
            ids, ran = [str(row) for row in range(part.start, part.stop)], backwards.count
            known = clock.due(part.start)
            valid = recording.valid[part]
            x = recording.x[part][valid] if isinstance(model, FrozenModel) else recording.x[part]
            if len(known):
                with aside.running(), backwards.paused():
                    model.study(recording.x[known], recording.y[known])
            with watch.running():
                if len(known):
                    model.learn(recording.x[known], recording.y[known])
                rows = model.answer(x)
                # What a bare loop does: an answer in JSON for each row.
                encode_predictions(twin.task, ids[: len(x)], np.nan_to_num(rows.prediction), rows.confidence, 0, name)
            write_rows(result, np.arange(part.start, part.stop)[valid], _only(rows, valid))
            result.adapted[part] = model.adapts
            result.backward[part] = backwards.count > ran
            while pending and pending[0][0] < part.stop:
                row, asked = pending.pop(0)
                result.asked[row] = asked_in_batches(model.ask, recording.x[asked], plan.batch_rows)
            if progress is not None:
                progress(part.stop)
    result.seconds, result.slow_seconds = watch.seconds, aside.seconds
    result.peak_bytes = memory.peak_bytes()
    if model.has_model:
        result.source_error = twin.source_error(model.ask, plan.batch_rows)
    result.frozen_source_error = twin.source_error(lambda x: twin.answer(x).prediction, plan.batch_rows)
    result.same = same_as_frozen(result, frozen or frozen_answers(twin, recording, plan))
    return result


def _only(rows: Rows, valid: NDArray[np.bool_]) -> Rows:
    """The rows of a batch that are finite, if all were answered."""
    if len(rows.prediction) != len(valid):
        return rows
    return Rows(rows.prediction[valid], rows.confidence[valid], rows.signals[valid], None)
