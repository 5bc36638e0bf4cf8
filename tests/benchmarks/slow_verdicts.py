"""What was wished of the slow loop, and what came: the arithmetic of `tests.benchmarks.slow_tables`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from daemon.evaluation.intervals import mean_interval
from tests.benchmarks.fast_readme import table
from tests.benchmarks.slow_runs import (
    BOTH,
    FAST,
    FROZEN,
    PLAIN,
    REFIT,
    SLOW,
    Result,
    Run,
    unpacked,
)  # fmt: skip

Results = Mapping[Run, Result]

BEHIND = 0.5
"""Points by which fast + slow may be behind the better of the two alone."""
GAIN = 2.0
"""Points that the refit must win for a cell to count for the share of its gain."""
SHARE, COMPUTE = 0.9, 0.1
"""Of the refit's gain at the least, and of its compute at the most."""
FORGOTTEN = 1.0
"""Points of error on the source's exemplars that may be lost."""
ALPHA = 0.05
"""The gate's level."""
FORGETTING = (
    ("fast + slow as served", BOTH, "forgetting", True),
    ("fast + slow, the version alone", BOTH, "version_forgetting", True),
    ("slow only", SLOW, "version_forgetting", False),
    ("fast only as served", FAST, "forgetting", False),
)
"""What is asked about the source: title, subject, field, and whether it was wished for."""
P99 = 1.5
"""Of serving beside a burst over serving alone, on two cores."""


@dataclass(frozen=True, kw_only=True)
class Behind:
    """Fast + slow against the better of the two alone, in one cell."""

    run: Run
    better: str
    points: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Share:
    """Fast + slow against the refit, in one cell."""

    run: Run
    gain: float
    """Points that the refit wins over the frozen model."""
    own: float
    """Points that fast + slow wins."""
    seconds: float
    """Of the refit's learning."""
    own_seconds: float
    """Of the slow loop."""
    fast_seconds: float
    """That the daemon took beside those and beyond the daemon that never adapts: what adapting at once costs."""


def behind(done: Results) -> list[Behind]:
    """Every cell, the farthest behind first."""
    found = []
    for run, result in done.items():
        alone = {name: done.get(_with(run, name)) for name in (FAST, SLOW)}
        known = {name: other for name, other in alone.items() if other is not None}
        if run.subject != BOTH or len(known) < 2:
            continue
        better = min(known, key=lambda name: (known[name]["error"], name))
        wrong, other = (unpacked(each["wrong"], each["rows"]) for each in (result, known[better]))
        more = mean_interval(wrong.astype(np.float64) - other).scaled(100.0)
        found.append(Behind(run=run, better=better, points=more.mean, low=more.low, high=more.high))
    return sorted(found, key=lambda each: (-each.points, each.run))


def _with(run: Run, subject: str) -> Run:
    if subject in (FROZEN, PLAIN):
        return Run(stream=run.stream, subject=subject, labels="none", delay=0, seed=run.seed)
    return Run(stream=run.stream, subject=subject, labels=run.labels, delay=run.delay, seed=run.seed)


def shares(done: Results) -> list[Share]:
    """Every cell in which the refit wins ``GAIN`` points or more."""
    found = []
    for run, refit in done.items():
        frozen, plain, own = (done.get(_with(run, subject)) for subject in (FROZEN, PLAIN, BOTH))
        if run.subject != REFIT or frozen is None or own is None or plain is None:
            continue
        gain = frozen["error"] - refit["error"]
        if gain >= GAIN:
            found.append(
                Share(
                    run=run,
                    gain=gain,
                    own=frozen["error"] - own["error"],
                    seconds=refit["slow_seconds"],
                    own_seconds=own["slow_seconds"],
                    fast_seconds=max(0.0, own["seconds"] - plain["seconds"]),
                )
            )
    return sorted(found, key=lambda each: (each.own / each.gain, each.run))


def forgetting(done: Results, subject: str = BOTH, field: str = "forgetting") -> list[tuple[Run, float]]:
    """Points by cell, the most first; ``field``: of what is served, or ``version_forgetting``."""
    found = [
        (run, float(result[field]))
        for run, result in done.items()
        if run.subject == subject and result.get(field) is not None
    ]
    return sorted(found, key=lambda each: (-each[1], each[0]))


def surely_worse(promotion: Result) -> bool:
    """Whether the stream was worse by the promoted version than by its parent: the whole interval lies above zero."""
    return bool(promotion["low"] > 0.0)


def traces(done: Results) -> tuple[int, int]:
    """Runs of a slow method alone that promoted nothing, and how many of them answered anything by another model."""
    found = [
        result["same"]
        for run, result in done.items()
        if run.subject not in (FROZEN, PLAIN, REFIT, FAST, BOTH) and "refit" not in run.subject
        and not result["counts"].get("promoted")
    ]  # fmt: skip
    return len(found), sum(same < 1.0 for same in found)


def summary(done: Results, serving: Sequence[Result]) -> str:
    """Each wish, what was measured, and whether that is what was wished for."""
    return table(["", "wanted", "measured", "reached"], list(_lines(done, serving)))


