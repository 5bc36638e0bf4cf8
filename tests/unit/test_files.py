"""Files as streams: no row is lost or read twice, wherever reading or writing was cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.errors import DeliveryError, StreamError
from daemon.records import Batch, DeadLetter, RawBatch
from daemon.streams import NullSink, Source, open_labels, open_sink, open_source
from daemon.streams.codecs import codec
from daemon.streams.fileio import FileUrl, LineReader
from daemon.streams.files import FileSink, FileSource

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("HOMEOSTAT_DATA", ROOT.parent / "shared" / "data"))


def rows(count: int, start: int = 0) -> bytes:
    return b"".join(b'{"id":"r%d","x":[%d,1]}\n' % (row, row) for row in range(start, start + count))


def source(url: str, shape: tuple[int, ...] = (2,), positions: dict[str, int] | None = None) -> Source:
    opened = open_source(url, codec("json", shape))
    opened.open(positions)
    return opened


def read(stream: Source, shape: tuple[int, ...] = (2,), max_rows: int = 512) -> Batch:
    return codec("json", shape).decode(stream.poll(max_rows, 0))


def drained(stream: Source, max_rows: int = 512) -> list[RawBatch]:
    batches = []
    while not stream.ended:
        batches.append(stream.poll(max_rows, 0))
    stream.close()
    return batches


def test_json_lines_come_in_order_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows(5))
    stream = source(f"file:{path}")
    assert stream.ready()
    raw = stream.poll(3, 0)
    assert raw.values == [line.encode() for line in path.read_text().splitlines()[:3]]
    assert raw.offsets == [0, 1, 2]
    assert raw.next_positions() == {f"file:{path}": 3}
    assert stream.can_fill(1)
    assert not stream.ended
    assert stream.poll(3, 0).offsets == [3, 4]
    assert stream.poll(3, 0).offsets == []
    assert stream.ended
    assert stream.lag() == 0
    stream.close()
    assert not stream.ready()


def test_a_files_commit_is_nothing_and_its_lag_is_estimated_from_the_lines_so_far(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"x":[1,1]}\n' * 100_000)
    stream = source(f"file:{path}")
    assert stream.lag() is None
    stream.poll(1000, 0)
    assert stream.lag() == 99_000
    stream.commit({f"file:{path}": 1000}, "note")
    stream.close()


@pytest.mark.parametrize("url", ["file:rows.jsonl", "file://rows.jsonl", "file:./rows.jsonl?format=jsonl&follow=false"])
def test_a_relative_path_is_one_from_the_working_folder(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(rows(1))
    monkeypatch.chdir(tmp_path)
    stream = source(url)
    assert stream.poll(1, 0).partitions == [f"file:{tmp_path}/rows.jsonl"]
    stream.close()


def test_an_escaped_path_is_unescaped(tmp_path: Path) -> None:
    (tmp_path / "a ?b.jsonl").write_bytes(rows(1))
    stream = source(f"file://{tmp_path}/a%20%3Fb.jsonl")
    assert len(stream.poll(1, 0)) == 1
    stream.close()


def test_line_ends_may_be_dos_and_a_last_line_may_have_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"x":[1,1]}\r\n\n{"x":[2,2]}')
    (raw, *_) = drained(source(f"file:{path}"))
    assert raw.values == [b'{"x":[1,1]}', b"", b'{"x":[2,2]}']
    batch = codec("json", (2,)).decode(raw)
    assert batch.ids == [f"file:{path}:0", f"file:{path}:2"]
    assert [letter.reason for letter in batch.dead] == ["empty"]


def test_a_line_over_the_limit_is_not_kept_in_memory_and_its_neighbours_do_not_notice(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"x":[1,1]}\n' + b"[" * 3_000_000 + b'\n{"x":[2,2]}\n')
    reader = LineReader(FileUrl.parse(f"file:{path}", "HOMEOSTAT_SOURCE"), max_bytes=1000)
    reader.open(0)
    lines = reader.read(10, 0)
    assert [lines[0], lines[2]] == [b'{"x":[1,1]}', b'{"x":[2,2]}']
    assert 1000 < len(lines[1]) < 1_000_000
    reader.close()


@settings(deadline=None)
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.translate(None, b"\r\n")), max_size=12),
    ended=st.booleans(),
    max_rows=st.integers(1, 5),
    data=st.data(),
)
def test_reading_on_after_a_restart_loses_no_row_and_repeats_none(
    lines: list[bytes], ended: bool, max_rows: int, data: st.DataObject
) -> None:
    text = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    expected = text.split(b"\n")[:-1] if text.endswith(b"\n") or not text else text.split(b"\n")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(text)
        whole = [value for raw in drained(source(f"file:{path}"), max_rows) for value in raw.values]
        assert whole == expected
        stop = data.draw(st.integers(0, len(expected)))
        again = drained(source(f"file:{path}", positions={f"file:{path}": stop}), max_rows)
        assert [value for raw in again for value in raw.values] == expected[stop:]
        assert [offset for raw in again for offset in raw.offsets] == list(range(stop, len(expected)))


def test_a_position_past_the_end_says_that_the_file_is_another(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows(3))
    with pytest.raises(StreamError, match=r"has 3 lines, and the checkpoint goes on at line 4"):
        source(f"file:{path}", positions={f"file:{path}": 4})
    table = tmp_path / "rows.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(StreamError, match=r"has 1 rows, and the checkpoint goes on at row 2"):
        source(f"file:{table}", positions={f"file:{table}": 2})
    np.savez(tmp_path / "rows.npz", x=np.zeros((3, 2)))
    with pytest.raises(StreamError, match=r"has 3 rows, and the checkpoint goes on at row 4"):
        source(f"file:{tmp_path}/rows.npz", positions={f"file:{tmp_path}/rows.npz": 4})


@settings(deadline=None)
@given(text=st.just(rows(6)), cuts=st.lists(st.integers(0, len(rows(6))), max_size=8))
def test_a_followed_file_gives_each_line_once_it_is_whole(text: bytes, cuts: list[int]) -> None:
    with TemporaryDirectory() as folder, ExitStack() as closing:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        stream = source(f"file:{path}?follow=true")
        closing.callback(stream.close)
        got: list[bytes | None] = []
        written = 0
        for cut in [*sorted(cuts), len(text)]:
            with path.open("ab") as file:
                file.write(text[written:cut])
            written = cut
            got += stream.poll(100, 0).values
            assert got == text[:cut].split(b"\n")[:-1]
            assert not stream.can_fill(1)
            assert not stream.ended


def test_a_followed_file_that_is_cut_or_replaced_is_an_error_not_a_silent_stop(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for change in ("cut", "replaced"):
        path.write_bytes(rows(3))
        stream = source(f"file:{path}?follow=true")
        assert len(stream.poll(10, 0)) == 3
        if change == "cut":
            path.write_bytes(rows(1))
        else:
            (tmp_path / "new").write_bytes(rows(4))
            (tmp_path / "new").rename(path)
        with pytest.raises(StreamError, match=r"HOMEOSTAT_SOURCE=.*replaced or cut"):
            stream.poll(10, 0)
        stream.close()


@pytest.fixture
def stdin() -> Iterator[Any]:
    """The writing end of a pipe that is this process's standard input."""
    reading, writing = os.pipe()
    saved = os.dup(0)
    os.dup2(reading, 0)
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as pipe:
        yield pipe
    os.dup2(saved, 0)
    os.close(saved)


