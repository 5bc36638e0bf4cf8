"""The tables of `make bench-slow`: what was wished for, whether it was reached, and every number behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tests.benchmarks import slow_verdicts as verdicts
from tests.benchmarks.fast_readme import table
from tests.benchmarks.slow_runs import (
    BOTH,
    EXACT,
    FAST,
    FROZEN,
    PLAIN,
    REFIT,
    REFIT_SMALL,
    SLOW,
    USUAL_DELAY,
    Result,
    kinds,
)  # fmt: skip
from tests.benchmarks.slow_verdicts import Results

HEAD = """# The slow loop on five streams

`make bench-slow` measures; `make bench-slow ARGS="--write tests/benchmarks/slow.md"` writes this file. Every
stream is served in its own order through the daemon's own loop with its default settings; *fast only* is
without the slow loop, *slow only* without the fast one. Each slow method by name runs without the fast loop and
without the exact head that the default tries first, and everything that the slow loop promotes has passed the
gate. *Refit* is what a team does by the clock: every 500 rows or every tenth of the stream (images: every
quarter) all weights are trained on from the packed model by the recipe that made it, on all labels so far and
the reference exemplars, and served whatever they are worth. *Refit, small* trains no more than what the slow
loop may move, in 100 steps every 500 labels.

*Surely* means that the 95% interval (moving blocks, paired row by row) lies on one side of zero: of versions
that are exactly as good as their parents one in forty looks surely worse. A promotion is judged by the answers
of the new version and of its parent to the rows after it: up to the next promotion, 500 at the most and 100 at
the least. Where the stream changes between the labels that judged a version and those rows, no gate can know;
such promotions are counted, and marked.