def _lines(done: Results, serving: Sequence[Result]) -> Iterator[list[str]]:
    if cells := behind(done):
        over = [each for each in cells if each.points > BEHIND]
        worst = cells[0]
        yield [
            f"fast + slow behind the better of the two alone, worst of {len(cells)} cells",
            f"≤ {BEHIND} points",
            f"{worst.points:+.2f}; {len(over)} cells above, {sum(each.low > 0 for each in over)} of them surely",
            reached(not over),
        ]
    if found := shares(done):
        ratios = [each.own / each.gain for each in found]
        pooled = sum(each.own for each in found) / sum(each.gain for each in found)
        least = sum(ratio >= SHARE for ratio in ratios)
        yield [
            f"gain over frozen as a share of the refit's, least of {len(found)} cells",
            f"≥ {SHARE:.0%}",
            f"{min(ratios):.0%}; of all together {pooled:.0%}; {least} cells of {len(found)} reach it",
            reached(least == len(found)),
        ]
        for title, seconds in (
            ("learning seconds as a share of the refit's, most of a cell", [each.own_seconds for each in found]),
            (
                "the same, adapting at once counted as learning",
                [each.own_seconds + each.fast_seconds for each in found],
            ),
        ):
            parts = [own / each.seconds for own, each in zip(seconds, found, strict=True)]
            together = sum(seconds) / sum(each.seconds for each in found)
            least = sum(part <= COMPUTE for part in parts)
            yield [
                title,
                f"≤ {COMPUTE:.0%}",
                f"{max(parts):.0%}; of all together {together:.0%}; {least} cells of {len(found)} reach it",
                reached(least == len(found)),
            ]
    for title, subject, of, judged in FORGETTING:
        if lost := forgetting(done, subject, of):
            worse = sum(points > FORGOTTEN for _, points in lost)
            yield [
                f"forgetting on the source, {title}, most of {len(lost)} cells",
                f"≤ {FORGOTTEN:g} point" if judged else "",
                f"{lost[0][1]:+.1f}; {worse} cells above",
                reached(not worse) if judged else "",
            ]
    for title, every in (("every run", list(done)), (BOTH, [run for run in done if run.subject == BOTH])):
        promoted = [each for run in every for each in done[run].get("promotions", [])]
        for when, chosen in (
            ("", promoted),
            (", no known change since the labels that judged it", [each for each in promoted if not each["changed"]]),
        ):
            if chosen:
                share = sum(map(surely_worse, chosen)) / len(chosen)
                yield [
                    f"promotions after which the stream was surely worse, {title}, of {len(chosen)}{when}",
                    f"≤ {ALPHA:.0%}" if not when else "",
                    f"{share:.1%}",
                    reached(share <= ALPHA) if not when else "",
                ]
    runs, touched = traces(done)
    yield [
        f"runs without a promotion, slow alone, whose answers are not the frozen model's, of {runs}",
        "0",
        str(touched),
        reached(not touched) if runs else "not measured",
    ]
    for each in serving:
        yield [
            f"p99 of a batch beside a burst over alone, {each['model']}, duty {each['duty']:g}",
            f"≤ {P99:g}",
            f"{each['p99_ratio']:.2f}",
            reached(each["p99_ratio"] <= P99),
        ]


def reached(whether: bool) -> str:
    """In words."""
    return "yes" if whether else "**no**"


def lists(done: Results) -> dict[str, str]:
    """By heading, the cells behind each wish that was not reached."""
    found = {}
    if over := [each for each in behind(done) if each.points > BEHIND]:
        rows = [
            [each.run.name, each.better, f"{each.points:+.2f}", f"{each.low:+.1f} to {each.high:+.1f}"] for each in over
        ]
        found[f"Cells where fast + slow is more than {BEHIND} points behind:"] = table(
            ["stream/subject/labels/delay/seed", "the better", "points", "95%"], rows
        )
    if cells := shares(done):
        rows = [
            [
                each.run.name, f"{each.gain:.1f}", f"{each.own:.1f}", f"{each.own / each.gain:.0%}",
                f"{each.seconds:.1f}", f"{each.own_seconds:.1f}", f"{each.own_seconds / each.seconds:.0%}",
                f"{each.fast_seconds:.1f}",
            ]
            for each in cells
        ]  # fmt: skip
        heads = ["cell of the refit", "its gain", "fast + slow", "share", "its seconds", "slow", "share", "fast"]
        found[f"Fast + slow against the refit, where that wins {GAIN:g} points or more:"] = table(heads, rows)
    lost = {field: dict(forgetting(done, BOTH, field)) for field in ("forgetting", "version_forgetting")}
    if forgets := [
        run for run, points in lost["forgetting"].items() if max(points, lost["version_forgetting"][run]) > FORGOTTEN
    ]:
        rows = [
            [
                run.name,
                f"{lost['forgetting'][run]:+.1f}",
                f"{lost['version_forgetting'][run]:+.1f}",
                _points(done.get(_with(run, FAST))),
            ]
            for run in forgets
        ]
        heads = ["cell", "as served", "the version alone", "fast only as served"]
        found[f"Cells where fast + slow forgets more than {FORGOTTEN:g} point of the source:"] = table(heads, rows)
    harmful = [(run, each) for run in done for each in done[run].get("promotions", []) if surely_worse(each)]
    if harmful:
        rows = [
            [
                run.name, str(each["row"]), str(each["rows"]), each["method"],
                "yes" if each["changed"] else "", f"{each['parent']:.1f}",
                f"{each['mean']:+.1f}", f"{each['low']:+.1f} to {each['high']:+.1f}",
            ]
            for run, each in sorted(harmful, key=lambda pair: -pair[1]["mean"])
        ]  # fmt: skip
        heads = ["run", "at row", "rows", "made by", "change", "its parent's error", "points more", "95%"]
        found["Promotions after which the stream was surely worse:"] = table(heads, rows)
    return found


def _points(result: Result | None) -> str:
    return "" if result is None else f"{result['forgetting']:+.1f}"
