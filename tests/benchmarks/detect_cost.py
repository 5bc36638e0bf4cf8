"""What an update costs: one value at a time, and in batches of 64, beside the forward of a small CNN."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import detectors
from tests.benchmarks import detect_rivals as rivals
from tests.benchmarks.detect_rivals import F64
from tests.benchmarks.detect_streams import FEATURES
from tests.benchmarks.detect_subjects import Subject, subjects

BATCH = 64
WARM_UP = 320
SECONDS = 0.3
REFERENCE = 5000
MMD_REFERENCE, MMD_WINDOW = 500, 50


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Microseconds of CPU."""

    subject: str
    reads: str
    single_us: float
    """An update with one value, or row of ``FEATURES``."""
    batch_us: float | None
    """The same within a batch of 64; None where the library has no call for a batch."""
    share: float | None = None
    """Of rows: time of a batch over that of the CNN's forward."""


def costs(names: list[str]) -> list[Cost]:
    """Of the subjects ``names``, at their default thresholds."""
    made = []
    forward_us = _forward_us() if any(subjects()[name].reads == "rows" for name in names) else 0.0
    for name in names:
        subject = subjects()[name]
        if subject.kind == "frouros" and subject.calibrated:
            continue
        try:
            made.append(_cost(subject, forward_us))
        except ValueError:  # frouros' ADWIN refuses negative values
            continue
    if rivals.has_frouros() and any(subjects()[name].kind == "frouros" for name in names):
        made.append(_mmd_streaming())
    return made


def _cost(subject: Subject, forward_us: float) -> Cost:
    rng = np.random.default_rng(0)
    shape = (FEATURES,) if subject.reads == "rows" else ()
    values, reference = rng.normal(size=(REFERENCE, *shape)), rng.normal(size=(REFERENCE, *shape))
    if not subject.calibrated:
        from tests.benchmarks.detect_subjects import build

        watch = build(subject, reference, 1000.0, 0)
        watch.update_many(values[:WARM_UP])
        single = _timed(lambda index: watch.update_many(values[index : index + 1]))
        return Cost(subject=subject.name, reads=subject.reads, single_us=single, batch_us=None)
    detector = detectors.build(subject.name)
    if detector.domain in ("binary", "unit"):
        values, reference = ((x > 1.0).astype(np.float64) for x in (values, reference))
    detector = detector.fit(reference)
    detector.update_many(values[:WARM_UP])
    numbers: Any = values if shape else values.tolist()
    single = _timed(lambda index: detector.update(numbers[index]))
    batches = REFERENCE // BATCH
    batch = _timed(lambda index: detector.update_many(_part(values, index % batches)))
    share = batch / forward_us if shape else None
    return Cost(subject=subject.name, reads=subject.reads, single_us=single, batch_us=batch / BATCH, share=share)


def _part(values: F64, number: int) -> F64:
    return values[number * BATCH : (number + 1) * BATCH]


def _timed(call: Callable[[int], object]) -> float:
    """Median microseconds of a call, over slices of some calls each."""
    slices, index, each = [], 0, 1
    deadline = time.process_time() + SECONDS
    while len(slices) < 3 or (time.process_time() < deadline and len(slices) < 200):
        began = time.process_time()
        for _ in range(each):
            call(index % REFERENCE)
            index += 1
        took = time.process_time() - began
        if took < 2e-3:  # too short for the clock
            each *= 2
            continue
        slices.append(took / each)
    return 1e6 * statistics.median(slices)


def _forward_us() -> float:
    """Of the benchmark's CNN on a batch of 64."""
    import torch

    from tests.benchmarks.fast_models import make

    torch.set_num_threads(1)
    made = make("cnn_bn2d")
    x = made.batches(BATCH, 1)[0]
    with torch.inference_mode():
        return _timed(lambda index: made.model(x))


def _mmd_streaming() -> Cost:
    from frouros.detectors.data_drift import MMDStreaming

    rng = np.random.default_rng(0)
    detector: Any = MMDStreaming(window_size=MMD_WINDOW)
    detector.fit(X=rng.normal(size=(MMD_REFERENCE, FEATURES)))
    rows = rng.normal(size=(REFERENCE, FEATURES))
    for row in rows[:WARM_UP]:
        detector.update(value=row)
    single = _timed(lambda index: detector.update(value=rows[index]))
    return Cost(subject="frouros MMDStreaming", reads="rows", single_us=single, batch_us=None)
