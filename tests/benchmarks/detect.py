"""How often calibrated detectors alarm without cause, against what was asked, and how late they are.

``python -m tests.benchmarks.detect [--arl0 2000] [--reference 5000] [--draws 8]`` prints one line per null stream and
detector. "Reached / asked" is the measured mean time between false alarms over the asked one, on fresh rows of the
true process: median and range over independent reference draws, and over all of them together (rows / alarms).
The delay is the median number of rows from a shift of one standard deviation to the next alarm. Beside the calibrated
detectors stand river's ADWIN as it comes, and a detector that tosses a coin at each row.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import detectors
from detectors import Calibrated

F64 = NDArray[np.float64]
Stream = Callable[[np.random.Generator, int], F64]
BEFORE = 1000
"""Rows in control before the shift."""


class Watch(Protocol):
    """What a detector must have to be measured here."""

    def update_many(self, values: F64) -> list[int]: ...


def autoregressive(phi: float) -> Stream:
    """AR(1) with unit variance."""

    def draw(rng: np.random.Generator, rows: int) -> F64:
        values = rng.normal(size=rows)
        values[1:] *= math.sqrt(1.0 - phi * phi)
        for t in range(1, rows):
            values[t] += phi * values[t - 1]
        return values

    return draw


def garch(rng: np.random.Generator, rows: int) -> F64:
    """Uncorrelated values in bursts of variance: GARCH(1,1) with unit variance."""
    noise, values, variance = rng.normal(size=rows), np.empty(rows), 1.0
    for t in range(rows):
        values[t] = noise[t] * math.sqrt(variance)
        variance = 0.05 + 0.1 * values[t] ** 2 + 0.85 * variance
    return values


SLOW = autoregressive(0.95)
STREAMS: dict[str, Stream] = {
    "iid": lambda rng, rows: rng.normal(size=rows),
    "ar 0.7": autoregressive(0.7),
    "ar 0.95": SLOW,
    "student t3": lambda rng, rows: rng.standard_t(3, size=rows) / math.sqrt(3.0),
    "scale 10": lambda rng, rows: 100.0 + 10.0 * rng.normal(size=rows),
    "ar 0.95 + noise": lambda rng, rows: (SLOW(rng, rows) + rng.normal(size=rows)) / math.sqrt(2.0),
    "errors 5%": lambda rng, rows: (rng.random(rows) < 0.05).astype(np.float64),
    "garch": garch,
}
DEVIATION = {"scale 10": 10.0, "errors 5%": math.sqrt(0.05 * 0.95)}
"""One standard deviation of a stream where it is not 1."""


class RiverADWIN:
    """River's ADWIN with its default confidence, on the raw values."""

    def __init__(self) -> None:
        from river.drift import ADWIN

        self._adwin = ADWIN()

    def update_many(self, values: F64) -> list[int]:
        """Indices of the alarms."""
        alarms = []
        for index, value in enumerate(values.tolist()):
            self._adwin.update(value)
            if self._adwin.drift_detected:
                alarms.append(index)
        return alarms


class Coin:
    """Looks at nothing: alarms at each row with probability 1 / arl0."""

    def __init__(self, arl0: float, rng: np.random.Generator) -> None:
        self._chance, self._rng = 1.0 / arl0, rng

    def update_many(self, values: F64) -> list[int]:
        """Indices of the alarms."""
        return [int(index) for index in np.flatnonzero(self._rng.random(values.size) < self._chance)]


def rows_per_alarm(make: Callable[[], Watch], stream: Stream, rng: np.random.Generator, rows: int) -> float:
    """Mean time between false alarms over one run of ``rows``; half an alarm stands for none."""
    return rows / max(len(make().update_many(stream(rng, rows))), 0.5)


def delays(
    make: Callable[[], Watch], stream: Stream, rng: np.random.Generator, shift: float, rows: int, runs: int
) -> Iterator[float]:
    """Rows from a shift of ``shift`` to the next alarm, ``runs`` times; infinite if none comes within ``rows``."""
    for _ in range(runs):
        values = stream(rng, BEFORE + rows)
        values[BEFORE:] += shift
        late = [alarm - BEFORE for alarm in make().update_many(values) if alarm >= BEFORE]
        yield float(late[0]) if late else math.inf


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arl0", type=float, default=2000, help="rows between false alarms that are asked for")
    parser.add_argument("--reference", type=int, default=5000, help="rows of the reference")
    parser.add_argument("--draws", type=int, default=8, help="independent references")
    asked = parser.parse_args()
    print(f"asked ARL0 {asked.arl0:g}, reference {asked.reference} rows, {asked.draws} draws")
    print(f"{'stream':16} {'detector':12} {'reached / asked':>24} {'together':>9} {'delay at 1 sigma':>17}")
    for name, stream in STREAMS.items():
        for kind in (*detectors.names(), "river ADWIN", "coin"):
            ratios: list[float] = []
            late: list[float] = []
            for draw in range(asked.draws):
                rng = np.random.default_rng([draw, list(STREAMS).index(name)])
                make = _maker(kind, stream(rng, asked.reference), asked.arl0, rng)
                ratios.append(rows_per_alarm(make, stream, rng, int(100 * asked.arl0)) / asked.arl0)
                late += delays(make, stream, rng, DEVIATION.get(name, 1.0), int(3 * asked.arl0), 10)
            median, together = np.median(ratios), 1.0 / np.mean(1.0 / np.array(ratios))
            spread = f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{name:16} {kind:12} {spread:>24} {together:9.2f} {np.median(late):17.0f}", flush=True)


def _maker(kind: str, reference: F64, arl0: float, rng: np.random.Generator) -> Callable[[], Watch]:
    if kind == "coin":
        return lambda: Coin(arl0, rng)
    if kind == "river ADWIN":
        return RiverADWIN
    calibration = detectors.calibrate(detectors.build(kind), reference, arl0=arl0).calibration()
    return lambda: Calibrated.from_calibration(detectors.build(kind), calibration)


if __name__ == "__main__":
    main()
