from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.base import Detector
from detectors.cusum import CUSUM
from detectors.e_detector import EDetector
from detectors.many import Many, ManyCUSUM, ManyEDetector

SLOTS = 7
KINDS = ["cusum", "e_detector", "fitted e_detector"]


def fitted() -> EDetector:
    return EDetector(4.0).fit(np.random.default_rng(9).standard_t(5, size=500), gain=0.5, jump=1.2)


def pair(kind: str, slots: int = SLOTS, **scaling: Any) -> tuple[Many, list[Detector]]:
    """Many slots, and as many single detectors of the same kind."""
    if kind == "cusum":
        return ManyCUSUM(slots, 4.0, shift=0.7, warn_at=0.5, **scaling), [
            CUSUM(4.0, shift=0.7, warn_at=0.5) for _ in range(slots)
        ]
    single = fitted() if kind.startswith("fitted") else EDetector(4.0)
    return ManyEDetector(slots, 4.0, detector=single, **scaling), [single.with_threshold(4.0) for _ in range(slots)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), broken=st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -1e308]))
def test_each_slot_equals_the_single_detector_bit_for_bit(kind: str, seed: int, broken: float) -> None:
    rng = np.random.default_rng(seed)
    location, scale = rng.normal(20.0, 5.0, SLOTS), rng.uniform(0.1, 5.0, SLOTS)
    many, singles = pair(kind, location=location, scale=scale)
    values = location + scale * rng.normal(size=(80, SLOTS))
    values[40:, : SLOTS // 2] += 2.0 * scale[: SLOTS // 2]
    values[rng.random(values.shape) < 0.1] = broken
    ignored = np.zeros(SLOTS, dtype=int)
    for row in values:
        active = rng.random(SLOTS) < 0.8
        alarms = many.update(row, active)
        expected = []
        for slot, single in enumerate(singles):
            z = (row[slot] - location[slot]) / scale[slot] if abs(row[slot]) < 1e200 else np.nan
            if active[slot] and np.isnan(z):
                ignored[slot] += 1
            elif active[slot]:
                expected += [slot] * single.update(float(z)).drift
                assert many.warning[slot] == single.warning
        assert alarms.tolist() == expected
        assert many.statistic.tolist() == [single.statistic for single in singles]
    assert many.ignored.tolist() == ignored.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_alarms_in_its_slot_alone(kind: str) -> None:
    many, _ = pair(kind)
    shift = 2.5 * (np.arange(SLOTS) == 3)
    # Plus and minus one: nobody's mean or scale but that of the shifted slot is anything but normal.
    alarms = np.concatenate([many.update(shift + sign) for sign in (1.0, -1.0) * 20])
    assert alarms.size and set(alarms.tolist()) == {3}


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_reading_leaves_its_slot_alone_and_is_counted(kind: str) -> None:
    many, _ = pair(kind)
    many.update(np.full(SLOTS, 1.5))
    before = many.statistic
    many.update(np.where(np.arange(SLOTS) == 2, np.nan, 1.5))
    assert many.statistic[2] == before[2]
    assert (np.delete(many.statistic, 2) != np.delete(before, 2)).all()
    assert many.ignored.tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert not many.warning[2]


@pytest.mark.parametrize("kind", KINDS)
def test_an_inactive_slot_stays_as_it_is_whatever_is_read_there(kind: str) -> None:
    many, _ = pair(kind)
    before = many.state_dict()
    assert many.update(np.full(SLOTS, np.nan), np.zeros(SLOTS, dtype=bool)).size == 0
    np.testing.assert_equal(many.state_dict(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_state_goes_on_bit_identically(kind: str) -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, size=(60, SLOTS))
    original, _ = pair(kind, location=0.1, scale=2.0)
    for row in values[:30]:
        original.update(row)
    state = original.state_dict()
    restored, _ = pair(kind)
    restored.load_state_dict(state)
    np.testing.assert_equal(restored.state_dict(), state)
    for row in values[30:]:
        assert restored.update(row).tolist() == original.update(row).tolist()
    np.testing.assert_equal(restored.state_dict(), original.state_dict())
    assert (state["location"] == 0.1).all()


def test_what_the_components_learnt_is_part_of_the_state() -> None:
    original, _ = pair("fitted e_detector")
    restored, _ = pair("e_detector")
    restored.load_state_dict(original.state_dict())
    values = np.random.default_rng(2).normal(1.0, 1.0, size=(30, SLOTS))
    for row in values:
        original.update(row)
        restored.update(row)
    np.testing.assert_equal(restored.state_dict(), original.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_single_slots_or_all_can_be_reset(kind: str) -> None:
    many, _ = pair(kind)
    many.update(np.full(SLOTS, 2.0))
    many.reset([1, 4])
    assert np.flatnonzero(many.statistic == 0.0).tolist() == [1, 4]
    many.reset()
    np.testing.assert_equal(many.state_dict(), pair(kind)[0].state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_slots_take_one_call(kind: str) -> None:
    many, _ = pair(kind, 10_000)
    values = np.zeros(10_000)
    values[-1] = 50.0
    assert many.update(values).tolist() == ([9_999] if kind == "cusum" else [])
    assert many.statistic.shape == (10_000,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_other_slots_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="anew"):
        pair(kind)[0].load_state_dict(pair(kind, 3)[0].state_dict())


def test_wrong_arguments_are_named() -> None:
    for options, message in (
        ({"slots": 0}, "slots"),
        ({"slots": 2, "threshold": 0.0}, "threshold"),
        ({"slots": 2, "scale": [1.0, 0.0]}, "scale"),
        ({"slots": 2, "location": [np.nan, 0.0]}, "location"),
        ({"slots": 2, "shift": -1.0}, "shift"),
    ):
        with pytest.raises(ValueError, match=message):
            ManyCUSUM(**options)
    with pytest.raises(ValueError, match="values"):
        ManyCUSUM(2).update(np.zeros(3))
    with pytest.raises(ValueError, match="active"):
        ManyCUSUM(2).update(np.zeros(2), np.ones(3, dtype=bool))
