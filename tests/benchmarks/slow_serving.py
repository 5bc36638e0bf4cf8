"""How long the daemon's loop takes for a batch while the slow loop learns beside it, against while it does not.

One process, its own thread for the slow loop, as in service. Phases with and without bursts take turns, so that
whatever else the machine does falls on both. The rows are the source's, with their labels: nothing drifts, serving is
as cheap as it gets, and nothing is left to learn, so that both phases serve the same function. Bursts are asked for one
after the other, whatever they promise, and judged at a level that chance does not reach. In the phases without bursts
an operator holds the version; labels are joined, scored and kept in both.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from daemon.assembly import Worker, build, warm_up
from daemon.bundle import open_bundle
from daemon.evaluation.recording import Plan, Recording, ReplayLabels, ReplaySource
from daemon.opening import Streams
from daemon.records import RawBatch
from daemon.streams.codec_base import assemble
from daemon.streams.null import NullSink
from daemon.versioning.keeper import NoKeeper
from tests.benchmarks.slow_runs import BOTH, settings_of
from tests.benchmarks.slow_streams import BATCH_ROWS
from tests.streams.auto import sources

Result = dict[str, Any]
Times = NDArray[np.float64]

MODELS = ("ageing", "mnist", "cifar")
"""A small perceptron and two convolutional networks, with enough rows of their source that none was trained on."""
DUTIES = (0.5, 1.0)
PAIRS, BATCHES = 10, 50
"""Pairs of phases, and batches of each phase."""
WARM_BATCHES = 40
EVERY_S = {"ageing": 0.01, "mnist": 0.02, "cifar": 0.08}
"""Seconds between two batches: one core can serve about twice as many."""
DELAY = 200
LEAST_LABELS = 32
"""Labels between two bursts: fewer than a batch has, so that one follows the other."""
LEVEL = 1e-9
"""Of the gate."""
DRAWS = 2_000


def measured(model: str, duty: float, *, pairs: int = PAIRS, batches: int = BATCHES) -> Result:
    """Milliseconds of a batch, at the median and the 99th percentile, without and with bursts."""
    torch.set_num_threads(1)
    worker, endless = _worker(model, duty, 2 * pairs * batches + WARM_BATCHES)
    worker.loop.actions.keeper = counting = _Counting()
    warm_up(worker)
    _phase(worker, endless, 0.0, WARM_BATCHES, burst=True)  # the optimiser's imports, and labels to begin with
    alone: list[Times] = []
    beside: list[Times] = []
    busy: list[float] = []
    for pair in range(pairs):
        for burst in (False, True) if pair % 2 else (True, False):
            times, working = _phase(worker, endless, EVERY_S[model], batches, burst=burst)
            (beside if burst else alone).append(times)
            busy += [working] if burst else []
    worker.loop.actions.learner.close(10.0)
    return {
        "model": model, "duty": duty, "cores": os.cpu_count(), "batches": pairs * batches, "busy": float(np.mean(busy)),
        "counts": dict(sorted(counting.ended.items())), **compared(alone, beside),
    }  # fmt: skip


def compared(alone: list[Times], beside: list[Times], seed: int = 0) -> Result:
    """Quantiles of both in ms, their ratios, and an interval of the ratio at p99: phases are drawn anew, in pairs."""
    found: Result = {}
    for name, quantile in (("p50", 0.5), ("p99", 0.99)):
        own, other = (1_000.0 * float(np.quantile(np.concatenate(each), quantile)) for each in (alone, beside))
        found |= {f"{name}_alone": own, f"{name}_beside": other, f"{name}_ratio": other / own}
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(DRAWS):
        drawn = rng.integers(len(alone), size=len(alone))
        own, other = (np.quantile(np.concatenate([each[at] for at in drawn]), 0.99) for each in (alone, beside))
        ratios.append(other / own)
    found["p99_low"], found["p99_high"] = map(float, np.quantile(ratios, [0.025, 0.975]))
    return found


class _Counting(NoKeeper):
    """Counts how bursts end."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()

    def decided(self, event: str, record: Mapping[str, Any], *, version: int | None = None) -> None:
        """One more."""
        self.ended[event] += 1


def _worker(model: str, duty: float, batches: int) -> tuple[Worker, Iterator[RawBatch]]:
    given = settings_of(BOTH, model)
    slow = given.slow.model_copy(update={"duty": duty, "price": 0.0, "min_labels": LEAST_LABELS, "alpha": LEVEL})
    settings = given.model_copy(update={"slow": slow})
    assert settings.bundle is not None
    bundle = open_bundle(settings.bundle, settings.factory, settings.app_dir)
    x, y = sources.get(model).rows("control")
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]
    count = batches * BATCH_ROWS
    # Of the stream as a whole only the labels are kept: its rows come round and round.
    y = y[np.arange(count) % len(y)]
    whole = Recording(x=np.empty((count, 0), np.float32), y=y, times_s=np.arange(count, dtype=np.float64))
    labels = ReplayLabels(whole, Plan(batch_rows=BATCH_ROWS, delay=DELAY))
    worker = build(settings, bundle, lambda decoder: Streams(ReplaySource(whole), NullSink(), labels), True)
    # By what it is told every burst promises something: without a price that is enough to start it.
    worker.loop.actions.learner.worth.source_error = -1.0
    return worker, _stream(x, labels, batches)


def _stream(x: NDArray[np.float32], labels: ReplayLabels, batches: int) -> Iterator[RawBatch]:
    """Rows x (n, *shape) over and over."""
    for start in range(0, batches * BATCH_ROWS, BATCH_ROWS):
        rows = list(range(start, start + BATCH_ROWS))
        times_s, ids = [float(row) for row in rows], [str(row) for row in rows]
        raw = RawBatch(keys=[None] * len(rows), times_s=times_s, partitions=["source/0"] * len(rows), offsets=rows)
        raw.batch = assemble(x[np.array(rows) % len(x)], ids, [None] * len(rows), times_s)
        labels.answered(start + BATCH_ROWS)
        yield raw


def _phase(
    worker: Worker, stream: Iterator[RawBatch], every_s: float, batches: int, *, burst: bool
) -> tuple[Times, float]:
    """Seconds (batches,) of each batch, and the share of them that were served while a burst was under way."""
    loop, learner = worker.loop, worker.loop.actions.learner
    _wait_until_idle(worker)
    loop.resident.versions.held = not burst
    times, working = [], 0
    due = time.perf_counter()
    for _ in range(batches):
        raw = next(stream)
        due += every_s
        time.sleep(max(0.0, due - time.perf_counter()))
        if burst and not learner.busy:
            learner.ask()
        began = time.perf_counter()
        loop.process(raw)
        times.append(time.perf_counter() - began)
        working += learner.busy and not learner.wanted
    return np.array(times), working / batches


def _wait_until_idle(worker: Worker) -> None:
    """End the burst of the phase before, so that none runs into this one."""
    learner, resident = worker.loop.actions.learner, worker.loop.resident
    learner.cancel()
    while learner.busy:
        learner.step(resident.version_model, resident.current.number)
        learner.cancel()
        time.sleep(0.01)
