"""A simulated array of ageing gas sensors: the stream that homeostat runs on when it is given none.

Sixteen metal-oxide sensors, four families of four, watch four process lines, each of which releases its own gas. A row
is one exposure, one every three minutes: a class (the line) and sixteen log conductance ratios. For sensor i

    r_i = log(1 + gain_i · Σ_g (S_ig · c_g)^β_ig) + drift_i + κ_i · (RH - RH_mean) / 10
    x_i = alive_i · r_i + (1 - alive_i) · STUCK + ε_i

- Σ_g (S_ig · c_g)^β_ig: the power law of metal oxides. A family is most sensitive to one gas and answers the other
  three too (cross-sensitivity). The released gas has a concentration drawn once per run of exposures; the other
  three stay in the background. The output is the logarithm of the conductance over that in clean air.
- gain_i falls exponentially, at each sensor's own rate (poisoning of the surface).
- drift_i is a path of Brownian motion, made from the first terms of its Karhunen-Loève series, so that it looks like
  a random walk and yet has a value at any row:  W(t) = Σ_k Z_k · √2 · sin((k - ½)πt) / ((k - ½)π).
- RH, the relative humidity in %, has a daily cycle, and a humid spell of some days. Water raises every reading.
- alive_i is 1, except for one sensor that is poisoned for good: in some 500 rows it stops answering.
- ε_i is white noise. κ_i, β_ig, S_ig and the rates are drawn once per seed.

Late in each life two lines change places: the same gas then belongs to the other class. No input shows it; labels do.
At the end of its life the array is replaced by a fresh one, the lines are put back, and it all begins again, with other
drift paths.

Every value is a function of the seed and the row's index: random numbers come from Philox, a counter-based generator
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose counter starts at the index of a chunk of
rows. So a reader that goes on at row n after a restart gets what an uninterrupted reader got.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

CHUNK = 512
"""Rows made at a time; no chunk depends on another, so a run of exposures goes over no boundary but by chance."""
LIFE = 38 * CHUNK
"""Rows after which the array is replaced: 19,456, about forty days."""
DAY = 480
"""Rows per day."""

DRIFT_FROM = 3_000
FADE_FROM = 6_000
DEATH_FROM = 9_000
HUMID_FROM, HUMID_TO = 11_000, 13_500
SWAP_FROM = 15_500

_RUN = 8.0  # mean exposures per run
_RELEASED = (-0.5, 2.5)  # range of the released gas's log concentration, drawn per run
_FLICKER = 0.2  # its standard deviation within a run
_BACKGROUND = (-2.5, 0.5)  # mean and standard deviation of the other gases' log concentrations
_NOISE = 0.1  # standard deviation of one reading
_DRIFT = 0.36  # standard deviation of a baseline at the end of a life
_TERMS = 8  # of the Karhunen-Loève series
_FADE_ROWS = (12_000.0, 40_000.0)  # e-folding times of the gains
_STUCK = 0.25  # reading of the dead sensor
_DEATH_ROWS = 150.0  # e-folding time of its death
_CYCLE, _SPELL = 6.0, 25.0  # % relative humidity
_SPELL_EDGE = 150.0  # rows in which the spell comes, and in which it goes

# Second half of the Philox key: what the numbers are for. Draws of source data have _SOURCE and the keys above it.
_ROWS, _SENSORS, _PATHS, _SOURCE = 0, 1, 2, 3


class Event(NamedTuple):
    """The start of one disturbance: the first row concerned, a short name, and what happens."""

    row: int
    name: str
    description: str


_LIFE_EVENTS = [
    Event(DRIFT_FROM, "drift", "the baselines begin to wander"),
    Event(FADE_FROM, "gain-loss", "poisoning: every sensor loses gain, exponentially, at its own rate"),
    Event(DEATH_FROM, "dead-sensor", "one sensor dies: its reading settles at a constant"),
    Event(HUMID_FROM, "humid-spell", "humid weather raises every reading"),
    Event(HUMID_TO, "dry-again", "the humid spell ends"),
    Event(SWAP_FROM, "label-swap", "two process lines change places: classes 1 and 2 exchange their gases"),
    Event(LIFE, "replacement", "a fresh array is fitted and the lines are put back"),
]


class AgeingArray:
    """Rows of the simulated array, readable from any index, without end.

    ``seed`` (0 to 2**64 - 1) fixes the sensors and every row. With ``ageing=False`` the array stays fresh and the
    lines stay in place for ever: a steady world, in which nothing should be adapted.
    """

    features = 16
    classes = 4

    def __init__(self, seed: int = 7, *, ageing: bool = True) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: give a number from 0 to 2**64 - 1")
        self._seed = seed
        self._ageing = ageing
        rng = self._rng(_SENSORS, 0)
        family = np.arange(self.features) // (self.features // self.classes)
        cross = np.array([0.0, -0.6, -1.0, -0.8])[(np.arange(self.classes)[:, None] - family) % self.classes]
        self._log_s: F64 = cross + rng.normal(0.0, 0.15, cross.shape)
        self._beta: F64 = rng.uniform(0.5, 0.8, cross.shape)
        self._kappa: F64 = rng.uniform(0.02, 0.3, (self.features, 1))
        self._fade: F64 = 1.0 / rng.uniform(*_FADE_ROWS, (self.features, 1))
        self._dying = int(rng.integers(self.features))
        # Small reads, and a reader of labels some way behind, take their rows from the same few chunks.
        self._chunk = lru_cache(maxsize=16)(self._generate)
        self._paths = lru_cache(maxsize=2)(self._draw_paths)

    def rows(self, start: int, count: int) -> tuple[F32, I64]:
        """Rows ``start`` to ``start + count``: readings (count, 16) and classes (count,), the caller's to keep.

        Raises:
            ValueError: when ``start`` or ``count`` is negative.
        """
        return self._read(_ROWS, start, count)

    def source_data(self, count: int, *, draw: int = 0) -> tuple[F32, I64]:
        """``count`` rows of the fresh array, in order: to train a model on, and with another ``draw`` to calibrate on.

        No two draws share a random number, and none shares one with ``rows``.

        Raises:
            ValueError: when ``count`` or ``draw`` is negative.
        """
        if draw < 0:
            raise ValueError(f"draw is {draw}: give 0 or more")
        return self._read(_SOURCE + draw, 0, count)

    @staticmethod
    def schedule(lives: int = 1) -> list[Event]:
        """What happens in the first ``lives`` lives, in order; each life ends with the replacement of the array.

        The first 3,000 rows of a life are calm.
        """
        return [event._replace(row=life * LIFE + event.row) for life in range(lives) for event in _LIFE_EVENTS]

    def _rng(self, purpose: int, index: int) -> np.random.Generator:
        """A generator of its own for each ``(seed, purpose, index)``, 2**192 numbers apart from the next index."""
        key = np.array([self._seed, purpose], np.uint64)
        counter = np.array([0, 0, 0, index], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _read(self, purpose: int, start: int, count: int) -> tuple[F32, I64]:
        if start < 0 or count < 0:
            raise ValueError(f"start is {start} and count is {count}: both must be 0 or more")
        x = np.empty((count, self.features), np.float32)
        y = np.empty(count, np.int64)
        done = 0
        while done < count:
            index, first = divmod(start + done, CHUNK)
            size = min(CHUNK - first, count - done)
            chunk_x, chunk_y = self._chunk(purpose, index)
            x[done : done + size] = chunk_x[first : first + size]
            y[done : done + size] = chunk_y[first : first + size]
            done += size
        return x, y

    def _generate(self, purpose: int, index: int) -> tuple[F32, I64]:
        """Chunk ``index``: x (CHUNK, 16) and y (CHUNK,).

        Made as (16, CHUNK), where numpy's inner loops are long, and element by element, since the rounding of a matrix
        product may depend on the number of threads.
        """
        rng = self._rng(purpose, index)
        row = index * CHUNK + np.arange(CHUNK)
        life, first = divmod(index * CHUNK, LIFE)  # a life is a whole number of chunks
        ageing = self._ageing and purpose == _ROWS
        age = (first + np.arange(CHUNK)) * float(ageing)

        gas, log_c = _exposures(rng, self.classes)
        signal = np.zeros((self.features, CHUNK))
        for beta, log_s, log_c_g in zip(self._beta, self._log_s, log_c, strict=True):
            signal += np.exp(beta[:, None] * (log_s[:, None] + log_c_g))
        x = np.log1p(signal * np.exp(-self._fade * np.maximum(age - FADE_FROM, 0.0)))
        x += self._kappa * (_humidity(row, age) / 10.0)
        if first + CHUNK > DRIFT_FROM and ageing:
            t = np.maximum(age - DRIFT_FROM, 0.0) / (LIFE - DRIFT_FROM)
            for k, coefficient in enumerate(self._paths(life)):
                x += coefficient[:, None] * np.sin((k + 0.5) * np.pi * t)
        alive = np.exp(-np.maximum(age - DEATH_FROM, 0.0) / _DEATH_ROWS)
        x[self._dying] = alive * x[self._dying] + (1.0 - alive) * _STUCK
        x += rng.normal(0.0, _NOISE, x.shape)

        swapped = (age >= SWAP_FROM) & ((gas == 1) | (gas == 2))
        return x.T.astype(np.float32, order="C"), np.where(swapped, 3 - gas, gas)

    def _draw_paths(self, life: int) -> F64:
        """Coefficients (_TERMS, 16) of the sines that make up each sensor's drift in one life."""
        z = self._rng(_PATHS, life).normal(0.0, _DRIFT, (_TERMS, self.features))
        frequency = (np.arange(_TERMS) + 0.5) * np.pi
        return np.asarray(np.sqrt(2.0) * z / frequency[:, None])


