"""The arithmetic and the tables of `make bench-kafka`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.kafka_watch import Sample

MIB = 1 << 20


@dataclass
class Measured:
    """One run of one subject in one round; nan: not measured."""

    subject: str
    stream: str
    """Codec and bytes, for example ``raw 200 B``."""
    rate: float = math.nan
    """Records per second over a backlog."""
    cpu_us: float = math.nan
    """Microseconds of processor time per record, user and system, of all the subject's threads."""
    half: Mapping[str, float] = field(default_factory=dict)
    """p50_ms, p99_ms, ... of the answers at half its own rate."""
    common: Mapping[str, float] = field(default_factory=dict)
    """The same at half the bare loop's rate."""
    peak: float = math.nan
    """Most resident memory, bytes."""
    growth: float = math.nan
    """Resident memory at the end of the backlog less that after its first tenth, bytes."""
    notes: str = ""


def rates(samples: Sequence[Sample], first: int, last: int) -> tuple[float, float]:
    """Records per second, and processor microseconds per record, from ``first`` to ``last`` answers.

    A transaction's end lies on the topic like an answer. It is taken for spread evenly: of what lies there, the share
    ``last`` / all are answers.

    Raises ValueError when the samples don't hold two different ones.
    """
    start = next((sample for sample in samples if sample.answers >= first), None)
    most = max((sample.answers for sample in samples), default=0)
    end = next((sample for sample in samples if sample.answers >= most), None)
    if start is None or end is None or end.time_s <= start.time_s or most < last:
        raise ValueError(f"no two samples between {first} and {last} answers")
    done = (most - start.answers) * last / most
    return done / (end.time_s - start.time_s), 1e6 * (end.cpu_s - start.cpu_s) / done


def memory_steps(samples: Sequence[Sample], total: int, steps: int = 10) -> list[float]:
    """Resident bytes after each tenth of ``total`` answers: the first sample that has so many."""
    found = []
    for step in range(1, steps + 1):
        wanted = total * step / steps
        found.append(next((float(sample.rss) for sample in samples if sample.answers >= wanted), math.nan))
    return found


def ratio(mine: Mapping[int, float], others: Mapping[int, float]) -> tuple[float, float, float]:
    """Median, least and most of the ratios round by round, over the rounds that have both; nan without any."""
    found = [mine[number] / others[number] for number in mine if others.get(number)]
    found = [each for each in found if math.isfinite(each)]
    return (statistics.median(found), min(found), max(found)) if found else (math.nan,) * 3


def _median(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _number(value: float, text: str = ",.0f") -> str:
    return format(value, text) if math.isfinite(value) else "–"


def _ratio(values: tuple[float, float, float]) -> str:
    middle, least, most = values
    return f"{middle:.2f} ({least:.2f}–{most:.2f})" if math.isfinite(middle) else "–"


def table(
    results: Sequence[Mapping[str, Measured]], stream: str, bare: str, rivals: Mapping[str, Sequence[str]]
) -> str:
    """One codec and size as Markdown: a row per subject, medians over ``results``, a mapping of them per round.

    Ratios are taken round by round, against the bare loop and against the fastest in that round of a subject's
    ``rivals``, by its name.
    """
    rounds = [{name: found for name, found in each.items() if found.stream == stream} for each in results]
    names = list(dict.fromkeys(name for each in rounds for name in each))
    rate = {name: {number: each[name].rate for number, each in enumerate(rounds) if name in each} for name in names}

    def fastest(of: Sequence[str]) -> dict[int, float]:
        known = {
            number: [each[name].rate for name in of if name in each and math.isfinite(each[name].rate)]
            for number, each in enumerate(rounds)
        }
        return {number: max(found) for number, found in known.items() if found}

    head = ["", "records/s", "to bare loop", "to Quix", "CPU µs", "p50 / p99 ms, own half", "same, bare's half",
            "peak MB", "growth MB"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for name in names:
        found = [each[name] for each in rounds if name in each]

        def middle(value: Callable[[Measured], float], found: list[Measured] = found) -> float:
            return _median(map(value, found))

        def latency(part: str, found: list[Measured] = found) -> str:
            both = [_median(getattr(each, part).get(key, math.nan) for each in found) for key in ("p50_ms", "p99_ms")]
            return " / ".join(_number(value, ".1f") for value in both)

        cells = [
            name,
            _number(middle(lambda each: each.rate)),
            "1" if name == bare else _ratio(ratio(rate[name], rate.get(bare, {}))),
            _ratio(ratio(rate[name], fastest(rivals.get(name, ())))),
            _number(middle(lambda each: each.cpu_us), ".1f"),
            latency("half"),
            latency("common"),
            _number(middle(lambda each: each.peak / MIB)),
            _number(middle(lambda each: each.growth / MIB), "+.1f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(steps: Mapping[str, Sequence[float]]) -> str:
    """Resident MB of each subject at every tenth of a long run, as Markdown."""
    count = max((len(each) for each in steps.values()), default=0)
    lines = [
        "| | " + " | ".join(f"{100 * (step + 1) // count}%" for step in range(count)) + " | last − first |",
        "|---|" + "---:|" * (count + 1),
    ]
    for name, each in steps.items():
        cells = [_number(value / MIB) for value in each]
        lines.append(f"| {name} | {' | '.join(cells)} | {_number((each[-1] - each[0]) / MIB, '+.1f')} |")
    return "\n".join(lines)


def notes(results: Sequence[Mapping[str, Measured]]) -> str:
    """What was said of each subject and stream, once, as a Markdown list."""
    found = dict.fromkeys(
        f"- {measured.subject}, {measured.stream}: {measured.notes}"
        for each in results
        for measured in each.values()
        if measured.notes
    )
    return "\n".join(found)


def between(text: str, mark: str, new: str) -> str:
    """``text`` with what stands between the first and the last ``mark`` replaced; added at its end if there is none."""
    before, found, rest = text.partition(mark)
    after = rest.rpartition(mark)[2] if mark in rest else "\n"
    return f"{before}{mark}\n{new.strip()}\n{mark}{after}" if found else f"{text.rstrip()}\n\n{mark}\n{new}\n{mark}\n"


def as_rows(results: Sequence[Mapping[str, Measured]]) -> list[dict[str, Any]]:
    """Every measurement as JSON can take it."""
    return [
        {"round": number, **vars(measured), "half": dict(measured.half), "common": dict(measured.common)}
        for number, each in enumerate(results)
        for measured in each.values()
    ]
