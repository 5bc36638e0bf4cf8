"""The tables of ``tests.benchmarks.detect`` as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.detect_cost import Cost
from tests.benchmarks.detect_real import SIGNALS
from tests.benchmarks.detect_results import Measured, Results, gathered
from tests.benchmarks.detect_rivals import P_VALUE, WINDOW, has_frouros
from tests.benchmarks.detect_streams import AFTER, COLUMNS, FEATURES, SETTINGS, SIZES, STREAMS
from tests.benchmarks.detect_subjects import subjects
from tests.benchmarks.fast_readme import table

if TYPE_CHECKING:
    from tests.benchmarks.detect import Outcome

GOAL = (0.8, 1.5)
"""Reached over asked ARL0."""
FAIR = 0.67
"""Least reached / asked ARL0 with which a delay competes: who alarms more often is early for nothing."""


def report(outcomes: list[Outcome], costs: list[Cost], arl0: float) -> str:
    """All tables."""
    results = gathered(outcomes)
    names = [name for name in subjects() if any(subject == name for subject, _ in results)]
    parts = [*_false_alarms(results, names, arl0), *_changes(results, names, arl0), *_recorded(results, names, arl0)]
    parts += _costs(costs)
    if not has_frouros():
        parts.append("frouros is not installed: `make bench-detect` installs it.")
    if errors := sorted({f"{subject}: {found.error}" for (subject, _), found in results.items() if found.error}):
        parts.append("What refused some stream:\n\n" + "\n".join(f"- {error}" for error in errors))
    return "\n\n".join(parts)


def _false_alarms(results: Results, names: list[str], arl0: float) -> list[str]:
    together, ranges, goals = [], [], []
    for name in names:
        found = [results.get((name, _null(name, stream))) for stream in STREAMS]
        if not any(found):
            continue
        together.append([name, _effort(found), *(_together(one, arl0) for one in found)])
        if subjects()[name].calibrated:
            ranges.append([name, *(_range(one, arl0) for one in found)])
        ratios = [one.ratio(arl0) for one in found if one and one.rows]
        within = sum(GOAL[0] <= ratio <= GOAL[1] for ratio in ratios)
        goals.append([name, f"{within} of {len(ratios)}" if ratios else "–"])
    if not together:
        return []
    return [
        "### 1. False alarms\n\nReached / asked ARL0 on fresh rows of the same process, over all draws of the "
        "reference, with a 95% interval; 1 is as asked, under 1 more alarms, > no alarm at all. Detectors of rows read "
        f"{COLUMNS} independent copies. Those named by their library alone stand as they come: their own defaults on "
        "raw values, which know of no ARL0 (DDM, EDDM, FHDDM, STEPD, ECDDWT, RDDM: whether a value is above the "
        "reference's median; HDDM: cut to [0, 1]). Slow ones get fewer draws and rows.",
        table(["detector", "draws × rows", *STREAMS], together),
        "Least to greatest over the draws, calibrated ones:",
        table(["detector", *STREAMS], ranges),
        f"On how many of these streams the ratio lies from {GOAL[0]} to {GOAL[1]}:",
        table(["detector", "streams"], goals),
    ]


def _effort(found: list[Measured | None]) -> str:
    """Draws of the reference, and rows without a change in each."""
    one = max((one for one in found if one), key=lambda one: len(one.rows))
    return f"{len(one.rows)} × {one.rows[0]:,}" if one.rows else "–"


def _null(name: str, stream: str) -> str:
    return f"{stream} x{COLUMNS}" if subjects()[name].reads == "rows" else stream


def _together(found: Measured | None, arl0: float) -> str:
    if found is None or not found.rows:
        return "–" if found is None else "refuses"
    low, high = found.interval(arl0)
    prefix = "" if sum(found.alarms) else "> "
    return f"{prefix}{_short(found.ratio(arl0))} ({_short(low)}–{_short(high)})"


def _range(found: Measured | None, arl0: float) -> str:
    if found is None or not found.rows:
        return "–"
    return "–".join(_short(ratio) for ratio in found.extremes(arl0))


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


CHANGES = {
    "Mean, by so many deviations": [("iid", "mean"), ("ar 0.7", "mean"), ("ar 0.95", "mean"), ("student t3", "mean")],
    "Deviation, times 1 + m": [("iid", "deviation"), ("ar 0.7", "deviation")],
    f"Rows: correlation of tanh(m / 2) in pairs of 6 features; the mean of one of {FEATURES} features; log odds of one "
    "of 5 classes": [("6 features", "correlation"), (f"{FEATURES} features", "one mean"), ("5 classes", "prior")],
}


def _changes(results: Results, names: list[str], arl0: float) -> list[str]:
    parts = [
        "### 2. Delay after a change\n\nMedian rows from the change, after 1,000 rows in control, to the next "
        f"alarm, and the share of runs that missed it within {AFTER:,} rows. Calibrated detectors compete, at the same "
        f"asked ARL0; those whose reached ARL0 on that process is under {FAIR} of it, and raw ones, stand with theirs "
        'in brackets. On rows a detector of values is a union over the columns (`how="bonferroni"`); only quick '
        f"ones can be calibrated for each of {FEATURES} columns within this run, and the slowest for none. Rivals of "
        "frouros that only look upwards are favoured: all means rise. Bold: the fastest of those that compete."
    ]
    for title, pairs in CHANGES.items():
        keys = [(setting, (kind, size)) for setting, kind in pairs for size in SIZES]
        best = {key: min(competing(results, names, *key, arl0).values(), default=math.nan) for key in keys}
        rows = []
        for name in names:
            cells = [_delay(name, results.get((name, setting)), change, arl0, best[setting, change])
                     for setting, change in keys]  # fmt: skip
            if set(cells) != {"–"}:
                rows.append([name, *cells])
        if rows:
            parts += [
                f"{title}:",
                table(["detector", *(f"{setting}: {change[1]:g}" for setting, change in keys)], rows),
            ]
    return [*parts, *_summary(results, names, arl0)] if len(parts) > 1 else []


def competing(
    results: Results, names: Iterable[str], setting: str, change: tuple[str, float], arl0: float
) -> dict[str, float]:
    """Delay of each subject that competes."""
    found = {}
    for name in names:
        one = results.get((name, setting))
        if one is None or not subjects()[name].calibrated or not one.rows or one.ratio(arl0) < FAIR:
            continue
        if (delay := one.delay(change)) is not None:
            found[name] = delay
    return found


def _delay(name: str, found: Measured | None, change: tuple[str, float], arl0: float, best: float) -> str:
    delay = None if found is None else found.delay(change)
    if found is None or delay is None:
        return "–"
    text = f"{delay:.0f}" if delay <= AFTER else f"> {AFTER}"
    if missed := found.missed(change):
        text += f" ({missed:.0%} missed)"
    ratio = found.ratio(arl0)
    if not subjects()[name].calibrated or ratio < FAIR:
        return f"{text} [{ratio * arl0:.0f}]"
    return f"**{text}**" if delay == best <= AFTER else text


def _summary(results: Results, names: list[str], arl0: float) -> list[str]:
    """How often ours are the fastest, and how far behind at worst."""
    ours = [name for name in names if subjects()[name].kind == "ours"]
    members = {"the best of ours": ours, **{name: [name] for name in ours}}
    rows = []
    keys = [(setting, (kind, size)) for pairs in CHANGES.values() for setting, kind in pairs for size in SIZES]
    for label, group in members.items():
        met, first, worst = 0, 0, 0.0
        for key in keys:
            delays = competing(results, names, *key, arl0)
            mine = min((delays[name] for name in group if name in delays), default=None)
            others = min((delay for name, delay in delays.items() if subjects()[name].kind != "ours"), default=math.inf)
            # Without a rival there is nothing to win; one that misses most runs is no best to be compared with.
            if mine is None or math.isinf(others) or (best := min(delays.values())) > AFTER:
                continue
            met += 1
            first += mine <= others
            worst = max(worst, (min(mine, AFTER) + 1.0) / (best + 1.0))
        rows.append([label, str(met), str(first), f"{worst:.2f}" if met else "–"])
    return [
        f"Of these {len(keys)} changes: at how many each of ours competed, was at least as fast as every rival, and "
        f"the "
        f"greatest ratio of its delay (+ 1; {AFTER} if missed) to the best of all:",
        table(["detector", "competed", "fastest", "worst ratio"], rows),
    ]


def _recorded(results: Results, names: list[str], arl0: float) -> list[str]:
    cases = [case for case in dict.fromkeys(setting for _, setting in results) if case not in SETTINGS]
    if not cases:
        return []
    cases.sort(key=lambda case: (case.partition(", ")[0], SIGNALS.index(case.partition(", ")[2])))
    rows = []
    for name in names:
        cells = [_recorded_cell(results.get((name, case))) for case in cases]
        if set(cells) != {"–"}:
            rows.append([name, *cells])
    return [
        f"### 3. Recorded streams\n\nAsked ARL0 {arl0:g}. Each cell: false alarms / rows before the change; delay, "
        f"or – "
        "for missed, after each change. Error: 0/1 of a frozen model; entropy: of its predictions; features: "
        "standardised inputs, mean and deviation of each channel for HAR, read as rows. Insects: model of rows "
        "0–3,999, "
        "reference every tenth of them, which it was not trained on (features: all); change at row 14,028. Gas: "
        "model of "
        "segment 1, reference 600 rows of segment 2, change from the rest of it to segments 3, 4, 5, 6, 8, 9, each "
        "shuffled, for their own order is by class. HAR: phone windows of subjects 13–17, then of 18–23, then the "
        "watch.",
        "What these can't show: the true ARL0, for the rows before a change are not known to be stationary (insects "
        "warm "
        "up all the time, subjects and activities of HAR follow one another in runs), they are too few to count "
        f"alarms {arl0:g} rows apart, and every tenth row has less correlation than the stream. A quick alarm "
        "of a detector that alarmed often before is no detection.",
        table(["detector", *cases], rows),
    ]


def _recorded_cell(found: Measured | None) -> str:
    if found is None or not found.rows:
        return "–" if found is None else "refuses"
    after = " ".join(f"{late[0]:.0f}" if math.isfinite(late[0]) else "–" for late in found.delays.values())
    return f"{sum(found.alarms)} / {sum(found.rows)}; {after}"


def _costs(costs: list[Cost]) -> list[str]:
    if not costs:
        return []
    rows = [
        [
            cost.subject,
            f"{cost.single_us:.2f}",
            "–" if cost.batch_us is None else f"{cost.batch_us:.3f}",
            "" if cost.share is None else f"{cost.share:.1%}",
        ]
        for cost in costs
    ]
    return [
        f"### 4. Cost\n\nMicroseconds of CPU for an update with one value (or row of {FEATURES}), alone and within a "
        "batch of 64; for rows, the batch's share of a small CNN's forward (`cnn_bn2d` of "
        "`tests/benchmarks/fast_models.py`) on 64 images. frouros' MMDStreaming gives a distance and no alarm. Its "
        f"KSWIN, BOCD and IncrementalKSTest (window {WINDOW}, taken to alarm at p < {P_VALUE}) take over 100 us, its "
        "ADWIN and STEPD 10 to 60: too long to be calibrated in this run. ECDDWT knows three ARL0 (100, 400, 1000; "
        "default 400) and no knob in between.",
        table(["detector", "one", "in a batch", "share of forward"], rows),
    ]


def filled(text: str, body: str) -> str:
    """``text`` with ``body`` between the marks. Raises ``ValueError`` where they are missing."""
    pattern = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError("there is no place for the tables in it: a line <!-- bench -->, and after it <!-- /bench -->")
    return pattern.sub(lambda found: f"{found[1]}{body}\n{found[2]}", text)


def write(path: Path, body: str) -> None:
    """Replace what stands between the marks of the file."""
    path.write_text(filled(path.read_text(encoding="utf-8"), body), encoding="utf-8")