def test_standard_input_gives_lines_as_they_come_and_ends_with_its_writer(stdin: Any) -> None:
    stream = source("-", positions={"file:-": 40})
    assert not stream.can_fill(1)
    assert stream.poll(10, 0).values == []
    stdin.write(rows(2) + b'{"x":')
    assert stream.can_fill(1)
    raw = stream.poll(10, 5)
    assert len(raw.values) == 2
    assert raw.offsets == [40, 41]
    assert stream.lag() is None
    stdin.write(b"[7,7]}")
    assert stream.poll(10, 0).values == []
    stdin.close()
    assert stream.poll(10, 0).values == [b'{"x":[7,7]}']
    assert stream.ended
    stream.close()


def test_csv_columns_are_named_or_x_and_what_is_no_number_makes_the_row_invalid(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [
        "\ufeffid,b,y,a,ts",
        "r0,1,2,3,2026-01-01T00:00:00Z",
        'r1,"1.5",0.5,"-3e2",5.5',
        "r2,,,3,",
        "r3,1,,warm,",
        ",1,,2,",
        "r5,1",
        "",
        "r7,1,high,2,",
        "r8,1,,2,noon",
        "r9,1e39,,2,",
        'r10,1,,"2,',
        "r11,inf,nan,2,nan",
        "r12,5,1,6,7",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    stream = source(f"file:{path}")
    raw = stream.poll(100, 0)
    batch = codec("json", (2,)).decode(raw)
    assert raw.offsets == batch.rows == list(range(13))
    assert batch.invalid == {
        2: "not_finite",
        3: "not_finite",
        5: "wrong_shape",
        6: "empty",
        7: "wrong_type",
        8: "wrong_type",
        9: "out_of_range",
        10: "wrong_shape",
        11: "not_finite",
    }
    assert [batch.ids[row] for row in (0, 4, 12)] == ["r0", f"file:{path}:4", "r12"]
    np.testing.assert_array_equal(batch.x[batch.valid], [[1, 3], [1.5, -300], [1, 2], [5, 6]])
    assert batch.y[:3] == [2, 0.5, None]
    assert type(batch.y[0]) is int
    assert [batch.times_s[row] for row in (0, 1, 12)] == [1_767_225_600.0, 5.5, 7.0]
    assert batch.times_s[4] == raw.times_s[4]
    stream.close()


def test_csv_reads_on_after_a_restart_with_the_columns_of_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("place,a,b\nhere,1,2\n3,4,5\nthere,,7")
    batch = read(source(f"file:{path}", positions={f"file:{path}": 1}))
    np.testing.assert_array_equal(batch.x, [[4, 5], [0, 0]])
    assert batch.invalid == {1: "not_finite"}
    assert batch.ids == [f"file:{path}:1", f"file:{path}:2"]


def test_a_csv_that_does_not_fit_the_model_names_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("place,a,b\nhere,1,2\n")
    with pytest.raises(StreamError, match=r"2 columns can be x \(a, b\), and the model takes 1 numbers"):
        source(f"file:{path}", (1,)).poll(1, 0)


def test_an_empty_csv_ends_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.touch()
    stream = source(f"file:{path}")
    assert len(read(stream)) == 0
    assert stream.ended
    stream.close()


def test_a_followed_csv_waits_for_its_header_and_for_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.touch()
    stream = source(f"file:{path}?follow=true")
    got = []
    for text in ("a,", "b\n1,2", "\n3,4\n", "5,6\n"):
        with path.open("a") as file:
            file.write(text)
        got.append(read(stream).x.tolist())
    assert got == [[], [], [[1, 2], [3, 4]], [[5, 6]]]
    stream.close()


def test_npz_rows_come_decoded_with_their_names_labels_and_times(tmp_path: Path) -> None:
    x = np.array([[1, 2], [np.nan, 4], [1e39, 6], [7, 8]])
    path = tmp_path / "rows.npz"
    np.savez(path, x=x, ids=np.array([3, 1, 4, 15]), y=np.array([0, 1, np.nan, 2]), ts=np.arange(4))
    stream = source(f"file:{path}")
    assert stream.lag() == 4
    batch = read(stream, max_rows=3)
    assert batch.ids == ["3", "1", "4"]
    assert batch.invalid == {1: "not_finite", 2: "out_of_range"}
    np.testing.assert_array_equal(batch.x, np.array([[1, 2], [0, 0], [0, 0]], np.float32))
    assert batch.y == [0.0, 1.0, None]
    assert batch.times_s.tolist() == [0, 1, 2]
    assert not stream.ended
    rest = stream.poll(3, 0)
    assert rest.offsets == [3]
    assert rest.next_positions() == {f"file:{path}": 4}
    assert stream.ended
    stream.close()


def test_integers_in_npz_keep_their_classes_and_flat_rows_take_the_models_shape(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    np.savez(path, x=np.arange(12, dtype=np.uint8).reshape(2, 6), y=np.array([1, 0], dtype=np.uint8))
    batch = read(source(f"file:{path}", (2, 3)), (2, 3))
    assert batch.x.shape == (2, 2, 3)
    assert batch.y == [1, 0]
    assert batch.ids == [f"file:{path}:0", f"file:{path}:1"]


def test_npz_without_what_is_needed_is_refused_and_pickles_are_never_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"blob": np.zeros(3)}, "no array x in it; there are: blob"),
        ({"x": np.zeros((3, 5))}, r"rows of shape \[5\], the model takes \[2\]"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, "y is float64 of shape"),
        ({"x": np.zeros((3, 2)), "y": np.array(["a", "b", "c"])}, "y is <U1 of shape"),
        ({"x": np.array([["1", "2"]])}, "x is <U1 of shape"),
        ({"x": np.array([[1, {}]], dtype=object)}, "not an npz archive of plain arrays"),
    ]
    for arrays, problem in cases:
        np.savez(path, **arrays)
        with pytest.raises(StreamError, match=f"HOMEOSTAT_SOURCE=file:.*{problem}"):
            source(f"file:{path}")
    path.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(StreamError, match="not an npz archive"):
        source(f"file:{path}")
    np.save(tmp_path / "rows", np.zeros(3))
    with pytest.raises(StreamError, match="not an npz archive"):
        source(f"file:{tmp_path}/rows.npy?format=npz")


