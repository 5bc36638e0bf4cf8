from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from daemon.bundle import open_bundle
from daemon.cli import main
from daemon.resident import Resident
from daemon.versioning import files, operating
from daemon.versioning.keeper import Keeper
from daemon.versioning.requests import FOLDER
from tests.unit import worlds

Run = Callable[..., tuple[int, str, str]]


class Box:
    """A daemon's folder with two versions."""

    def __init__(self, folder: Path) -> None:
        self.resident: Resident = worlds.worker(folder, fast={"name": "none"}).loop.resident
        self.folder = folder / "state" / "versions"
        self.hash = open_bundle(worlds.bundle(), worlds.FACTORY).hash
        self.now = 0.0
        self.keeper = Keeper(
            self.folder, self.resident, bundle=self.hash, position=lambda: (500, {"p/0": 500}), clock=self.clock
        )
        self.keeper.open("x", None)
        self.keeper.decided("rejected", {"reason": "not better", "trigger": {"reasons": ["drift alarm"]}})
        for value in (1.0, 3.0):
            record = {"method": "head", "rows": 64, "gain": 0.25, "gain_low": 0.125, "measure": "error", "seconds": 1.5}
            version = self.resident.promote({"3.bias": torch.tensor([0.0, value, 0.0])}, record)
            self.keeper.decided("promoted", version.record, version=version.number)
        assert self.keeper.step(self) is False
        self.keeper.close(20)

    def clock(self) -> float:
        self.now += 2.0
        return self.now

    def rollback(self, number: int) -> None:
        self.resident.rollback(number)

    def take_up(self, _: float = 0.0) -> None:
        self.keeper.step(self)
        self.keeper.close(20)

    @property
    def waiting(self) -> int:
        return len(list((self.folder / FOLDER).glob("*.json")))


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.setenv("HOMEOSTAT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HOMEOSTAT_BUNDLE", str(worlds.bundle()))
    monkeypatch.setenv("HOMEOSTAT_FACTORY", worlds.FACTORY)
    return Box(tmp_path)


