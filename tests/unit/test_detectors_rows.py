from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import detectors
from detectors.arrays import pack
from detectors.base import F64, Detector

NAMES = ["ks", "label_shift", "mahalanobis", "mmd"]
D = 5
DRAWN = np.random.default_rng(0).normal(size=(1000, D))


@cache
def known(name: str) -> Detector:
    """A detector that knows a thousand Gaussian rows, D = 5."""
    return detectors.build(name).fit(DRAWN)


def drawn(seed: int, rows: int, columns: int = D) -> F64:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def delay(detector: Detector, rows: F64) -> int:
    """Rows until the first alarm; more than there are if it does not come."""
    fresh = detector.with_threshold(detector.threshold)
    return next(iter(fresh.update_many(rows)), len(rows)) + 1


def correlated(seed: int, rows: int) -> F64:
    covariance = np.full((D, D), 0.6) + 0.4 * np.eye(D)
    return np.random.default_rng(seed).multivariate_normal(np.zeros(D), covariance, size=rows)


@pytest.mark.parametrize("name", NAMES)
class TestEveryRowDetector:
    def test_a_shift_of_all_features_is_seen_within_forty_rows(self, name: str) -> None:
        assert all(delay(known(name), drawn(seed, 100) + 1.0) <= 40 for seed in range(1, 6))

    def test_is_quiet_where_nothing_changes(self, name: str) -> None:
        detector = known(name).with_threshold(known(name).threshold)
        assert len(detector.update_many(drawn(1, 10_000))) <= 8

    def test_one_wild_row_is_no_drift(self, name: str) -> None:
        rows = drawn(2, 64)
        rows[32] = 1e6
        detector = known(name).with_threshold(20.0)
        assert detector.update_many(rows) == []

    def test_a_row_may_come_alone_or_in_any_batch(self, name: str) -> None:
        @settings(max_examples=15, deadline=None)
        @given(st.integers(0, 1000), st.lists(st.integers(0, 300), max_size=6))
        def check(seed: int, lengths: list[int]) -> None:
            rows = drawn(seed, 700)
            rows[300:400] += 1.0
            single = known(name).with_threshold(6.0)
            batched = single.with_threshold(6.0)
            alarms = [index for index, row in enumerate(rows) if single.update(row).drift]
            found, begin = [], 0
            for part in np.split(rows, np.minimum(np.cumsum(lengths, dtype=int), len(rows))):
                found += [begin + index for index in batched.update_many(part)]
                begin += len(part)
            assert found == alarms != []
            assert batched.state_dict() == single.state_dict()

        check()

    def test_a_restored_detector_goes_on_bit_identically(self, name: str) -> None:
        rows = drawn(3, 3000)
        original = known(name).with_threshold(5.0)
        original.update_many(rows[:1700])
        restored = known(name).with_threshold(9.0)
        restored.load_state_dict(original.state_dict())
        assert restored.state_dict() == original.state_dict()
        assert restored.update_many(rows[1700:]) == original.update_many(rows[1700:]) != []
        assert restored.state_dict() == original.state_dict()

    def test_a_state_of_the_warm_up_is_restored(self, name: str) -> None:
        rows = drawn(4, 900)
        rows[700:] += 1.0
        original = detectors.build(name, warmup=500)
        original.update_many(rows[:400])
        restored = detectors.build(name, warmup=500)
        restored.load_state_dict(original.state_dict())
        assert restored.update_many(rows[400:]) == original.update_many(rows[400:]) != []
        assert restored.state_dict() == original.state_dict()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_tensors_raise_the_alarms_of_arrays(self, name: str, dtype: torch.dtype) -> None:
        tensor = torch.from_numpy(drawn(5, 600)).to(dtype)
        tensor[300:] += 1.0
        one, other = known(name).with_threshold(7.0), known(name).with_threshold(7.0)
        assert one.update_many(tensor) == other.update_many(tensor.numpy()) != []
        assert one.update(tensor[0]).state_dict() == other.update(tensor.numpy()[0]).state_dict()

    def test_what_fit_learnt_survives_json(self, name: str) -> None:
        stored = json.loads(json.dumps(known(name).fitted()))
        copied = detectors.build(name).with_fitted(stored).with_threshold(5.0)
        rows = drawn(6, 1000)
        assert copied.update_many(rows) == known(name).with_threshold(5.0).update_many(rows) != []
        assert copied.fitted() == stored

    def test_another_threshold_and_a_reset_keep_what_fit_learnt(self, name: str) -> None:
        detector = known(name).with_threshold(5.0)
        new = detector.state_dict()
        detector.update_many(drawn(7, 300))
        detector.reset()
        assert detector.state_dict() == new
        assert detector.fitted() == known(name).fitted() != {}

    def test_what_was_learnt_by_another_detector_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}.*does not fit"):
            detectors.build(name).with_fitted({"nothing": pack(np.zeros(3))})

    def test_a_state_without_its_reference_is_refused(self, name: str) -> None:
        detector = known(name).with_threshold(20.0)
        detector.update_many(drawn(8, 30))
        with pytest.raises(ValueError, match="fit"):
            detectors.build(name).load_state_dict(detector.state_dict())

    def test_rows_of_another_length_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="rows of 5 values and now got one of 3"):
            known(name).with_threshold(5.0).update(np.zeros(3))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_row_that_is_not_finite_is_refused_and_changes_nothing(self, name: str, bad: float) -> None:
        detector = known(name).with_threshold(20.0)
        rows = drawn(9, 10)
        detector.update_many(rows)
        before = detector.state_dict()
        rows[5, 2] = bad
        with pytest.raises(ValueError, match="finite"):
            detector.update_many(rows)
        assert detector.state_dict() == before

    def test_a_short_reference_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="at least 50 rows, got 49"):
            detectors.build(name).fit(DRAWN[:49])

    def test_a_constant_reference_that_moves_is_seen(self, name: str) -> None:
        detector = detectors.build(name).fit(np.zeros((200, 3)))
        assert detector.update_many(np.zeros((500, 3))) == []
        assert delay(detector, np.ones((100, 3))) <= 20

    def test_more_columns_than_rows_are_read(self, name: str) -> None:
        detector = detectors.build(name).fit(drawn(10, 100, 150))
        assert delay(detector, drawn(11, 60, 150) + 1.0) <= 40

    def test_a_longer_memory_of_the_signal_raises_the_scale_of_long_windows(self, name: str) -> None:
        noise = drawn(12, 8000, 2)
        slow = noise.copy()
        for t in range(1, len(slow)):
            slow[t] += 0.9 * slow[t - 1]
        detector = detectors.build(name).fit(slow[:4000])
        naive = detectors.build(name).fit(np.random.default_rng(0).permutation(slow[:4000]))
        assert len(detector.update_many(slow[4000:])) < 0.5 * len(naive.update_many(slow[4000:]))