@pytest.mark.parametrize(
    ("name", "shape", "count"), [("gas_drift.npz", (128,), 6697), ("har_phone_watch.npz", (64, 6), 3663)]
)
def test_recorded_streams_are_read_whole(name: str, shape: tuple[int, ...], count: int) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in {DATA}; set HOMEOSTAT_DATA")
    batches = [codec("json", shape).decode(raw) for raw in drained(source(f"file:{DATA / name}", shape))]
    assert sum(int(batch.valid.sum()) for batch in batches) == count
    assert all(type(y) is int for batch in batches for y in batch.y)


def test_a_recorded_csv_with_a_date_column_is_read_whole() -> None:
    path = DATA / "ETTh1.csv"
    if not path.exists():
        pytest.skip(f"ETTh1.csv is not in {DATA}; set HOMEOSTAT_DATA")
    expected = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(1, 8), dtype=np.float32)
    raws = drained(source(f"file:{path}", (7,)))
    np.testing.assert_array_equal(np.concatenate([raw.batch.x for raw in raws if raw.batch]), expected)


def test_answers_are_appended_as_lines_and_are_on_the_disk_after_flush(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    sink = FileSink(f"file:{path}")
    sink.open()
    sink.send([None, b"k"], [b"1", b"2"])
    sink.send([], [])
    sink.flush(1)
    assert path.read_bytes() == b"1\n2\n"
    sink.close()
    sink.close()
    again = FileSink(f"file:{path}")
    again.open()
    again.send([None], [b"3"])
    again.close()
    assert path.read_bytes() == b"1\n2\n3\n"


@settings(deadline=None)
@given(text=st.binary(max_size=40), newlines=st.integers(0, 3))
def test_whatever_a_kill_left_behind_the_file_goes_on_with_a_whole_line(text: bytes, newlines: int) -> None:
    left = text + b"\n" * newlines + b'{"id":"cut off'
    with TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        path.write_bytes(left)
        sink = FileSink(f"file:{path}")
        sink.open()
        sink.send([None], [b"next"])
        sink.flush(1)
        sink.close()
        assert path.read_bytes() == left[: left.rfind(b"\n") + 1] + b"next\n"


def test_a_partial_line_longer_than_one_look_is_cut_off_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"whole\n" + b"x" * 200_000)
    sink = FileSink(f"file:{path}")
    sink.open()
    sink.close()
    assert path.read_bytes() == b"whole\n"


