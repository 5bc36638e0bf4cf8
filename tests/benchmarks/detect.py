"""How often detectors alarm without cause, against what was asked, how late they are, and what they cost.

``python -m tests.benchmarks.detect [--arl0 1000] [--reference 5000] [--draws 8] [--jobs 2] [--only PATTERN] [--quick]
[--write detectors/README.md]`` calibrates each detector once for each process and draw of the reference, and measures
the same calibration on fresh rows without a change and on runs with one. Rivals are river's and frouros' detectors as
they come, frouros' behind ``detectors.calibrate``, and one that alarms every n rows. All subjects see the same rows.
Progress goes to stderr, the tables to stdout and, with ``--write``, between the marks of that file.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.benchmarks import detect_cost, detect_real, detect_tables
from tests.benchmarks.detect_rivals import Restartable, Watch
from tests.benchmarks.detect_streams import (
    AFTER,
    BEFORE,
    CLASSES,
    DEVIATION,
    F64,
    SETTINGS,
    SIZES,
    STREAMS,
    Setting,
    Stream,
    autoregressive,
    garch,
)
from tests.benchmarks.detect_subjects import MANY, Subject, build, subjects
from tests.benchmarks.errors import told

__all__ = ["DEVIATION", "STREAMS", "autoregressive", "delays", "garch", "rows_per_alarm"]

BLOCK = 250
"""Rows given at once while an alarm is waited for."""
RUNS = 40
"""Runs with a change of each kind and size, over all draws."""
EFFORT = {"full": (1.0, 100), "some": (0.25, 40), "slow": (0.125, 25), "least": (0.125, 2)}
"""Share of the draws, and rows without a change in each, in units of the asked ARL0. The last get no delays."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One subject on one process, synthetic or recorded, with one reference."""

    subject: str
    setting: str
    draw: int
    arl0: float
    reference: int
    rows: int = 0
    """Without a change."""
    runs: int = 0
    """With each change."""


@dataclass(kw_only=True)
class Outcome:
    """What came out of a job."""

    job: Job
    seconds: float = 0.0
    rows: int = 0
    alarms: int = 0
    delays: dict[tuple[str, float], list[float]] = field(default_factory=dict)
    """Rows by kind and size of the change; infinite: missed. Of recorded streams by name and 0."""
    error: str = ""
    """Why there is nothing."""


def rows_per_alarm(make: Callable[[], Watch], stream: Stream, rng: np.random.Generator, rows: int) -> float:
    """Mean time between false alarms over one run of ``rows``; half an alarm stands for none."""
    return rows / max(len(make().update_many(stream(rng, rows))), 0.5)


def delays(
    make: Callable[[], Watch], stream: Stream, rng: np.random.Generator, shift: float, rows: int, runs: int
) -> Iterator[float]:
    """Rows from a shift of ``shift`` to the next alarm, ``runs`` times; infinite if none comes within ``rows``."""
    for _ in range(runs):
        values = stream(rng, BEFORE + rows)
        values[BEFORE:] += shift
        yield first_alarm(make(), values, BEFORE)


def first_alarm(watch: Watch, values: F64, change: int) -> float:
    """Rows from ``change`` to the first alarm at or after it; infinite if there is none."""
    watch.update_many(values[:change])
    for begin in range(change, len(values), BLOCK):
        if alarms := watch.update_many(values[begin : begin + BLOCK]):
            return float(begin - change + alarms[0])
    return math.inf


def measure(job: Job) -> Outcome:
    """Calibrate, and measure on rows that calibration has not seen."""
    begun = time.process_time()
    outcome = Outcome(job=job)
    subject = subjects()[job.subject]
    try:
        with np.errstate(all="ignore"):  # the rivals' own warnings
            if job.setting in SETTINGS:
                _synthetic(job, subject, SETTINGS[job.setting], outcome)
            else:
                _recorded(job, subject, outcome)
    except Exception as error:  # a rival that refuses a stream is a result, and so is one of ours
        outcome.error = f"{type(error).__name__}: {error}"
        outcome.rows = outcome.alarms = 0
        outcome.delays = {}
    outcome.seconds = time.process_time() - begun
    return outcome


def _synthetic(job: Job, subject: Subject, setting: Setting, outcome: Outcome) -> None:
    process = zlib.crc32(setting.name.encode())
    rng = np.random.default_rng([job.draw, process])
    reference = setting.draw(rng, job.reference)
    watch = build(subject, reference, job.arl0, job.draw, classes=setting.name == f"{CLASSES} classes")
    np.random.seed(job.draw)  # frouros' KSWIN draws from numpy's global generator
    outcome.rows = job.rows
    outcome.alarms = len(watch.update_many(setting.draw(rng, job.rows)))
    for kind, change in setting.changes.items():
        for size in SIZES:
            found = []
            for run in range(job.runs):
                # The same rows for every subject.
                rng = np.random.default_rng([job.draw, process, zlib.crc32(kind.encode()), int(100 * size), run])
                values = setting.draw(rng, BEFORE + AFTER)
                values[BEFORE:] = change(values[BEFORE:], size, rng)
                watch.reset()
                found.append(first_alarm(watch, values, BEFORE))
            outcome.delays[kind, size] = found


