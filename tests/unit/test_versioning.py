from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from daemon.versioning import durable, files, journal
from daemon.versioning.requests import EVERY_S, LARGEST, MOST, Inbox, payload, submit
from daemon.versioning.shelf import Shelf, Wanted
from daemon.versions import Version, VersionError

BASE = {"a.weight": torch.arange(64.0).reshape(8, 8), "a.bias": torch.zeros(8)}
DELTA = {"a.bias": torch.linspace(-1, 1, 8)}


def entry(event: str, lineage: str = "x", after: int = 0, **more: Any) -> journal.Entry:
    return {"event": event, "lineage": lineage, "after": after, "serves": 0, **more}


def restored(lineage: str, after: int | None) -> journal.Entry:
    return entry(journal.RESTORED, lineage) | {"after": after}


def live(folder: Path) -> list[Any]:
    return [item.get("n") for item in journal.live(journal.read(folder))]


def write(path: Path, number: int = 7, bundle: str = "b1", **record: Any) -> int:
    return files.write(path, DELTA, BASE, bundle=bundle, number=number, parent=3, record=record)


# Journal


def test_decisions_come_back_in_order_and_in_strict_json(tmp_path: Path) -> None:
    made = journal.Journal(tmp_path)
    for n, value in enumerate([math.nan, math.inf, np.float32(0.5), np.arange(2), Path("p"), torch.ones(1)]):
        assert made.append(entry("rejected", n=n, value=value))
    found = journal.read(tmp_path)
    assert [item["n"] for item in found] == list(range(6))
    assert [item["value"] for item in found] == [None, None, 0.5, [0, 1], "p", [1.0]]
    assert b"NaN" not in made.path.read_bytes()


def test_what_was_decided_after_the_checkpoint_is_superseded_by_a_restart_from_it(tmp_path: Path) -> None:
    made = journal.Journal(tmp_path)
    for n, after in enumerate([0, 1, 2]):
        made.append(entry("promoted", after=after, n=n))
    # Checkpoint 2 holds what was decided after checkpoints 0 and 1.
    made.append(restored("x", 2))
    assert live(tmp_path) == [0, 1]
    made.append(entry("promoted", after=2, n="2 again"))
    assert live(tmp_path) == [0, 1, "2 again"]
    # The newest checkpoint is damaged: back to the one before.
    made.append(restored("x", 1))
    assert live(tmp_path) == [0]


@pytest.mark.parametrize(("lineage", "after"), [("y", None), ("y", 5), ("x", None)])
def test_a_fresh_start_supersedes_everything(tmp_path: Path, lineage: str, after: int | None) -> None:
    made = journal.Journal(tmp_path)
    made.append(entry("promoted", n=1))
    made.append(restored(lineage, after))
    assert live(tmp_path) == [] and len(journal.read(tmp_path)) == 2


@given(st.lists(st.one_of(st.just("decide"), st.just("save"), st.integers(0, 3)), max_size=40))
def test_however_often_it_crashes_each_decision_counts_once(acts: list[Any]) -> None:
    """A model: decision n is made when n were made before; a crash goes back to one of the newest checkpoints."""
    entries: list[journal.Entry] = []
    saved, sequence, count = {0: 0}, 0, 0
    for act in acts:
        if act == "decide":
            entries.append(entry("promoted", after=sequence, n=count))
            count += 1
        elif act == "save":
            sequence += 1
            saved[sequence] = count
        else:
            sequence = max(0, sequence - act)
            count = saved[sequence]
            entries.append(restored("x", sequence))
    assert [item["n"] for item in journal.live(journal.fold(entries))] == list(range(count))


def test_a_line_cut_short_by_a_crash_loses_itself_alone(tmp_path: Path) -> None:
    made = journal.Journal(tmp_path)
    for n in range(2):
        made.append(entry("rejected", n=n))
    made.path.write_bytes(made.path.read_bytes()[:-10])
    journal.Journal(tmp_path).append(entry("rejected", n=2))
    assert live(tmp_path) == [0, 2]


def test_lines_that_are_no_decisions_are_passed_over(tmp_path: Path) -> None:
    made = journal.Journal(tmp_path)
    made.append(entry("rejected", n=0))
    with open(made.path, "ab") as file:
        file.write(b'[1]\n{"event": 3}\n\xff\xfe\n{}\nnull\n')
    made.append(entry("rejected", n=1))
    assert live(tmp_path) == [0, 1]


