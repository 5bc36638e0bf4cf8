from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import checkpoint
from daemon.signals import Level, divergence


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.integers(0, 60))
def test_a_level_does_not_depend_on_how_the_rows_were_cut(values: list[float], cut: int) -> None:
    whole, parts = Level(16), Level(16)
    whole.update(np.asarray(values))
    parts.update(np.asarray(values[:cut]))
    parts.update(np.asarray(values[cut:]))
    assert parts.value == pytest.approx(whole.value, abs=1e-9) and parts.rows == pytest.approx(whole.rows)


def test_a_level_holds_where_nothing_finite_comes() -> None:
    level = Level(16)
    assert math.isnan(level.value)
    level.update(np.array([3.0, np.nan, np.inf]))
    level.update(np.array([np.nan]))
    assert level.value == 3.0
    other = Level(16)
    other.load_state_dict(checkpoint.decode(checkpoint.encode(level.state_dict())))
    assert other.value == level.value


def test_divergence_is_none_between_equals_and_one_bit_between_opposites() -> None:
    assert divergence(np.array([0.3, 0.7]), np.array([0.3, 0.7])) == pytest.approx(0, abs=1e-9)
    assert divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1, abs=1e-6)
