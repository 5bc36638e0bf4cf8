from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks import auto, auto_tables
from tests.benchmarks.auto_cells import Cell, short_cells


def cell(**changes: Any) -> Cell:
    given: dict[str, Any] = {
        "stream": "mnist", "model": "mnist", "order": "iid", "batch": 64, "labels": "none", "seed": 0, "kind": "sudden",
        "role": "fixed", "rows": 1_500,
    }  # fmt: skip
    return Cell(**{**given, **changes})


def result(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "cell": cell(), "name": "a cell", "frozen": 30.0, "error": 20.0, "low": -12.0, "high": -8.0, "same": 1.0,
        "backward": 0.0, "ms": 0.3, "plain_ms": 0.2, "singles": {"norm": 10.0, "tent": 12.0},
    }  # fmt: skip
    return {**given, **changes}


def test_harm_is_half_a_point_and_sure() -> None:
    assert not auto_tables.harmed(result())
    assert auto_tables.harmed(result(error=31.0, low=0.1, high=1.9))
    assert not auto_tables.harmed(result(error=31.0, low=-0.1, high=2.1))
    assert not auto_tables.harmed(result(error=30.4, low=0.1, high=0.7))


def test_the_gain_counts_where_a_single_method_wins_two_points() -> None:
    assert auto_tables.best_single(result()) == ("norm", 10.0)
    assert auto_tables.share_of_gain(result()) == pytest.approx(0.5)
    assert auto_tables.share_of_gain(result(error=33.0)) == pytest.approx(-0.15)
    assert auto_tables.share_of_gain(result(singles={"norm": 28.5})) is None


def test_source_rows_in_runs_of_classes_are_no_control() -> None:
    control = cell(stream="mnist_control", kind="control")
    assert auto_tables.kind(control) == "control"
    assert auto_tables.kind(cell(stream="ageing_control", kind="control", order="native")) == "label"
    assert auto_tables.kind(cell()) == "sudden"


def test_the_report_says_what_was_measured_and_names_what_harms() -> None:
    harmful = result(name="mnist/bad", error=40.0, low=5.0, high=15.0)
    control = result(cell=cell(stream="mnist_control", kind="control"), error=30.0, low=0.0, high=0.0, same=0.97)
    text = auto_tables.report([result(), harmful, control, {"name": "broken", "failed": "no"}], "a command")
    lines = {
        line.split("|")[1].strip(): line.split("|")[3].strip() for line in text.splitlines() if line.count("|") == 4
    }
    assert lines["cells"] == "3"
    assert lines["harm: more than 0.5 points above frozen, and surely"] == "1"
    assert lines["worst cell, served − frozen"] == "+10.00"
    assert lines["controls: rows bit-equal to frozen, least / mean"] == "97.0% / 97.0%"
    assert lines["controls: time a row over frozen's in the same loop"] == "1.50"
    assert "| mnist/bad" in text and "a command" in text


def test_every_stream_that_was_looked_at_is_one() -> None:
    streams = {each.stream for each in short_cells(1_400.0)}
    assert streams >= auto_tables.SEEN and streams - auto_tables.SEEN


def test_parts_of_a_result_are_joined_by_what_they_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        auto, "_keys", lambda cell, methods: {name: name for name in ("auto", auto.PLAIN, "norm", "lame")}
    )
    known = {
        "auto": {"key": "auto", "error": 20.0},
        auto.PLAIN: {"key": "p", "ms": 0.5},
        "norm": {"key": "norm", "error": 10.0},
        "lame": {"key": "lame", "refused": "no head"},
    }
    joined = auto._joined(cell(), known, ("norm", "lame"))
    assert joined["singles"] == {"norm": 10.0} and joined["plain_ms"] == 0.5 and "failed" not in joined
    assert "failed" in auto._joined(cell(), {**known, "norm": {"failed": "broken"}}, ("norm", "lame"))
    assert "failed" in auto._joined(cell(), {"norm": known["norm"]}, ("norm", "lame"))