def test_it_never_grows_for_ever(tmp_path: Path) -> None:
    made = journal.Journal(tmp_path, max_bytes=2_000)
    for n in range(200):
        made.append(entry("rejected", n=n))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4_000
    assert live(tmp_path)[-1] == 199 and live(tmp_path) == list(range(live(tmp_path)[0], 200))


def test_a_decision_too_long_to_write_is_written_without_what_makes_it_long(tmp_path: Path) -> None:
    journal.Journal(tmp_path).append(entry("failed", n=1, record={"reason": "x" * journal.LONGEST_LINE}))
    (found,) = journal.read(tmp_path)
    assert (found["event"], found["n"]) == ("failed", 1) and found["left_out_bytes"] > journal.LONGEST_LINE


def test_a_full_disk_is_counted_and_what_waits_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = journal.Journal(tmp_path)
    made.append(entry("rejected", n=0))
    sync = os.fsync

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not made.append(entry("rejected", n=1))
    assert made.failures == 1 and "No space left" in made.problem and live(tmp_path) == [0]
    for n in range(2, journal.PENDING + 3):
        made.append(entry("rejected", n=n))
    assert made.dropped == 2
    monkeypatch.setattr(os, "fsync", sync)
    assert made.flush() and made.problem == ""
    assert live(tmp_path) == [0, *range(3, journal.PENDING + 3)]


# Files


def test_a_version_goes_through_its_file(tmp_path: Path) -> None:
    path = files.path_of(tmp_path, 7)
    size = write(path, gain=0.1, gain_low=math.nan)
    card, delta = files.read(path, BASE, bundle="b1")
    assert (card.number, card.parent, card.size, card.pinned) == (7, 3, size, False)
    assert card.record == {"gain": 0.1, "gain_low": None}
    assert list(delta) == ["a.bias"] and torch.allclose(delta["a.bias"], DELTA["a.bias"], rtol=1e-6)
    assert [item.name for item in tmp_path.iterdir()] == ["version-000007.safetensors"]


def test_a_file_of_another_bundle_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "v", bundle="b2")
    with pytest.raises(VersionError, match=f"{tmp_path / 'v'}: made for bundle b2, this one is b1"):
        files.read(tmp_path / "v", BASE, bundle="b1")


def damaged(content: bytes) -> list[bytes]:
    return [
        b"",
        b"\xff" * 64,
        content[:-1],
        content[: len(content) // 2],
        content + b"x",
        content.replace(b'"schema"', b"'schema'").replace(b'"homeostat":"1"', b'"homeostat":"9"'),
        content.replace(b'"number":"7"', b'"number":"?"'),
        (8).to_bytes(8, "little") + b"[[[[[[[[",
    ]


@pytest.mark.parametrize("kind", range(8))
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "version-000007.safetensors"
    write(path)
    path.write_bytes(damaged(path.read_bytes())[kind])
    with pytest.raises(VersionError, match=str(path)):
        files.read(path, BASE, bundle="b1")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    bad = {"a.bias": torch.full((8,), value)}
    try:
        files.write(tmp_path / "v", bad, BASE, bundle="b1", number=1, parent=0, record={})
    except ValueError as error:
        assert "a.bias" in str(error)
        return
    with pytest.raises(VersionError, match=str(tmp_path / "v")):
        files.read(tmp_path / "v", BASE, bundle="b1")


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"a.bias": torch.zeros(8)}, tmp_path / "v")
    with pytest.raises(VersionError, match="schema None of a version's file"):
        files.read_card(tmp_path / "v")
    with pytest.raises(VersionError, match="No such file"):
        files.read_card(tmp_path / "w")


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "v")
    with pytest.raises(VersionError, match=f"{tmp_path / 'v'}: does not fit the model"):
        files.read(tmp_path / "v", {"other": torch.zeros(3)}, bundle="b1")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=20,
    )
)
def test_any_plain_record_is_strict_json_and_stays_what_it_is(value: Any) -> None:
    once = durable.plain(value)
    assert durable.plain(json.loads(json.dumps(once, allow_nan=False))) == once


# Shelf


def wanted(*numbers: int, pins: tuple[int, ...] = ()) -> list[Wanted]:
    return [Wanted(Version(number, DELTA, {"parent": 0, "n": number}), number in pins) for number in numbers]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_follows_the_versions(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "v", BASE, bundle="b1")
    shelf.bring(wanted(1, 2))
    assert names(shelf.folder) == ["version-000001.safetensors", "version-000002.safetensors"]
    shelf.bring(wanted(1, 3, pins=(1,)))
    assert names(shelf.folder) == ["version-000001.pinned.safetensors", "version-000003.safetensors"]
    shelf.bring(wanted(1, 3))
    assert names(shelf.folder) == ["version-000001.safetensors", "version-000003.safetensors"]


