from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adapters.slow as slow
from daemon.evaluation.recording import Recording
from daemon.resident import Resident
from tests.benchmarks import slow as bench
from tests.benchmarks import slow_refit, slow_runs, slow_serving, slow_streams, slow_tables, slow_verdicts
from tests.benchmarks.slow_runs import BOTH, FAST, FROZEN, PLAIN, REFIT, REFIT_SMALL, SLOW, Run
from tests.streams import data
from tests.streams.data import MissingData
from tests.streams.sources import HELD_FROM, Recipe

torch.set_num_threads(1)

ROWS = 1_000


def run(subject: str, stream: str = "gas", **changes: Any) -> Run:
    if subject in (FROZEN, PLAIN):
        changes = {"labels": "none", "delay": 0} | changes
    return Run(stream=stream, subject=subject, **changes)


def result(error: float, **changes: Any) -> dict[str, Any]:
    """Of 1,000 rows of which the first are wrong."""
    wrong = np.arange(ROWS) < round(ROWS * error / 100)
    given: dict[str, Any] = {
        "rows": ROWS, "error": error, "pieces": [error] * 8, "recoveries": [120, None], "forgetting": 0.2,
        "version_forgetting": 0.1,
        "slow_seconds": 2.0, "seconds": 3.0, "same": 0.5, "counts": {"promoted": 2, "rejected": 3}, "promotions": [],
        "wrong": slow_runs.packed(wrong),
    }  # fmt: skip
    return given | changes


def world(**changes: dict[str, Any]) -> dict[Run, dict[str, Any]]:
    """A cell in which everything is reached; ``changes`` by subject, blanks written as underscores."""
    found = {
        FROZEN: result(40.0, slow_seconds=0.0, counts={}, same=1.0),
        PLAIN: result(40.0, slow_seconds=0.0, seconds=1.0, counts={}, same=1.0),
        REFIT: result(20.0, slow_seconds=50.0, counts={}),
        FAST: result(30.0, counts={}),
        SLOW: result(25.0),
        BOTH: result(21.0),
    }
    for name, more in changes.items():
        found[{"frozen": FROZEN, "refit": REFIT, "fast": FAST, "slow": SLOW, "both": BOTH}[name]] |= more
    return {run(subject): each for subject, each in found.items()}


def promotion(mean: float, low: float, high: float, *, changed: bool = False) -> dict[str, Any]:
    return {
        "row": 300,
        "rows": 500,
        "method": "lda_head",
        "parent": 30.0,
        "mean": mean,
        "low": low,
        "high": high,
        "changed": changed,
    }


