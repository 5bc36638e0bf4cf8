from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import detectors
from detectors import Calibrated
from detectors.base import F64, Detector
from detectors.cusum import CUSUM
from detectors.ensemble import Ensemble, How, Member, ensemble

ROWS = 120


class Scripted:
    """A member that alarms, or has a statistic, where it was told to; threshold 1."""

    def __init__(self, alarms: set[int], arl0: float = 1000.0, evidence: float = 0.0, name: str = "e_detector") -> None:
        self.name, self.arl0, self.threshold, self.statistic = name, arl0, 1.0, 0.0
        self._alarms, self._evidence = alarms, evidence
        self._row = 0
        self.drift = self.warning = False
        self.baseline = 0

    def update(self, value: Any) -> None:
        self.drift = self._row in self._alarms
        self.statistic = 0.0 if self.drift else self._evidence
        self._row += 1

    def update_many(self, values: F64) -> list[int]:
        begin = self._row
        for value in values:
            self.update(value)
        return [row - begin for row in range(begin, self._row) if row in self._alarms]

    def reset(self) -> None:
        self.statistic = self._evidence = 0.0

    def rebaseline(self, rows: int) -> None:
        self.baseline = rows

    def state_dict(self) -> dict[str, Any]:
        return {"row": self._row, "statistic": self.statistic, "drift": self.drift}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._row, self.statistic, self.drift = state["row"], state["statistic"], state["drift"]


def scripted(*alarms: set[int]) -> list[Member]:
    return [Scripted(rows) for rows in alarms]


def elected(alarms: list[set[int]], quorum: int, span: int) -> list[int]:
    """The rule, written row by row from its definition."""
    votes: dict[int, int] = {}
    found = []
    for row in range(ROWS):
        votes |= {j: row for j, rows in enumerate(alarms) if row in rows}
        if any(vote == row for vote in votes.values()) and sum(row - v < span for v in votes.values()) >= quorum:
            found.append(row)
            votes = {}
    return found


