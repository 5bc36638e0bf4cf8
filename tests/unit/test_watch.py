from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from daemon import checkpoint
from daemon.assembly import assemble
from daemon.bundle import read_manifest
from daemon.detector_settings import check_detectors, of_features, of_signals
from daemon.errors import SettingsError
from daemon.packing import pack
from daemon.regulator import State
from daemon.signals import watched_features
from daemon.source_reference import MOST_FEATURES, make_reference
from daemon.watch import CLASS_GROUPS, class_index
from tests.unit.worlds import FACTORY, build, decoded, settings, source_rows, worker

CUSUM_ONLY = "HOMEOSTAT_DETECT=ddm: the bundle is not calibrated for it: pack it with the same setting, or use cusum"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose features are watched as a whole."""
    folder = tmp_path_factory.mktemp("watch") / "bundle"
    x, y = source_rows(4000, seed=1)
    names = {"watch": ("cusum",), "watch_features": "mahalanobis"}
    pack(folder, model=build(), factory=FACTORY, x=x, y=y, arl0=20_000, **names)  # type: ignore[arg-type]
    return folder


def mixed(rows: int, seed: int) -> np.ndarray:
    """Source rows whose inputs depend on each other; each alone looks as ever."""
    x, _ = source_rows(rows, seed=seed)
    x[:, 1] = 0.9 * x[:, 0] + np.sqrt(1 - 0.9**2) * x[:, 1]
    x[:, 3] = -0.9 * x[:, 2] + np.sqrt(1 - 0.9**2) * x[:, 3]
    return x


def test_a_detector_of_features_sees_what_no_single_signal_shows(tmp_path: Path, bundle: Path) -> None:
    made = worker(tmp_path, bundle=bundle, detect={"features": "mahalanobis"})
    made.loop.process(decoded(source_rows(256, seed=5)[0]))
    assert made.loop.monitor.watch.shift.kind.value == "none"
    made.loop.process(decoded(mixed(512, 6), 256))
    counted = {name: count._value.get() for (name, _), count in made.telemetry.drifts.items() if count._value.get()}
    assert "features" in counted


def test_the_manifest_says_which_false_alarm_rates_were_asked_for_and_reached(bundle: Path) -> None:
    found = read_manifest(bundle).false_alarms
    assert set(found) == {"cusum", "label_shift", "risk_monitor", "mahalanobis", "early_warning"}
    assert set(found["cusum"]) == {"input_shift", "feature_shift", "class_shift", "entropy", "error"}
    for name, signals in found.items():
        for asked, reached, low, high in signals.values():
            # Eight detectors can alarm: together they may do so once in 20,000 rows.
            assert asked == (20_000 if name == "early_warning" else 160_000)
            assert low < reached < high and low / 1.5 < asked < 1.5 * high


def test_features_are_not_kept_unless_they_are_watched(tmp_path: Path, bundle: Path) -> None:
    plain = worker(tmp_path, bundle=bundle)
    assert "features" not in plain.loop.monitor.watch.detectors
    assert plain.loop.resident.measure_version(source_rows(4)[0]).features is None


def test_a_watch_goes_on_from_a_checkpoint_bit_identically(tmp_path: Path, bundle: Path) -> None:
    one, other = (worker(tmp_path, bundle=bundle, detect={"features": "mahalanobis"}).loop for _ in range(2))
    one.process(decoded(source_rows(100, seed=7)[0]))
    other.monitor.watch.load_state_dict(checkpoint.decode(checkpoint.encode(one.monitor.watch.state_dict())))
    rows = one.resident.measure_version(mixed(300, 8))
    for loop in (one, other):
        loop.monitor.watch.rows(rows)
    assert one.monitor.watch.alarms == other.monitor.watch.alarms != []
    np.testing.assert_equal(one.monitor.watch.state_dict(), other.monitor.watch.state_dict())


def test_another_rate_of_false_alarms_is_that_of_all_together_and_outlives_a_checkpoint(
    tmp_path: Path, bundle: Path
) -> None:
    loop = worker(tmp_path, bundle=bundle).loop
    loop.process(decoded(source_rows(100, seed=7)[0]))
    watch, early = loop.monitor.watch, loop.monitor.watch.early["feature_shift"]
    each = {name: (made.arl0, made.threshold, made.statistic) for name, made in watch.detectors.items()}
    watch.aim(5_000)
    assert watch.arl0 == 5_000 and early.arl0 == 5_000
    for name, made in watch.detectors.items():
        arl0, threshold, statistic = each[name]
        assert made.arl0 == arl0 / 4 and made.threshold < threshold and made.statistic == pytest.approx(statistic)
    again = worker(tmp_path, bundle=bundle, detect={"arl0": 40_000}).loop.monitor.watch
    again.load_state_dict(checkpoint.decode(checkpoint.encode(watch.state_dict())))
    assert all(made.arl0 == 2 * each[name][0] for name, made in again.detectors.items())
    assert all(made.threshold > each[name][1] for name, made in again.detectors.items())
    watch.aim(None)
    assert all(made.threshold == pytest.approx(each[name][1]) for name, made in watch.detectors.items())


def test_a_rate_that_one_detector_can_not_have_changes_none(tmp_path: Path, bundle: Path) -> None:
    watch = worker(tmp_path, bundle=bundle).loop.monitor.watch
    watch.rows(worker(tmp_path, bundle=bundle).loop.resident.measure_version(source_rows(64)[0]))
    before, rate = watch.state_dict(), watch.arl0
    with pytest.raises(ValueError, match=r"early_warning: .*calibrate anew"):
        watch.aim(60)
    np.testing.assert_equal(watch.state_dict(), before)
    assert watch.arl0 == rate


def test_other_shares_of_the_classes_are_reported_and_start_no_adaptation(tmp_path: Path, bundle: Path) -> None:
    made = worker(tmp_path, bundle=bundle)
    watch = made.loop.monitor.watch
    watch.alarms = ["prior", "risk"]
    assert not watch.drift()
    watch.alarms = ["prior", "entropy"]
    assert watch.drift()
    x, y = source_rows(3000, seed=9)
    made.loop.process(decoded(x[y == 0][:40]))
    counted = {name: count._value.get() for (name, _), count in made.telemetry.drifts.items() if count._value.get()}
    assert counted.get("prior", 0) > 0
    assert made.loop.regulator.state is State.STEADY or set(counted) - {"prior", "risk"}


def test_a_new_baseline_is_not_taken_by_what_is_measured_against_the_reference(tmp_path: Path, bundle: Path) -> None:
    watch = worker(tmp_path, bundle=bundle).loop.monitor.watch
    watch.rebaseline(64)
    assert {name for name, detector in watch.detectors.items() if not detector.learning} == {"prior", "risk"}


def test_many_classes_are_watched_in_groups() -> None:
    assert class_index(np.array([0, 63, 64, 1000])).tolist() == [0, 63, 0, 1000 % CLASS_GROUPS]


def test_wide_features_are_watched_along_their_leading_directions() -> None:
    rng = np.random.default_rng(0)
    low = rng.normal(size=(500, 8)) @ rng.normal(size=(8, 200))
    features = torch.from_numpy((low + 0.01 * rng.normal(size=(500, 200))).astype(np.float32))
    logits, y = torch.from_numpy(rng.normal(size=(500, 3)).astype(np.float32)), rng.integers(0, 3, 500).astype(float)
    reference = make_reference(low.astype(np.float32), y, logits, features, np.arange(9), "classification", 3)
    assert reference.feature_axes is not None and reference.feature_axes.shape == (MOST_FEATURES - 1, 200)
    watched = watched_features(features, reference.feature_mean, reference.feature_axes)
    assert watched is not None and watched.shape == (500, MOST_FEATURES)
    # Eight directions hold nearly all; what the others leave out stays small, until something new comes.
    assert watched[:, -1].max() < 1.0
    beyond = features + 0.5 * torch.from_numpy(rng.normal(size=(1, 200)).astype(np.float32))
    moved = watched_features(beyond, reference.feature_mean, reference.feature_axes)
    assert moved is not None and moved[:, -1].min() > watched[:, -1].max()


def test_class_moments_are_those_of_the_predicted_class_and_lean_on_all_rows_where_scarce() -> None:
    features = torch.cat((torch.zeros(400, 2), torch.ones(400, 2) * 10.0))
    logits = torch.zeros(800, 3)
    logits[:400, 0] = logits[400:, 1] = 5.0
    reference = make_reference(features.numpy(), np.zeros(800), logits, features, np.arange(3), "classification", 3)
    assert reference.class_feature_mean is not None
    assert reference.class_feature_mean[:, 0].tolist() == pytest.approx([10 * 5 / 410, 4050 / 410, 5.0])


@pytest.mark.parametrize(
    ("detect", "message"),
    [
        ({"name": "nope"}, "HOMEOSTAT_DETECT=nope: there is no such detector of a signal; there are adwin, "),
        ({"name": "mmd"}, "HOMEOSTAT_DETECT=mmd: there is no such detector of a signal"),
        ({"name": "early_warning"}, "HOMEOSTAT_DETECT=early_warning: there is no such detector of a signal"),
        ({"features": "cusum"}, "HOMEOSTAT_DETECT__FEATURES=cusum: .* there are ks, mahalanobis, mmd"),
    ],
)
def test_a_detector_in_the_wrong_place_is_refused_by_name(tmp_path: Path, detect: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_detectors(settings(tmp_path, detect=detect))


def test_a_bundle_that_does_not_know_a_detector_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=CUSUM_ONLY):
        assemble(settings(tmp_path, detect={"name": "ddm"}))
    with pytest.raises(SettingsError, match="HOMEOSTAT_DETECT__FEATURES=mmd: the bundle is not calibrated for it"):
        assemble(settings(tmp_path, detect={"features": "mmd"}))


def test_every_detector_has_its_place() -> None:
    assert {"adwin", "cusum", "ddm", "e_detector", "kswin"} <= set(of_signals())
    assert of_features() == ["ks", "mahalanobis", "mmd"]
