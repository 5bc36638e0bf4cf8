from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.recorded.figures import Figure, span, thinned, ticks
from daemon.recorded.plot import page
from daemon.recorded.watch import Alarm, Watched

NOISE = np.random.default_rng(0).normal(20.0, 3.0, size=1600)


def quiet(rows: int, alarms: list[int], detector: str = "cusum") -> Watched:
    """What a detector found that alarmed at ``alarms`` of ``rows``."""
    return Watched(
        detector=detector,
        advisory=False,
        columns=["<a & b>"],
        calibration={"threshold": 5.0},
        start=0,
        alarms=[Alarm(row, 1.0) for row in alarms],
        live=np.ones(rows, dtype=bool),
        ignored=0,
        reference_ignored=0,
        trace=(np.arange(float(rows)), np.zeros(rows)),
    )


@given(st.integers(1, 4000), st.integers(0, 100), st.floats(0.0, 0.9))
@settings(max_examples=50, deadline=None)
def test_thinning_keeps_the_extremes_and_the_order(rows: int, seed: int, missing: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=rows)
    values[rng.random(rows) < missing] = np.nan
    places, kept = thinned(np.arange(float(rows)), values, 0.0, float(max(rows - 1, 1)), 100)
    assert len(kept) <= max(rows if rows <= 200 else 0, 200)
    assert (np.diff(places) >= 0.0).all()
    if np.isfinite(values).any():
        assert (np.nanmin(kept), np.nanmax(kept)) == (np.nanmin(values), np.nanmax(values))


def test_one_wild_value_does_not_flatten_the_rest() -> None:
    low, high = span(np.append(NOISE, 1e9))
    assert low == NOISE.min() and high < 60.0


@pytest.mark.parametrize("values", [[], [np.nan], [0.0], [3.0, 3.0], [-2.0]])
def test_there_is_always_a_range_to_draw(values: list[float]) -> None:
    low, high = span(np.array(values))
    assert low < high and 2 <= len(ticks(low, high, 4)) <= 8


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_lie_inside_the_range(low: float, width: float) -> None:
    found = ticks(low, low + width, 5)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-6 * width <= tick <= low + 1.000001 * width for tick in found)


def test_marks_that_share_a_pixel_become_one_that_counts_them() -> None:
    figure = Figure("a", np.zeros(100_000), [quiet(100_000, list(range(0, 100_000, 50)))], [], 50.0)
    marks = re.findall(r'data-alarms="(\d+)"', page([figure], "t", []))
    assert sum(map(int, marks)) == 2000 and len(marks) <= 500


def test_names_are_escaped() -> None:
    text = page([Figure("<a & b>", np.zeros(50), [quiet(50, [7])], [9], 100.0)], "<t>", ["<line>"])
    assert not re.search("<(a &|t>|line>)", text)
    assert ET.fromstring(text[text.index("<svg") : text.index("</body>")]).get("aria-label") == "<a & b>"


def test_a_gap_in_the_stream_is_a_gap_in_the_line() -> None:
    values = np.zeros(50)
    values[20:30] = np.nan
    line = re.search(r'class="line" d="([^"]*)"', page([Figure("a", values, [quiet(50, [])], [], 100.0)], "t", []))
    assert line is not None and line[1].count("M") == 2


def test_no_threshold_is_drawn_where_the_statistic_is_something_else() -> None:
    text = page([Figure("a", np.zeros(50), [quiet(50, [7], "adwin")], [], 100.0)], "t", [])
    assert 'class="threshold"' not in text and "not what is compared" in text
