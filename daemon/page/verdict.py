"""One sentence on top of the page: is it well, since when, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from daemon.page import words

Parts = list[str | dict[str, float]]
"""Text with moments in between: ``{"at": seconds since the epoch}``, which the reader's browser writes in its zone."""

FALLS_BEHIND_S = 10.0
"""Work that waits, in seconds, from which on the sentence says so."""
CLOSE = 0.005
"""Errors that differ by less are called the same."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the sentence is made of; moments are seconds since the epoch, None where unknown."""

    alive: tuple[bool, str]
    ready: tuple[bool, str]
    state: str
    frozen: bool
    version: int
    served: float | None
    frozen_error: float | None
    labels: int
    """Labels that found their answer."""
    lag_s: float | None
    overload: int
    state_at: float
    drift_at: float | None = None
    """Of the drift that began the present excursion."""
    out_at: float | None = None
    """When the working range was left."""
    frozen_at: float | None = None
    trip: str | None = None


def verdict(facts: Facts) -> dict[str, Any]:
    """``tone`` (good, busy, warning, alarm), ``text``, and ``numbers``: apart, since a reader is told of a new text."""
    tone, text = _health(facts) or _loop(facts)
    behind = facts.lag_s is not None and facts.lag_s >= FALLS_BEHIND_S
    if (behind or facts.overload) and tone != "alarm":
        tone = "warning"
        text = [*text, " It falls behind: more records come than it can answer."]
    return {"tone": tone, "text": text, "numbers": _numbers(facts)}


def _health(facts: Facts) -> tuple[str, Parts] | None:
    if not facts.alive[0]:
        return "alarm", [f"The daemon is stuck: {facts.alive[1]}."]
    if facts.ready[0]:
        return None
    why = facts.ready[1]
    if why == "starting":
        return "busy", ["Starting: the model is being loaded, nothing is answered yet."]
    if why == "draining":
        return "warning", ["Finishing: it answers what it has read, then it ends."]
    return "alarm", [f"No records are answered: {why}."]


def _loop(facts: Facts) -> tuple[str, Parts]:
    answers = words.model(facts.version)
    if facts.frozen:
        since: Parts = [" since ", {"at": facts.frozen_at}] if facts.frozen_at is not None else []
        tail = f": {answers} answers as it is, nothing adapts or learns."
        return "warning", ["Frozen by an operator", *since, tail]
    match facts.state:
        case "fast":
            return "busy", [*_out(facts), "; fast adaptation is at work."]
        case "slow":
            return "busy", [*_out(facts), "; correcting is not enough, a better version is being learnt."]
        case "settling":
            return "busy", [f"{answers.capitalize()} took over at ", {"at": facts.state_at}, " and settles in."]
        case "fallback":
            why = words.TRIPS.get(facts.trip or "", "the guard stepped in")
            return "alarm", [
                "Safety stop at ", {"at": facts.state_at}, f": {why}. Adaptation pauses; {answers} answers."
            ]  # fmt: skip
    return "good", ["All is well: the model is in its working range."]


def _out(facts: Facts) -> Parts:
    if facts.drift_at is not None:
        return ["The model drifted at ", {"at": facts.drift_at}]
    if facts.out_at is not None:
        return ["The model left its working range at ", {"at": facts.out_at}]
    return ["The model is out of its working range"]


def _numbers(facts: Facts) -> str:
    served, frozen = facts.served, facts.frozen_error
    if served is None and facts.labels:
        return "Its error is not known yet: labels are still to come."
    if served is None:
        return "No labels have come yet: its error is not known."
    if frozen is None:
        return f"Served error {served:.2f}."
    if abs(served - frozen) < CLOSE:
        return f"Served error {served:.2f}, the same as the frozen model's."
    if served > frozen:
        return f"Served error {served:.2f}, at present worse than frozen: {frozen:.2f}."
    return f"Served error {served:.2f}, frozen would be {frozen:.2f}."