scripts = st.lists(st.sets(st.integers(0, ROWS - 1), max_size=25), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(scripts, st.integers(1, 5), st.integers(1, 60), st.lists(st.integers(0, ROWS), max_size=4))
def test_an_election_counts_different_members_within_the_span(
    alarms: list[set[int]], quorum: int, span: int, cuts: list[int]
) -> None:
    quorum = min(quorum, len(alarms))
    single, batched = (Ensemble(scripted(*alarms), "election", quorum=quorum, span=span) for _ in range(2))
    assert [row for row in range(ROWS) if single.update(0.0).drift] == elected(alarms, quorum, span)
    found, begin = [], 0
    for end in [*sorted(cuts), ROWS]:
        found += [begin + index for index in batched.update_many(np.zeros(end - begin))]
        begin = end
    assert found == elected(alarms, quorum, span)
    assert batched.state_dict() == single.state_dict()


@settings(max_examples=50, deadline=None)
@given(scripts)
def test_under_bonferroni_any_member_alarms(alarms: list[set[int]]) -> None:
    assert Ensemble(scripted(*alarms)).update_many(np.zeros(ROWS)) == sorted(set[int]().union(*alarms))


@settings(max_examples=50, deadline=None)
@given(scripts, st.integers(1, 5))
def test_an_election_uses_up_a_quorum_of_alarms_each_time(alarms: list[set[int]], quorum: int) -> None:
    """Which is what ``joint_arl0`` rests on."""
    quorum = min(quorum, len(alarms))
    found = Ensemble(scripted(*alarms), "election", quorum=quorum).update_many(np.zeros(ROWS))
    assert len(found) * quorum <= sum(len(rows) for rows in alarms)


def test_who_alarmed_is_named() -> None:
    members = [Scripted({5}, name="cusum"), Scripted({9}, name="adwin"), Scripted({7}, name="cusum")]
    jury = Ensemble(members, "election", columns=[0, None, 1], quorum=2)
    assert jury.labels == ["cusum[0]", "adwin", "cusum[1]"]
    assert jury.update_many(np.zeros((8, 2))) == [7]
    assert jury.voters == ["cusum[0]", "cusum[1]"]
    assert jury.drift
    assert not jury.update(np.zeros(2)).drift
    assert jury.update(np.zeros(2)).warning  # the vote of row 9 stands alone
    assert jury.statistic == 0.5


def test_the_majority_is_the_default_quorum() -> None:
    assert Ensemble(scripted({1}, {2}, {3}), "election").update_many(np.zeros(9)) == [2]


@pytest.mark.parametrize(("how", "quorum", "expected"), [("bonferroni", None, 400.0), ("election", 2, 800.0)])
def test_the_joint_rate_is_the_sum_of_the_members_over_the_quorum(how: How, quorum: int, expected: float) -> None:
    members = [Scripted(set(), arl0) for arl0 in (1000.0, 1000.0, 2000.0)]
    assert Ensemble(members, how, quorum=quorum).joint_arl0 == pytest.approx(expected)


def test_evidence_that_no_member_has_enough_of_alone_adds_up() -> None:
    def share(evidence: float) -> float:
        return math.expm1(evidence * math.log(1000.0)) / 999.0

    jury = Ensemble([Scripted(set(), evidence=0.85), Scripted(set(), evidence=0.85)], "e_average")
    assert not jury.update(0.0).drift
    assert jury.statistic == pytest.approx(2 * share(0.85))
    jury = Ensemble([Scripted(set(), evidence=0.95), Scripted(set(), evidence=0.9)], "e_average")
    assert share(0.95) < 1.0 < share(0.95) + share(0.9)
    assert jury.update(0.0).drift
    assert jury.voters == ["e_detector"] * (1 + (share(0.9) >= 0.5))
    assert not jury.update(0.0).drift  # all members restarted
    assert jury.statistic == 0.0


def test_an_e_average_alarms_where_a_member_does() -> None:
    assert Ensemble(scripted({3}, {8}), "e_average").update_many(np.zeros(12)) == [3, 8]


def test_without_evidence_an_e_average_is_zero_however_many_members() -> None:
    members = [Scripted(set(), arl0=60.0, evidence=-1.0) for _ in range(100)]
    assert Ensemble(members, "e_average").update(0.0).statistic == 0.0


def test_a_new_baseline_is_for_all_members() -> None:
    members = [Scripted({0}), Scripted(set())]
    jury = Ensemble(members, "election", quorum=2)
    jury.update(0.0)
    jury.rebaseline(70)
    assert [member.baseline for member in members] == [70, 70]
    assert (jury.statistic, jury.warning) == (0.0, False)


def test_wrong_arguments_are_named() -> None:
    for how, options, message in (
        ("vote", {}, "how"),
        ("bonferroni", {"quorum": 2}, "quorum"),
        ("election", {"quorum": 4}, "quorum must be from 1 to 3"),
        ("election", {"span": 0}, "span"),
        ("bonferroni", {"columns": [1]}, "column"),
    ):
        with pytest.raises(ValueError, match=message):
            Ensemble(scripted(set(), set(), set()), how, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="members"):
        Ensemble([])
    with pytest.raises(ValueError, match="e_average needs e-values, which cusum"):
        Ensemble([Scripted(set(), name="cusum")], "e_average")
    with pytest.raises(ValueError, match="unknown detector"):
        ensemble(["nope"], np.zeros(100))
    with pytest.raises(ValueError, match="early_warning only gives advice"):
        ensemble(["early_warning"], np.zeros(100))


@pytest.fixture(scope="module")
def calibrations() -> list[tuple[str, dict[str, Any]]]:
    """Two detectors calibrated once for the module, for 600 rows each."""
    values = np.random.default_rng(0).normal(20.0, 3.0, size=2000)
    names = ["cusum", "e_detector"]
    return [(name, detectors.calibrate(detectors.build(name), values, arl0=600).calibration()) for name in names]


def jury(calibrations: list[tuple[str, dict[str, Any]]], **options: Any) -> Ensemble:
    members = [
        Calibrated.from_calibration(detectors.build(name), calibration)
        for name, calibration in calibrations
        for _ in range(2)
    ]
    return Ensemble(members, columns=[0, 1] * len(calibrations), **options)


@pytest.mark.parametrize("options", [{}, {"how": "election", "quorum": 2}])
def test_calibrated_members_keep_the_joint_rate_and_find_a_shift(calibrations: Any, options: Any) -> None:
    rows = np.random.default_rng(1).normal(20.0, 3.0, size=(50_000, 2))
    watch = jury(calibrations, **options)
    assert 50_000 / len(watch.update_many(rows)) > 0.6 * watch.joint_arl0
    rows[:200, 1] += 6.0
    watch.reset()
    assert watch.update_many(rows[:200])[0] < 60
    assert all(label.endswith("[1]") for label in watch.voters)


def test_calibrated_e_values_keep_the_joint_rate() -> None:
    rng = np.random.default_rng(2)
    watch = ensemble(["e_detector", "disagreement"], rng.normal(size=2000), arl0=300, how="e_average")
    assert watch.joint_arl0 == pytest.approx(300)
    assert [member.arl0 for member in watch.members] == [600, 600]
    assert 15_000 / len(watch.update_many(rng.normal(size=15_000))) > 0.5 * 300
    assert watch.update_many(rng.normal(1.0, 1.0, size=200))


@pytest.mark.parametrize("options", [{}, {"how": "election"}, {"how": "election", "quorum": 2, "span": 30}])
def test_a_restored_ensemble_goes_on_bit_identically(calibrations: Any, options: Any) -> None:
    rows = np.random.default_rng(3).normal(20.0, 3.0, size=(2000, 2))
    rows[::97, 0] = np.nan
    rows[900:, 1] += 2.0
    original = jury(calibrations, **options)
    one_by_one = [index for index, row in enumerate(rows) if original.update(row).drift]
    batched = jury(calibrations, **options)
    found = batched.update_many(rows[:1100])
    restored = jury(calibrations, **options)
    restored.load_state_dict(batched.state_dict())
    found += [1100 + index for index in restored.update_many(rows[1100:])]
    assert found == one_by_one
    np.testing.assert_equal(restored.state_dict(), original.state_dict())


def test_an_e_average_does_not_depend_on_how_the_stream_is_cut(calibrations: Any) -> None:
    rows = np.random.default_rng(4).normal(20.0, 3.0, size=(600, 2))
    rows[300:, 1] += 3.0
    single, batched = (jury(calibrations[1:], how="e_average") for _ in range(2))
    expected = [index for index, row in enumerate(rows) if single.update(row).drift]
    assert expected
    assert batched.update_many(rows[:250]) + [250 + i for i in batched.update_many(rows[250:])] == expected
    np.testing.assert_equal(batched.state_dict(), single.state_dict())


def test_the_state_of_other_members_is_refused(calibrations: Any) -> None:
    state = jury(calibrations).state_dict()
    with pytest.raises(ValueError, match="anew"):
        Ensemble(scripted(set())).load_state_dict(state)


def test_a_matrix_gives_each_detector_of_values_a_member_for_each_column(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = np.arange(20.0).reshape(10, 2)
    seen = []

    def calibrate(detector: Detector, values: F64, arl0: float, seed: int) -> Scripted:
        seen.append((detector.name, values.tolist(), seed))
        return Scripted(set(), arl0, name=detector.name)

    monkeypatch.setattr("detectors.ensemble.calibrate", calibrate)
    watch = ensemble([CUSUM(shift=2.0), "mmd"], reference, 100, "election", quorum=2, seed=7)
    assert watch.labels == ["cusum[0]", "cusum[1]", "mmd"]
    assert seen == [
        ("cusum", reference[:, 0].tolist(), 7),
        ("cusum", reference[:, 1].tolist(), 8),
        ("mmd", reference.tolist(), 9),
    ]
    assert [member.arl0 for member in watch.members] == [150, 150, 150]
    assert watch.joint_arl0 == pytest.approx(100)
