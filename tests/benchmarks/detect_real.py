"""Recorded streams with a change that somebody wrote down, seen through a frozen model and as features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from tests.benchmarks.detect_rivals import F64
from tests.streams import data, models, sources
from tests.streams.data import F32, I64

INSECTS_CHANGE = 14_028
HAR_REFERENCE_SUBJECT = 17
"""Phone windows of subjects 13 to this one are the reference, those of the others the control."""
GAS_REFERENCE = 600
SIGNALS = ("error", "entropy", "features")
LONGEST = 4_000
"""Rows after a change that are looked at."""
EPSILON = 1e-12


@dataclass(frozen=True, kw_only=True)
class Case:
    """A signal of a recorded stream: reference and control before any written-down change, and what comes after."""

    reference: F64
    control: F64
    after: dict[str, F64]


def cases() -> list[str]:
    """Names "stream, signal"; none when the data is not on this machine."""
    files = {"insects": "insects_gradual.npz", "gas": "gas_drift.npz", "HAR": "har_phone_watch.npz"}
    return [
        f"{stream}, {signal}"
        for stream, file in files.items()
        for signal in SIGNALS
        if (data.folder() / file).is_file()
    ]


@lru_cache(maxsize=2)
def case(name: str) -> Case:
    """The case of that name."""
    stream, _, signal = name.partition(", ")
    x, y, reference, control, after = {"insects": _insects, "gas": _gas, "HAR": _har}[stream](signal)
    used = np.concatenate([reference, control, *after.values()])
    values: dict[int, int] = {int(row): position for position, row in enumerate(used)}
    series = _series(stream, signal, x[used], y[used])

    def part(rows: I64) -> F64:
        return series[[values[int(row)] for row in rows]]

    return Case(
        reference=part(reference),
        control=part(control),
        after={label: part(rows[:LONGEST]) for label, rows in after.items()},
    )


Parts = tuple[F32, I64, I64, I64, dict[str, I64]]
"""Inputs, labels, and the rows of reference, control and what follows each change."""


def _insects(signal: str) -> Parts:
    found = data.arrays("insects_gradual.npz")
    train = np.arange(sources.INSECTS_TRAIN)
    # What the model has not been trained on: every tenth row. The features know no model.
    reference = train if signal == "features" else train[train % 10 == 9]
    control = np.arange(sources.INSECTS_TRAIN, INSECTS_CHANGE)
    after = {"row 14,028": np.arange(INSECTS_CHANGE, len(found["y"]))}
    return found["x"], found["y"].astype(np.int64), reference, control, after


def _gas(signal: str) -> Parts:
    x, y, segment = sources.gas.load()
    rng = np.random.default_rng(0)
    second, *others = (rng.permutation(np.flatnonzero(segment == number)) for number in (2, 3, 4, 5, 6, 8, 9))
    after = {f"segment {number}": rows for number, rows in zip((3, 4, 5, 6, 8, 9), others, strict=True)}
    return x, y, second[:GAS_REFERENCE], second[GAS_REFERENCE:], after


def _har(signal: str) -> Parts:
    x, y, found = sources.har_windows()
    subject, phone = found["subject"], found["segment"] == 0
    late = subject > sources.HAR_SUBJECTS
    reference = np.flatnonzero(phone & late & (subject <= HAR_REFERENCE_SUBJECT))
    control = np.flatnonzero(phone & (subject > HAR_REFERENCE_SUBJECT))
    return x, y, reference, control, {"watch": np.flatnonzero(~phone & late)}


def _series(stream: str, signal: str, x: F32, y: I64) -> F64:
    if signal == "features":
        # Of a window: mean and deviation of each channel.
        flat = x if x.ndim == 2 else np.concatenate([x.mean(2), x.std(2)], axis=1)
        return flat.astype(np.float64)
    torch.set_num_threads(1)
    network = models.model(stream.lower())
    logits, _ = models.outputs(network, np.ascontiguousarray(x, dtype=np.float32))
    if signal == "error":
        return (logits.argmax(1).numpy() != y).astype(np.float64)
    p = torch.softmax(logits.double(), 1).numpy()
    entropy: F64 = -(p * np.log(p + EPSILON)).sum(1)
    return entropy
