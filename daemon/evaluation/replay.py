"""A recorded stream through the daemon's own loop: predict, answer, score, and only then learn.

Nothing here decides anything: batches go through `daemon.loop.Loop`, built from the user's settings. Streams are in
memory, the slow loop learns inline, so that a replay gives the same answers every time. A label comes once the row
``delay`` rows after its own is answered, whatever the recording's times say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from adapters.slow import optimizers
from daemon.assembly import Worker, build, warm_up
from daemon.bundle import Bundle
from daemon.evaluation.answers import (
    Frozen,
    Progress,
    Replayed,
    asked_in_batches,
    empty,
    frozen_answers,
    same_as_frozen,
    write_rows,
)
from daemon.evaluation.measure import Backwards, Memory, Stopwatch
from daemon.evaluation.noting import line, noted
from daemon.evaluation.recording import I64, Plan, Recording, ReplayLabels, ReplaySource, batches
from daemon.loop import Loop
from daemon.opening import Streams
from daemon.predicted import Predicted
from daemon.records import F32, Batch, Bools, RawBatch
from daemon.settings import Settings
from daemon.streams.null import NullSink

__all__ = ["Plan", "Progress", "Recording", "Replayed", "replay"]


class _Observed(Loop):
    """The daemon's loop, which keeps what its latest batch was answered with."""

    latest: Predicted | None = None

    def _answer(self, raw: RawBatch, batch: Batch, predicted: Predicted | None, clean: bool) -> None:
        super()._answer(raw, batch, predicted, clean)
        self.latest = predicted


def replay(
    settings: Settings,
    bundle: Bundle,
    recording: Recording,
    plan: Plan,
    *,
    progress: Progress | None = None,
    frozen: Replayed | None = None,
    asks: Mapping[int, I64] | None = None,
) -> Replayed:
    """Replay ``recording`` through the daemon as ``settings`` configure it.

    Args:
        settings: of the daemon; streams, batch size and checkpoints are not looked at, the slow loop learns inline.
        bundle: is not changed.
        recording: rows of the bundle's shape.
        plan: batches, delay and share of the labels.
        progress: called after each batch.
        frozen: the frozen model's answers in the same batches, where they are known already.
        asks: by row, rows of the recording to be answered as if they came after it; nothing is learnt from them.

    Raises:
        HomeostatError: as for `homeostat run`.
    """
    torch.manual_seed(plan.seed)
    torch.set_num_threads(settings.threads)
    slow = settings.slow.model_copy(update={"inline": True})
    settings = settings.model_copy(update={"slow": slow})
    twin = Frozen(settings, bundle)
    if plan.label_share and slow.enabled:
        # Imports that take seconds: in a daemon they come beside the stream.
        optimizers.check(slow.optimizer, lr=slow.lr)
    memory = Memory(twin.device)
    with noted() as notes:
        source, labels = ReplaySource(recording), ReplayLabels(recording, plan) if plan.label_share else None
        worker = _worker(settings, bundle, source, labels)
        warm_up(worker)
        result = empty(len(recording))
        result.warnings = [line(note) for note in notes if note["log_level"] == "warning"]
        ask = _asker(settings, bundle, worker, plan) if asks else None
        pending = sorted((asks or {}).items())
        watch, backwards = Stopwatch(), Backwards()
        loop = worker.loop
        assert isinstance(loop, _Observed)
        with _slow_apart(worker, backwards) as slow_watch, backwards.counting():
            for part in batches(len(recording), plan.batch_rows):
                raw, ran, before = source.batch(part), backwards.count, len(notes)
                if labels is not None:
                    labels.answered(part.stop)
                with watch.running():
                    loop.process(raw)
                _note(result, part, recording.valid[part], loop.latest)
                result.backward[part] = backwards.count > ran
                result.states.append(loop.regulator.state.value)
                result.decisions += [(part.stop - 1, line(note)) for note in notes[before:]]
                while pending and pending[0][0] < part.stop and ask is not None:
                    row, rows = pending.pop(0)
                    result.asked[row] = ask(recording.x[rows])
                if progress is not None:
                    progress(part.stop)
        result.seconds, result.slow_seconds = watch.seconds - slow_watch.seconds, slow_watch.seconds
        result.peak_bytes = memory.peak_bytes()
        final = _asker(settings, bundle, worker, plan)
        result.source_error = twin.source_error(final, plan.batch_rows)
    result.frozen_source_error = twin.source_error(lambda x: twin.answer(x).prediction, plan.batch_rows)
    result.same = same_as_frozen(result, frozen or frozen_answers(twin, recording, plan))
    return result


def _worker(settings: Settings, bundle: Bundle, source: ReplaySource, labels: ReplayLabels | None) -> Worker:
    # A copy of the model: the worker hangs its hooks on it.
    own = replace(bundle, model=copy.deepcopy(bundle.model))
    streams = Streams(source, NullSink(), labels)
    return build(settings, own, lambda decoder: streams, labels is not None, loop_type=_Observed)


def _asker(settings: Settings, bundle: Bundle, worker: Worker, plan: Plan) -> Callable[[F32], F32]:
    """Answers (n,) to rows (n, *shape) by the served function as it is at that moment.

    A second worker is asked, on a copy of the state: whatever it counts or keeps, the replay does not see.
    """
    other = _worker(settings, bundle, ReplaySource(_no_rows(bundle)), None).loop.resident

    def ask(x: F32) -> F32:
        other.load_state_dict(worker.loop.resident.state_dict())
        serve = worker.loop.actions.trusted
        return asked_in_batches(lambda rows: other.predict(rows, adapt=False, serve=serve).rows.prediction, x, size)

    size = plan.batch_rows
    return ask


def _no_rows(bundle: Bundle) -> Recording:
    shape = (0, *bundle.manifest.input_shape)
    return Recording(x=np.empty(shape, np.float32), y=np.empty(0, np.int64), times_s=np.empty(0))


@contextmanager
def _slow_apart(worker: Worker, backwards: Backwards) -> Iterator[Stopwatch]:
    """The slow loop on a stopwatch of its own, its backward passes not counted: in a daemon it has its own thread."""
    watch, learner = Stopwatch(), worker.loop.actions.learner
    step = learner.step

    def apart(*args: Any) -> Any:
        with watch.running(), backwards.paused():
            return step(*args)

    learner.step = apart  # type: ignore[method-assign, assignment]
    yield watch


def _note(result: Replayed, part: slice, valid: Bools, predicted: Predicted | None) -> None:
    """Keep a batch's answers; what was answered as invalid stays NaN."""
    if predicted is None:
        return
    rows = np.flatnonzero(valid) + part.start
    write_rows(result, rows, predicted.rows)
    result.adapted[rows] = predicted.served_adapted or predicted.number != 0
