from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.arrays import pack, unpack
from detectors.base import F64
from detectors.linear import LARGEST, exact, steps
from detectors.windows import KEPT, MOST, STRIDES, WINDOWS, Windows, deviations, gauge


def drawn(seed: int, rows: int, columns: int = 5) -> F64:
    return np.random.default_rng(seed).normal(size=(rows, columns))


class TestWindows:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 1000), st.lists(st.integers(1, MOST), min_size=1, max_size=40), st.integers(0, 600))
    @pytest.mark.parametrize("dtype", [np.float64, np.int32])
    def test_sums_are_those_of_the_rows_since_the_start(
        self, dtype: type[np.float64] | type[np.int32], seed: int, lengths: list[int], start: int
    ) -> None:
        rows = np.random.default_rng(seed).integers(-(2**20), 2**20, size=(sum(lengths), 2))
        windows = Windows(2, dtype)
        at = 0
        for length in lengths:
            first = windows.append(rows[at : at + length].astype(dtype))
            if at <= start < at + length:
                windows.restart(first + start - at)
            at += length
        newest = first + lengths[-1] - 1
        since = rows[start + 1 :] if start < len(rows) else rows
        begin = max(first, newest - 40, newest - at + start + 2)
        sums, looks = windows.looks(begin, newest + 1)
        found = {}
        for k, position, count in looks:
            for _ in range(count):
                found[k, at - newest + position] = sums[len(found)].tolist()
                position += STRIDES[k]
        wanted = {}
        for k, window in enumerate(WINDOWS):
            for read in range(at - newest + begin, at + 1):
                if read % STRIDES[k] == 0:
                    oldest = max(read - window, start + 1 if start < at else 0)
                    wanted[k, read] = rows[oldest:read].sum(0).tolist()
        assert found == wanted
        assert windows.recent().tolist() == since[max(len(since) - KEPT, 0) :].tolist()

    def test_too_many_rows_are_not_restored(self) -> None:
        with pytest.raises(ValueError, match="at most 511"):
            Windows(1, np.float64).load(np.zeros((KEPT + 1, 1), dtype=np.int32), 0)

    def test_the_norms_of_sums_are_standard_normal_in_the_reference(self) -> None:
        rows = np.rint(1000.0 * drawn(0, 50_000, 8))
        gauged = gauge(rows[:5000] - rows[:5000].mean(0))
        for k in (0, 2, 4):
            sums = rows[: 50_000 // WINDOWS[k] * WINDOWS[k]].reshape(-1, WINDOWS[k], 8).sum(1)
            z = deviations(sums, gauged[k])
            assert abs(z.mean()) < 0.15
            assert 0.85 < z.std() < 1.15
            assert 0.0005 < (z > 2.75).mean() < 0.009 or len(z) < 2000


class TestExactMaps:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 1000), st.integers(1, 80), st.floats(1e-6, 1e6))
    def test_the_order_of_addition_does_not_matter(self, seed: int, columns: int, scale: float) -> None:
        rng = np.random.default_rng(seed)
        matrix = exact(scale * rng.normal(size=(columns, 7)))
        whole = np.rint(rng.uniform(-LARGEST, LARGEST, size=(9, columns)))
        order = rng.permutation(columns)
        assert ((whole @ matrix) == (whole[:, order] @ matrix[order])).all()
        assert (whole @ matrix)[3].tolist() == (whole[3:4] @ matrix)[0].tolist()

    def test_far_values_are_bounded(self) -> None:
        assert steps(np.array([[1e300, -1e300]]), np.zeros(2), np.full(2, 1e-9)).tolist() == [[LARGEST, -LARGEST]]


class TestArrays:
    @pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3, 4)])
    def test_what_is_packed_comes_back_bit_for_bit(self, shape: tuple[int, ...]) -> None:
        array = np.random.default_rng(0).normal(size=shape)
        again = unpack(json.loads(json.dumps(pack(array))))
        assert again.shape == shape
        assert again.tobytes() == np.asarray(array).tobytes()

    def test_single_precision_takes_half_the_room(self) -> None:
        array = drawn(0, 30)
        single = pack(array, single=True)
        assert len(single["base64"]) == len(pack(array)["base64"]) // 2
        assert unpack(single) == pytest.approx(array, rel=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"shape": [3, 2]}, "damaged"),
            ({"shape": [-1]}, "list of lengths"),
            ({"shape": 5}, "list of lengths"),
            ({"dtype": "<i8"}, "of type"),
            ({"base64": "???"}, "no base64"),
            ({"base64": 7}, "no base64"),
            ({"more": 1}, "keys"),
            ({"base64": "AAAAAAAA+H8=", "shape": [1]}, "not finite"),
        ],
    )
    def test_a_damaged_array_is_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            unpack(pack(np.zeros(5)) | change)
