"""Versions across kills and in an operator's hands: the daemon as a process on the simulator's ageing sensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon import checkpoint
from daemon.cli import main
from daemon.versioning.overview import overview
from tests.daemon_process import DaemonProcess, eventually

RARELY = {"HOMEOSTAT_CHECKPOINT__EVERY_S": "1000"}
OFTEN = {"HOMEOSTAT_CHECKPOINT__EVERY_BATCHES": "5"}
PROMOTED_S = 120.0


@pytest.fixture
def learning(settings: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A daemon that promotes its first version after some ten thousand rows, at the same row every time."""
    return settings | {
        "HOMEOSTAT_SOURCE": "sim://ageing?rate=4000",
        "HOMEOSTAT_CHECKPOINT": str(tmp_path / "state" / "checkpoints"),
        "HOMEOSTAT_FAST": "none",
        "HOMEOSTAT_BATCH_ROWS": "64",
        # Every batch is full, and so the same in every run, although the rows come at a pace.
        "HOMEOSTAT_LINGER_MS": "1000",
        "HOMEOSTAT_SLOW__INLINE": "true",
        "HOMEOSTAT_SLOW__OPTIMIZER": "adam",
        "HOMEOSTAT_SLOW__LR": "0.02",
        "HOMEOSTAT_SLOW__STEPS": "60",
        "HOMEOSTAT_REGULATOR__SLOW_RETRY_ROWS": "100",
        # None goes while the test looks.
        "HOMEOSTAT_VERSIONS": "500",
    }


@pytest.fixture
def versions(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`homeostat versions` against the daemon's folder: exit code, and what it said."""
    monkeypatch.setenv("HOMEOSTAT_STATE_DIR", settings["HOMEOSTAT_STATE_DIR"])

    def call(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["versions", *arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def seen(settings: dict[str, str]) -> dict[str, Any]:
    return overview(Path(settings["HOMEOSTAT_STATE_DIR"]) / "versions")


def promoted(content: dict[str, Any], *, superseded: bool = False) -> list[int]:
    decisions = content["decisions"]
    return [item["version"] for item in decisions if item["event"] == "promoted" and item["superseded"] is superseded]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_leave_each_decision_once_and_an_operator_goes_back_and_forth(
    learning: dict[str, str], tmp_path: Path, versions: Callable[..., tuple[int, str]]
) -> None:
    with DaemonProcess(learning | RARELY, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_version", 1, PROMOTED_S)
        # It serves before it is written down.
        eventually("it is written down", lambda: promoted(seen(learning)))
        daemon.kill()
    first = seen(learning)
    assert promoted(first)[0] == 1

    # No checkpoint held it: the whole stream is replayed, and makes the same version at the same row again.
    with DaemonProcess(learning | OFTEN, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_version", 1, PROMOTED_S)
        eventually("its file is there", lambda: 1 in [item["number"] for item in seen(learning)["versions"]])
        code, said = versions("rollback", "0", "--hold", "--wait", "30")
        assert code == 0 and "version 0 serves; held" in said, said
        eventually("the frozen model serves", lambda: daemon.metrics()["homeostat_version"] == 0)
        eventually("a checkpoint holds it", lambda: not seen(learning)["waiting"])
        rows = daemon.metrics()["homeostat_records_out_total"]
        daemon.wait_for("homeostat_records_out_total", rows + 3_000)
        assert daemon.metrics()["homeostat_version"] == 0
        code, said = versions("rollback", "999", "--wait", "30")
        assert code == 2 and "version 999 is not kept" in said, said
        daemon.kill()
    second = seen(learning)
    assert 1 in promoted(second, superseded=True) and len(promoted(second)) == len(set(promoted(second)))
    before, again = (next(item for item in each["decisions"] if is_first(item)) for each in (first, second))
    assert again["at"] == before["at"] and again["record"]["trigger"]["reasons"]
    for name in ("rows", "gain", "gain_low", "worst_class_gain", "reference_loss", "trigger", "parent"):
        assert again["record"][name] == before["record"][name]

    code, said = versions("rollback", "1", "--wait", "0")
    assert code == 0 and "at its next start" in said
    with DaemonProcess(learning | OFTEN, tmp_path) as daemon:
        daemon.wait_until_ready()
        eventually("version 1 serves again", lambda: daemon.metrics()["homeostat_version"] == 1)
        eventually("a checkpoint holds it", lambda: not seen(learning)["waiting"])
        assert daemon.terminate() == 0
    with DaemonProcess(learning, tmp_path, "list", "--json", command="versions") as listing:
        assert listing.wait() == 0
        final = json.loads(listing.output)
    assert final["serves"] == _served_by_checkpoint(learning) == 1 and final["held"]
    decided = [item for item in final["decisions"] if not item["superseded"]]
    assert [item["version"] for item in decided if item["event"] == "rollback"] == [0, 1]
    assert [item["version"] for item in decided if item["event"] == "refused"] == [999]


def is_first(decision: dict[str, Any]) -> bool:
    """Whether it is the promotion of version 1 that counts."""
    return decision["event"] == "promoted" and decision["version"] == 1 and not decision["superseded"]


def _served_by_checkpoint(settings: dict[str, str]) -> int:
    """The version in the newest checkpoint; 0 before the first."""
    files = sorted(Path(settings["HOMEOSTAT_CHECKPOINT"]).glob("checkpoint-*.bin"))
    return int(checkpoint.read(files[-1]).state["resident"]["current"]["number"]) if files else 0
