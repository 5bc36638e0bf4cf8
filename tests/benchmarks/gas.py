"""Error by month group on the real gas-sensor stream, served against frozen: ``python -m tests.benchmarks.gas``.

The model is trained on segment 1; the others follow in the order of the months, as files, with labels 200 rows late and
without labels. The slow loop learns in line, so the table is the same in every run on one machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from daemon.bundle import open_bundle
from daemon.packing import pack
from tests.models import gas

ROOT = Path(__file__).resolve().parents[2]
DELAY = 200


def make_bundle(path: Path) -> None:
    """Train on three quarters of segment 1, calibrate on the rest."""
    x, y, segment = gas.load()
    rows = np.random.default_rng(0).permutation(np.flatnonzero(segment == 1))
    cut = len(rows) * 3 // 4
    train, held = np.sort(rows[:cut]), np.sort(rows[cut:])
    model = gas.train(x[train], y[train])
    kw = {"x": x[train], "y": y[train], "calibration": (x[held], y[held]), "watch": ("cusum",)}
    pack(path, model=model, factory=gas.FACTORY, **kw)  # type: ignore[arg-type]


def write_stream(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    """records.jsonl and labels.jsonl, one second a row, labels ``DELAY`` seconds late."""
    with open(folder / "records.jsonl", "w") as records, open(folder / "labels.jsonl", "w") as labels:
        for row in range(len(x)):
            records.write(json.dumps({"id": str(row), "x": x[row].tolist(), "ts": row}) + "\n")
            labels.write(json.dumps({"id": str(row), "y": int(y[row]), "ts": row + DELAY}) + "\n")


def served(folder: Path, bundle: Path, labels: bool) -> tuple[np.ndarray, dict[str, object]]:
    """Answers in the order of the rows, and the daemon's report."""
    name = "answers-with-labels" if labels else "answers-without-labels"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HOMEOSTAT_")} | {
        "HOMEOSTAT_SOURCE": f"file:{folder / 'records.jsonl'}",
        "HOMEOSTAT_SINK": f"file:{folder / name}.jsonl",
        "HOMEOSTAT_BUNDLE": str(bundle),
        "HOMEOSTAT_FACTORY": gas.FACTORY,
        "HOMEOSTAT_APP_DIR": str(ROOT),
        "HOMEOSTAT_STATE_DIR": str(folder / name),
        "HOMEOSTAT_HTTP": "off",
        "HOMEOSTAT_LOG_LEVEL": "error",
        "HOMEOSTAT_BATCH_ROWS": "64",
        "HOMEOSTAT_SLOW__INLINE": "true",
    }
    if labels:
        environment["HOMEOSTAT_LABELS"] = f"file:{folder / 'labels.jsonl'}"
    report = folder / f"{name}.json"
    command = [sys.executable, "-m", "daemon.cli", "run", "--report", str(report)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    answers = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return np.array([answer["y"] for answer in answers]), json.loads(report.read_text())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    x, y, segment = gas.load()
    later = segment > 1
    x, y, segment = x[later], y[later], segment[later]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_bundle(folder / "bundle")
        write_stream(folder, x, y)
        with torch.inference_mode():
            frozen = open_bundle(folder / "bundle", gas.FACTORY, ROOT).model(torch.from_numpy(x)).argmax(1).numpy()
        without, _ = served(folder, folder / "bundle", labels=False)
        with_labels, report = served(folder, folder / "bundle", labels=True)
    print(f"{'segment':<9} {'rows':>6} {'frozen':>8} {'no labels':>10} {'labels 200 late':>16}")
    for number in [*np.unique(segment), None]:
        rows = np.ones(len(y), bool) if number is None else segment == number
        errors = [(answer != y)[rows].mean() for answer in (frozen, without, with_labels)]
        name = "all" if number is None else str(number)
        print(f"{name:<9} {rows.sum():>6} {errors[0]:>8.3f} {errors[1]:>10.3f} {errors[2]:>16.3f}")
    print(f"with labels: {report['versions']} versions promoted, {report['guard_trips']} guard trips")


if __name__ == "__main__":
    main()
