"""Streams, the two benchmarks of the fast methods, and what adapters/fast/README.md says."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adapters.fast as fast
from daemon.source_reference import make_reference
from tests import streams
from tests.benchmarks import errors, fast_models, fast_readme
from tests.benchmarks import fast as bench
from tests.streams import data, models, sources
from tests.streams.corruptions import CONSTANTS, corrupt, disk

RNG_SEED = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> data.Images:
    """Smooth colour images, away from black and white."""
    pytest.importorskip("PIL")
    coarse = np.random.default_rng(1).integers(60, 190, (12, 3, 4, 4)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), size=32, mode="bilinear")
    return smooth.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def corrupted(images: data.Images, kind: str, severity: int) -> data.Images:
    return corrupt(images, kind, severity, np.random.default_rng(RNG_SEED))


@pytest.mark.parametrize("kind", CONSTANTS)
def test_every_corruption_keeps_the_shape_and_repeats_itself(images: data.Images, kind: str) -> None:
    for severity in (1, 5):
        once, again = corrupted(images, kind, severity), corrupted(images, kind, severity)
        assert once.dtype == np.uint8 and once.shape == images.shape
        assert np.array_equal(once, again)
        assert not np.array_equal(once, images)


@pytest.mark.parametrize("kind", sorted(set(CONSTANTS) - {"saturate"}))
def test_a_higher_severity_is_further_from_the_image(images: data.Images, kind: str) -> None:
    distances = [
        float(np.square(corrupted(images, kind, severity) - images.astype(float)).mean()) for severity in (1, 3, 5)
    ]
    assert distances == sorted(distances) and distances[0] < distances[2]


def test_noise_has_the_published_deviation(images: data.Images) -> None:
    grey = np.full((8, 32, 32, 3), 128, np.uint8)
    assert (corrupted(grey, "gaussian_noise", 5) / 255.0).std() == pytest.approx(0.10, rel=0.03)
    assert (corrupted(grey, "shot_noise", 5) / 255.0).std() == pytest.approx((0.502 / 50) ** 0.5, rel=0.03)
    hit = corrupted(grey, "impulse_noise", 5) != 128
    assert hit.mean() == pytest.approx(0.07, rel=0.1)


def test_contrast_shrinks_around_the_mean_of_each_channel(images: data.Images) -> None:
    pale = corrupted(images, "contrast", 5).astype(float)
    assert pale.mean((1, 2)) == pytest.approx(images.mean((1, 2)), abs=1.0)
    assert pale.std((1, 2)) == pytest.approx(0.15 * images.std((1, 2)), abs=0.6)


def test_brightness_adds_to_the_largest_channel_and_keeps_the_hue(images: data.Images) -> None:
    bright = corrupted(images, "brightness", 3) / 255.0
    value = images.max(3) / 255.0
    assert bright.max(3) == pytest.approx(np.minimum(value + 0.15, 1.0), abs=1 / 255)
    assert bright.argmax(3)[value < 0.8].tolist() == images.argmax(3)[value < 0.8].tolist()


def test_saturation_moves_grey_to_red_as_published() -> None:
    grey = np.full((1, 32, 32, 3), 100, np.uint8)
    red, green, blue = corrupted(grey, "saturate", 5)[0, 0, 0].tolist()
    assert red in (99, 100) and green == blue == 80


@pytest.mark.parametrize("kind", ["defocus_blur", "gaussian_blur", "zoom_blur", "pixelate"])
def test_a_blur_leaves_a_plain_image_plain(kind: str) -> None:
    plain = np.full((2, 32, 32, 3), 77, np.uint8)
    assert np.abs(corrupted(plain, kind, 5).astype(int) - 77).max() <= 1


def test_the_disk_of_the_defocus_sums_to_one() -> None:
    for radius, blur in CONSTANTS["defocus_blur"]:
        assert disk(radius, blur).sum() == pytest.approx(1.0)


def test_what_is_no_corruption_is_refused_by_name(images: data.Images) -> None:
    with pytest.raises(ValueError, match=r"no corruption is called 'rain'; there are: gaussian_noise, "):
        corrupted(images, "rain", 1)
    with pytest.raises(ValueError, match="severity is 1 to 5, got 6"):
        corrupted(images, "contrast", 6)


def test_a_quarter_turn_is_numpys() -> None:
    image = np.random.default_rng(0).random((1, 9, 9)).astype(np.float32)
    assert data.rotated(image, 0.0) == pytest.approx(image)
    turns = [np.rot90(image, k, axes=(1, 2)) for k in (1, -1)]
    assert any(data.rotated(image, 90.0) == pytest.approx(turn, abs=1e-6) for turn in turns)


REGIME = np.repeat([0, 1, 2], [60, 90, 30])
LABELS = np.random.default_rng(2).integers(0, 4, 180)


@pytest.mark.parametrize("kind", streams.ORDERS)
def test_every_order_serves_every_row_once_and_repeats_itself(kind: str) -> None:
    rows = streams.order(kind, LABELS, REGIME)
    assert sorted(rows.tolist()) == list(range(180))
    assert np.array_equal(rows, streams.order(kind, LABELS, REGIME))


def test_orders_within_regimes_keep_the_regimes_order_and_mixed_does_not() -> None:
    for kind in ("native", "iid", "sorted", "bursts", "one"):
        assert (np.diff(REGIME[streams.order(kind, LABELS, REGIME)]) >= 0).all(), kind
    assert (np.diff(REGIME[streams.order("mixed", LABELS, REGIME)]) < 0).any()


def test_sorted_has_one_run_of_each_class_in_each_regime_and_bursts_have_longer_runs_than_iid() -> None:
    rows = streams.order("sorted", LABELS, REGIME)
    assert (np.diff(10 * REGIME[rows] + LABELS[rows]) >= 0).all()

    def changes(kind: str) -> int:
        return int((np.diff(LABELS[streams.order(kind, LABELS, REGIME)]) != 0).sum())

    assert changes("sorted") < changes("bursts") < changes("iid")


def test_one_row_at_a_time_is_the_iid_order() -> None:
    assert np.array_equal(streams.order("one", LABELS, REGIME), streams.order("iid", LABELS, REGIME))
    with pytest.raises(ValueError, match=r"no order is called 'random'; there are: native, iid"):
        streams.order("random", LABELS, REGIME)


def test_a_shorter_stream_has_the_same_share_of_every_regime() -> None:
    chosen = streams.thin(REGIME, 60)
    assert np.bincount(REGIME[chosen]).tolist() == [20, 30, 10]
    assert (np.diff(chosen) > 0).all()
    assert len(streams.thin(REGIME, None)) == len(streams.thin(REGIME, 1_000)) == 180


def test_missing_data_says_where_it_was_looked_for_and_what_to_set(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HOMEOSTAT_DATA", str(tmp_path))
    with pytest.raises(streams.MissingData, match=rf"har_phone_watch.npz is not in {tmp_path}: set HOMEOSTAT_DATA"):
        streams.load("har")
    with pytest.raises(ValueError, match=r"no stream is called 'weather'; there are: cifar, "):
        streams.load("weather")


def recorded(name: str, rows: int | None = None) -> streams.Stream:
    try:
        return streams.load(name, rows)
    except streams.MissingData as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", streams.STREAMS)
def test_a_stream_fits_its_model_and_is_no_longer_than_asked(name: str) -> None:
    stream = recorded(name, 400)
    assert stream.name == name and stream.source == streams.source_of(name)
    assert 380 <= len(stream.x) <= 400 and len(stream.y) == len(stream.regime) == len(stream.x)
    assert stream.x.dtype == np.float32 and np.isfinite(stream.x).all() and stream.y.dtype == np.int64
    assert sorted(set(stream.regime.tolist())) == list(range(len(stream.regimes)))
    network = sources.RECIPES[stream.source].build().eval()
    with torch.inference_mode():
        outputs = network(torch.from_numpy(stream.x[:4]))
    assert outputs.shape[0] == 4 and stream.y.max() < outputs.shape[1]


def test_no_row_of_a_stream_was_trained_on() -> None:
    har, gas, insects = (recorded(name) for name in ("har", "gas", "insects"))
    assert (len(har.x), len(gas.x)) == (870 + 873, 6_697 - 445)
    stressed = recorded("insects_stress")
    assert len(insects.x) + len(stressed.x) == 24_150 - sources.INSECTS_TRAIN
    for stream in (har, gas, insects, stressed):
        x, _ = sources.RECIPES[stream.source].rows("train", None)
        seen = {row.tobytes() for row in x}
        common = sum(row.tobytes() in seen for row in stream.x)
        assert common <= 0.01 * len(stream.x), stream.name  # the recordings themselves repeat a few rows


def test_swapped_labels_are_those_of_the_same_images() -> None:
    stream = recorded("mnist_swap", 200)
    _, labels = data.mnist("test", sources.HELD_FROM)
    second = stream.regime == 1
    assert (stream.y[~second] == labels[:200][~second]).all()
    assert set(stream.y[second][labels[:200][second] == 3].tolist()) == {5}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """A user's cache of the tests' own, for the trained model."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def test_a_model_is_trained_once_and_then_read(cache: Path, monkeypatch: Any) -> None:
    first = models.model("ageing")
    monkeypatch.setattr(sources, "train", lambda recipe: pytest.fail("trained again"))
    second = models.model("ageing")
    assert len(list(cache.rglob("ageing-*.safetensors"))) == 1
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    x, y = sources.RECIPES["ageing"].rows("held", None)
    assert (models.outputs(second, x)[0].argmax(1).numpy() == y).mean() > 0.9