def lines(text: str) -> dict[str, list[str]]:
    """Cells by the first of each line of a table."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in found}


def verdict(results: dict[Run, dict[str, Any]], begin: str, serving: Any = ()) -> list[str]:
    """Of the line that begins so: wanted, measured, reached."""
    return next(
        cells for name, cells in lines(slow_verdicts.summary(results, serving)).items() if name.startswith(begin)
    )


def test_all_that_is_reached_is_said_to_be() -> None:
    found = lines(slow_verdicts.summary(world(), [serving(1.4)]))
    judged = [cells[-1] for name, cells in found.items() if cells[-1] in ("yes", "**no**")]
    assert judged == ["yes"] * 7


def test_behind_is_against_the_better_of_the_two_in_the_same_cell() -> None:
    behind = slow_verdicts.behind(world(both=result(26.0)))
    assert [(each.better, round(each.points, 6)) for each in behind] == [(SLOW, 1.0)]
    assert verdict(world(both=result(26.0)), "fast + slow behind")[1].startswith("+1.00; 1 cells above")
    assert verdict(world(both=result(26.0)), "fast + slow behind")[-1] == "**no**"
    assert verdict(world(both=result(25.5)), "fast + slow behind")[-1] == "yes"
    # A cell with another delay has no better one to be compared with.
    assert slow_verdicts.behind({run(BOTH, delay=0): result(90.0), **world()})[0].points == pytest.approx(-4.0)


def test_the_share_of_the_gain_counts_where_the_refit_wins_two_points() -> None:
    (share,) = slow_verdicts.shares(world())
    assert (share.gain, share.own) == (20.0, 19.0)
    assert (share.own_seconds, share.fast_seconds) == (2.0, 2.0)
    assert verdict(world(), "gain over frozen")[1].startswith("95%; of all together 95%; 1 cells of 1")
    assert verdict(world(both=result(23.0)), "gain over frozen")[-1] == "**no**"
    assert verdict(world(), "learning seconds")[1].startswith("4%")
    assert verdict(world(both={"slow_seconds": 6.0}), "learning seconds")[-1] == "**no**"
    assert verdict(world(), "the same, adapting at once")[1].startswith("8%")
    assert not slow_verdicts.shares(world(refit=result(38.5)))


def test_forgetting_is_judged_for_fast_and_slow_together() -> None:
    begin = "forgetting on the source, "
    assert verdict(world(slow={"version_forgetting": 30.0}), f"{begin}slow only")[1:] == ["+30.0; 1 cells above", ""]
    assert verdict(world(both={"forgetting": 1.0}), f"{begin}fast + slow as served")[-1] == "yes"
    assert verdict(world(both={"forgetting": 1.1}), f"{begin}fast + slow as served")[-1] == "**no**"
    assert verdict(world(both={"version_forgetting": 1.1}), f"{begin}fast + slow, the version alone")[-1] == "**no**"
    listed = slow_verdicts.lists(world(both={"version_forgetting": 1.1}, fast={"forgetting": 7.0}))
    assert lines("\n".join(listed.values()))["gas/fast + slow/100%/200/0"] == ["+0.2", "+1.1", "+7.0"]


def test_a_promotion_is_harmful_when_its_whole_interval_is() -> None:
    harmful, unsure, good = promotion(3.0, 0.5, 5.0), promotion(3.0, -0.1, 6.0), promotion(-2.0, -4.0, -1.0)
    results = world(both={"promotions": [harmful, unsure]}, slow={"promotions": [good] * 18})
    begin = "promotions after which the stream was surely worse, "
    assert verdict(results, f"{begin}every run, of 20")[1:] == ["5.0%", "yes"]
    assert verdict(results, f"{begin}fast + slow, of 2")[1:] == ["50.0%", "**no**"]
    found = lines(slow_tables.promotions(results))
    assert found["all"] == ["20", f"{(18 * 2 - 6) / 20:+.1f}", "2", "1", "5.0%"]
    assert found[BOTH][:1] == ["2"] and found["… of these by lda_head"][0] == "20"
    assert "+0.5 to +5.0" in next(text for title, text in slow_verdicts.lists(results).items() if "Promotions" in title)


def test_promotions_before_a_change_of_the_stream_are_also_counted_apart() -> None:
    before, calm = promotion(3.0, 0.5, 5.0, changed=True), promotion(-2.0, -4.0, -1.0)
    results = world(both={"promotions": [before, calm]})
    begin = "promotions after which the stream was surely worse, fast + slow"
    assert verdict(results, f"{begin}, of 2")[1:] == ["50.0%", "**no**"]
    assert verdict(results, f"{begin}, of 1, no known change")[1:] == ["0.0%", ""]


def test_a_rejected_candidate_that_leaves_a_trace_is_counted() -> None:
    clean, touched = result(40.0, same=1.0, counts={"rejected": 4}), result(40.0, same=0.999, counts={"rejected": 4})
    promoted = result(30.0, same=0.2)
    assert slow_verdicts.traces({run("head"): clean, run("film"): touched, run("full"): promoted}) == (2, 1)
    assert verdict({run("film"): touched}, "runs without a promotion")[1:] == ["1", "**no**"]


def serving(ratio: float) -> dict[str, Any]:
    return {
        "model": "gas", "duty": 0.5, "cores": 2, "busy": 0.9, "p50_alone": 1.0, "p50_beside": 1.2, "p50_ratio": 1.2,
        "p99_alone": 2.0, "p99_beside": 2.0 * ratio, "p99_ratio": ratio, "p99_low": 1.0, "p99_high": 1.9,
    }  # fmt: skip


def test_serving_may_take_half_as_long_again_beside_a_burst() -> None:
    assert verdict(world(), "p99", [serving(1.5)])[-1] == "yes"
    assert verdict(world(), "p99", [serving(1.51)])[1:] == ["1.51", "**no**"]


def test_the_ratio_of_quantiles_is_that_of_all_batches_together() -> None:
    alone = [np.full(50, 0.001), np.full(50, 0.003)]
    beside = [np.full(50, 0.002), np.full(50, 0.006)]
    found = slow_serving.compared(alone, beside)
    assert found["p99_alone"] == pytest.approx(3.0) and found["p99_ratio"] == pytest.approx(2.0)
    assert found["p99_low"] == pytest.approx(2.0) and found["p99_high"] == pytest.approx(2.0)
    assert found == slow_serving.compared(alone, beside)


def test_the_report_has_every_subject_and_names_what_failed() -> None:
    more = {run("vera"): {"refused": "no linear layer"}, run("oft"): {"failed": "ValueError: broken"}}
    text = slow_tables.report(world() | more, [serving(1.2)], "a command")
    table = lines(text)
    assert "a command" in text and f"gas {ROWS:,}" in text and "- gas/oft/100%/200/0: ValueError: broken" in text
    assert table["vera"][0] == "–" and table["oft"][0] == "failed"
    assert table["gas 100% 200"][:5] == ["40.0", "30.0", "25.0", "21.0", "-4.00"]
    assert table["gas, duty 0.5"][2] == "1.20"


def test_recovery_counts_the_changes_and_takes_the_median_of_those_recovered_from() -> None:
    found = lines(slow_tables.recoveries(world(both={"recoveries": [100, 300, None]})))
    assert found[BOTH] == ["200 (2/3)"] and found["frozen"] == ["120 (1/2)"]


def test_results_over_seeds_are_averaged() -> None:
    results = world() | {run(BOTH, seed=1): result(23.0, counts={"promoted": 3})}
    assert lines(slow_tables.subjects(results, "gas"))[BOTH][0] == "22.0"
    assert lines(slow_tables.subjects(results, "gas"))[BOTH][4] == "2.5"


def test_every_slow_method_and_all_labels_and_delays_are_run_once() -> None:
    runs = slow_runs.all_runs(1)
    assert len(set(runs)) == len(runs) == len(slow_runs.all_runs(3)) / 3
    of_gas = [each for each in runs if each.stream == "gas"]
    cross = {(each.labels, each.delay) for each in of_gas if each.subject == BOTH}
    assert cross == {(labels, delay) for labels in ("100%", "10%", "1%") for delay in (0, 200, 2_000)} | {("none", 0)}
    assert {each.subject for each in of_gas} >= set(slow.names()) - set(slow_runs.REGRESSION) | set(slow_runs.KEPT)
    exact = {name for name in slow.names() if isinstance(slow.get(name), slow.ExactMethod)}
    assert {*slow_runs.EXACT, *slow_runs.REGRESSION} == exact


def test_the_short_form_leaves_out_only_what_learns_by_gradients_on_the_second_stream_of_images() -> None:
    left_out = set(slow_runs.all_runs(1)) - set(slow_runs.all_runs(1, everything=False))
    assert {each.stream for each in left_out} == {slow_runs.COSTLY}
    assert {each.subject for each in left_out} == set(slow_runs.kinds())


@pytest.mark.parametrize(
    ("subject", "fast", "enabled", "name"),
    [
        (BOTH, "auto", True, "norm_affine_head"),
        (FAST, "auto", False, "norm_affine_head"),
        (SLOW, "none", True, "norm_affine_head"),
        (PLAIN, "none", False, "norm_affine_head"),
        (REFIT_SMALL, "auto", True, "norm_affine_head"),
        ("lora", "none", True, "lora"),
    ],
)
def test_a_subject_is_the_default_but_for_what_it_names(
    monkeypatch: pytest.MonkeyPatch, subject: str, fast: str, enabled: bool, name: str
) -> None:
    monkeypatch.setattr(slow_runs, "bundle_for", lambda model: Path("bundle"))
    settings = slow_runs.settings_of(subject, "gas_mlp_bn")
    assert (settings.fast.name, settings.slow.enabled, settings.slow.name) == (fast, enabled, name)
    assert settings.slow.exact == ("" if name == "lora" else "lda_head")


def test_bursts_are_counted_by_how_they_ended() -> None:
    found = slow_runs.ended(
        [
            "version promoted: version 1, method lda_head",
            "burst without a version: result rejected, reason x",
            "burst without a version: result rejected, reason y",
            "burst without a version: result declined, reason z",
            "version withdrawn: worse than the frozen model: version 1",
            "decision: state slow, learner promoted",
        ]
    )
    assert found == {"declined": 1, "promoted": 1, "rejected": 2, "withdrawn": 1}


def blob() -> tuple[nn.Module, Recording]:
    """A classifier that answers the sign of the row's only number, and rows whose class is that."""
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    x = np.random.default_rng(0).normal(size=(900, 1)).astype(np.float32)
    return model.requires_grad_(False), Recording(x=x, y=(x[:, 0] > 0).astype(np.int64), times_s=np.arange(900.0))