def test_standard_output_shows_each_answer_at_once_and_stays_open(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    sink = open_sink("-", dead_letters_url="null:")
    sink.open()
    sink.send([None], [b"1"])
    assert capfdbinary.readouterr().out == b"1\n"
    sink.flush(1)
    sink.close()
    assert not sys.stdout.closed


def test_a_full_disk_is_a_failed_delivery() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    sink = FileSink("file:/dev/full")
    sink.open()
    sink.send([None], [b"1"])
    with pytest.raises(DeliveryError, match="HOMEOSTAT_SINK=file:/dev/full: No space left on device"):
        sink.flush(1)
    sink.close()


def test_a_sink_that_is_not_open_takes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DeliveryError, match="not open"):
        FileSink(f"file:{tmp_path}/out.jsonl").send([None], [b"1"])


def test_a_sink_whose_folder_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"HOMEOSTAT_SINK=file:.*No such file or directory"):
        FileSink(f"file:{tmp_path}/missing/out.jsonl").open()


def test_dead_letters_go_to_their_own_file_with_their_bytes_intact(tmp_path: Path) -> None:
    sink = open_sink(f"file:{tmp_path}/out.jsonl", dead_letters_url=f"file:{tmp_path}/dead.jsonl")
    sink.open()
    sink.send([None], [b"1"])
    sink.send_dead(DeadLetter("sensors/0", 7, b"\x00k", b"\xff\n", "undecodable", "not json"))
    sink.send_dead(DeadLetter("sensors/0", 8, None, None, "tombstone", "the record has no value"))
    sink.flush(1)
    sink.close()
    assert (tmp_path / "out.jsonl").read_bytes() == b"1\n"
    first, second = map(json.loads, (tmp_path / "dead.jsonl").read_text().splitlines())
    assert b64decode(first.pop("key")) == b"\x00k"
    assert b64decode(first.pop("value")) == b"\xff\n"
    assert first == {"partition": "sensors/0", "offset": 7, "reason": "undecodable", "detail": "not json"}
    assert (second["key"], second["value"]) == (None, None)