def test_the_reference_has_class_balanced_exemplars(cache: Path) -> None:
    known = streams.reference("ageing", streams.model("ageing"))
    assert known.exemplars_y.bincount().tolist() == [64] * 4
    assert known.feature_mean is not None and known.feature_mean.shape == (32,)


class Recorder:
    """Answers 0 to every row and writes down what it is given."""

    labelled = True

    def __init__(self) -> None:
        self.told: list[tuple[str, list[float]]] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.told.append(("x", x[:, 0].tolist()))
        outputs = torch.eye(2)[torch.zeros(len(x), dtype=torch.long)]
        outputs[x[:, 0] == 3] = torch.nan
        return outputs

    def learn(self, x: Tensor, y: Tensor) -> None:
        self.told.append(("y", x[:, 0].tolist()))


def test_a_label_comes_after_its_delay_and_an_output_of_nan_is_wrong() -> None:
    x, y = torch.arange(8.0)[:, None], np.array([0, 0, 1, 0, 0, 0, 1, 0])
    adapter = Recorder()
    wrong = errors.served(adapter, x, y, 2, 3)  # type: ignore[arg-type]
    assert np.flatnonzero(wrong).tolist() == [2, 3, 6]
    assert adapter.told == [
        ("x", [0, 1]), ("x", [2, 3]), ("y", [0]), ("x", [4, 5]), ("y", [1, 2]), ("x", [6, 7]),
    ]  # fmt: skip