def test_a_promotion_is_judged_on_the_rows_until_the_next_one() -> None:
    model, rows = blob()
    turned = slow_runs.Promotion(parent={}, own={"weight": -model.weight}, method="full")
    found = slow_runs.aftermath(turned, model, rows, 100, 400)
    assert found is not None and (found["rows"], found["parent"]) == (300, 0.0)
    assert found["mean"] == found["low"] == 100.0 and slow_verdicts.surely_worse(found)
    back = slow_runs.aftermath(
        slow_runs.Promotion(parent={"weight": -model.weight}, own={}, method="full"), model, rows, 100, 400
    )
    assert back is not None and back["mean"] == -100.0
    assert [(each or {"rows": None})["rows"] for each in (
        slow_runs.aftermath(turned, model, rows, 100, 900),
        slow_runs.aftermath(turned, model, rows, 100, 110),
        slow_runs.aftermath(turned, model, rows, 850, 900),
    )] == [500, 100, None]  # fmt: skip


def test_promotions_are_watched_only_inside() -> None:
    promote = Resident.promote
    with pytest.raises(RuntimeError, match="over"), slow_runs.watched_promotions() as found:
        assert Resident.promote is not promote and found.promotions == [] and found.last() == {}
        raise RuntimeError("over")
    assert Resident.promote is promote


