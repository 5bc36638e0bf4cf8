"""`homeostat evaluate`: what it reads, keeps, prints and draws."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import structlog

import daemon.actions
from daemon.bundle import open_bundle
from daemon.cli import main
from daemon.config import load_settings
from daemon.errors import SettingsError, StreamError
from daemon.evaluation.answers import Replayed
from daemon.evaluation.baselines import replay_baseline
from daemon.evaluation.configurations import METHODS, configurations, relevant
from daemon.evaluation.reading import Read, Wanted, read
from daemon.evaluation.recording import Plan, Recording
from daemon.evaluation.replay import replay
from daemon.evaluation.store import Store, key
from daemon.logs import configure
from daemon.settings import Settings
from tests.unit.worlds import FACTORY, bundle, settings, source_rows

ROWS = 640


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command sets logging up for its process, which here is that of all tests."""
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def write(path: Path, **arrays: Any) -> Path:
    x, y = source_rows(ROWS, seed=3)
    np.savez(path, **{"x": x, "y": y.astype(np.int64), **arrays})
    return path


def reading(path: Path, folder: Path, **wanted: Any) -> Read:
    return read(Wanted(file=path, **wanted), settings(folder), open_bundle(bundle(), FACTORY).manifest)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bundle in the environment, and a recording: half way the classes are exchanged."""
    for name, value in {"BUNDLE": bundle(), "FACTORY": FACTORY, "STATE_DIR": tmp_path / "state"}.items():
        monkeypatch.setenv(f"HOMEOSTAT_{name}", str(value))
    y = source_rows(ROWS, seed=3)[1].astype(np.int64)
    y[ROWS // 2 :] = (y[ROWS // 2 :] + 1) % 3
    return write(tmp_path / "in.npz", y=y, segment=np.arange(ROWS) // (ROWS // 2))


def test_an_npz_is_read_with_its_segments_times_and_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", segment=np.repeat([0, 1, 0], [100, 300, 240]), ts=np.arange(ROWS) * 2.0)
    recording = reading(path, tmp_path).recording
    assert recording.changes == (100, 400) and recording.times_s[3] == 6.0 and recording.keys is None
    np.savez(tmp_path / "b.npz", **{**np.load(path), "key": np.array(["a", "b"] * (ROWS // 2))})
    keyed = reading(tmp_path / "b.npz", tmp_path).recording
    assert keyed.keys is not None and keyed.keys[:2] == [b"a", b"b"]
    assert reading(path, tmp_path, changes=(50,)).recording.changes == (50,)
    last = reading(path, tmp_path, last=300).recording
    assert len(last) == 300 and last.changes == (60,) and np.array_equal(last.x, recording.x[-300:])
    mixed = reading(path, tmp_path, order="iid").recording
    assert mixed.changes == () and sorted(mixed.y) == sorted(recording.y) and not np.array_equal(mixed.y, recording.y)


def test_csv_and_json_lines_are_read_as_the_daemon_reads_them(tmp_path: Path) -> None:
    x, y = source_rows(50, seed=3)
    lines = ["a,b,c,d,y", *(",".join(map(str, [*row, int(label)])) for row, label in zip(x, y, strict=True))]
    lines[3] = "1,,3,4,2"
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    found = reading(tmp_path / "a.csv", tmp_path).recording
    assert np.flatnonzero(~found.valid).tolist() == [2] and found.y.tolist()[3:] == y[3:].tolist()
    np.testing.assert_allclose(found.x[5], x[5])
    records = [{"id": str(row), "x": x[row].tolist(), "y": int(y[row])} for row in range(50)]
    del records[4]["y"]
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, records), "no record"]) + "\n")
    read_lines = reading(tmp_path / "a.jsonl", tmp_path)
    assert read_lines.unreadable == 1 and read_lines.recording.y[4] == -1 and read_lines.recording.known.sum() == 49


def test_labels_of_a_stream_of_their_own_are_joined_by_id(tmp_path: Path) -> None:
    x, _ = source_rows(50, seed=3)
    rows = [json.dumps({"id": f"r{row}", "x": x[row].tolist()}) for row in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    labels = [json.dumps({"id": f"r{row}", "y": row % 3}) for row in reversed(range(49))]
    (tmp_path / "l.jsonl").write_text("\n".join([*labels, json.dumps({"id": "r3", "y": 1})]) + "\n")
    given = settings(tmp_path, labels=f"file:{tmp_path / 'l.jsonl'}")
    manifest = open_bundle(bundle(), FACTORY).manifest
    recording = read(Wanted(file=tmp_path / "a.jsonl"), given, manifest).recording
    assert recording.y.tolist() == [*(row % 3 for row in range(49)), -1], "the first label counts, as for the daemon"


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"x": np.zeros((ROWS, 7))}, r"a.npz: x is float64 of shape \(640, 7\); the model takes rows of \[4\]"),
        ({"y": np.full(ROWS, -1)}, r"a.npz: no label: nothing can be scored"),
        ({"y": np.arange(ROWS) // 300 * 3}, r"a.npz: row 300: y is 3, .* knows classes 0 to 2"),
        ({"y": np.full(ROWS, 0.5)}, r"a.npz: row 0: y is 0.5, and the bundle's model is a classifier"),
        ({"y": np.zeros(5, int)}, r"a.npz: y has shape \(5,\); x has 640 rows"),
        ({"ts": np.array(["a"] * ROWS)}, r"a.npz: ts is <U1, not numbers"),
        ({"x": np.full((ROWS, 4), np.nan)}, r"a.npz: no row is finite"),
    ],
)
def test_what_can_not_be_replayed_names_file_and_row(tmp_path: Path, arrays: dict[str, Any], line: str) -> None:
    with pytest.raises(StreamError, match=line):
        reading(write(tmp_path / "a.npz", **arrays), tmp_path)


def test_a_file_without_y_or_that_is_none_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 4)))
    with pytest.raises(StreamError, match=r"a.npz: no array y in it; there are: x"):
        reading(tmp_path / "a.npz", tmp_path)
    (tmp_path / "b.npz").write_bytes(b"PK nonsense")
    with pytest.raises(StreamError, match=r"b.npz: not an npz archive"):
        reading(tmp_path / "b.npz", tmp_path)
    with pytest.raises(StreamError, match=r"c.csv: no such file"):
        reading(tmp_path / "c.csv", tmp_path)
    with pytest.raises(StreamError, match="--changes=700: rows 1 to 639"):
        reading(write(tmp_path / "d.npz"), tmp_path, changes=(700,))


def test_all_problems_of_the_configurations_are_told_at_once(environment: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        configurations(load_settings(), ["norm", "tentt"], ["x", "y:FAST", "z:SLOW__STEPS=no", "norm:FAST=tent"])
    text = "\n".join(refused.value.problems)
    for part in ("--methods=tentt: no fast adapter", "--config=x: right would be", "'FAST' is no assignment"):
        assert part in text
    assert "--config=z:SLOW__STEPS=no: HOMEOSTAT_SLOW__STEPS=no: " in text
    assert "--config=norm: there is another configuration of that name" in text
    with pytest.raises(SettingsError, match="HOMEOSTAT_BUNDLE is the same for all configurations"):
        configurations(load_settings(), [], ["x:BUNDLE=other"])


def test_a_variant_is_the_environment_with_its_changes(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOMEOSTAT_SLOW__STEPS", "7")
    made = {each.name: each for each in configurations(load_settings(), METHODS, ["v:FAST=tent,FAST__LR=0.5"])}
    assert list(made) == ["frozen", "blind copy", "periodic refit", *METHODS, "homeostat", "v"]
    varied = made["v"].settings
    assert (varied.fast.name, varied.fast.options(), varied.slow.steps) == ("tent", {"lr": "0.5"}, 7)
    assert load_settings().fast.name == made["homeostat"].settings.fast.name != "tent"


def test_a_key_holds_no_secret_and_changes_with_what_matters(tmp_path: Path) -> None:
    plain = settings(tmp_path)
    secret = settings(tmp_path, kafka={"password": "hidden"}, http="127.0.0.1:0", sink="-")
    assert relevant(plain) == relevant(secret) and "hidden" not in json.dumps(relevant(secret))
    assert relevant(plain) != relevant(settings(tmp_path, slow={"steps": 3}))
    assert key("a", 1) == key("a", 1) != key("a", 2)


def some(given: Settings) -> Replayed:
    x, y = source_rows(100, seed=3)
    x[7] = np.nan
    recording = Recording(x=x, y=y.astype(np.int64), times_s=np.arange(100.0))
    asks = {31: np.arange(40, 60)}
    return replay_baseline("norm", given, open_bundle(bundle(), FACTORY), recording, Plan(batch_rows=32), asks=asks)


def test_a_result_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    result = some(settings(tmp_path))
    result.decisions.append((31, "decision: “x”"))
    Store(tmp_path).put("a", "norm", result)
    Store(tmp_path).put("b", "rna", "refused because")
    store = Store(tmp_path)
    found = store.get("a")
    assert isinstance(found, Replayed) and store.get("b") == "refused because" and store.get("c") is None
    for name, value in vars(result).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(found, name), value)
        elif name != "asked":
            assert getattr(found, name) == value
    np.testing.assert_array_equal(found.asked[31], result.asked[31])


def test_half_a_line_is_passed_over_and_the_next_is_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("a", "b"):
        store.put(name, name, some(settings(tmp_path)))
    whole = store.path.read_bytes()
    for cut in (5, len(whole) // 4):
        store.path.write_bytes(whole[:-cut])
        again = Store(tmp_path)
        assert isinstance(again.get("a"), Replayed) and again.get("b") is None
        again.put("c", "c", "why")
        assert isinstance(Store(tmp_path).get("a"), Replayed) and Store(tmp_path).get("c") == "why"
    store.path.write_bytes(whole.replace(b'"rows": 100', b'"rows": 999'))
    assert Store(tmp_path).get("a") is None, "a line whose columns do not fit is no result"


@pytest.mark.parametrize("level", ["error", "debug"])
def test_decisions_are_noted_whatever_is_logged(level: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    configure(level, "json")
    before = daemon.actions.log
    x, y = source_rows(ROWS, seed=3)
    x[400:] += 2.0
    recording = Recording(x=x, y=y.astype(np.int64), times_s=np.arange(float(ROWS)))
    given = settings(tmp_path, detect={"arl0": 100})
    result = replay(given, open_bundle(bundle(), FACTORY), recording, Plan(batch_rows=32))
    assert any("reasons ['drift alarm']" in text for _, text in result.decisions)
    assert any("calibrated for another HOMEOSTAT_DETECT__ARL0" in text for text in result.warnings)
    assert daemon.actions.log is before
    assert "".join(capfd.readouterr()) == "", "it is no event of the process that replays"


class Balanced(HTMLParser):
    """Raises when a tag is closed that was not the last to be opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_command_prints_saves_and_draws(environment: Path, tmp_path: Path, capsys: Any) -> None:
    html, out = tmp_path / "out.html", tmp_path / "out.json"
    more = ["--batch=32", "--delay=50", "--methods=norm,rna", "--refit=100", "--seeds=0,1", "--window=90"]
    arguments = ["evaluate", str(environment), *more, "--config", "<b>&:SLOW__ENABLED=false"]
    assert main([*arguments, "--html", str(html), "--json", str(out)]) == 0
    printed = capsys.readouterr()
    table = printed.out
    for part in ("frozen", "blind copy", "periodic refit", "best in hindsight: norm", "homeostat", "back after change"):
        assert part in table
    assert re.search(r"^rna +– +– ", table, re.MULTILINE) and "rna: rna can't serve this model" in table
    assert "640 of 640 rows, each 50 rows after its answer" in table
    content = json.loads(out.read_text())
    found = {each["name"]: each for each in content["configurations"]}
    assert content["best_in_hindsight"] == "norm" and content["recording"]["changes"] == [320]
    assert len(found["periodic refit"]["error_by_seed"]) == 2 and len(found["frozen"]["error_by_seed"]) == 1
    assert found["frozen"]["against_frozen"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["frozen"]["error"]["low"] < found["frozen"]["error"]["mean"] < found["frozen"]["error"]["high"]
    assert found["rna"]["refused"] and "error" not in found["rna"]
    assert found["periodic refit"]["same_as_frozen_share"] < 1 == found["frozen"]["same_as_frozen_share"]
    page = html.read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    (drawn,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    svg = ElementTree.fromstring(drawn)
    names = {each.text for each in svg.iter("{http://www.w3.org/2000/svg}title")}
    assert {"frozen", "homeostat", "<b>&", "change at row 320"} <= names
    assert "<script" not in page and "<b>" not in page and "url(" not in page and "@import" not in page
    assert re.findall(r"(?:https?:)?//[^\s\"']+", page) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"\s(?:src|href)=", page)
    # A second run knows it all; after a kill in the middle of a line it makes what is missing.
    assert main([*arguments, "--json", str(out)]) == 0
    assert "12 of 12 replays were known" in capsys.readouterr().out
    results = tmp_path / "state/evaluate/results.jsonl"
    results.write_bytes(results.read_bytes()[:-100])
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert "11 of 12 replays were known" in again.out
    assert _numbers(again.out) == _numbers(table)


def _numbers(table: str) -> list[str]:
    """Lines of the table up to the columns that are times."""
    return [line.split("MiB")[0][:70] for line in table.splitlines() if "MiB" in line]


def test_fewer_rows_than_a_batch_are_refused(environment: Path, capsys: Any) -> None:
    assert main(["evaluate", str(environment), "--records", "10"]) == 2
    assert "10 rows, fewer than a batch of 64" in capsys.readouterr().err


def test_wrong_options_end_with_code_2(environment: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["evaluate", str(environment), "--html", str(tmp_path / "none/out.html")]) == 2
    assert "no such folder" in capsys.readouterr().err
    for wrong in (
        ["--seeds", "a"],
        ["--label-share", "2"],
        ["--changes", "x"],
        ["--batch", "0"],
        ["--order", "random"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(environment), *wrong])
        assert ended.value.code == 2
    assert main(["evaluate", str(environment), "--from=3"]) == 2
    assert "--from and --to are offsets of a kafka://" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["evaluate", str(environment), "--state", str(tmp_path / "file")]) == 2
    assert "--state=" in capsys.readouterr().err


def test_a_stream_that_is_no_recording_is_refused(
    environment: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HOMEOSTAT_SOURCE", "-")
    assert main(["evaluate"]) == 2
    assert "HOMEOSTAT_SOURCE=-: give the recording as FILE" in capsys.readouterr().err
