from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import detectors
from daemon.cli import main
from daemon.recorded.watch import Alarm, watch
from detectors import Calibrated
from detectors.cusum import CUSUM

SVG = "{http://www.w3.org/2000/svg}"
RNG = np.random.default_rng(0)
NOISE = RNG.normal(20.0, 3.0, size=1600)
SHIFTED = NOISE.copy()
SHIFTED[1000:1200] += 9.0
SHIFTED[1400:] -= 9.0
FEW_FALSE = ["--arl0", "1000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recorded")
    lines = [f"{row},day {row},{NOISE[row]:.4f},{SHIFTED[row]:.4f}" for row in range(len(NOISE))]
    lines[700] = "700,day 700,NA,"
    (made / "sensors.csv").write_text("id,date,calm,shifted\n" + "\n".join(lines) + "\n", encoding="utf-8")
    np.savez(made / "rows.npz", x=np.column_stack((NOISE, SHIFTED)), y=np.zeros(1600, dtype=np.uint8))
    np.savez(made / "normal.npz", x=np.column_stack((NOISE, NOISE[::-1])))
    return made


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    """JSON and HTML of one run over both columns of the CSV."""
    arguments = [str(folder / "sensors.csv"), "--changes", "1000,1200,1400", "--reference", "800", *FEW_FALSE]
    outputs = ["--json", str(folder / "out.json"), "--plot", str(folder / "out.html")]
    assert main(["detect", *arguments, *outputs]) == 0
    content: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    content["html"] = (folder / "out.html").read_text(encoding="utf-8")
    return content


class RowSum(CUSUM):
    """Reads rows, and is calibrated faster than those that look at more than a sum."""

    reads = "rows"

    def update_many(self, values: NDArray[np.float64]) -> list[int]:
        return super().update_many(values.sum(1) / math.sqrt(values.shape[1]))


@pytest.fixture
def row_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector named "sum" is ``RowSum``."""
    known = detectors.build
    monkeypatch.setattr(detectors, "build", lambda name: RowSum() if name == "sum" else known(name))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a run that ends with exit code 2 writes to stderr."""
    assert main(["detect", *map(str, arguments)]) == 2
    return capsys.readouterr().err


class TestWatch:
    @pytest.mark.parametrize("rebaseline", [0, 60])
    def test_it_finds_what_row_by_row_reading_finds(self, rebaseline: int) -> None:
        values = np.tile(SHIFTED, 4)
        values[[5, 2000, 2001]] = np.nan
        found = watch("cusum", ["a"], NOISE, values, arl0=500.0, start=100, rebaseline=rebaseline, traced=True)
        single = Calibrated.from_calibration(detectors.build("cusum"), found.calibration)
        alarms, statistics, live, before = [], [], [], 0.0
        for row, value in enumerate(values):
            live.append(single.learning == 0 and math.isfinite(value))
            if single.update(value).drift:
                alarms.append(Alarm(100 + row, before))
                statistics.append(found.threshold)
                if rebaseline:
                    single.rebaseline(rebaseline)
            else:
                statistics.append(single.statistic)
            before = single.statistic
        assert found.alarms == alarms and len(alarms) > 4
        assert found.live.tolist() == live
        assert found.ignored == 3
        assert found.trace is not None
        assert found.trace[0].tolist() == list(range(100, 100 + len(values)))
        assert found.trace[1].tolist() == statistics

    def test_a_detector_of_rows_reads_them_whole(self, row_sum: None) -> None:
        rows = np.column_stack((NOISE, SHIFTED))
        rows[900, 0] = np.inf
        found = watch("sum", ["a", "b"], rows[:800], rows[800:], arl0=200.0, start=800)
        assert found.label == "a + b"
        assert found.ignored == 1 and not found.live[100]
        assert any(1000 <= alarm.row < 1030 for alarm in found.alarms)

    def test_alarms_on_rows_that_follow_each_other_are_all_kept(self, row_sum: None) -> None:
        rows = np.column_stack((NOISE, NOISE[::-1]))
        found = watch("sum", ["a", "b"], rows, np.full((40, 2), 200.0), arl0=50.0)
        assert 1 in np.diff([alarm.row for alarm in found.alarms])