def _recorded(job: Job, subject: Subject, outcome: Outcome) -> None:
    case = detect_real.case(job.setting)
    watch: Restartable = build(subject, case.reference, job.arl0, 0)
    outcome.rows = len(case.control)
    outcome.alarms = len(watch.update_many(case.control))
    for label, after in case.after.items():
        watch.reset()
        values = np.concatenate([case.control, after])
        outcome.delays[label, 0.0] = [first_alarm(watch, values, len(case.control))]


def takes_part(subject: Subject, setting: Setting) -> bool:
    """Rows have their own null streams; where a change is looked for everybody meets."""
    if setting.null and setting.columns:
        return subject.reads == "rows"
    if setting.null and subject.reads == "values":
        return True
    return bool(setting.changes) and subject.serves(setting.columns)


def jobs(asked: argparse.Namespace) -> list[Job]:
    """All there is to do, the longest first."""
    made = []
    for subject in subjects().values():
        if asked.quick and subject.effort not in ("full", "some"):
            continue
        share, rows = EFFORT[subject.effort]
        for setting in SETTINGS.values():
            if not takes_part(subject, setting):
                continue
            most = max(1, round(share * asked.draws))
            if setting.columns and subject.reads == "values":
                most = 1 if setting.columns > MANY else min(most, 2)  # a calibration for each column
            made += [
                Job(
                    subject=subject.name, setting=setting.name, draw=draw, arl0=asked.arl0, reference=asked.reference,
                    rows=int(rows * asked.arl0), runs=0 if subject.effort == "least" else math.ceil(asked.runs / most),
                )
                for draw in range(most)
            ]  # fmt: skip
        for case in detect_real.cases():
            reads = "rows" if case.endswith("features") else "values"
            if subject.kind == "blind" or (subject.calibrated and subject.reads == reads):
                made.append(Job(subject=subject.name, setting=case, draw=0, arl0=asked.arl0, reference=0))
    if asked.only:
        made = [job for job in made if re.search(asked.only, f"{job.subject} on {job.setting}")]
    # A rough order: unions over many columns, then the slow ones, then those that read rows.
    order = {"slow": 1, "least": 1, "some": 2, "full": 3}

    def rank(job: Job) -> int:
        setting, subject = SETTINGS.get(job.setting), subjects()[job.subject]
        many = setting is not None and setting.columns >= MANY and subject.reads == "values"
        return 0 if many else order[subject.effort]

    return sorted(made, key=rank)


def run(todo: list[Job], workers: int) -> tuple[list[Outcome], list[detect_cost.Cost]]:
    """All outcomes, and what an update costs, measured alone at the end."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcomes: list[Outcome] = []
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done in as_completed([pool.submit(measure, job) for job in todo]):
            outcome = done.result()
            outcomes.append(outcome)
            job = outcome.job
            said = outcome.error or f"{outcome.alarms} alarms in {outcome.rows} rows"
            at = f"{time.monotonic() - began:5.0f} s {len(outcomes):4}/{len(todo)}"
            print(
                f"{at} {job.subject} on {job.setting} #{job.draw}: {said}, {outcome.seconds:.1f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        costs = pool.submit(detect_cost.costs, sorted({job.subject for job in todo})).result()
    return outcomes, costs


def main() -> None:
    """Measure, print and write."""
    asked = _arguments()
    if asked.quick:
        asked.arl0, asked.reference, asked.draws, asked.runs = 200.0, 1500, 2, 6
    todo = jobs(asked)
    if not todo:
        sys.exit(f"nothing matches {asked.only!r}: it is looked for in names like 'cusum on ar 0.7'")
    began = time.monotonic()
    outcomes, costs = run(todo, asked.jobs)
    minutes = (time.monotonic() - began) / 60
    text = detect_tables.report(outcomes, costs, asked.arl0)
    head = (
        f"`{shlex.join(['python', '-m', 'tests.benchmarks.detect', *told(sys.argv[1:])])}`, {minutes:.0f} minutes; "
        f"asked ARL0 {asked.arl0:g}, references of {asked.reference} rows, {asked.draws} draws of them."
    )
    print(f"{head}\n\n{text}")
    if asked.write:
        detect_tables.write(asked.write, f"{head}\n\n{text}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.detect", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--arl0", type=float, default=1000.0, help="rows between false alarms that are asked for")
    parser.add_argument("--reference", type=int, default=5000, help="rows of a reference")
    parser.add_argument("--draws", type=int, default=8, help="independent references; slow detectors get fewer")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", help="regular expression, looked for in 'SUBJECT on STREAM'")
    parser.add_argument("--quick", action="store_true", help="ARL0 200, few runs, no slow detector")
    parser.add_argument("--write", type=Path, help="file whose tables are to be replaced")
    parser.set_defaults(runs=RUNS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
