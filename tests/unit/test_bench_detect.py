from __future__ import annotations

import math

import numpy as np
import pytest

from tests.benchmarks import detect_rivals as rivals
from tests.benchmarks import detect_tables
from tests.benchmarks.detect import Job, Outcome, delays, first_alarm, measure, rows_per_alarm, takes_part
from tests.benchmarks.detect_results import Measured, gathered
from tests.benchmarks.detect_streams import CLASSES, F64, SETTINGS, STREAMS, correlated, one_hot, prior, seasonal
from tests.benchmarks.detect_subjects import build, subjects


class AlarmsAt:
    """Alarms at given rows since the start."""

    def __init__(self, *rows: int) -> None:
        self._rows, self._seen = rows, 0

    def update_many(self, values: F64) -> list[int]:
        begin, self._seen = self._seen, self._seen + len(values)
        return [row - begin for row in self._rows if begin <= row < self._seen]


def test_the_arl0_of_the_blind_detector_is_n() -> None:
    rng = np.random.default_rng(0)
    assert rows_per_alarm(lambda: rivals.EveryN(7, rng), STREAMS["iid"], rng, 7000) == 7.0


def test_the_blind_detector_alarms_at_the_same_rows_however_the_stream_is_cut() -> None:
    whole, cut = (rivals.EveryN(7, np.random.default_rng(3)) for _ in range(2))
    found = [begin + index for begin in range(0, 100, 13) for index in cut.update_many(np.zeros(min(13, 100 - begin)))]
    assert found == whole.update_many(np.zeros(100))
    assert set(np.diff(found)) == {7}


@pytest.mark.parametrize("change", [0, 1, 300])
def test_a_delay_counts_from_the_change_and_leaves_out_what_alarmed_before(change: int) -> None:
    assert first_alarm(AlarmsAt(0, change + 260), np.zeros(1000), change) == (260.0 if change else 0.0)


def test_no_alarm_is_a_miss() -> None:
    assert math.isinf(first_alarm(AlarmsAt(5), np.zeros(1000), 6))


def test_delays_are_those_of_the_shifted_rows() -> None:
    class Above:
        def update_many(self, values: F64) -> list[int]:
            return [int(index) for index in np.flatnonzero(values > 5.0)]

    rng = np.random.default_rng(0)
    assert list(delays(Above, STREAMS["iid"], rng, 100.0, rows=50, runs=3)) == [0.0, 0.0, 0.0]
    assert list(delays(Above, STREAMS["iid"], rng, 0.0, rows=50, runs=1)) == [math.inf]


def test_a_rival_is_really_rivers() -> None:
    from river.drift import ADWIN

    values = np.random.default_rng(1).normal(size=900)
    values[500:] += 2.0
    expected, adwin = [], ADWIN()
    for index, value in enumerate(values):
        adwin.update(value)
        if adwin.drift_detected:
            expected.append(index)
            adwin = ADWIN()
    assert expected
    assert build(subjects()["river ADWIN"], values, 100.0, 0).update_many(values) == expected


@pytest.mark.parametrize("name", rivals.RIVER)
def test_each_of_rivers_reads_raw_values(name: str) -> None:
    values = np.random.default_rng(2).normal(size=200)
    watch = rivals.river_raw(name, values)
    alarms = watch.update_many(values)
    watch.reset()
    assert watch.update_many(values) == alarms


@pytest.mark.parametrize(("name", "setting"), [("cusum", "iid"), ("every n", "iid"), ("every n", "6 features")])
def test_a_job_counts_alarms_and_finds_what_is_plain_to_see(name: str, setting: str) -> None:
    job = Job(subject=name, setting=setting, draw=0, arl0=50.0, reference=200, rows=500, runs=1)
    outcome = measure(job)
    assert (outcome.error, outcome.rows) == ("", 500)
    assert len(outcome.delays) == 3 * len(SETTINGS[setting].changes)
    assert outcome.alarms == 10 or name != "every n"
    assert all(delay < 500 for found in outcome.delays.values() for delay in found)


def test_what_a_subject_refuses_is_told() -> None:
    job = Job(subject="cusum", setting="iid", draw=0, arl0=50.0, reference=10, rows=10)
    outcome = measure(job)
    assert outcome.error.startswith("ValueError")
    assert (outcome.rows, outcome.alarms, outcome.delays) == (0, 0, {})


def test_every_detector_that_alarms_is_measured() -> None:
    import detectors

    alarming = {name for name in detectors.names() if not detectors.build(name).advisory}
    assert alarming <= set(subjects())
    for name in alarming:
        taken = [setting for setting in SETTINGS.values() if takes_part(subjects()[name], setting)]
        assert sum(setting.null for setting in taken) >= len(STREAMS)
        assert any(setting.changes for setting in taken)


def test_the_interval_is_never_narrower_than_counting_allows() -> None:
    found = Measured(rows=[10_000, 10_000], alarms=[10, 10])
    low, high = found.interval(1000.0)
    assert found.ratio(1000.0) == 1.0
    assert low == pytest.approx(math.exp(-1.96 / math.sqrt(20)))
    assert high == pytest.approx(math.exp(1.96 / math.sqrt(20)))
    wide = Measured(rows=[10_000, 10_000], alarms=[1, 199]).interval(100.0)
    assert wide[0] < 0.51 and wide[1] > 9.0


def _outcome(subject: str, alarms: int, delay: float) -> Outcome:
    job = Job(subject=subject, setting="iid", draw=0, arl0=100.0, reference=1000)
    return Outcome(job=job, rows=10_000, alarms=alarms, delays={("mean", 1.0): [delay] * 3})


def test_only_who_keeps_the_arl0_competes() -> None:
    outcomes = [_outcome("cusum", 100, 20.0), _outcome("e_detector", 400, 2.0), _outcome("river ADWIN", 90, 1.0)]
    assert detect_tables.competing(gathered(outcomes), subjects(), "iid", ("mean", 1.0), 100.0) == {"cusum": 20.0}
    text = detect_tables.report(outcomes, [], 100.0)
    assert "**20**" in text and "2 [25]" in text and "1 [111]" in text


def test_tables_go_between_the_marks_alone() -> None:
    text = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n"
    assert detect_tables.filled(text, "new") == "before\n<!-- bench -->\nnew\n<!-- /bench -->\nafter\n"
    with pytest.raises(ValueError, match="no place"):
        detect_tables.filled("nothing", "new")


def test_a_change_of_correlation_leaves_each_feature_as_it_was() -> None:
    rng = np.random.default_rng(4)
    after = correlated(rng.normal(size=(20_000, 6)), 2.0, rng)
    assert after.std(0) == pytest.approx(np.ones(6), abs=0.03)
    found = np.corrcoef(after.T)
    assert [found[0, 1], found[2, 3], found[4, 5]] == pytest.approx([math.tanh(1.0)] * 3, abs=0.02)
    assert abs(found[1, 2]) < 0.03


def test_a_change_of_the_prior_moves_the_log_odds_of_one_class() -> None:
    rng = np.random.default_rng(5)
    share = prior(one_hot(rng, 50_000), 1.0, rng).mean(0)
    assert math.log(share[0] / (1.0 - share[0])) + math.log(CLASSES - 1) == pytest.approx(1.0, abs=0.05)
    assert share[1:] == pytest.approx(np.full(CLASSES - 1, (1.0 - share[0]) / (CLASSES - 1)), abs=0.01)


def test_the_seasonal_stream_has_unit_variance() -> None:
    assert seasonal(np.random.default_rng(6), 96 * 200).std() == pytest.approx(1.0, abs=0.02)