def test_a_file_is_written_once_unless_it_is_another_version_of_that_number(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, BASE, bundle="b1")
    shelf.bring(wanted(1))
    path = files.path_of(tmp_path, 1)
    first = path.stat().st_ino
    shelf.bring(wanted(1))
    assert path.stat().st_ino == first
    shelf.bring([Wanted(Version(1, DELTA, {"parent": 0, "n": "made again"}), False)])
    assert files.read_card(path).record["n"] == "made again"
    path.write_bytes(b"damaged")
    shelf.bring(wanted(1))
    assert files.read_card(path).record["n"] == 1


def test_what_was_pinned_for_another_bundle_is_never_thrown_away(tmp_path: Path) -> None:
    write(files.path_of(tmp_path, 5, pinned=True), 5, "b2")
    write(files.path_of(tmp_path, 6), 6, "b2")
    (tmp_path / "version-000008.pinned.safetensors").write_bytes(b"unreadable")
    Shelf(tmp_path, BASE, bundle="b1").bring(wanted(1))
    assert sorted(files.files(tmp_path)) == [1, 5, 8]


def test_a_folder_that_can_not_be_written_is_counted_and_tried_again(tmp_path: Path) -> None:
    failed: list[int] = []
    folder = tmp_path / "v"
    folder.write_bytes(b"a file where the folder should be")
    shelf = Shelf(folder, BASE, bundle="b1", failed=lambda: failed.append(1))
    shelf.ask(wanted(1))
    assert shelf.wait(20) and shelf.stale and failed == [1]
    folder.unlink()
    shelf.ask(wanted(1))
    assert shelf.wait(20) and not shelf.stale and names(folder) == ["version-000001.safetensors"]


def test_what_a_crash_left_half_written_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".version-000001.safetensors.ab12.tmp").write_bytes(b"half")
    Shelf(tmp_path, BASE, bundle="b1").bring([])
    assert names(tmp_path) == []


# Requests


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_are_taken_once_in_their_order_and_looked_for_once_a_second(tmp_path: Path) -> None:
    clock = Clock()
    inbox = Inbox(tmp_path, clock=clock)
    assert inbox.take() == []
    first, second = submit(tmp_path, "pin", number=3), submit(tmp_path, "rollback", number=2, hold=True)
    clock.now = EVERY_S - 0.01
    assert inbox.take() == []
    clock.now = EVERY_S
    assert inbox.take() == [first, second]
    clock.now = 9.0
    assert inbox.take() == []
    # Not removed yet, so the next process takes it again.
    assert Inbox(tmp_path).take() == [first, second]
    inbox.done(first)
    assert Inbox(tmp_path).take() == [second]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'{"action": "erase"}',
        b'{"action": ["pin"], "number": 1}',
        b'{"action": "pin", "number": -1}',
        b'{"action": "pin", "number": true}',
        b'{"action": "rollback", "number": 1, "hold": "yes"}',
        b'{"action": "pin", "number": 1}' + b" " * LARGEST + b"x",
        b"\xff\xfe",
        b"[" * 3_000,
    ],
)
def test_what_is_no_request_is_refused_and_removed(tmp_path: Path, content: bytes) -> None:
    good = submit(tmp_path, "resume")
    path = tmp_path / "requests" / "00000000000000000001-00000000.json"
    path.write_bytes(content)
    inbox = Inbox(tmp_path)
    assert inbox.take() == [good]
    assert len(inbox.refused) == 1 and str(path) in inbox.refused[0] and not path.exists()


def test_waiting_requests_are_bounded(tmp_path: Path) -> None:
    for _ in range(MOST):
        submit(tmp_path, "resume")
    with pytest.raises(VersionError, match=f"{MOST} requests wait already"):
        submit(tmp_path, "resume")


def test_the_file_to_import_goes_with_its_request(tmp_path: Path) -> None:
    request = submit(tmp_path, "import", data=b"content")
    assert payload(tmp_path, request).read_bytes() == b"content"
    Inbox(tmp_path).done(request)
    assert list((tmp_path / "requests").iterdir()) == []


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "requests").write_bytes(b"")
    with pytest.raises(VersionError, match=str(tmp_path / "requests")):
        submit(tmp_path, "resume")
    assert Inbox(tmp_path).take() == []