*Forgetting* is the error on the bundle's source exemplars after the stream, above the frozen model's: first of
what is served, fast adaptation and all, as it stands after the last row; then of the last version alone, which
is what the slow loop has learnt. *Seconds* are of learning, and of one core."""
ENDS = ("promoted", "rejected", "declined", "withdrawn")
FORGOTTEN = ("forgetting", "version_forgetting")
COUNTED = (FAST, SLOW, BOTH)


def report(results: Results, serving: Sequence[Result], command: str) -> str:
    """All tables, as Markdown."""
    done = {run: result for run, result in results.items() if "error" in result}
    streams = list(dict.fromkeys(run.stream for run in done))
    seeds = len({run.seed for run in done})
    parts = [
        f"`{command}`",
        f"Rows: {', '.join(f'{stream} {_rows(done, stream):,}' for stream in streams)}. Seeds: {seeds}. Errors and "
        "forgetting in per cent and points; seconds are the processor's, of learning alone. A label is known "
        "so many rows after its own, in batches of 64.",
        verdicts.summary(done, serving),
    ]
    for title, text in verdicts.lists(done).items():
        parts += [title, text]
    for stream in streams:
        parts += [f"### {stream}, all labels, {USUAL_DELAY} rows late", subjects(results, stream)]
    if any(run.subject == BOTH for run in done):
        parts += ["### Labels and delays, error", cross(done)]
    parts += ["### Rows to recover after a change", recoveries(done)]
    if any(result["promotions"] for result in done.values()):
        parts += ["### Promotions", promotions(done)]
    if serving:
        parts += [f"### Serving beside a burst, on {serving[0]['cores']} cores", served(serving)]
    if failed := sorted(f"{run.name}: {result['failed']}" for run, result in results.items() if "failed" in result):
        parts += ["### Failed", "\n".join(f"- {line}" for line in failed)]
    return "\n\n".join(parts)


def _rows(done: Results, stream: str) -> int:
    return next(int(result["rows"]) for run, result in done.items() if run.stream == stream)


def order() -> tuple[str, ...]:
    """Subjects as the tables have them."""
    return (FROZEN, REFIT, REFIT_SMALL, FAST, SLOW, BOTH, *EXACT, *kinds())


def at_usual(results: Results, stream: str, subject: str) -> list[Result]:
    """Of all seeds, with all labels at the usual delay."""
    return [
        result
        for run, result in results.items()
        if (run.stream, run.subject) == (stream, subject)
        and (subject in (FROZEN, PLAIN) or (run.labels, run.delay) == ("100%", USUAL_DELAY))
    ]


def subjects(results: Results, stream: str) -> str:
    """One line for each subject: error, its way through the stream, forgetting, cost, versions."""
    rows = []
    for subject in order():
        found = at_usual(results, stream, subject)
        if not found:
            continue
        if refused := [each for each in found if "error" not in each]:
            rows.append([subject, "–" if "refused" in refused[0] else "failed", *[""] * (3 + len(ENDS))])
            continue
        pieces = np.mean([each["pieces"] for each in found], axis=0)
        counts = [f"{np.mean([each['counts'].get(name, 0) for each in found]):.3g}" for name in ENDS]
        rows.append(
            [
                subject,
                f"{mean(found, 'error'):.1f}",
                " ".join(f"{piece:.0f}" for piece in pieces),
                " / ".join(signed(found, name) for name in FORGOTTEN if signed(found, name)),
                f"{mean(found, 'slow_seconds'):.1f}",
                *(counts if subject not in (FROZEN, REFIT, REFIT_SMALL, FAST) else [""] * len(ENDS)),
            ]
        )
    return table(["", "error", "in eight parts", "forgetting", "seconds", *ENDS], rows)


def cross(done: Results) -> str:
    """One line for each stream, share of labels and delay."""
    rows = []
    for stream, labels, delay in sorted({(r.stream, r.labels, r.delay) for r in done if r.subject == BOTH}, key=_cell):
        of = {
            subject: [
                result
                for run, result in done.items()
                if (run.stream, run.subject, run.labels, run.delay) == (stream, subject, labels, delay)
            ]
            for subject in (*COUNTED, REFIT, REFIT_SMALL)
        }
        frozen = at_usual(done, stream, FROZEN)
        best = min((mean(of[subject], "error") for subject in (FAST, SLOW) if of[subject]), default=np.nan)
        rows.append(
            [
                f"{stream} {labels}" + (f" {delay:,}" if labels != "none" else ""),
                number(frozen, "error"),
                *(number(of[subject], "error") for subject in COUNTED),
                f"{mean(of[BOTH], 'error') - best:+.2f}",
                number(of[REFIT], "error"),
                number(of[REFIT_SMALL], "error"),
                " / ".join(signed(of[BOTH], name) for name in FORGOTTEN),
                f"{mean(of[BOTH], 'slow_seconds'):.1f}",
            ]
        )
    heads = [
        "stream, labels, delay",
        FROZEN,
        *COUNTED,
        "behind the better",
        REFIT,
        REFIT_SMALL,
        "forgetting",
        "seconds",
    ]
    return table(heads, rows)


def _cell(cell: tuple[str, str, int]) -> tuple[str, int, int]:
    stream, labels, delay = cell
    return stream, ("100%", "10%", "1%", "none").index(labels), delay


def recoveries(done: Results) -> str:
    """How many changes were recovered from at all, and the median rows it took those; all labels, usual delay."""
    streams = list(dict.fromkeys(run.stream for run in done))
    rows = []
    for subject in (FROZEN, REFIT, *COUNTED, *EXACT):
        if not any(run.subject == subject for run in done):
            continue
        cells = []
        for stream in streams:
            found = [rows for result in at_usual(done, stream, subject) if "error" in result
                     for rows in result["recoveries"]]  # fmt: skip
            back = [rows for rows in found if rows is not None]
            cells.append(f"{np.median(back):.0f} ({len(back)}/{len(found)})" if back else f"– (0/{len(found)})")
        rows.append([subject, *cells])
    return table(["median rows (changes recovered from / changes)", *streams], rows)


def promotions(done: Results) -> str:
    """What became of promoted versions on the rows after them, by subject, then by what made them."""
    groups: dict[str, list[Result]] = {}
    for run, result in done.items():
        for each in result.get("promotions", []):
            groups.setdefault(run.subject, []).append(each)
            if run.subject in (SLOW, BOTH):
                groups.setdefault(f"… of these by {each['method']}", []).append(each)
    known = [name for name in (SLOW, BOTH) if name in groups]
    known += sorted(name for name in groups if name.startswith("…"))
    known += [name for name in order() if name in groups and name not in known]
    every = [each for run, result in done.items() for each in result.get("promotions", [])]
    rows = [_promoted("all", every), *(_promoted(name, groups[name]) for name in known)]
    return table(["by", "judged afterwards", "mean gain, points", "worse", "surely worse", "share surely worse"], rows)


def _promoted(name: str, found: Sequence[Result]) -> list[str]:
    worse = sum(each["mean"] > 0.0 for each in found)
    surely = sum(map(verdicts.surely_worse, found))
    gain = -float(np.mean([each["mean"] for each in found])) if found else float("nan")
    share = f"{100 * surely / len(found):.1f}%" if found else "–"
    return [name, str(len(found)), f"{gain:+.1f}", str(worse), str(surely), share]


def served(serving: Sequence[Result]) -> str:
    """One line for each model and duty."""
    rows = [
        [
            f"{each['model']}, duty {each['duty']:g}",
            f"{each['p50_alone']:.2f}",
            f"{each['p50_beside']:.2f}",
            f"{each['p50_ratio']:.2f}",
            f"{each['p99_alone']:.2f}",
            f"{each['p99_beside']:.2f}",
            f"{each['p99_ratio']:.2f} ({each['p99_low']:.2f} to {each['p99_high']:.2f})",
            f"{100 * each['busy']:.0f}%",
        ]
        for each in serving
    ]
    heads = ["ms of a batch of 64", "p50", "beside", "ratio", "p99", "beside", "ratio (95%)", "batches beside a burst"]
    return table(heads, rows)


def mean(found: Iterable[Result], field: str) -> float:
    """Over runs that have it; NaN of none."""
    values = [result[field] for result in found if result.get(field) is not None]
    return float(np.mean(values)) if values else float("nan")


def signed(found: Sequence[Result], field: str) -> str:
    """With its sign, empty where it was not measured."""
    value = mean(found, field)
    return "" if np.isnan(value) else f"{value:+.1f}"


def number(found: Sequence[Result], field: str) -> str:
    """With one decimal, empty where nothing was run."""
    return f"{mean(found, field):.1f}" if found else ""