def test_the_last_label_is_the_newest_that_is_known_when_the_batch_is_served() -> None:
    y = np.array([1, 2, 3, 4, 5, 6])
    answered = [y[row] if wrong else None for row, wrong in enumerate(errors.last_label(y, 1, 2, 1))]
    assert answered == [None, 2, 3, 4, 5, 6]  # only the first guess was right
    assert not errors.last_label(np.array([7, 7, 7, 7]), 7, 1, 0).any()
    assert errors.last_label(np.array([1, 1, 2, 2]), 1, 1, 0).tolist() == [False, False, True, False]


def counts(rows: int, wrong: int, gained: int, lost: int) -> dict[str, Any]:
    return {"rows": rows, "wrong": wrong, "gained": gained, "lost": lost}


def test_an_arrow_needs_two_standard_errors() -> None:
    assert errors.cell(counts(200, 50, 9, 3)) == "25.0  "
    assert errors.cell(counts(200, 50, 30, 3)) == "25.0 ↓"
    assert errors.cell(counts(200, 50, 3, 30)) == "25.0 ↑"
    assert errors.cell({"refused": "it has no norm layers; use 't3a'"}) == "– "


def table_of(cells: dict[tuple[str, str], dict[str, Any]], names: list[str], methods: list[str]) -> str:
    return errors.order_table({("iid", *key): value for key, value in cells.items()}, "iid", names, methods)


