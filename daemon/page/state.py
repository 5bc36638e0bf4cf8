"""What the page shows, as one JSON object: metrics by `Numbers`, the rest from what the loop left to be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from daemon import __version__
from daemon.errors import SettingsError
from daemon.overload import Step
from daemon.page import words
from daemon.page.numbers import Numbers
from daemon.page.verdict import Facts, verdict
from daemon.places import dead_letters_url

if TYPE_CHECKING:
    from daemon.page.live import Page

DECISIONS = 60
"""Sentences that are shown."""


def state(page: Page, wall: float) -> dict[str, Any]:
    """Everything at this moment; ``wall`` is the time in seconds since the epoch. Moments in it are that too."""
    page.refresh()
    numbers = Numbers(page.worker.telemetry.registry)
    now, settings = page.clock(), page.worker.settings

    def epoch(at: float | None) -> float | None:
        return None if at is None else round(wall - now + at, 1)

    states = numbers.by("state", "state")
    name = next((found for found, on in states.items() if on), "steady")
    errors = numbers.by("error_ratio", "model")
    frozen, version = bool(numbers.of("frozen")), int(numbers.of("version") or 0)
    moments, alive, ready = page.moments, page.alive(), page.ready()
    facts = Facts(
        alive=alive,
        ready=ready,
        state=name,
        frozen=frozen,
        version=version,
        served=errors.get("served"),
        frozen_error=errors.get("frozen"),
        labels=numbers.counts("labels_total", "result").get("joined", 0),
        lag_s=numbers.of("lag_seconds"),
        overload=int(numbers.of("overload_step") or 0),
        state_at=epoch(moments.state_at) or wall,
        drift_at=epoch(moments.drift_at) if name in ("fast", "slow") else None,
        out_at=epoch(moments.out_at),
        frozen_at=epoch(moments.frozen_at),
        trip=moments.trip,
    )
    return {
        "now": round(wall, 1),
        "started": epoch(page.started),
        "product": __version__,
        "source": without_secrets(settings.source),
        "task": page.worker.loop.task,
        "alive": {"fine": alive[0], "why": alive[1]},
        "ready": {"fine": ready[0], "why": ready[1]},
        "verdict": verdict(facts),
        "loop": {
            "state": name,
            "title": words.STATES.get(name, name),
            "meaning": words.MEANING.get(name, ""),
            "since": epoch(moments.state_at),
            "frozen": frozen,
            "gain": numbers.of("gain_ratio"),
            "version": version,
            "seconds": numbers.by("state_seconds_total", "state"),
            "answered": numbers.counts("answered_rows_total", "by"),
            "bursts": numbers.counts("slow_bursts_total", "result"),
            "trips": sum(numbers.counts("guard_trips_total", "reason").values()),
            "drifts": page.worker.loop.tally.drifts,
        },
        "error": errors,
        "labels": numbers.counts("labels_total", "result"),
        "signals": _signals(numbers),
        "flow": _flow(page, numbers, now),
        "checkpoint": {
            "at": numbers.of("checkpoint_timestamp_seconds") or None,
            "failures": numbers.count("checkpoint_failures_total"),
        },
        "dead": {
            "reasons": {k: n for k, n in numbers.counts("records_invalid_total", "reason").items() if n},
            "total": page.worker.loop.tally.dead,
            "place": _dead_letters(page),
            "last": [
                {
                    "at": epoch(letter.at),
                    "where": f"{letter.partition}, offset {letter.offset}",
                    "reason": letter.reason,
                    "detail": letter.detail,
                }
                for letter in reversed(page.chronicle.letters())
            ],
        },
        "versions": list(page.versions),
        "held": page.held,
        "decisions": _decisions(page, epoch),
        "history": _history(page, epoch),
        "operator": page.operator,
    }


def _signals(numbers: Numbers) -> list[dict[str, Any]]:
    level, deviation = numbers.by("signal", "signal"), numbers.by("signal_deviation_ratio", "signal")
    statistic, threshold = numbers.by("detector_statistic", "signal"), numbers.by("detector_threshold", "signal")
    names = [*dict.fromkeys([*deviation, *statistic, *level])]
    return [
        {
            "name": name,
            "words": words.signal(name),
            "level": level.get(name),
            "deviation": deviation.get(name),
            "statistic": statistic.get(name),
            "threshold": threshold.get(name),
        }
        for name in names
    ]


def _flow(page: Page, numbers: Numbers, now: float) -> dict[str, Any]:
    records, answers, step = (numbers.count(f"records_{way}_total") for way in ("in", "out", "shed"))
    overload = Step(int(numbers.of("overload_step") or 0))
    first = page.ticks[0] if page.ticks else (page.started, 0.0, 0.0)
    seconds = now - first[0]
    return {
        "in": records,
        "out": answers,
        "in_per_s": round(max(0.0, records - first[1]) / seconds, 2) if seconds > 0 else None,
        "out_per_s": round(max(0.0, answers - first[2]) / seconds, 2) if seconds > 0 else None,
        "lag": numbers.of("lag_records"),
        "lag_s": numbers.of("lag_seconds"),
        "overload": int(overload),
        "gives_way": overload.words,
        "shed": step,
        "skipped": numbers.count("records_skipped_total"),
        "progress": numbers.of("progress_timestamp_seconds") or None,
    }


def _decisions(page: Page, epoch: Callable[[float], float | None]) -> list[dict[str, Any]]:
    """Sentences, newest first; of looks that came to the same one after the other, the newest with their number."""
    found: list[dict[str, Any]] = []
    result, times = None, 1
    for entry in reversed(page.chronicle.entries()):
        told = words.decision(entry.event, entry.facts)
        if told is None:
            continue
        same = entry.facts.get("result") if told.tone == "quiet" else None
        if same is not None and same == result:
            times += 1
            found[-1]["text"] = f"{found[-1]['text'].rstrip('.').partition(' · ')[0]} · {times} times in a row."
            continue
        result, times = same, 1
        found.append({"at": epoch(entry.at), "tone": told.tone, "text": told.text})
    return found[:DECISIONS]


def _history(page: Page, epoch: Callable[[float], float | None]) -> dict[str, Any]:
    points = page.history.points()
    return {
        "states": list(words.STATES),
        "at": [epoch(point.last) for point in points],
        "served": [_short(point.served) for point in points],
        "frozen": [_short(point.frozen) for point in points],
        "state": [point.rank for point in points],
        "marks": [
            {"at": epoch(mark.at), "kind": mark.kind, "version": mark.version, "count": mark.count}
            for mark in page.history.marks()
        ],
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _dead_letters(page: Page) -> str:
    try:
        return without_secrets(dead_letters_url(page.worker.settings))
    except SettingsError as error:
        return str(error)


def without_secrets(url: str) -> str:
    """An address without user, password and query, which are nobody's business who may look."""
    parts = urlsplit(url)
    if not parts.netloc:
        return url.partition("?")[0]
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
