"""The slow loop in a process of its own: a change of concept learnt from late labels, and what a kill leaves of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon import checkpoint
from daemon.inspecting import CLOCKED, describe
from daemon.streams.simulator import AgeingArray
from daemon.versioning.overview import overview
from tests.daemon_process import DaemonProcess, eventually

ROWS, CHANGE, DELAY = 4_000, 1_000, 150
"""Rows, the one from which on the classes are renamed, and by how many rows a label comes later."""


@pytest.fixture(scope="module")
def truth() -> tuple[np.ndarray, np.ndarray]:
    """x and y; the sensors hardly age, the classes are renamed at a stroke."""
    x, y = AgeingArray(7).rows(0, ROWS)
    return x, np.where(np.arange(ROWS) < CHANGE, y, (y + 1) % 4)


@pytest.fixture
def streams(settings: dict[str, str], tmp_path: Path, truth: tuple[np.ndarray, np.ndarray]) -> dict[str, str]:
    """Records and late labels in files; everything is learnt in the loop, so that every run learns the same."""
    x, y = truth
    records = [json.dumps({"id": str(row), "x": x[row].tolist(), "ts": 1000 + row}) for row in range(ROWS)]
    labels = [json.dumps({"id": str(row), "y": int(y[row]), "ts": 1000 + row + DELAY}) for row in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    (tmp_path / "labels.jsonl").write_text("\n".join(labels) + "\n", encoding="utf-8")
    return settings | {
        "HOMEOSTAT_SOURCE": f"file:{tmp_path / 'in.jsonl'}",
        "HOMEOSTAT_LABELS": f"file:{tmp_path / 'labels.jsonl'}",
        "HOMEOSTAT_FAST": "auto",
        "HOMEOSTAT_BATCH_ROWS": "64",
        "HOMEOSTAT_SLOW__INLINE": "true",
        "HOMEOSTAT_CHECKPOINT__EVERY_BATCHES": "3",
    }


def placed(streams: dict[str, str], folder: Path) -> dict[str, str]:
    """``streams`` with answers and state in a folder of their own."""
    return streams | {
        "HOMEOSTAT_SINK": f"file:{folder / 'out.jsonl'}",
        "HOMEOSTAT_STATE_DIR": str(folder / "state"),
    }


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]


def final(folder: Path) -> dict[str, Any]:
    newest = checkpoint.Store(folder / "state" / "checkpoints").newest()
    assert newest is not None
    return describe(newest)


def decisions(folder: Path) -> list[dict[str, Any]]:
    """What every look came to, without what the clock measured; the ones that a kill took back are left out."""
    every = overview(folder / "state" / "versions")["decisions"]
    found = [item for item in every if "record" in item and not item["superseded"]]
    return [
        {
            "event": item["event"],
            "version": item.get("version"),
            **{name: value for name, value in item["record"].items() if name not in CLOCKED},
        }
        for item in found
    ]


def ahead(folder: Path) -> int:
    """Lines of answers, more than the newest checkpoint knows of."""
    out = folder / "out.jsonl"
    newest = checkpoint.Store(folder / "state" / "checkpoints").newest()
    known = sum(describe(newest)["positions"].values()) if newest is not None else 0
    return (out.read_bytes().count(b"\n") if out.exists() else 0) - known


def kill_between_checkpoints(daemon: DaemonProcess, folder: Path, before: int) -> bool:
    """Where answers are out that the next life gives again, ``before`` of former ones aside; not one that has ended."""

    def caught() -> bool:
        daemon.process.send_signal(signal.SIGSTOP)
        if not daemon.running:
            return True
        os.waitid(os.P_PID, daemon.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if not daemon.running or ahead(folder) > before:
            return True
        daemon.process.send_signal(signal.SIGCONT)
        return False

    eventually("answers are ahead of the checkpoint", caught)
    running = daemon.running
    daemon.kill()
    return running


def run(streams: dict[str, str], folder: Path, kills: tuple[int, ...] = ()) -> int:
    """To the end of the file; killed each time that so many records have been answered in that life.

    Gives how often that was: a life that the test is too late for comes to the end, and is the last one.
    """
    own, killed = placed(streams, folder), 0
    for least in kills:
        before = ahead(folder)
        with DaemonProcess(own, folder) as daemon:
            daemon.wait_for_kill("homeostat_records_out_total", least)
            if not kill_between_checkpoints(daemon, folder, before):
                return killed  # one more life would join the labels that were not due at the end
        killed += 1
    with DaemonProcess(own, folder) as daemon:
        assert daemon.wait(120) == 0, daemon.log[-3000:]
    return killed


@pytest.mark.slow
def test_a_change_of_concept_is_learnt_from_late_labels_and_kills_change_nothing(
    streams: dict[str, str], tmp_path: Path, truth: tuple[np.ndarray, np.ndarray]
) -> None:
    """Equal to the bit: answers, versions, memories, evidence. Answers since the last checkpoint are given twice."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(streams, whole)
    kills = run(streams, killed, kills=(1_200, 600))

    once = answers(whole)
    assert [answer["id"] for answer in once] == [str(row) for row in range(ROWS)]
    wrong = np.array([answer["y"] for answer in once]) != truth[1]
    frozen = final(whole)["tally"]["frozen"]
    assert wrong[:CHANGE].mean() < 0.2
    # The frozen model is as good as never right after the change, and what serves is learnt within the delay and more.
    assert frozen["total"] / frozen["rows"] > 0.6 and wrong[-1_000:].mean() < 0.25
    assert {answer["version"] for answer in once} > {0} and final(whole)["version"] >= 1
    assert any(item["event"] == "promoted" for item in decisions(whole))

    expected = {answer["id"]: answer for answer in once}
    again = answers(killed)
    assert all(answer == expected[answer["id"]] for answer in again)
    assert {answer["id"] for answer in again} == expected.keys() and (len(again) > ROWS) is (kills > 0)
    for part in ("positions", "label_positions", "state", "gain", "version", "tally", "digests"):
        assert final(killed)[part] == final(whole)[part], part
    assert decisions(killed) == decisions(whole)