def test_wrong_answers_come_back_to_the_bit() -> None:
    wrong = np.random.default_rng(0).random(1_003) < 0.3
    assert (slow_runs.unpacked(slow_runs.packed(wrong), len(wrong)) == wrong).all()


def test_a_number_that_is_not_finite_is_a_wrong_answer() -> None:
    model, rows = blob()
    broken = slow.apply_delta(model, {"weight": torch.full((2, 1), torch.nan)})
    assert slow_runs.errs(broken, rows.x[:10], rows.y[:10]).all()


def test_the_refit_trains_a_copy_of_the_packed_model_by_its_recipe_on_the_rows_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rows = blob()
    recipe = Recipe(build=nn.Identity, rows=lambda part, count: (rows.x[:1], rows.y[:1]), files=(), epochs=3, lr=0.5)
    given: list[Recipe] = []

    def train(asked: Recipe) -> nn.Module:
        given.append(asked)
        network = asked.build()
        for parameter in network.parameters():
            assert parameter.requires_grad
            parameter.data.mul_(-1.0)
        return network

    monkeypatch.setattr(slow_refit.sources, "train", train)
    fitted = slow_refit.trained(model, recipe, rows.x, 1 - rows.y)
    assert slow_runs.errs(fitted, rows.x, rows.y).all() and not slow_runs.errs(model, rows.x, rows.y).any()
    assert (given[0].epochs, given[0].lr, given[0].batch) == (3, 0.5, recipe.batch)
    x, y = given[0].rows("train", None)
    assert x is rows.x and np.array_equal(y, 1 - rows.y)
    assert slow_refit.trained(model, recipe, rows.x[:10], rows.y[:10]) is model and len(given) == 1


def test_the_clock_of_the_refit_is_slower_on_long_streams_and_on_images() -> None:
    assert slow_refit.rows_between(1_393, images=False) == 500
    assert slow_refit.rows_between(20_150, images=False) == 2_015
    assert slow_refit.rows_between(3_000, images=True) == 750


@pytest.mark.parametrize("stream", ["har", "cifar_swap", "gas"])
def test_streams_are_the_same_in_every_call(stream: str) -> None:
    try:
        first = slow_streams.STREAMS[stream][1](1)
    except (MissingData, FileNotFoundError) as missing:
        pytest.skip(str(missing))
    again = slow_streams.STREAMS[stream][1](1)
    assert np.array_equal(first.x, again.x) and np.array_equal(first.y, again.y)
    assert first.changes == again.changes and all(0 < row < len(first.y) for row in first.changes)
    assert not np.array_equal(first.x, slow_streams.STREAMS[stream][1](0).x) or stream == "gas"


def test_labels_change_places_in_the_second_half_only() -> None:
    try:
        images, labels = data.cifar10("test", HELD_FROM)
        rows = slow_streams.STREAMS["cifar_swap"][1](0)
    except (MissingData, FileNotFoundError) as missing:
        pytest.skip(str(missing))
    true = {image.tobytes(): label for image, label in zip(data.channels_first(images), labels.tolist(), strict=True)}
    half = slow_streams.IMAGES // 2
    was = np.array([true[image.tobytes()] for image in rows.x])
    assert rows.changes == (half,) and len(rows.y) == 2 * half
    assert (rows.y[:half] == was[:half]).all()
    assert (rows.y[half:] == np.array([0, 1, 2, 5, 9, 3, 6, 7, 8, 4])[was[half:]]).all()


def test_an_unknown_stream_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no stream is called 'gass'; there are: gas, insects"):
        slow_streams.model_of("gass")


def test_a_result_cut_off_by_a_kill_is_passed_over_and_the_next_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "there" / "slow.jsonl"
    bench.mend(file)
    bench._append(file, {"key": "a", "error": 1.0})
    with open(file, "a") as opened:
        opened.write('{"key": "b", "err')
    bench.mend(file)
    bench._append(file, {"key": "a", "error": 2.0})
    assert bench.read(file) == {"a": {"key": "a", "error": 2.0}}
    assert json.loads(file.read_text().splitlines()[-1])["error"] == 2.0


def test_a_result_depends_on_the_run_and_on_the_code_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "bundle_for", lambda model: Path(model))
    before = {each: bench.key_of(each) for each in slow_runs.all_runs(2)}
    assert len(set(before.values())) == len(before)
    monkeypatch.setattr(bench, "product_version", lambda: "another")
    changed = {each.subject for each, key in before.items() if bench.key_of(each) != key}
    assert changed == {each.subject for each in before} - {FROZEN, REFIT}
