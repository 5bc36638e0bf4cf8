"""`auto` against the frozen model and every single method, over streams, models, orders, batches, labels and attacks.

    python -m tests.benchmarks.auto                 the short form, in the time of --limit
    python -m tests.benchmarks.auto --long          the full product: hours

Every cell is served through the daemon's own loop with its default settings, and by each method alone, without a guard,
in the same batches and with the same late labels. "Hindsight" is the best of the single methods on the very cell.
Results are kept: those of a method for as long as its code is the same, those of the daemon likewise.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch

from daemon.bundle import open_bundle
from daemon.evaluation.answers import Frozen, Replayed, frozen_answers
from daemon.evaluation.baselines import RefusedError, replay_baseline
from daemon.evaluation.intervals import mean_interval
from daemon.evaluation.recording import Plan, Recording
from daemon.evaluation.replay import replay
from daemon.evaluation.store import code_version as product_version
from daemon.settings import Settings
from tests.benchmarks import auto_tables, fast_readme
from tests.benchmarks.auto_cells import Cell, bundle_for, load_cell, long_cells, short_cells
from tests.benchmarks.errors import code_version, told
from tests.streams import models
from tests.streams.auto import sources

ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Any]

METHODS = (
    "norm", "alpha_norm", "ema_norm", "unmix_norm", "eta", "rpl", "roid", "sar", "rotta", "lame", "label_shift", "t3a",
    "ada_npc", "gain_control", "error_memory",
)  # fmt: skip
"""The single methods: at least one of every family, and the best ones of adapters/fast/README.md."""
SERVED, PLAIN, BARE = "auto", "frozen, same loop", "frozen"
"""The daemon as it comes; the daemon that never adapts; the bare forward."""
SHARES = {"none": 0.0, "10%": 0.1, "100%": 1.0}


def main() -> None:
    """Run what is missing and print the tables."""
    asked = _arguments()
    cells = long_cells() if asked.long else short_cells(asked.limit, cores=asked.jobs)
    if asked.only:
        cells = [cell for cell in cells if any(part in cell.name for part in asked.only)]
    started = time.monotonic()
    results = run(cells, asked.jobs, asked.results, asked.methods)
    text = auto_tables.report(results, " ".join(["python -m tests.benchmarks.auto", *told(sys.argv[1:])]))
    print(text)
    print(f"\n{time.monotonic() - started:.0f} s", file=sys.stderr)
    if asked.write:
        fast_readme.write(asked.write, "bench-auto", text)
    if failed := [result for result in results if "failed" in result]:
        raise SystemExit("\n".join(f"{result['name']}: {result['failed']}" for result in failed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.auto", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--long", action="store_true", help="every combination, with twice the rows")
    parser.add_argument("--limit", type=float, default=1_400.0, help="seconds that the short form is to take")
    parser.add_argument("--only", nargs="*", default=[], help="cells whose name contains one of these")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="single methods")
    parser.add_argument("--jobs", type=int, default=2, help="processes, a thread each")
    parser.add_argument("--results", type=Path, default=models.cache_folder().parent / "auto.jsonl")
    parser.add_argument("--write", type=Path, help="file whose table is to be replaced")
    return parser.parse_args()


def run(cells: list[Cell], jobs: int, path: Path, methods: Iterable[str]) -> list[Result]:
    """One result a cell: the daemon's, and every method's error."""
    known = _read(path)
    missing = [cell for cell in cells if any(key not in known for key in _keys(cell, methods).values())]
    for name in sorted({cell.model for cell in missing}):
        bundle_for(name)  # packed here, not once per process
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_cell, cell, list(methods), path): cell for cell in missing}
        for number, future in enumerate(as_completed(futures), 1):
            print(
                f"{number}/{len(missing)} {futures[future].name}: {future.result():.1f} s", file=sys.stderr, flush=True
            )
    known = _read(path)
    return [_joined(cell, known, methods) for cell in cells]


def _read(path: Path) -> dict[str, Result]:
    """Parts of results by key; of two with one key the later. A line cut off by a kill is passed over."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            part = json.loads(line)
        except ValueError:
            continue
        found[part["key"]] = part
    return found


