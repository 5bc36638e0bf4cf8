"""Small worlds for the daemon's tests: two tiny models with their bundles, and streams in memory."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from daemon.assembly import Worker, assemble
from daemon.packing import pack
from daemon.records import Batch, DeadLetter, Labels, Positions, RawBatch
from daemon.settings import Settings

FACTORY = "tests.unit.worlds:build"
REGRESSION_FACTORY = "tests.unit.worlds:build_regression"


def _net(outputs: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for parameter in model[3].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build() -> nn.Module:
    return _net(3)


def build_regression() -> nn.Module:
    return _net(1)


def source_rows(rows: int, *, seed: int = 0, task: str = "classification") -> tuple[np.ndarray, np.ndarray]:
    """Rows (rows, 4), and what the model of the task says of them; one label in ten is another."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    with torch.inference_mode():
        outputs = (build() if task == "classification" else build_regression())(torch.from_numpy(x))
    if task == "regression":
        return x, outputs[:, 0].numpy().astype(np.float64) + rng.normal(size=rows) * 0.1
    y = outputs.argmax(1).numpy()
    return x, np.where(rng.random(rows) < 0.1, (y + 1) % 3, y).astype(np.float64)


@functools.cache
def bundle(task: str = "classification") -> Path:
    """A bundle, packed once a session."""
    folder = Path(tempfile.mkdtemp(prefix="homeostat-world-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model, factory = (build(), FACTORY) if task == "classification" else (build_regression(), REGRESSION_FACTORY)
    x, y = source_rows(600, task=task)
    pack(folder / task, model=model, factory=factory, x=x, y=y, task=task, arl0=2_000, watch=("cusum",))
    return folder / task


def settings(folder: Path, task: str = "classification", **changes: Any) -> Settings:
    given: dict[str, Any] = {
        "bundle": bundle(task),
        "factory": FACTORY if task == "classification" else REGRESSION_FACTORY,
        "source": f"file:{folder / 'in.jsonl'}",
        "state_dir": folder / "state",
        "http": "off",
        "batch_rows": 32,
    }
    return Settings(**{**given, **changes})


def record(name: int | str, x: Any, **more: Any) -> bytes:
    return json.dumps({"id": str(name), "x": [float(value) for value in x], "ts": 1000.0, **more}).encode()


def raw(values: list[bytes], first: int = 0, partition: str = "mem/0") -> RawBatch:
    count = len(values)
    return RawBatch(
        list(values),
        [None] * count,
        [1000.0] * count,
        [partition] * count,
        list(range(first, first + count)),
        arrived=time.monotonic(),
    )


class MemorySource:
    """Gives out ``values`` in polls of the given sizes (0: nothing this time), then for ever as asked."""

    def __init__(self, values: list[bytes], sizes: list[int] | None = None) -> None:
        self.values = values
        self.sizes = list(sizes or [])
        self.next = 0
        self.committed: list[Positions] = []
        self.closed = False
        self.on_poll: Any = lambda: None

    def open(self, positions: Positions | None) -> None:
        self.next = (positions or {}).get("mem/0", 0)

    def poll(self, max_rows: int, timeout_s: float) -> RawBatch:
        self.on_poll()
        count = min(max_rows, self.sizes.pop(0) if self.sizes else max_rows)
        start, self.next = self.next, min(len(self.values), self.next + count)
        return raw(self.values[start : self.next], start)

    def can_fill(self, rows: int) -> bool:
        return len(self.values) - self.next >= rows

    @property
    def ended(self) -> bool:
        return self.next >= len(self.values)

    def lag(self) -> int | None:
        return len(self.values) - self.next

    def commit(self, positions: Positions, note: str) -> None:
        self.committed.append(dict(positions))

    def ready(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


class MemorySink:
    """Keeps answers and dead letters."""

    def __init__(self) -> None:
        self.values: list[bytes] = []
        self.dead: list[DeadLetter] = []
        self.refusing = False

    def open(self) -> None: ...

    def send(self, keys: list[bytes | None], values: list[bytes]) -> None:
        assert len(keys) == len(values)
        self.values += values

    def send_dead(self, letter: DeadLetter) -> None:
        self.dead.append(letter)

    def flush(self, timeout_s: float) -> None:
        if self.refusing:
            raise TimeoutError("the sink is away")

    def close(self) -> None: ...

    @property
    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(value) for value in self.values]


class MemoryLabels:
    """Gives its labels in one poll."""

    def __init__(self, labels: Labels | None = None) -> None:
        self.labels = labels or Labels()
        self.rejected: dict[str, int] = {}

    def open(self, positions: Positions | None) -> None: ...

    def poll(self, timeout_s: float = 0) -> Labels:
        labels, self.labels = self.labels, Labels()
        return labels

    def at_end(self) -> bool:
        return not len(self.labels)

    def positions(self) -> Positions:
        return {}

    def close(self) -> None: ...


def worker(folder: Path, values: list[bytes] | None = None, task: str = "classification", **changes: Any) -> Worker:
    """A worker of the tiny model between a source and a sink in memory."""
    made = assemble(settings(folder, task, **changes))
    made.source = MemorySource(values or [])
    made.sink = made.loop.sink = MemorySink()
    return made


def records(count: int, *, seed: int = 1, labelled: bool = False, shift: float = 0.0, first: int = 0) -> list[bytes]:
    x, y = source_rows(count, seed=seed)
    more = [{"y": int(label)} if labelled else {} for label in y]
    return [record(first + row, x[row] + shift, **more[row]) for row in range(count)]


def decoded(x: np.ndarray, first: int = 0) -> RawBatch:
    """A raw batch that is decoded already."""
    made = raw([b""] * len(x), first)
    made.values = []
    names = [str(row) for row in made.offsets]
    made.batch = Batch(names, x, [None] * len(x), np.full(len(x), 1000.0), np.ones(len(x), bool), list(range(len(x))))
    return made