@pytest.fixture
def run(box: Box, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["versions", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_the_list_says_what_serves_and_why_each_was_kept(run: Run) -> None:
    code, text, _ = run()
    assert code == 0 and "version 2 serves" in text
    assert "0.25 [0.125, -] error" in text and "not better" not in text
    everything = run("list", "--all")[1]
    assert "not better; drift alarm" in everything


def test_the_list_as_json_holds_every_decision(run: Run, box: Box) -> None:
    content = json.loads(run("list", "--json")[1])
    assert (content["serves"], content["held"], content["waiting"]) == (2, False, [])
    assert [(item["number"], item["parent"], item["serves"]) for item in content["versions"]] == [
        (1, 0, False),
        (2, 1, True),
    ]
    assert [item["event"] for item in content["decisions"]] == ["rejected", "promoted", "promoted"]
    assert content["versions"][1]["bundle"] == box.hash


def test_inspect_of_the_folder_shows_the_same(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(box.folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["decisions"]) == 3
    assert main(["inspect", str(box.folder)]) == 0
    assert "not better" in capsys.readouterr().out


def test_a_folder_without_versions_says_so(run: Run, tmp_path: Path) -> None:
    code, text, _ = run("--state", tmp_path / "none", "list")
    assert code == 0 and "the frozen model serves" in text and "HOMEOSTAT_STATE_DIR" in text


def test_show_tells_the_parents_and_what_is_changed(run: Run) -> None:
    content = json.loads(run("show", 2, "--json")[1])
    assert (content["parents"], content["record"]["gain"]) == ([1, 0], 0.25)
    assert any("3.bias" in name for name in content["tensors"])
    assert content["decisions"][0]["at"]["rows"] == 500
    assert "gain: 0.25" in run("show", 2)[1]


@pytest.mark.parametrize(("number", "text"), [(0, "has no file"), (9, "no file of version 9; there are 1, 2")])
def test_a_version_without_a_file_is_named(run: Run, number: int, text: str, tmp_path: Path) -> None:
    for arguments in (["show", number], ["export", number, tmp_path / "out"]):
        code, _, err = run(*arguments)
        assert code == 2 and text in err


def test_an_export_is_a_version_and_overwrites_nothing(run: Run, box: Box, tmp_path: Path) -> None:
    assert run("export", 2, tmp_path / "two.safetensors")[0] == 0
    assert files.read_card(tmp_path / "two.safetensors").number == 2
    code, _, err = run("export", 1, tmp_path / "two.safetensors")
    assert code == 2 and "exists already" in err
    code, _, err = run("export", 1, tmp_path / "none" / "x")
    assert code == 2 and str(tmp_path / "none" / "x") in err


def test_a_merge_averages_what_versions_change_and_can_be_imported(run: Run, box: Box, tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    assert run("merge", 1, 2, "--weights", "1,3", "--out", out)[0] == 0
    base = dict(box.resident.frozen.named_parameters())
    card, delta = files.read(out, base, bundle=box.hash)
    own = base["3.bias"]
    # New values are 1 and 3 at index 1, in shares of a quarter and three quarters.
    assert torch.allclose(delta["3.bias"], torch.tensor([0.0, 2.5, 0.0]), atol=1e-5)
    assert own.shape == (3,) and [item["number"] for item in card.record["merged"]] == [1, 2]
    assert run("import", out, "--wait", 0)[0] == 0 and box.waiting == 1
    box.take_up()
    assert box.resident.versions.numbers() == [0, 1, 2, 3]
    assert "imported" in run("list")[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["1", "--out", "x"], "1 alone is nothing to merge"),
        (["1", "2", "--weights", "1", "--out", "x"], "--weights has 1 numbers for 2"),
        (["1", "8", "--out", "x"], "no file of version 8"),
        (["1", "none.safetensors", "--out", "x"], "none.safetensors: No such file"),
    ],
)
def test_a_merge_that_makes_no_sense_is_refused(run: Run, arguments: list[str], text: str) -> None:
    code, _, err = run("merge", *arguments)
    assert code == 2 and text in err


def test_a_file_of_another_bundle_is_refused_before_anything_is_asked(run: Run, box: Box, tmp_path: Path) -> None:
    base = dict(box.resident.frozen.named_parameters())
    files.write(tmp_path / "v", {"3.bias": torch.ones(3)}, base, bundle="other", number=1, parent=0, record={})
    for arguments in (["import", tmp_path / "v"], ["merge", 1, tmp_path / "v", "--out", tmp_path / "x"]):
        code, _, err = run(*arguments)
        assert code == 2 and f"{tmp_path / 'v'}: made for bundle other" in err
    assert box.waiting == 0


def test_a_running_daemon_answers(run: Run, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating.time, "sleep", box.take_up)
    assert run("pin", 1)[1].endswith("pin: done; version 2 serves\n")
    code, out, _ = run("rollback", 0, "--hold")
    assert code == 0 and "version 0 serves; held: nothing is promoted" in out
    assert box.resident.current.number == 0 and json.loads(run("list", "--json")[1])["held"]
    assert "held" not in run("rollback", "--resume")[1] and not box.resident.versions.held
    code, _, err = run("rollback", 7)
    assert code == 2 and "refused: version 7 is not kept; there are 0, 1, 2" in err
    assert run("unpin", 1)[0] == 0 and box.resident.versions.pins == set()


def test_a_stopped_daemon_takes_it_later(run: Run, box: Box) -> None:
    code, out, _ = run("rollback", 1, "--wait", 0)
    assert code == 0 and "a stopped daemon does it at its next start" in out
    assert box.waiting == 1 and "1 requests wait" in run()[1]
    box.take_up()
    assert box.resident.current.number == 1


@pytest.mark.parametrize("arguments", [[], ["1", "--resume"], ["--resume", "--hold"], ["--hold"]])
def test_a_rollback_needs_a_number_or_the_end_of_a_hold(run: Run, arguments: list[str], box: Box) -> None:
    code, _, err = run("rollback", *arguments)
    assert code == 2 and "--resume alone" in err and box.waiting == 0


@pytest.mark.parametrize("arguments", [["pin", "x"], ["rollback", "1", "--wait", "-1"], ["merge", "--weights", "0,1"]])
def test_what_is_no_number_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["versions", *arguments])
    assert ended.value.code == 2 and "is not " in capsys.readouterr().err


def test_a_request_without_a_daemons_folder_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run("--state", tmp_path / "none", "pin", 1)
    assert code == 2 and f"{tmp_path / 'none'}: no such folder" in err