@pytest.mark.parametrize("name", ["mahalanobis", "mmd"])
class TestAnyChange:
    def test_twice_the_variance_is_seen_within_a_hundred_and_twenty_rows(self, name: str) -> None:
        assert all(delay(known(name), np.sqrt(2.0) * drawn(seed, 400)) <= 120 for seed in range(5))

    def test_a_correlation_of_three_fifths_is_seen_within_three_hundred_rows(self, name: str) -> None:
        assert all(delay(known(name), correlated(seed, 400)) <= 300 for seed in range(5))


class TestKS:
    def test_one_feature_of_thirty_is_seen(self) -> None:
        detector = detectors.build("ks", threshold=14.0).fit(drawn(0, 1000, 30))
        rows = drawn(1, 400, 30)
        assert delay(detector, rows) > 400
        rows[:, 17] += 1.0
        assert delay(detector, rows) <= 80

    def test_a_rare_value_becoming_frequent_is_seen(self) -> None:
        rng = np.random.default_rng(0)
        detector = detectors.build("ks").fit((rng.random((1000, 1)) < 0.05).astype(np.float64))
        assert delay(detector, (rng.random((200, 1)) < 0.5).astype(np.float64)) <= 60

    def test_many_features_have_fewer_cuts(self) -> None:
        few, many = (detectors.build("ks").fit(drawn(0, 60, columns)).fitted()["values"] for columns in (64, 100))
        assert (few["shape"], many["shape"]) == ([5, 64], [3, 100])


class TestMahalanobis:
    def test_one_direction_of_many_columns_is_seen(self) -> None:
        mixing = drawn(0, 100, 100)
        detector = detectors.build("mahalanobis").fit(drawn(1, 1000, 100) @ mixing)
        rows = drawn(2, 300, 100)
        assert delay(detector, (1.5 * rows) @ mixing) <= 30


class TestLabelShift:
    PRIOR = np.array([0.5, 0.3, 0.2])

    def labels(self, seed: int, prior: F64, rows: int) -> F64:
        return np.random.default_rng(seed).choice(3, p=prior, size=rows).astype(np.float64)

    def probabilities(self, seed: int, prior: F64, rows: int) -> F64:
        logits = 3.0 * np.eye(3)[self.labels(seed, prior, rows).astype(int)] + drawn(seed, rows, 3)
        powers = np.exp(logits)
        shares: F64 = powers / powers.sum(1, keepdims=True)
        return shares

    @pytest.mark.parametrize("kind", ["labels", "probabilities", "one_hot"])
    def test_a_reversed_prior_is_seen(self, kind: str) -> None:
        def rows(seed: int, prior: F64, count: int) -> Any:
            return (
                np.eye(3)[self.labels(seed, prior, count).astype(int)]
                if kind == "one_hot"
                else made(seed, prior, count)
            )

        made = self.probabilities if kind == "probabilities" else self.labels
        detector = detectors.build("label_shift", threshold=10.0).fit(rows(0, self.PRIOR, 1000))
        assert delay(detector, rows(1, self.PRIOR, 2000)) > 1000
        assert all(delay(detector, rows(seed, self.PRIOR[::-1], 300)) <= 120 for seed in range(2, 7))

    def test_a_class_of_its_own_is_seen_but_not_from_one_row(self) -> None:
        detector = detectors.build("label_shift").fit(self.labels(0, self.PRIOR, 1000))
        labels = self.labels(1, self.PRIOR, 200)
        labels[100] = 7.0
        assert delay(detector, labels) > 200
        labels[100::2] = 7.0
        assert 100 < delay(detector, labels) <= 140

    def test_numbers_that_are_no_classes_are_watched_for_their_mean(self) -> None:
        detector = detectors.build("label_shift").fit(drawn(0, 1000, 1))
        assert delay(detector, drawn(1, 200, 1) + 1.0) <= 60