def test_the_null_sink_takes_everything(tmp_path: Path) -> None:
    sink = open_sink("null:", dead_letters_url="null:")
    sink.open()
    sink.send([None], [b"1"])
    sink.send_dead(DeadLetter("p", 0, None, None, "tombstone", ""))
    sink.flush(0)
    sink.close()
    assert list(tmp_path.iterdir()) == []
    NullSink().close()


def test_labels_that_can_not_be_read_are_counted_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_bytes(b'{"id":"a","y":1,"ts":5}\n\nnonsense\n{"id":"b","y":true}\n{"id":"c","y":0.5}\n{"id":"d"}\n')
    labels = open_labels(f"file:{path}")
    labels.open(None)
    got = labels.poll()
    assert (got.ids, got.y, got.times_s[0]) == (["a", "c"], [1, 0.5], 5.0)
    assert labels.rejected == {"empty": 1, "undecodable": 1, "wrong_type": 1, "missing_field": 1}
    assert labels.positions() == {f"file:{path}": 6}
    labels.poll()
    assert labels.at_end()
    labels.close()


def test_labels_go_on_at_their_position(tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_bytes(b'{"id":"a","y":1}\n{"id":"b","y":2}\n')
    (tmp_path / "labels.csv").write_text("y,id\n1,a\n2,b\n")
    np.savez(tmp_path / "labels.npz", ids=["a", "b"], y=[1, 2])
    for name in ("labels.jsonl", "labels.csv", "labels.npz"):
        labels = open_labels(f"file:{tmp_path / name}")
        labels.open({f"file:{tmp_path / name}": 1})
        got = labels.poll()
        assert (got.ids, got.y) == (["b"], [2])
        assert type(got.y[0]) is int
        assert labels.positions() == {f"file:{tmp_path / name}": 2}
        labels.close()


def test_labels_in_a_table_are_rejected_by_row(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,y,ts,note\na,1,,fine\n,2,,\nc,,,\nd,warm,,\ne,1,noon,\nf,2,7,\n")
    labels = open_labels(f"file:{path}")
    labels.open(None)
    got = labels.poll()
    assert (got.ids, got.y, got.times_s[1]) == (["a", "f"], [1, 2], 7.0)
    assert labels.rejected == {"missing_field": 2, "wrong_type": 2}
    labels.close()


def test_a_label_table_needs_ids_and_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,class\na,1\n")
    labels = open_labels(f"file:{tmp_path}/labels.csv")
    labels.open(None)
    with pytest.raises(StreamError, match=r"HOMEOSTAT_LABELS=.*labels need the columns id and y"):
        labels.poll()
    np.savez(tmp_path / "labels.npz", y=[1])
    with pytest.raises(StreamError, match="no array ids in it; there are: y"):
        open_labels(f"file:{tmp_path}/labels.npz").open(None)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (
            "",
            "no scheme; right would be one like file:rows.jsonl, -, kafka://127.0.0.1:9092/topic, mqtt://127.0.0.1/pl",
        ),
        ("rows.jsonl", "no scheme; .*for the file of that name, file:rows.jsonl"),
        ("http://host/rows", "http: can't be used here; right would be one like file:rows.jsonl"),
        ("null:", "null: can't be used here"),
        ("file:", "no path; right would be file:rows.jsonl"),
        ("file:rows.jsonl?folow=true", "no parameter 'folow' here; there are: format, follow"),
        ("file:rows.jsonl?follow=yes", "follow=yes; right would be one of true, false"),
        ("file:rows.jsonl?format=parquet", "format=parquet; right would be one of jsonl, csv, npz"),
        ("file:rows.jsonl.gz", "the suffix .gz says nothing of the format; name it .jsonl"),
        ("file:rows.npz?follow=true", "an npz archive is read whole"),
        ("-?format=npz", "an npz archive is read whole"),
    ],
)
def test_a_wrong_url_is_answered_with_its_variable_the_problem_and_what_would_be_right(url: str, problem: str) -> None:
    with pytest.raises(StreamError) as caught:
        open_source(url, codec("json", (1,)), variable="HOMEOSTAT_TWIN")
    assert str(caught.value).startswith(f"HOMEOSTAT_TWIN={url}: ")
    assert caught.match(problem)


