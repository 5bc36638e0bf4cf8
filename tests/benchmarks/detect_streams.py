"""Streams in control with one random process behind each, and what may change in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Stream = Callable[[np.random.Generator, int], F64]
Change = Callable[[F64, float, np.random.Generator], F64]
"""Rows after the change as they would have been, its size, and chance: the rows as they are."""

BEFORE = 1000
"""Rows in control before a change."""
AFTER = 4000
"""Rows after it: what has not alarmed by then has missed it."""
SIZES = (0.5, 1.0, 2.0)
PERIOD = 96
FEATURES = 30
CLASSES = 5
COLUMNS = 5
"""Independent copies of a null stream that make up a row."""


def autoregressive(phi: float) -> Stream:
    """AR(1) with unit variance."""

    def draw(rng: np.random.Generator, rows: int) -> F64:
        from scipy.signal import lfilter  # river brings scipy

        values = rng.normal(size=rows)
        values[1:] *= math.sqrt(1.0 - phi * phi)
        filtered: F64 = lfilter([1.0], [1.0, -phi], values)
        return filtered

    return draw


def garch(rng: np.random.Generator, rows: int) -> F64:
    """Uncorrelated values in bursts of variance: GARCH(1,1) with unit variance."""
    noise, values, variance = rng.normal(size=rows), np.empty(rows), 1.0
    for t in range(rows):
        values[t] = noise[t] * math.sqrt(variance)
        variance = 0.05 + 0.1 * values[t] ** 2 + 0.85 * variance
    return values


def seasonal(rng: np.random.Generator, rows: int) -> F64:
    """A sine of amplitude 1 with a period of 96 rows and a random phase, in noise of deviation sqrt(0.5)."""
    phase = rng.uniform(0.0, 2.0 * math.pi)
    wave = np.sin(2.0 * math.pi * np.arange(rows) / PERIOD + phase)
    return wave + math.sqrt(0.5) * rng.normal(size=rows)


SLOW = autoregressive(0.95)
STREAMS: dict[str, Stream] = {
    "iid": lambda rng, rows: rng.normal(size=rows),
    "ar 0.7": autoregressive(0.7),
    "ar 0.95": SLOW,
    "student t3": lambda rng, rows: rng.standard_t(3, size=rows) / math.sqrt(3.0),
    "scale 10": lambda rng, rows: 100.0 + 10.0 * rng.normal(size=rows),
    "seasonal": seasonal,
    "ar 0.95 + noise": lambda rng, rows: (SLOW(rng, rows) + rng.normal(size=rows)) / math.sqrt(2.0),
    "errors 5%": lambda rng, rows: (rng.random(rows) < 0.05).astype(np.float64),
    "garch": garch,
}
DEVIATION = {"scale 10": 10.0, "errors 5%": math.sqrt(0.05 * 0.95)}
"""One standard deviation of a stream where it is not 1."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A process, as values (rows,) or rows (rows, D), and the changes that are tried on it."""

    name: str
    draw: Stream
    changes: dict[str, Change] = field(default_factory=dict)
    null: bool = False
    """Whether it belongs to the table of false alarms."""
    columns: int = 0
    """D; 0: values."""


def columns_of(stream: Stream, columns: int) -> Stream:
    """Rows (rows, columns) of independent copies of ``stream``."""
    return lambda rng, rows: np.stack([stream(rng, rows) for _ in range(columns)], axis=1)


def one_hot(rng: np.random.Generator, rows: int) -> F64:
    """One-hot rows of ``CLASSES`` equally frequent classes."""
    made: F64 = np.eye(CLASSES)[rng.integers(CLASSES, size=rows)]
    return made


def mean_shift(after: F64, size: float, rng: np.random.Generator) -> F64:
    """All values greater by ``size`` deviations, which are 1 where this is used."""
    return after + size


def wider(after: F64, size: float, rng: np.random.Generator) -> F64:
    """Deviation times 1 + ``size`` about the mean, which is 0 where this is used."""
    return after * (1.0 + size)


def correlated(after: F64, size: float, rng: np.random.Generator) -> F64:
    """Correlation of tanh(size / 2) between columns 0 and 1, 2 and 3, ...; each column alone stays as it was."""
    rho = math.tanh(size / 2.0)
    made = after.copy()
    made[:, 1::2] = rho * after[:, ::2] + math.sqrt(1.0 - rho * rho) * after[:, 1::2]
    return made


def one_feature(after: F64, size: float, rng: np.random.Generator) -> F64:
    """The first of all columns greater by ``size`` deviations."""
    made = after.copy()
    made[:, 0] += size
    return made


def prior(after: F64, size: float, rng: np.random.Generator) -> F64:
    """Log odds of class 0 greater by ``size``; the others keep their proportions."""
    odds = math.exp(size) / (CLASSES - 1)
    share = odds / (1.0 + odds)
    turned = (share - 1.0 / CLASSES) / (1.0 - 1.0 / CLASSES)
    made = after.copy()
    made[rng.random(len(after)) < turned] = np.eye(CLASSES)[0]
    return made


BOTH: dict[str, Change] = {"mean": mean_shift, "deviation": wider}
VALUE_CHANGES: dict[str, dict[str, Change]] = {
    "iid": BOTH,
    "ar 0.7": BOTH,
    "ar 0.95": {"mean": mean_shift},
    "student t3": {"mean": mean_shift},
}
SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in [
        *(
            Setting(name=name, draw=stream, changes=VALUE_CHANGES.get(name, {}), null=True)
            for name, stream in STREAMS.items()
        ),
        *(
            Setting(name=f"{name} x{COLUMNS}", draw=columns_of(stream, COLUMNS), null=True, columns=COLUMNS)
            for name, stream in STREAMS.items()
        ),
        Setting(name="6 features", draw=columns_of(STREAMS["iid"], 6), changes={"correlation": correlated}, columns=6),
        Setting(
            name=f"{FEATURES} features",
            draw=columns_of(STREAMS["iid"], FEATURES),
            changes={"one mean": one_feature},
            columns=FEATURES,
        ),
        Setting(name=f"{CLASSES} classes", draw=one_hot, changes={"prior": prior}, columns=CLASSES),
    ]
}
