"""The cells of `make bench-auto`: streams, controls, attacks, the short form's design, and bundles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daemon import packing
from daemon.bundle import build_model, open_bundle
from tests.benchmarks import auto_cells
from tests.benchmarks.auto_cells import Cell, LoadedCell
from tests.streams import MissingData, data, models
from tests.streams import sources as base_sources
from tests.streams.auto import attacks, bundles, sources
from tests.streams.auto import streams as auto_streams
from tests.streams.auto.streams import Drawn, arrange, draw, stretches
from tests.streams.data import F32

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's cache of the tests' own; only models that train in a second or two are asked of it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        auto_cells._served_by.cache_clear()
        yield folder
    auto_cells._served_by.cache_clear()


def cell_of(stream: str, order: str = "iid", labels: Any = "10%", seed: int = 0, rows: int = 400, **other: Any) -> Cell:
    levels: dict[str, Any] = {
        "model": auto_cells.models_of(stream)[-1], "batch": 8, "kind": auto_cells.kind_of(stream, order),
        "role": auto_cells.ROLES[stream],
    }  # fmt: skip
    return Cell(stream=stream, order=order, labels=labels, seed=seed, rows=rows, **(levels | other))


def drawn(name: str, rows: int = 300, seed: int = 0) -> Drawn:
    try:
        return draw(name, rows, seed)
    except MissingData as missing:
        pytest.skip(str(missing))


def loaded(cell: Cell) -> LoadedCell:
    try:
        return auto_cells.load_cell(cell)
    except MissingData as missing:
        pytest.skip(str(missing))


def part(name: str, which: sources.Part) -> sources.Rows:
    try:
        return sources.get(name).rows(which)
    except MissingData as missing:
        pytest.skip(str(missing))


def hashes(x: F32) -> set[bytes]:
    return {row.tobytes() for row in x}


# --- the design


def test_no_two_cells_are_the_same() -> None:
    for cells in (auto_cells.long_cells(), auto_cells.short_cells(1e9)):
        assert len({cell.name for cell in cells}) == len(set(cells)) == len(cells)


def test_the_short_form_is_part_of_the_long_one_and_a_shorter_time_gives_its_first_cells() -> None:
    def levels(cell: Cell) -> tuple[Any, ...]:
        return (cell.stream, cell.model, cell.order, cell.batch, cell.labels, cell.seed, cell.kind, cell.role)

    every = {levels(cell) for cell in auto_cells.long_cells()}
    short = auto_cells.short_cells(1e9)
    assert len(short) == auto_cells.MOST and {levels(cell) for cell in short} <= every
    assert len(auto_cells.short_cells(0.0)) == auto_cells.FEWEST
    middle = auto_cells.short_cells(sum(map(auto_cells.seconds, short[:180])) / 2 + 1e-6)
    assert middle == short[: len(middle)] and len(middle) == 180
    auto_cells._design.cache_clear()
    assert auto_cells.short_cells(1e9) == short


def met(cells: list[Cell]) -> Counter[Any]:
    return Counter(pair for cell in cells for pair in combinations(auto_cells.levels(cell).items(), 2))


@pytest.mark.parametrize(("limit", "between"), [(1e9, 3), (0.0, 2)])
def test_every_two_levels_that_go_together_meet_in_the_short_form(limit: float, between: int) -> None:
    possible, found = met(auto_cells.long_cells()), met(auto_cells.short_cells(limit))
    crossed = ("order", "batch", "labels", "seed", "network")
    for (one, other), _ in possible.items():
        count = found[one, other]
        if limit:
            assert count >= 1, (one, other)  # even each stream with each batch
        if one[0] in crossed and other[0] in ("batch", "labels", "seed"):
            assert count >= between, (one, other)
    assert all(found[pair] for pair in possible if pair[0][0] == "stream" and pair[1][0] == "model")


def test_every_kind_of_event_and_both_roles_are_in_the_short_form() -> None:
    short = auto_cells.short_cells(1e9)
    kinds = Counter(cell.kind for cell in short)
    assert set(kinds) == set(auto_cells.KINDS) and min(kinds.values()) >= 10
    assert min(Counter(cell.role for cell in short).values()) >= 80
    assert {cell.rows for cell in short} == set(auto_cells.ROWS.values()) and min(auto_cells.ROWS.values()) >= 300


def test_streams_are_fixed_or_reported_whatever_else_the_cell_is() -> None:
    roles = {(cell.stream, cell.role) for cell in auto_cells.long_cells()}
    assert len(roles) == len(auto_cells.ROLES) == len({stream for stream, _ in roles})
    assert auto_cells.ROLES["cifar3"] == "fixed" and auto_cells.ROLES["mnist_dead_sensor"] == "fixed"
    assert auto_cells.ROLES["cifar"] == auto_cells.ROLES["har_control"] == auto_cells.ROLES["elec2"] == "reported"


def test_a_control_whose_classes_come_sorted_is_no_control() -> None:
    for cell in auto_cells.long_cells():
        if cell.stream.endswith("_control"):
            assert cell.kind == ("label" if cell.order in ("sorted", "bursts") else "control")
        assert (cell.kind == "attack") == (cell.stream in auto_cells.ATTACK_STREAMS)


def test_every_network_of_a_family_serves_its_streams_and_wide_ones_only_controls() -> None:
    for stream in auto_cells.ROLES:
        names = auto_cells.models_of(stream)
        served = [sources.get(name) for name in names]
        assert served and len({source.network for source in served}) == len(served)
        assert len({source.wide for source in served}) == 1
        if served[0].wide:
            assert stream.endswith("_control") or stream in auto_cells.ATTACK_STREAMS
    networks = {source.network for source in sources.SOURCES.values()}
    assert networks == {"cnn_bn", "cnn_gn", "transformer", "mlp_bn", "mlp_ln", "mlp"}


# --- rows


@pytest.mark.parametrize("name", auto_streams.DRAWS)
def test_a_draw_is_the_same_in_every_call_and_another_for_another_seed(name: str) -> None:
    first, again, other = drawn(name), drawn(name), drawn(name, seed=1)
    assert 270 <= len(first.y) <= 300
    assert first.x.dtype == np.float32 and np.isfinite(first.x).all() and first.y.dtype == np.int64
    assert len(first.x) == len(first.y) == len(first.regime) == len(first.visit)
    assert np.array_equal(first.x, again.x) and np.array_equal(first.y, again.y)
    assert first.x.shape != other.x.shape or not np.array_equal(first.x, other.x)
    assert (np.diff(first.visit) >= 0).all() and first.regime.min() == 0
    for name_of in [source.name for source in sources.SOURCES.values() if source.name == name.partition("_")[0]]:
        with torch.inference_mode():
            outputs = sources.get(name_of).recipe.build().eval()(torch.from_numpy(first.x[:4]))
        assert outputs.shape[0] == 4 and first.y.max() < outputs.shape[1]


def test_stretches_are_neighbours_spread_over_every_regime() -> None:
    regime = np.repeat([0, 1], [1_000, 3_000])
    for seed in range(5):
        rows = stretches(regime, 400, np.random.default_rng(seed))
        assert np.bincount(regime[rows]).tolist() == [100, 300] and len(set(rows.tolist())) == 400
        assert (np.diff(rows) > 1).sum() <= 2 * auto_streams.STRETCHES
        assert rows.max() < 4_000 and rows[regime[rows] == 1].max() - rows[regime[rows] == 1].min() > 2_000
    assert stretches(regime, 9_000, np.random.default_rng(0)).tolist() == list(range(4_000))


def test_the_gradual_stream_moves_further_from_the_images_with_every_step() -> None:
    made = drawn("cifar_gradual", 600)
    spread = [float(np.abs(np.diff(made.x[made.regime == step], axis=3)).mean()) for step in range(6)]
    assert made.regime.tolist() == np.repeat(np.arange(6), 100).tolist()
    assert spread == sorted(spread, reverse=True) and spread[5] < 0.3 * spread[0]  # neighbouring pixels become alike


@pytest.mark.parametrize("name", ["mnist_recurring", "cifar_recurring"])
def test_regimes_come_back_under_their_old_number(name: str) -> None:
    made = drawn(name, 400)
    assert [int(made.regime[made.visit == visit][0]) for visit in range(8)] == [0, 1, 0, 2, 1, 2, 0, 1]
    assert len(hashes(made.x)) == len(made.x)
    contrast = [float(made.x[made.visit == visit].std((1, 2, 3)).mean()) for visit in range(8)]
    pale = {"mnist_recurring": (1, 4, 7), "cifar_recurring": (3, 5)}[name]
    others = [value for visit, value in enumerate(contrast) if visit not in pale]
    assert max(contrast[visit] for visit in pale) < 0.5 * min(others)


def test_labels_change_places_in_the_second_half_of_the_swapped_digits() -> None:
    made, before = drawn("mnist_swap", 400), drawn("mnist_control", 8_000)
    truth = {row.tobytes(): int(label) for row, label in zip(before.x, before.y, strict=True)}
    original = np.array([truth[row.tobytes()] for row in made.x])
    assert (made.y[made.regime == 0] == original[made.regime == 0]).all()
    after = made.regime == 1
    assert (made.y[after] == auto_streams.SWAPPED[original[after]]).all() and (made.y[after] != original[after]).any()


def test_the_prior_shift_leaves_the_images_and_skews_the_classes() -> None:
    made = drawn("cifar_prior", 1_000)
    frequent = np.isin(made.y, (1, 4, 8))
    assert len(hashes(made.x)) == len(made.x)
    assert frequent[made.regime == 0].mean() < 0.45 and frequent[made.regime == 1].mean() == pytest.approx(0.9)


@pytest.mark.parametrize("kind", ["native", "iid", "sorted", "bursts", "mixed", "recurring"])
def test_every_order_serves_every_row_once_and_repeats_itself(kind: str) -> None:
    rng = np.random.default_rng(3)
    visit = np.repeat([0, 1, 2, 3], [60, 90, 30, 20])
    made = Drawn(x=np.zeros((200, 1), np.float32), y=rng.integers(0, 4, 200), regime=visit % 3, visit=visit)
    rows = arrange(kind, made, 0)
    assert sorted(rows.tolist()) == list(range(200)) and np.array_equal(rows, arrange(kind, made, 0))
    if kind != "native":
        assert not np.array_equal(rows, arrange(kind, made, 1))


def test_recurring_goes_round_the_regimes_three_times() -> None:
    regime = np.repeat([0, 1, 2], [60, 90, 31])
    made = Drawn(x=np.zeros((181, 1), np.float32), y=np.zeros(181, np.int64), regime=regime, visit=regime)
    served = regime[arrange("recurring", made, 0)]
    runs = np.split(served, np.flatnonzero(np.diff(served)) + 1)
    assert [int(run[0]) for run in runs] == [0, 1, 2] * 3
    assert [len(run) for run in runs] == [20, 30, 11, 20, 30, 10, 20, 30, 10]


def test_what_is_no_stream_or_no_model_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no stream is called 'weather'; there are: cifar, "):
        draw("weather", 100, 0)
    with pytest.raises(ValueError, match="rows is 0 and seed is 0"):
        draw("cifar", 0, 0)
    with pytest.raises(ValueError, match=r"no source model is called 'oracle'; there are: cifar, "):
        sources.get("oracle")
    with pytest.raises(ValueError, match=r"no attack is called 'flood'; there are: dead_sensor, "):
        attacks.attack("flood", *plain_rows(), np.random.default_rng(0))


# --- controls


def control_models() -> list[str]:
    return sorted({auto_cells.models_of(name)[0] for name in auto_streams.DRAWS if name.endswith("_control")})


@pytest.mark.parametrize("name", control_models())
def test_control_rows_are_in_no_training_or_calibration_row(name: str) -> None:
    x, y = part(name, "control")
    train, held = part(name, "train")[0], part(name, "held")[0]
    assert len(y) >= 300 and len(held) >= 50
    seen = hashes(train) | hashes(held)
    common = sum(row.tobytes() in seen for row in x)
    assert common <= 0.01 * len(x)  # the recordings themselves repeat a few rows
    drawn_rows = drawn(f"{name.partition('_')[0]}_control", len(y)).x
    assert hashes(drawn_rows) <= hashes(x)


@pytest.mark.parametrize("name", sources.SOURCES)
def test_held_rows_are_enough_to_calibrate_on_and_not_trained_on(name: str) -> None:
    train, held = part(name, "train"), part(name, "held")
    assert len(held[0]) >= 100 and len(train[0]) == len(train[1])
    seen = hashes(train[0])
    assert sum(row.tobytes() in seen for row in held[0]) <= 0.02 * len(held[0])  # the recordings repeat a few rows


def test_neighbouring_windows_of_one_trial_are_never_parted() -> None:
    """They overlap by half, so that a model trained on one would know the other."""
    found = data.arrays("har_phone_watch.npz") if drawn("har_control", 50) else {}
    phone = found["segment"] == 0
    x = np.ascontiguousarray(found["x"][phone].transpose(0, 2, 1), dtype=np.float32)
    place = {row.tobytes(): number for number, row in enumerate(x)}
    parts = np.empty(len(x), "U8")
    for which in ("train", "held", "control"):
        for row in part("har_cnn_bn_wide", which)[0]:
            parts[place[row.tobytes()]] = which
    near = (np.abs(np.diff(found["t_ms"][phone])) < 1_280) & (np.diff(found["subject"][phone].astype(int)) == 0)
    assert near.sum() > 500 and (parts[1:] == parts[:-1])[near].all()


def test_where_there_are_no_rows_for_a_control_the_answer_says_what_to_take() -> None:
    for name in ("gas_mlp_bn", "insects", "har_cnn_bn", "elec2_mlp_bn"):
        with pytest.raises(ValueError, match="take the wide model's"):
            part(name, "control")


# --- attacks


def plain_rows(shape: tuple[int, ...] = (6,)) -> tuple[F32, Any, Any]:
    rng = np.random.default_rng(4)
    y = rng.integers(0, 3, 500)
    scores = rng.random((500, 3)) + 2 * np.eye(3)[y]
    return rng.normal(0, 1, (500, *shape)).astype(np.float32), y, scores / scores.sum(1, keepdims=True)


def attacked(kind: str, shape: tuple[int, ...] = (6,), seed: int = 0) -> tuple[F32, attacks.Attacked]:
    x, y, confidence = plain_rows(shape)
    before, labels = x.copy(), y.copy()
    made = attacks.attack(kind, x, y, confidence, np.random.default_rng(seed))
    assert np.array_equal(x, before) and np.array_equal(y, labels)
    first = attacks.begins(500)
    assert np.array_equal(made.x[:first], x[:first]) and np.array_equal(made.y[:first], y[:first])
    assert made.touched.min() >= first and np.isfinite(made.x).all() and made.x.dtype == np.float32
    untouched = np.setdiff1d(np.arange(500), made.touched)
    assert np.array_equal(made.x[untouched], x[untouched]) and np.array_equal(made.y[untouched], y[untouched])
    return x, made


@pytest.mark.parametrize("shape", [(6,), (6, 16), (1, 28, 28), (3, 32, 32)])
def test_a_dead_sensor_stays_at_zero_or_at_its_last_value(shape: tuple[int, ...]) -> None:
    ends = set()
    for seed in range(8):
        x, made = attacked("dead_sensor", shape, seed)
        changed = (made.x[300:] != x[300:]).any(0)
        assert changed.any() and changed.mean() <= 0.26
        values = made.x[300:][:, changed]
        assert (values == values[0]).all()
        ends.add(bool((values == 0).all()))
        assert (values == 0).all() or np.array_equal(values[0], x[199][changed])
    assert ends == {True, False}


def test_a_constant_stream_repeats_one_row_with_its_label() -> None:
    x, made = attacked("constant")
    assert (made.x[200:] == x[200]).all() and len(set(made.y[200:].tolist())) == 1


def test_one_row_in_a_hundred_is_wild_and_finite() -> None:
    _, made = attacked("outliers")
    assert len(made.touched) == 3
    wild = np.abs(made.x[made.touched])
    assert (wild.max(1) >= 1e3).all() and wild.max() <= 1e6 * 1.01
    _, wide = attacked("outliers", (6, 64))
    far = np.abs(wide.x[wide.touched]) >= 900
    assert far.mean() == pytest.approx(0.25, abs=0.05) and (wide.x[wide.touched][far] < 0).any()


def test_nine_rows_in_ten_are_copies_of_the_surest_of_one_class() -> None:
    x, made = attacked("duplicates")
    _, y, confidence = plain_rows()
    assert len(made.touched) == 270 and len(hashes(made.x[made.touched])) == attacks.COPIED
    (label,) = set(made.y[made.touched].tolist())
    originals = [number for number, row in enumerate(x) if row.tobytes() in hashes(made.x[made.touched])]
    mine = (y == label) & (confidence.argmax(1) == y)
    least = confidence[originals].max(1).min()
    assert (y[originals] == label).all() and (confidence[mine].max(1) > least).sum() < attacks.COPIED


def test_too_few_rows_for_an_attack_are_refused() -> None:
    x, y, confidence = plain_rows()
    with pytest.raises(ValueError, match="constant: 20 rows are too few"):
        attacks.attack("constant", x[:20], y[:20], confidence[:20], np.random.default_rng(0))
    with pytest.raises(ValueError, match="fewer than 4 rows of every class right"):
        attacks.attack("duplicates", x, (y + 1) % 3, confidence, np.random.default_rng(0))


# --- loaded cells


def test_a_cell_is_the_same_in_every_call_and_its_model_is_the_callers_own(cache: Path) -> None:
    cell = cell_of("ageing_duplicates", "native")
    first = loaded(cell)
    with torch.no_grad():
        first.model.classifier.weight.zero_()  # type: ignore[union-attr, operator]
    first.x[:] = 0.0
    auto_cells._drawn.cache_clear()
    second, third = loaded(cell), loaded(cell)
    assert np.array_equal(second.x, third.x) and np.array_equal(second.labelled, third.labelled) and second.x.any()
    assert second.model.classifier.weight.any()  # type: ignore[union-attr, operator]
    assert second.changes == [160] and second.regime.tolist() == [0] * 160 + [1] * 240
    assert second.classes == 4 and len(second.source_x) == len(second.source_y) == 4_096
    assert 20 <= second.labelled.sum() <= 60 and cell.delay == 200


def test_changes_are_where_another_regime_begins(cache: Path) -> None:
    made = loaded(cell_of("ageing", "recurring"))
    assert len(made.changes) == 14 and all(made.regime[row] != made.regime[row - 1] for row in made.changes)
    assert loaded(cell_of("ageing", "mixed")).changes == []
    assert loaded(cell_of("ageing_control", "sorted")).changes == []
    assert len(loaded(cell_of("gas", "native")).changes) == 6


def test_labels_come_for_all_rows_for_a_tenth_or_for_none(cache: Path) -> None:
    shares = [loaded(cell_of("ageing", labels=labels, rows=2_000)).labelled.mean() for labels in auto_cells.LABELS]
    assert shares[0] == 0.0 and shares[1] == pytest.approx(0.1, abs=0.03) and shares[2] == 1.0
    assert loaded(cell_of("elec2", "native")).cell.delay == 48


@pytest.mark.parametrize(("stream", "most"), [("ageing_control", 0.06), ("gas_control", 0.04), ("har_control", 0.06)])
def test_the_model_is_as_good_on_its_control_as_on_held_rows(cache: Path, stream: str, most: float) -> None:
    made = loaded(cell_of(stream, rows=1_500))

    def error(x: F32, y: Any) -> float:
        return float((models.outputs(made.model, x)[0].argmax(1).numpy() != y).mean())

    held, control = error(made.source_x, made.source_y), error(made.x, made.y)
    assert control < most and abs(control - held) < 0.02


def test_a_model_is_trained_once_and_its_name_follows_the_recipe(cache: Path, monkeypatch: Any) -> None:
    try:
        first = sources.model("gas_mlp")
    except MissingData as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(base_sources, "train", lambda recipe: pytest.fail("trained again"))
    second = sources.model("gas_mlp")
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    stems = {source.stem for source in sources.SOURCES.values() if source.family in ("gas", "ageing")}
    assert len(stems) == 5 and sources.get("ageing").stem == f"ageing-{models.key('ageing')}"


# --- bundles


def test_a_bundle_is_packed_once_and_knows_what_the_cell_knows(cache: Path, monkeypatch: Any) -> None:
    made = loaded(cell_of("gas"))
    assert made.cell.model == "gas_mlp"
    folder = auto_cells.bundle_for("gas_mlp")
    monkeypatch.setattr(packing, "pack", lambda *args, **kw: pytest.fail("packed again"))
    assert auto_cells.bundle_for("gas_mlp") == folder and folder.is_relative_to(models.cache_folder())
    bundle = open_bundle(folder, sources.get("gas_mlp").factory, ROOT)
    assert bundle.manifest.calibration_rows == len(made.source_x) and bundle.manifest.head == "5"
    assert torch.equal(bundle.model(torch.from_numpy(made.x[:64])), made.model(torch.from_numpy(made.x[:64])))
    for name, tensor in made.reference.to_tensors().items():
        assert torch.allclose(tensor, bundle.reference.to_tensors()[name]), name


def test_the_code_that_packs_is_followed_through_its_imports(monkeypatch: Any) -> None:
    files = {file.relative_to(ROOT).as_posix() for file in bundles._imported(ROOT / "daemon/packing.py", False)}
    assert {"daemon/calibrating.py", "daemon/signals.py", "adapters/reference.py"} <= files
    assert not any(file.startswith("adapters/fast") for file in files)
    everything = {
        file.relative_to(ROOT).as_posix() for file in bundles._imported(ROOT / "daemon/calibrating.py", False)
    }
    assert "detectors/cusum.py" in everything
    assert bundles.code_version(True) != bundles.code_version(False)


@pytest.mark.parametrize("name", sources.SOURCES)
def test_every_network_is_a_factory_with_a_head_that_the_daemon_can_import(name: str) -> None:
    from adapters.features import find_head

    network = build_model(sources.get(name).factory, ROOT)
    head = find_head(network)
    assert head is not None and isinstance(network.get_submodule(head), torch.nn.Linear)
    assert sum(parameter.numel() for parameter in network.parameters()) < 200_000