def test_a_stream_that_a_method_can_not_serve_counts_with_the_frozen_error() -> None:
    cells = {(s, m): counts(100, 30, 0, 0) for s in ("a", "b") for m in ("frozen", "last label")}
    cells |= {("a", "norm"): counts(100, 10, 20, 0), ("b", "norm"): {"refused": "no"}}
    cells |= {("a", "tent"): counts(100, 20, 10, 0), ("b", "tent"): counts(100, 45, 0, 15)}
    lines = table_of(cells, ["a", "b"], ["tent", "norm"]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["frozen", "last label", "norm", "tent"]
    assert [cell.strip() for cell in lines[4].split("|")[2:-1]] == ["10.0 ↓", "–", "20.0", "+0.0"]
    assert [cell.strip() for cell in lines[5].split("|")[2:-1]] == ["20.0 ↓", "45.0 ↑", "32.5", "+15.0"]


def test_what_was_measured_is_not_measured_again(cache: Path, tmp_path: Path) -> None:
    path, setting = tmp_path / "errors.jsonl", errors.Setting(rows=300, single_rows=20)
    units, base = [("ageing", "iid"), ("ageing", "one")], [errors.FROZEN, errors.LAST_LABEL]
    first = errors.run(units, [*base, "norm"], setting, 1, path)
    path.write_text(path.read_text() + '{"key": "cut o')
    before = len(path.read_text().splitlines())
    again = errors.run(units, [*base, "norm", "tent"], setting, 1, path)
    assert len(path.read_text().splitlines()) == before + 2  # tent alone, in both orders
    assert first == [result for result in again if result["method"] != "tent"]
    assert {result["rows"] for result in first if result["order"] == "one"} <= set(range(15, 21))
    asked = Namespace(orders=["iid", "one"], streams=["ageing"], apart=[], methods=["norm", "tent"])
    text = errors.report(again, asked, setting)
    assert "at most 300 rows a stream" in text and "at most 20 rows a stream, batches of one" in text


def test_a_broken_method_is_reported_and_costs_no_other_result(cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fast.get("norm"), "_setup", lambda self: 1 / 0)
    found = errors.run([("ageing", "iid")], ["norm", "none"], errors.Setting(rows=200), 1, tmp_path / "errors.jsonl")
    assert found[0]["failed"] == "ZeroDivisionError: division by zero" and "wrong" in found[1]
    assert errors.cell(found[0]) == "failed"


def test_a_results_version_follows_the_code_that_a_method_imports() -> None:
    versions = {errors.code_version(name) for name in ("tent", "norm", "lame")}
    assert len(versions) == 3
    imported = errors._imported(
        "from adapters.fast.core import rows\nimport numpy\nfrom adapters.reference import Reference"
    )
    assert imported == {"adapters.fast.core.rows", "adapters.reference"}


def test_the_command_in_the_tables_does_not_say_how_it_was_run() -> None:
    asked = ["--rows", "500", "--jobs", "2", "--results=here", "--write", "README.md", "--orders", "iid"]
    assert errors.told(asked) == ["--rows", "500", "--orders", "iid"]


@pytest.fixture(scope="module")
def made() -> fast_models.Made:
    return fast_models.make("mlp_ln")


@pytest.mark.parametrize("kind", fast_models.KINDS)
def test_the_measured_networks_take_rows_of_their_shape(kind: str) -> None:
    build, shape, classes = fast_models.KINDS[kind]
    with torch.inference_mode():
        assert build().eval()(torch.zeros(2, *shape)).shape == (2, classes)


def test_a_measured_network_is_trained_and_its_stream_drifts(made: fast_models.Made) -> None:
    assert made.reference.error < 0.2
    x = made.batches(256, 1)[0]
    assert float((x.mean() - made.x.mean()).abs()) > 0.2
    assert torch.equal(x, made.batches(256, 1)[0])


def test_pairs_are_timed_on_the_same_rows_in_random_order(made: fast_models.Made) -> None:
    calls: list[tuple[str, int]] = []
    batches = made.batches(2, 4)

    def call(name: str):
        def record(x: Tensor) -> Tensor:
            calls.append((name, next(number for number, batch in enumerate(batches) if batch is x)))
            return x

        return record

    one, other = bench.paired(call("one"), call("other"), batches, 40, 60.0)
    rounds = [calls[start : start + 2] for start in range(2 * bench.WARM_UP, len(calls), 2)]
    assert len(one) == len(other) == len(rounds) == 40
    assert all({name for name, _ in pair} == {"one", "other"} and pair[0][1] == pair[1][1] for pair in rounds)
    assert {pair[0][0] for pair in rounds} == {"one", "other"}


def test_memory_is_what_was_allocated_at_most_and_what_is_left() -> None:
    kept: list[Tensor] = []

    def call() -> None:
        torch.empty(3 * 2**20, dtype=torch.uint8)
        kept.append(torch.empty(2**20, dtype=torch.uint8))

    assert bench._cpu_memory(call) == (3 * 2**20, 2**20)


def test_a_method_that_learns_by_gradients_needs_more_memory_than_one_that_does_nothing(made: fast_models.Made) -> None:
    x = made.batches(64, 1)[0]
    plain, tent = (
        bench.extra_bytes(made.model, lambda name=name: fast.build(name, made.model), x) for name in ("none", "tent")
    )
    assert 0 <= plain < tent


def cost(method: str, batch: int, ratio: float, model: str = "mlp_ln", slots: int = 0) -> bench.Cost:
    return bench.Cost(
        method=method, model=model, batch=batch, ratio=ratio, low=ratio, high=ratio, rounds=1, ms=1.0, plain_ms=1.0,
        slots=slots, extra_bytes=2**20,
    )  # fmt: skip


def test_what_was_wanted_is_judged_by_the_worst_batch() -> None:
    costs = [cost("norm", 1, 1.44), cost("norm", 1, 1.0, "gru"), cost("norm", 64, 1.1)]
    assert bench.wanted_line(costs) == "wanted: norm <= 1.3: reached (1.20 at batch 1)"
    assert "norm <= 1.3: not reached (2.00 at batch 256)" in bench.wanted_line([*costs, cost("norm", 256, 2.0)])


def test_the_tables_hold_every_method_model_batch_and_slot() -> None:
    costs = [cost("tent", 64, 3.0), cost("tent", 64, 2.0, "gru"), cost("tent", 1, 4.0), cost("tent", 64, 1.5, slots=9)]
    text = bench.report(costs, {"mlp_ln": 22_150, "gru": 14_214}, 9)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| tent")
    ]
    assert rows == [
        ["tent", "3.00", "2.00"],
        ["tent", "4.00", "2.45", ""],
        ["tent", "1.00", "1.00"],
        ["tent", "1.50", "–"],
    ]
    assert "mlp_ln 22,150" in text and "9 sensors" in text