def _exposures(rng: np.random.Generator, gases: int) -> tuple[I64, F64]:
    """Released gas (CHUNK,) and log concentrations (gases, CHUNK), in runs of geometric length."""
    starts = rng.random(CHUNK) < 1.0 / _RUN
    starts[0] = True
    step = rng.integers(1, gases, CHUNK) * starts  # never 0: another run is another gas
    step[0] = rng.integers(gases)
    gas = np.cumsum(step) % gases
    run = np.maximum.accumulate(np.where(starts, np.arange(CHUNK), 0))
    log_c = rng.normal(*_BACKGROUND, (gases, CHUNK))
    log_c[gas, np.arange(CHUNK)] = rng.uniform(*_RELEASED, CHUNK)[run] + rng.normal(0.0, _FLICKER, CHUNK)
    return gas, log_c


def _humidity(row: NDArray[Any], age: NDArray[Any]) -> F64:
    """Relative humidity over its mean, in %, of the plant's weather (row) with the spell (age)."""
    spell = _rise((age - HUMID_FROM) / _SPELL_EDGE) - _rise((age - HUMID_TO) / _SPELL_EDGE)
    return np.asarray(_CYCLE * np.sin(2.0 * np.pi / DAY * row) + _SPELL * spell, np.float64)


def _rise(t: NDArray[Any]) -> F64:
    """0 before t = 0, then smoothly to 1 at t = 1."""
    t = np.clip(t, 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), np.float64)