def _keys(cell: Cell, methods: Iterable[str]) -> dict[str, str]:
    """By part of a cell's result, what it depends on."""
    common = (cell.name, sources.get(cell.model).stem, _streams_version())
    keys = {SERVED: _key(*common, product_version()), PLAIN: _key(*common, product_version(), PLAIN)}
    return keys | {name: _key(*common, name, code_version(name)) for name in methods}


def _key(*parts: str) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


@lru_cache(maxsize=1)
def _streams_version() -> str:
    """Changes with the code that makes rows and models, and with that which replays methods."""
    files = [*sorted((ROOT / "tests" / "streams").rglob("*.py")), ROOT / "tests" / "benchmarks" / "auto_cells.py"]
    texts = [file.read_bytes() for file in files] + [inspect.getsource(replay_baseline).encode()]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def _joined(cell: Cell, known: dict[str, Result], methods: Iterable[str]) -> Result:
    keys = _keys(cell, methods)
    parts = {name: known[key] for name, key in keys.items() if key in known}
    failed = [f"{name}: {part['failed']}" for name, part in parts.items() if "failed" in part]
    if failed or SERVED not in parts or PLAIN not in parts:
        return {"name": cell.name, "cell": cell, "failed": "; ".join(failed) or "no result"}
    served = {field: value for field, value in parts[SERVED].items() if field != "key"}
    singles = {name: parts[name]["error"] for name in methods if name in parts and "error" in parts[name]}
    return {**served, "name": cell.name, "cell": cell, "plain_ms": parts[PLAIN]["ms"], "singles": singles}


def _cell(cell: Cell, methods: list[str], path: Path) -> float:
    """Run what is missing of one cell; each part is written at once."""
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    started, known, keys = time.monotonic(), _read(path), _keys(cell, methods)
    loaded = load_cell(cell)
    rows = len(loaded.y)
    recording = Recording(
        x=loaded.x, y=loaded.y, times_s=np.arange(rows, dtype=np.float64), changes=tuple(loaded.changes)
    )
    plan = Plan(batch_rows=cell.batch, delay=cell.delay, label_share=SHARES[cell.labels], seed=cell.seed)
    factory = sources.get(cell.model).factory
    settings = Settings(bundle=bundle_for(cell.model), factory=factory, app_dir=ROOT)
    bundle = open_bundle(bundle_for(cell.model), factory, ROOT)
    frozen = frozen_answers(Frozen(settings, bundle), recording, plan)
    for name, key in keys.items():
        if key in known:
            continue
        part: Result = {"key": key}
        try:
            part |= _part(name, settings, bundle, recording, plan, frozen)
        except RefusedError as refusal:
            part["refused"] = str(refusal)
        except Exception as error:  # one broken part must not cost the others their table
            part["failed"] = f"{type(error).__name__}: {error}"
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(part) + "\n")
    return time.monotonic() - started


def _part(name: str, settings: Settings, bundle: Any, recording: Recording, plan: Plan, frozen: Replayed) -> Result:
    if name == PLAIN:
        never = settings.model_copy(
            update={
                "fast": settings.fast.model_copy(update={"name": "none"}),
                "slow": settings.slow.model_copy(update={"enabled": False}),
            }
        )
        made = replay(never, bundle, recording, plan, frozen=frozen)
        return {"ms": 1_000.0 * made.seconds / len(recording)}
    if name != SERVED:
        made = replay_baseline(name, settings, bundle, recording, plan, frozen=frozen)
        return {"error": _error(made, recording)}
    made = replay(settings, bundle, recording, plan, frozen=frozen)
    wrong, frozen_wrong = (one.prediction != recording.y for one in (made, frozen))
    paired = mean_interval(wrong.astype(np.float64) - frozen_wrong)
    return {
        "rows": len(recording),
        "error": 100.0 * float(wrong.mean()),
        "frozen": 100.0 * float(frozen_wrong.mean()),
        "low": 100.0 * paired.low,
        "high": 100.0 * paired.high,
        "same": float(made.same.mean()),
        "backward": float(made.backward.mean()),
        "ms": 1_000.0 * made.seconds / len(recording),
        "bare_ms": 1_000.0 * frozen.seconds / len(recording),
        "slow_seconds": made.slow_seconds,
        "decisions": len(made.decisions),
    }


def _error(made: Replayed, recording: Recording) -> float:
    return 100.0 * float((made.prediction != recording.y).mean())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