def test_what_answers_is_counted_while_a_version_stands_beside_the_adapter(
    streams: dict[str, str], tmp_path: Path
) -> None:
    own = placed(streams, tmp_path / "pipe") | {"HOMEOSTAT_SOURCE": "-"}
    with DaemonProcess(own, tmp_path / "pipe", stdin=subprocess.PIPE) as daemon:
        daemon.wait_until_ready()
        assert daemon.process.stdin is not None
        daemon.process.stdin.write((tmp_path / "in.jsonl").read_bytes())
        daemon.process.stdin.flush()
        # The pipe stays open: the daemon waits for more, and can be asked.
        eventually("all is answered", partial(all_answered, daemon), 120)
        metrics = daemon.metrics()
        daemon.process.stdin.close()
        assert daemon.wait(60) == 0
    rows = {name: metrics[f'homeostat_answered_rows_total{{by="{name}"}}'] for name in ("version", "both")}
    assert sum(rows.values()) > 500
    counts = [value for name, value in metrics.items() if name.startswith("homeostat_answered_rows_total")]
    assert sum(counts) == ROWS
    assert metrics['homeostat_slow_bursts_total{result="promoted"}'] == metrics["homeostat_version"] >= 1
    assert metrics['homeostat_slow_bursts_total{result="failed"}'] == 0


def all_answered(daemon: DaemonProcess) -> bool:
    # Counted in last of all; counted out before it is learnt from.
    return daemon.metrics()["homeostat_records_in_total"] >= ROWS


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"HOMEOSTAT_SLOW__OPTIONS": '{"rank": 4}'}, 'HOMEOSTAT_SLOW__OPTIONS={"rank": 4}: slow method'),
        ({"HOMEOSTAT_SLOW__OPTIONS": "rank=4"}, "HOMEOSTAT_SLOW__OPTIONS="),
        ({"HOMEOSTAT_SLOW__EXACT": "lda"}, "HOMEOSTAT_SLOW__EXACT=lda: "),
        ({"HOMEOSTAT_SLOW": "norm_afine"}, "HOMEOSTAT_SLOW=norm_afine: "),
    ],
)
def test_a_wrong_setting_of_the_slow_loop_ends_the_start_in_one_line_that_names_it(
    streams: dict[str, str], tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    with DaemonProcess(placed(streams, tmp_path / "wrong") | variables, tmp_path / "wrong") as daemon:
        assert daemon.wait(60) == 2
        assert said in daemon.log and "Traceback" not in daemon.log


def test_an_exact_head_alone_learns_it_too(
    streams: dict[str, str], tmp_path: Path, truth: tuple[np.ndarray, np.ndarray]
) -> None:
    folder = tmp_path / "exact"
    with DaemonProcess(placed(streams, folder) | {"HOMEOSTAT_SLOW": "lda_head"}, folder) as daemon:
        assert daemon.wait(120) == 0, daemon.log[-3000:]
    wrong = np.array([answer["y"] for answer in answers(folder)]) != truth[1]
    assert wrong[-1_000:].mean() < 0.3 and final(folder)["version"] >= 1
    assert {item["method"] for item in decisions(folder) if item["event"] == "promoted"} <= {"lda_head", "regime"}
