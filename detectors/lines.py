"""Periodic parts of a signal: sine waves that stand out of its spectrum, such as the day and the cycle of a machine."""

from __future__ import annotations

import math

import numpy as np

from detectors.base import F64

FEWEST_CYCLES = 5.0
"""Cycles that the signal must hold: slower waves can't be told from wandering."""
STANDS_OUT = 30.0
"""Times the level of the spectrum around it that a line must reach: noise does so once in 1e13 frequencies."""
LEAST_POWER = 0.01
"""Share of the signal's variance under which a line is left in."""
NEIGHBOURS = 25
"""Frequencies on either side whose median is the level."""
MOST_LINES = 6
PADDING = 8


def find_lines(z: F64) -> tuple[F64, F64, F64]:
    """Frequencies (L,) in cycles a row, amplitudes (L,), and what is left of ``z`` (N,) without them.

    One after the other, the greatest line of the periodogram is fitted by least squares and taken away, at most
    ``MOST_LINES`` of them. Empty when nothing stands out, or when the signal is too short to say.
    """
    frequencies: list[float] = []
    amplitudes: list[float] = []
    left = z - z.mean()
    times = np.arange(z.size)
    variance = float(left.var())
    lowest = math.ceil(FEWEST_CYCLES)
    while len(frequencies) < MOST_LINES and z.size // 2 > lowest + 2 * NEIGHBOURS and variance > 0.0:
        power = np.abs(np.fft.rfft(left)) ** 2
        peak = lowest + int(power[lowest:].argmax())
        around = np.concatenate((power[max(1, peak - NEIGHBOURS) : peak - 1], power[peak + 2 : peak + 2 + NEIGHBOURS]))
        # The median of a periodogram around its level is ln 2 times that level.
        if power[peak] * math.log(2.0) < STANDS_OUT * float(np.median(around)):
            break
        fine = np.abs(np.fft.rfft(left, PADDING * z.size))
        near = PADDING * peak + np.arange(-PADDING, PADDING + 1)
        near = near[near < fine.size]
        frequency = float(near[fine[near].argmax()]) / (PADDING * z.size)
        basis = np.stack((np.cos(2.0 * math.pi * frequency * times), np.sin(2.0 * math.pi * frequency * times)), 1)
        parts = np.linalg.lstsq(basis, left, rcond=None)[0]
        amplitude = float(np.hypot(*parts))
        if 0.5 * amplitude**2 < LEAST_POWER * variance:
            break
        frequencies.append(frequency)
        amplitudes.append(amplitude)
        left = left - basis @ parts
    return np.array(frequencies), np.array(amplitudes), left


def draw_lines(frequencies: F64, amplitudes: F64, length: int, phases: F64) -> F64:
    """Waves (length, C) of these frequencies and amplitudes (L,), with ``phases`` (L, C) in radians."""
    waves = np.zeros((length, phases.shape[1]))
    times = 2.0 * math.pi * np.arange(length)
    for frequency, amplitude, phase in zip(frequencies, amplitudes, phases, strict=True):
        waves += amplitude * np.cos(frequency * times[:, None] + phase)
    return waves
