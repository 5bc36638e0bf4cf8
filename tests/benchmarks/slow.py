"""The slow loop against a model that stays as it is, a refit by the clock, and the fast loop: ``make bench-slow``.

    python -m tests.benchmarks.slow                 the short form, one seed
    python -m tests.benchmarks.slow --long          three seeds, every method on every stream; or HOMEOSTAT_LONG=1

Five streams, each served through the daemon's own loop with its default settings, with what is left out or named in
`tests.benchmarks.slow_runs.settings_of`. Results are kept, a JSON line each, for as long as the code that they come
from is the same: a second call goes on where the first was killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import structlog
import torch

from daemon.evaluation.baselines import RefusedError
from daemon.evaluation.store import code_version as product_version
from tests.benchmarks import slow_serving, slow_tables
from tests.benchmarks.errors import told
from tests.benchmarks.slow_runs import FROZEN, REFIT, ROOT, Result, Run, all_runs, measured
from tests.benchmarks.slow_streams import STREAMS, model_of
from tests.streams import models
from tests.streams.auto.bundles import bundle_for

SEEDS, LONG_SEEDS = 1, 3
OWN = ("HOMEOSTAT_DATA", "HOMEOSTAT_LONG")
"""Variables that are not the daemon's."""


def main() -> None:
    """Run what is missing and print the tables."""
    asked = _arguments()
    for name in [name for name in os.environ if name.startswith("HOMEOSTAT_") and name not in OWN]:
        del os.environ[name]  # what is measured are the defaults
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    runs = [run for run in all_runs(LONG_SEEDS if asked.long else SEEDS, everything=asked.long) if chosen(run, asked)]
    started = time.monotonic()
    results = run_all(runs, asked.jobs, asked.results)
    serving = [] if asked.no_serving else serve_all(asked.results)
    command = " ".join(["python -m tests.benchmarks.slow", *map(shlex.quote, told(sys.argv[1:]))])
    text = slow_tables.report(results, serving, command)
    print(text)
    print(f"\n{time.monotonic() - started:.0f} s", file=sys.stderr)
    if asked.write:
        asked.write.write_text(f"{slow_tables.HEAD}\n\n{text}\n", encoding="utf-8")
    if failed := [f"{run.name}: {result['failed']}" for run, result in results.items() if "failed" in result]:
        raise SystemExit("\n".join(failed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.slow", description=(__doc__ or "").split("\n")[0])
    long = os.environ.get("HOMEOSTAT_LONG", "") not in ("", "0")
    parser.add_argument(
        "--long", action="store_true", default=long, help=f"{LONG_SEEDS} seeds, and every method on every stream"
    )
    parser.add_argument("--streams", nargs="*", default=list(STREAMS), choices=list(STREAMS), help="these alone")
    parser.add_argument("--subjects", nargs="*", default=[], help="these alone, as they are called in the tables")
    parser.add_argument("--no-serving", action="store_true", help="leave out the times of serving beside a burst")
    parser.add_argument("--jobs", type=int, default=2, help="processes, a thread each")
    parser.add_argument("--results", type=Path, default=models.cache_folder().parent / "slow.jsonl")
    parser.add_argument("--write", type=Path, help="file to write the tables to, in place of what it holds")
    return parser.parse_args()


def chosen(run: Run, asked: argparse.Namespace) -> bool:
    """Whether the run was asked for."""
    return run.stream in asked.streams and (not asked.subjects or run.subject in asked.subjects)


def run_all(runs: list[Run], jobs: int, path: Path) -> dict[Run, Result]:
    """What came of each run: known from the file, or made now."""
    for model in sorted({model_of(run.stream) for run in runs}):
        bundle_for(model)  # packed here, not once per process
    keys = {run: key_of(run) for run in runs}
    known = read(path)
    # Those of images are the longest: they begin first, so that no process is left with one at the end.
    missing = sorted((run for run in runs if keys[run] not in known), key=lambda run: ("cifar" not in run.stream, run))
    mend(path)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        futures = {pool.submit(_one, run, keys[run], path): run for run in missing}
        for number, future in enumerate(as_completed(futures), 1):
            name = futures[future].name
            print(f"{number}/{len(missing)} {name}: {future.result():.1f} s", file=sys.stderr, flush=True)
    known = read(path)
    return {run: known[key] for run, key in keys.items()}


def serve_all(path: Path) -> list[Result]:
    """Times of serving, made alone on the machine: nothing of ours runs beside it."""
    mend(path)
    found = []
    for model in slow_serving.MODELS:
        for duty in slow_serving.DUTIES:
            code = hashlib.sha256(Path(slow_serving.__file__).read_bytes()).hexdigest()
            key = _key("serving", model, duty, os.cpu_count(), bundle_for(model).name, product_version(), code)
            result = read(path).get(key)
            if result is None:
                result = {"key": key, **slow_serving.measured(model, duty)}
                _append(path, result)
                print(f"serving {model}, duty {duty:g}: p99 × {result['p99_ratio']:.2f}", file=sys.stderr, flush=True)
            found.append(result)
    return found


def _quiet() -> None:
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))


def _one(run: Run, key: str, path: Path) -> float:
    """Make one result and write it at once; its seconds."""
    started = time.monotonic()
    result: Result = {"key": key, "name": run.name}
    try:
        result |= measured(run)
    except RefusedError as refusal:
        result["refused"] = str(refusal)
    except Exception as error:  # one broken run must not cost the others their table
        result["failed"] = f"{type(error).__name__}: {error}"
    _append(path, result)
    return time.monotonic() - started


def _append(path: Path, result: Result) -> None:
    # One write: whole even beside that of another process.
    line = json.dumps(result).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        file.write(line)


def mend(path: Path) -> None:
    """End a line that a kill left half written, so that the next one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


def read(path: Path) -> dict[str, Result]:
    """Results by key, the later of two; a line cut off by a kill is passed over."""
    found: dict[str, Result] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            result = json.loads(line)
            found[result["key"]] = result
        except (ValueError, KeyError, TypeError):
            continue
    return found


def key_of(run: Run) -> str:
    """Changes with everything that the result depends on."""
    code = [_version("slow_runs.py", "slow_streams.py"), bundle_for(model_of(run.stream)).name]
    if run.subject == REFIT:
        code.append(_version("slow_refit.py"))
    elif run.subject != FROZEN:
        code.append(product_version())
    return _key(run.name, *code)


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


@lru_cache(maxsize=8)
def _version(*names: str) -> str:
    """Of files of this folder, and of the code that makes rows and source models."""
    files = [*sorted((ROOT / "tests" / "streams").rglob("*.py")), ROOT / "tests" / "models" / "gas.py"]
    files += [Path(__file__).parent / name for name in names]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