def test_a_file_of_lines_needs_the_json_codec() -> None:
    for name in ("raw", "msgpack"):
        with pytest.raises(StreamError, match=f"the codec is {name}; right would be HOMEOSTAT_CODEC=json"):
            open_source("file:rows.jsonl", codec(name, (1,)))
        open_source("file:rows.npz", codec(name, (1,)))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"HOMEOSTAT_SOURCE=file:.*No such file or directory"):
        source(f"file:{tmp_path}/missing.jsonl")
    with pytest.raises(StreamError, match=r"HOMEOSTAT_SOURCE=file:.*this is a folder"):
        source(f"file:{tmp_path}?format=jsonl")


@pytest.mark.parametrize(
    ("sink", "dead", "problem"),
    [
        ("file:out.csv", "null:", "HOMEOSTAT_SINK=file:out.csv: what is written is JSON lines"),
        ("file:out.jsonl?follow=true", "null:", "HOMEOSTAT_SINK=.*no parameter 'follow' here; there are: format"),
        ("file:out.jsonl", "", "HOMEOSTAT_DEAD_LETTERS=: no scheme"),
        ("file:out.jsonl", "sim://ageing", "HOMEOSTAT_DEAD_LETTERS=sim://ageing: sim: can't be used here"),
        ("file:out.jsonl", "file://./out.jsonl", "HOMEOSTAT_DEAD_LETTERS=.*HOMEOSTAT_SINK names the same file"),
    ],
)
def test_a_wrong_sink_is_refused_before_anything_is_written(sink: str, dead: str, problem: str) -> None:
    with pytest.raises(StreamError, match=problem):
        open_sink(sink, dead_letters_url=dead)


def test_a_file_source_needs_no_kafka_client_and_no_simulator() -> None:
    code = (
        "import sys; from daemon.streams import open_source; from daemon.streams.codecs import codec;"
        "open_source('file:rows.jsonl', codec('json', (1,)));"
        "print([name for name in sys.modules if name in ('kafka', 'torch', 'daemon.streams.simsource')])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_simulator_and_its_labels_are_opened_by_url() -> None:
    assert type(open_source("sim://ageing?seed=1", codec("json", (16,)))).__name__ == "SimSource"
    assert type(open_labels("sim://ageing?seed=1")).__name__ == "SimLabels"


def test_file_source_and_sink_keep_to_the_contract(tmp_path: Path) -> None:
    stream: Source = FileSource(f"file:{tmp_path}/rows.jsonl", codec("json", (1,)))
    stream.close()
    stream.close()
    assert not stream.ready()
