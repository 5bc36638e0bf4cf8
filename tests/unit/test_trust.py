from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from daemon.inspecting import digest
from daemon.predicted import Predicted
from daemon.runs import LONGEST, Runs
from daemon.signals import Rows
from daemon.trust import BALANCED_ROWS, LABEL_SILENCE_ROWS, MAX_UNPROVEN, Trust

PRIOR = np.full(4, 0.25)


def batch(mean_p: np.ndarray, disagreement: float, rows: int = 256) -> Predicted:
    version = np.zeros(rows, np.float32)
    adapted = version.copy()
    adapted[: round(disagreement * rows)] = 1
    signals = np.zeros((rows, 3), np.float32)
    answer = Rows(version, version, signals, mean_p.astype(np.float32))
    shadow = Rows(adapted, version, signals, mean_p.astype(np.float32))
    return Predicted(answer, adapted, version, version, np.ones(rows, np.float32), adapted_rows=shadow)


def unlabelled(mean_p: np.ndarray, disagreement: float, rows: int = 4 * BALANCED_ROWS) -> Trust:
    trust = Trust(PRIOR, labelled=False)
    for _ in range(rows // 256):
        trust.observe(batch(mean_p, disagreement), 256)
    return trust


def test_without_labels_a_small_correction_on_balanced_answers_is_served() -> None:
    assert unlabelled(PRIOR, MAX_UNPROVEN / 2).earned()


def test_without_labels_no_adaptation_may_change_many_answers() -> None:
    assert not unlabelled(PRIOR, 2 * MAX_UNPROVEN).earned()


def test_without_labels_nothing_is_served_while_classes_come_in_runs() -> None:
    assert not unlabelled(np.array([0.97, 0.01, 0.01, 0.01]), 0.0).earned()


def test_without_labels_balance_has_to_last() -> None:
    assert not unlabelled(PRIOR, 0.0, BALANCED_ROWS // 2).earned()


def test_a_label_stream_asks_for_proof_before_its_first_label() -> None:
    trust = Trust(PRIOR, labelled=True)
    for _ in range(LABEL_SILENCE_ROWS // 256):
        trust.observe(batch(PRIOR, 0.0), 256)
        assert not trust.earned()


def test_one_long_run_of_a_class_is_less_evidence_than_as_many_rows_of_changing_ones() -> None:
    changing, one = Trust(PRIOR, labelled=True), Trust(PRIOR, labelled=True)
    rows = 4 * LONGEST
    changing.weigh(np.arange(rows) % 4, np.ones(rows))
    one.weigh(np.zeros(rows), np.ones(rows))
    assert changing.earned() and not one.earned()


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(-1, 1)), max_size=80), st.integers(0, 80))
def test_runs_do_not_depend_on_how_the_labels_came(rows: list[tuple[int, float]], cut: int) -> None:
    labels, values = np.array([y for y, _ in rows]), np.array([v for _, v in rows], np.float64)
    whole, parts = Runs(), Runs()
    expected = whole.means(labels, values)
    found = np.concatenate((parts.means(labels[:cut], values[:cut]), parts.means(labels[cut:], values[cut:])))
    assert found.tolist() == expected.tolist()
    assert digest(parts.state_dict()) == digest(whole.state_dict())


@given(st.lists(st.integers(0, 1), min_size=1, max_size=200))
def test_no_run_is_longer_than_the_longest(labels: list[int]) -> None:
    runs = Runs()
    ended = runs.means(np.array(labels), np.ones(len(labels)))
    assert len(labels) - runs.state_dict()["count"] <= LONGEST * max(1, len(ended))
    assert (ended == 1).all() and runs.state_dict()["count"] <= LONGEST
