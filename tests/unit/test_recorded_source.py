from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from daemon.errors import StreamError
from daemon.recorded.source import read_recording

ROWS = np.random.default_rng(0).normal(size=(1600, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recorded")
    lines = [f"{row},day {row},{a},{b}" for row, (a, b) in enumerate(ROWS.tolist())]
    (made / "sensors.csv").write_text("id,date,calm,shifted\n" + "\n".join(lines) + "\n", encoding="utf-8")
    np.savez(made / "rows.npz", x=ROWS, y=np.zeros(1600, dtype=np.uint8))
    return made


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "made.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_of_numbers_are_taken_but_not_those_that_only_name_a_row(folder: Path) -> None:
    assert list(read_recording(folder / "sensors.csv").choose()) == ["calm", "shifted"]


def test_a_column_is_named_or_counted(folder: Path) -> None:
    recording = read_recording(folder / "sensors.csv")
    assert list(recording.choose(["3", "id"])) == ["shifted", "id"]


def test_an_array_stands_for_its_columns_and_one_can_be_picked(folder: Path) -> None:
    recording = read_recording(folder / "rows.npz")
    assert list(recording.choose()) == ["x[0]", "x[1]"]
    for name in ("x[1]", "x:1"):
        assert recording.choose([name])["x[1]"].tolist() == ROWS[:, 1].tolist()
    assert list(recording.choose(["y", "x:0"])) == ["y", "x[0]"]


@pytest.mark.parametrize("cell", ["", "NA", "nan", "null", "inf", "-"])
def test_a_value_that_is_not_there_is_no_error(cell: str, tmp_path: Path) -> None:
    column = read_recording(written(tmp_path, f"a,b\n1,2\n{cell},3\n")).choose(["a"])["a"]
    assert column[0] == 1.0 and not math.isfinite(column[1])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_usual_delimiters_are_known(delimiter: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"a{delimiter}b\n1{delimiter}2\n")
    assert {name: column.tolist() for name, column in read_recording(path).choose().items()} == {"a": [1], "b": [2]}


def test_a_first_line_of_numbers_is_no_header(tmp_path: Path) -> None:
    chosen = read_recording(written(tmp_path, "1,2\n3,4\n")).choose()
    assert {name: column.tolist() for name, column in chosen.items()} == {"0": [1, 3], "1": [2, 4]}


def test_a_column_without_a_name_is_left_out_but_can_be_counted(tmp_path: Path) -> None:
    recording = read_recording(written(tmp_path, "\ufeff,a,a\n0,5,6\n"))
    assert list(recording.choose()) == ["a", "a (column 2)"]
    assert recording.choose(["0"])["unnamed 0"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "made.csv: empty"),
        ("a,b\n", "made.csv: no rows"),
        ("a,b\n1,2\n3\n", "line 3 has 1 cells"),
        ("a,b\n1,2\n3,oops\n", "column b: line 3: 'oops' is not a number.*--column"),
        ("a\nx\n", "column a: line 2: 'x' is not a number"),
        ("a\nNA\n", "column a: no finite number"),
    ],
)
def test_a_broken_csv_is_refused_with_the_place(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=problem):
        read_recording(written(tmp_path, text)).choose()


def test_text_beside_the_chosen_columns_does_no_harm(tmp_path: Path) -> None:
    assert read_recording(written(tmp_path, "a,b\n1,2\n3,oops\n")).choose(["a"])["a"].tolist() == [1.0, 3.0]


def test_text_far_below_is_found_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a\n" + "1\n" * 5000 + "bad\n")
    with pytest.raises(StreamError, match="column a: line 5002: 'bad'"):
        read_recording(path).choose()


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("nope", "no column nope: choose with --column from x, y"),
        ("x[2]", r"no column x\[2\]: x has shape \(1600, 2\)"),
        ("9", "no column 9"),
    ],
)
def test_a_missing_column_is_refused_with_those_that_there_are(wanted: str, problem: str, folder: Path) -> None:
    with pytest.raises(StreamError, match=problem):
        read_recording(folder / "rows.npz").choose([wanted])


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"a": np.zeros(3), "b": np.zeros(4)}, "a has 3 rows, b has 4"),
        ({"x": np.zeros((0, 3))}, r"column x: no rows of numbers \(shape \(0, 3\)"),
        ({"a": np.array(["text"])}, "column a: no rows of numbers"),
        ({"a": np.array([None, 1])}, "column a: .*allow_pickle"),
    ],
)
def test_an_npz_without_columns_to_watch_is_refused(
    arrays: dict[str, NDArray[Any]], problem: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "made.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(StreamError, match=problem):
        read_recording(tmp_path / "made.npz").choose()


@pytest.mark.parametrize(
    ("name", "problem"),
    [("none.csv", "no such file"), ("damaged.npz", "not an npz"), ("binary.csv", "neither an npz nor text")],
)
def test_a_file_that_is_nothing_is_named(name: str, problem: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.npz").write_bytes((folder / "rows.npz").read_bytes()[:9000])
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01" * 50)
    with pytest.raises(StreamError, match=f"{name}: {problem}"):
        read_recording(tmp_path / name)
