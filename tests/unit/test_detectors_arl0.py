from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import detectors
from detectors import Calibrated
from detectors.bootstrap import autocorrelation_time, autoregression, describe, simulate, simulate_white
from detectors.lines import find_lines
from tests.benchmarks.detect import DEVIATION, STREAMS, delays, rows_per_alarm

ARL0 = 500
CLAIMED = ["iid", "ar 0.7", "ar 0.95", "student t3", "scale 10"]


@pytest.mark.parametrize("detector", ["adwin", "cusum", "e_detector"])
@pytest.mark.parametrize("name", CLAIMED)
def test_false_alarms_come_as_often_as_asked_and_a_shift_is_found(detector: str, name: str) -> None:
    stream, rng = STREAMS[name], np.random.default_rng(42)
    calibration = detectors.calibrate(detectors.build(detector), stream(rng, 5000), arl0=ARL0).calibration()
    assert calibration["reached_low"] / 1.2 < ARL0 < calibration["reached_high"] * 1.2
    make = partial(Calibrated.from_calibration, detectors.build(detector), calibration)

    # 200 alarms are expected: a counting error of 7%. A factor of 2 leaves room for what 5,000 rows can't tell.
    reached = rows_per_alarm(make, stream, rng, 200 * ARL0)
    assert 0.5 < reached / ARL0 < 2.0

    # Blind alarms at the asked rate would be 0.69 * ARL0 rows late in the median. With an autocorrelation time of 39
    # rows (ar 0.95) a window of a few hundred rows says little, so that the bound can't be much tighter for ADWIN.
    late = list(delays(make, stream, rng, DEVIATION.get(name, 1.0), rows=3 * ARL0, runs=21))
    assert np.median(late) < 0.5 * ARL0


def test_without_the_reference_correlation_false_alarms_would_flood() -> None:
    stream, rng = STREAMS["ar 0.95"], np.random.default_rng(1)
    reference = stream(rng, 5000)
    shuffled = detectors.calibrate(detectors.build("cusum"), rng.permutation(reference), arl0=ARL0).calibration()
    make = partial(Calibrated.from_calibration, detectors.build("cusum"), shuffled)
    assert rows_per_alarm(make, stream, rng, 100 * ARL0) < 0.2 * ARL0


def test_a_short_reference_asks_for_a_greater_threshold() -> None:
    values = STREAMS["iid"](np.random.default_rng(2), 5000)
    cusum = detectors.build("cusum")
    short, long = (detectors.calibrate(cusum, values[:rows], arl0=ARL0).threshold for rows in (60, 5000))
    assert short > 1.1 * long


@pytest.mark.parametrize(("name", "expected"), [("iid", 1.0), ("ar 0.7", 17 / 3), ("ar 0.95", 39.0)])
def test_the_autocorrelation_time_is_that_of_theory(name: str, expected: float) -> None:
    values = STREAMS[name](np.random.default_rng(3), 50_000)
    assert autocorrelation_time(values) == pytest.approx(expected, rel=0.2)
    assert describe(values).autocorrelation_time == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("name", CLAIMED)
def test_null_streams_resemble_the_reference(name: str) -> None:
    values = STREAMS[name](np.random.default_rng(4), 20_000)
    null = describe(values)
    z = np.clip((values - null.location) / null.scale, -null.clip, null.clip)
    simulated = np.clip(simulate(null, chains=30, length=4000, seed=0), -null.clip, null.clip)
    assert simulated.shape == (30, 4000)
    assert simulated.mean() == pytest.approx(0.0, abs=0.1)
    assert simulated.std() == pytest.approx(1.0, rel=0.1)
    for quantile in (0.001, 0.05, 0.95, 0.999):
        assert np.quantile(simulated, quantile) == pytest.approx(np.quantile(z, quantile), abs=0.4)
    lag_1 = np.mean(simulated[:, 1:] * simulated[:, :-1])
    assert lag_1 == pytest.approx(np.mean(z[1:] * z[:-1]), abs=0.05)


def test_bursts_of_variance_are_drawn_in_blocks() -> None:
    rng = np.random.default_rng(5)
    assert describe(STREAMS["garch"](rng, 5000)).block > 5
    assert describe(STREAMS["iid"](rng, 5000)).block <= 2


def test_partial_autocorrelations_turn_into_the_coefficients_of_theory() -> None:
    # AR(2) with coefficients 0.5, 0.3 has partial autocorrelations 0.5 / (1 - 0.3) and 0.3.
    assert autoregression(np.array([[0.5 / 0.7], [0.3]]))[:, 0] == pytest.approx([0.5, 0.3])


def test_a_periodic_part_is_found_with_its_frequency_and_amplitude() -> None:
    rng = np.random.default_rng(6)
    wave = np.sin(2 * np.pi * np.arange(5000) / 96.3) + 0.5 * np.cos(2 * np.pi * np.arange(5000) / 17.1)
    frequencies, amplitudes, rest = find_lines(wave + rng.normal(size=5000))
    assert np.sort(1 / frequencies) == pytest.approx([17.1, 96.3], rel=0.01)
    assert np.sort(amplitudes) == pytest.approx([0.5, 1.0], abs=0.1)
    assert rest.std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["iid", "ar 0.7", "ar 0.95", "student t3"])
def test_noise_has_no_periodic_part(name: str) -> None:
    for seed in range(20):
        frequencies, _, _ = find_lines(STREAMS[name](np.random.default_rng(seed), 3000))
        assert not frequencies.size


def test_prewhitened_null_streams_are_white_but_for_the_error_of_the_filter() -> None:
    values = STREAMS["ar 0.95"](np.random.default_rng(7), 5000)
    white = simulate_white(describe(values), chains=30, length=4000, seed=0)
    assert white.shape == (30, 4000)
    assert white.std() == pytest.approx(1.0, abs=0.03)
    assert np.mean(white[:, 1:] * white[:, :-1]) == pytest.approx(0.0, abs=0.02)