class TestCommand:
    def test_it_finds_the_changes_and_scores_them(self, seen: dict[str, Any]) -> None:
        calm, shifted = seen["results"]
        assert [calm["columns"], shifted["columns"]] == [["calm"], ["shifted"]]
        delays = [item["delay"] for item in shifted["score"]["delays"]]
        assert delays[0] < 10 and delays[2] < 10 and shifted["threshold"] > 0.0
        assert shifted["runs"][0]["alarms"] > 5
        assert shifted["arl0"]["low"] < shifted["arl0"]["reached"] < shifted["arl0"]["high"]

    def test_it_says_what_it_took_for_normal(self, seen: dict[str, Any]) -> None:
        assert (seen["rows"], seen["reference"]["rows"], seen["changes"]) == (1600, 800, [1000, 1200, 1400])

    def test_values_that_are_missing_are_counted(self, seen: dict[str, Any]) -> None:
        assert [result["not_finite"] for result in seen["results"]] == [{"watched": 0, "reference": 1}] * 2

    def test_the_plot_is_one_file_with_a_figure_a_column(self, seen: dict[str, Any]) -> None:
        figures = [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", seen["html"], re.DOTALL)]
        assert [figure.get("aria-label") for figure in figures] == ["calm", "shifted"]
        for figure, result in zip(figures, seen["results"], strict=True):
            marks = [path for path in figure.iter(f"{SVG}path") if path.get("class") == "alarm"]
            assert sum(int(mark.get("data-alarms", "0")) for mark in marks) == len(result["alarms"])
            assert [int(mark.get("data-row", "-1")) for mark in marks] == [run["first"] for run in result["runs"]]
            kinds = [item.get("class") for item in figure.iter()]
            assert (kinds.count("change"), kinds.count("reference"), kinds.count("threshold")) == (6, 2, 1)

    def test_the_plot_needs_no_network_and_no_script(self, seen: dict[str, Any]) -> None:
        html = seen["html"].replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|<script|<link|url\(|src=|@import", html)
        assert "prefers-color-scheme: dark" in html

    def test_the_tables_say_the_same(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--column", "x:1", "--reference", "0.5", "--changes", "1000,1400", "--rebaseline", "100"]
        assert main(["detect", str(folder / "rows.npz"), *arguments, *FEW_FALSE]) == 0
        out = capsys.readouterr().out
        assert out.split()[:7] == ["row", "to", "alarms", "column", "detector", "statistic", "threshold"]
        assert re.search(r"^100\d +1  x\[1\] +cusum +\d", out, re.MULTILINE)
        assert re.search(r"cusum on x\[1\]: \d+ alarms; ARL0 1000 asked, \d+ in calibration \(\d+ to \d+\)", out)
        assert re.search(r"delay after 1000: \d, 1400: \d+ \(0 of 2 missed\)", out)
        assert "0 false alarms in 200 rows without a change: ARL0 above 54 (95%)" in out

    def test_columns_of_a_row_are_chosen_apart_from_those_watched_alone(
        self, row_sum: None, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["--detector", "cusum", "sum", "--column", "x:0", "--features", "x", "--reference", "800"]
        plot = folder / "features.html"
        assert main(["detect", str(folder / "rows.npz"), *arguments, *FEW_FALSE, "--plot", str(plot)]) == 0
        assert re.findall(r"^\w+ on (.*?):", capsys.readouterr().out, re.MULTILINE) == ["x[0]", "x[0] + x[1]"]
        assert "root mean square of the standardised columns" in plot.read_text(encoding="utf-8")

    def test_another_file_can_be_the_reference(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--column", "x:0", "--reference", folder / "normal.npz", "--changes", "none", *FEW_FALSE]
        assert main(["detect", str(folder / "rows.npz"), *map(str, arguments)]) == 0
        assert re.search(r"in 1600 rows without a change", capsys.readouterr().out)

    def test_a_column_that_the_reference_lacks_is_named_with_the_file(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        error = refused(capsys, folder / "rows.npz", "--column", "y", "--reference", folder / "normal.npz")
        assert "normal.npz: no column y" in error

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (["--reference", "1600"], "sensors.csv: 1600 rows, and a reference of 1600 leaves none"),
            (["--reference", "30"], "sensors.csv: cusum on calm: calibration needs at least 50 finite"),
            (["--changes", "10"], "--changes=10: lies in the reference: rows 500 to 1599"),
            (["--changes", "900,1600"], "--changes=1600: lies behind the end"),
            (["--detector", "nope"], "--detector=nope: unknown detector"),
            (["--column", "date"], "sensors.csv: column date: line 2: 'day 0' is not a number"),
            (["--json", "none/out.json"], "--json=none/out.json: no such folder"),
            (["--plot", "out.svg"], "--plot=out.svg: give a name that ends in .html or .png"),
            (["--rebaseline", "1"], "--rebaseline=1: a new normal needs at least 2 rows"),
        ],
    )
    def test_what_can_not_be_done_is_refused_with_the_reason(
        self, arguments: list[str], problem: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert problem in refused(capsys, folder / "sensors.csv", *arguments)

    @pytest.mark.parametrize(
        "arguments", [["--changes", "3,x"], ["--reference", "1.5"], ["--reference", "0"], ["--arl0", "9"]]
    )
    def test_a_malformed_option_is_refused_before_the_file_is_read(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["detect", "none.csv", *arguments])
        assert ended.value.code == 2 and f"argument {arguments[0]}: {arguments[1]} is " in capsys.readouterr().err

    def test_a_png_without_matplotlib_is_refused_with_the_other_way(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("daemon.recorded.png.available", lambda: False)
        assert "matplotlib" in (error := refused(capsys, folder / "sensors.csv", "--plot", "out.png"))
        assert "use .html" in error
