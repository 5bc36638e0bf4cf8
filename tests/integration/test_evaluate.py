"""`homeostat evaluate` as a process: the simulator's model on a file, and on a range of a real topic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon.evaluation.reading_kafka import read_range
from daemon.settings import Settings
from daemon.streams.codecs import codec
from daemon.streams.simulator import AgeingArray
from tests.kafka import produce

ROOT = Path(__file__).resolve().parents[2]
ROWS = 1_500
METHODS = "--methods=ema_norm,lame"


def evaluate(settings: dict[str, str], out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON that it wrote, and all that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "daemon.cli", "evaluate", *arguments, METHODS, f"--json={out}"],
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        cwd=ROOT,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found, done.stdout + done.stderr


def errors(found: dict[str, Any]) -> dict[str, float]:
    return {each["name"]: each["error"]["mean"] for each in found["configurations"]}


@pytest.mark.slow
def test_a_file_and_a_range_of_a_topic_with_the_same_rows_give_the_same_errors(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    x, y = AgeingArray(7).rows(0, ROWS)
    np.savez(tmp_path / "rows.npz", x=x[300:], y=y[300:])
    file, printed = evaluate(
        settings, tmp_path / "file.json", str(tmp_path / "rows.npz"), f"--html={tmp_path / 'o.html'}"
    )
    assert "evaluate: 6 of 6: homeostat: " in printed and "Adapting " in printed
    assert (tmp_path / "o.html").read_text(encoding="utf-8").count("<svg") == 1
    source, labels = topic(prefix="rows"), topic(prefix="labels")
    rows = [{"id": str(row), "x": x[row].tolist(), "ts": float(row)} for row in range(ROWS)]
    values = [json.dumps(row).encode() for row in rows]
    # Before the range, behind it, and a record that is none.
    produce(kafka_broker, source, [*values, b"no record", *values[:50]])
    late = [{"id": str(row), "y": int(y[row]), "ts": row + 200.0} for row in range(ROWS)]
    produce(kafka_broker, labels, [json.dumps(label).encode() for label in late])
    streams = {
        **settings,
        "HOMEOSTAT_SOURCE": f"kafka://{kafka_broker}/{source}",
        "HOMEOSTAT_LABELS": f"kafka://{kafka_broker}/{labels}",
    }
    ranged, _ = evaluate(streams, tmp_path / "topic.json", "--from=300", f"--to={ROWS + 1}")
    assert ranged["recording"]["rows"] == ROWS - 300 and ranged["recording"]["unreadable"] == 1
    assert errors(ranged) == errors(file)


def test_the_newest_rows_of_several_partitions_come_in_the_order_of_their_times(
    kafka_broker: str, topic: Callable[..., str]
) -> None:
    source = topic(partitions=3, prefix="rows")
    for number in range(9):
        produce(kafka_broker, source, [str(number).encode()], partition=number % 3)
    given = Settings(source=f"kafka://{kafka_broker}/{source}", codec="raw")
    (raw,) = read_range(given, codec("raw", (4,)), last=2)
    assert raw.values == [b"3", b"4", b"5", b"6", b"7", b"8"], "two of each; the last two in all are cut from these"
    assert raw.next_positions() == {f"{source}/{number}": 3 for number in range(3)}
    (raw,) = read_range(given, codec("raw", (4,)), first=1, stop=2)
    assert raw.values == [b"3", b"4", b"5"]


def test_an_empty_range_says_what_there_is(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source = topic(prefix="rows")
    produce(kafka_broker, source, [b"{}"] * 3)
    done = subprocess.run(
        [sys.executable, "-m", "daemon.cli", "evaluate", "--from=3"],
        capture_output=True,
        text=True,
        env={**os.environ, **settings, "HOMEOSTAT_SOURCE": f"kafka://{kafka_broker}/{source}"},
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 2
    assert f"no records from offset 3 to the end; {source}/0 has 0 to 3" in done.stderr