def test_one_method_is_measured_from_end_to_end(
    made: fast_models.Made, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "make", lambda kind: made)
    target = tmp_path / "table.md"
    target.write_text("<!-- bench -->\n<!-- end -->\n")
    arguments = ["--methods", "tent,norm", "--models", "mlp_ln", "--batches", "4,64", "--seconds", "0", "--slots", "70"]
    files = ["--json", str(tmp_path / "all.json"), "--write", str(target)]
    monkeypatch.setattr("sys.argv", ["fast", *arguments, *files])
    bench.main()
    costs = json.loads((tmp_path / "all.json").read_text())
    assert {(c["method"], c["batch"], c["slots"]) for c in costs} == {("tent", 4, 0), ("tent", 64, 0), ("tent", 64, 70)}
    assert all(c["ratio"] > 0 for c in costs)
    assert "python -m tests.benchmarks.fast --methods tent,norm" in target.read_text()
    assert str(tmp_path) not in target.read_text()
    assert "wanted: tent <= 2.6: " in capsys.readouterr().out


def test_a_place_that_is_not_there_is_said() -> None:
    assert (
        fast_readme.filled("a\n<!-- t -->\nold\n<!-- end -->\nb", "t", "new") == "a\n<!-- t -->\nnew\n<!-- end -->\nb"
    )
    with pytest.raises(ValueError, match="no place for t"):
        fast_readme.filled("a", "t", "new")


README = fast_readme.README.read_text(encoding="utf-8")


def test_the_readme_lists_the_methods_that_there_are() -> None:
    assert fast_readme.filled(README, "methods", fast_readme.methods_table()) == README, (
        "run python -m tests.benchmarks.fast_readme"
    )


def test_every_method_that_the_readmes_guide_names_exists() -> None:
    guide = README.partition("<!-- methods -->")[0] + README.partition("## Wrappers")[2].partition("##")[0]
    named = {part for name in re.findall(r"`([a-z0-9_+]+)`", guide) for part in name.split("+")}
    words = {"check", "gain", "learn", "slots", "forward", "predict"}
    assert named - words <= set(fast.names())


def test_the_readme_names_the_methods_that_serve_a_regression() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).eval()
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    outputs, features = models.outputs(model, x)
    known = make_reference(x, x[:, 0], outputs, features, np.arange(100), "regression", 1)
    serving = set()
    for name in fast.names():
        method, packed = fast.get(name), known
        if models.prepares(method):
            tensors = method.prepare(model, known, torch.from_numpy(x), torch.from_numpy(x[:, 0].copy()))
            packed = replace(known, prepared={name: tensors})
        if method.check(model, packed) is None:
            serving.add(name)
    paragraph = README.partition("**Regression**")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == serving


@pytest.mark.parametrize("name", fast.names())
def test_every_method_says_what_it_does_in_one_line(name: str) -> None:
    said = fast_readme.summary(fast.get(name))
    assert 15 <= len(said) <= 160 and "\n" not in said and "|" not in said
