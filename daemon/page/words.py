"""What the daemon does, in words for somebody who runs a plant and not a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

STATES = {
    "steady": "In its working range",
    "settling": "A new version settles in",
    "fast": "Fast adaptation at work",
    "slow": "Learning a better version",
    "fallback": "Safety stop",
}
"""The controller's states from the calmest on; the place is the rank in the history."""
MEANING = {
    "steady": "What is measured is within its bounds. Both loops look on, and step in when that changes.",
    "fast": "The world has changed. The fast loop corrects for it at once; that can be taken back at any time.",
    "slow": "Correcting is not enough. The slow loop learns a better version from late labels; the fast one goes on.",
    "settling": "A new version has just taken over. Nothing is judged until its own numbers have settled.",
    "fallback": "Something was about to do harm, so adaptation is off for a while and a version that is safe answers.",
}
SIGNALS = {
    "input_shift": "Inputs look unusual",
    "feature_shift": "Inputs look unusual to the model",
    "class_shift": "Rows look unlike their class",
    "output_shift": "Answers have moved",
    "entropy": "The model is unsure",
    "confidence": "Confidence of the answers",
    "class_divergence": "Classes come in unusual shares",
    "disagreement": "Adapted and plain model disagree",
    "error": "Answers are wrong",
    "loss": "Answers are wrong or overconfident",
    "prior": "Classes come in other shares",
    "risk": "Errors exceed what was accepted",
    "features": "Inputs as a whole look unusual",
}
KINDS = {
    "covariate": "the inputs have changed",
    "label": "the classes come in other shares",
    "concept": "the same inputs now mean something else",
}
TRIPS = {
    "non_finite": "the adapted model gave answers that are no numbers",
    "collapse": "the adapted model began to give everything the same answer",
    "harm": "labels showed that adapting made the answers worse",
    "proxy_harm": "the signals say that adapting made things worse",
    "version_harm": "a version was worse than the frozen model",
}
RESULTS = {
    "rejected": "Learning gave no better version",
    "declined": "No learning was started",
    "failed": "Learning failed",
    "overrun": "Learning took too long",
    "out_of_memory": "Learning ran out of memory",
    "non_finite": "Learning gave numbers that are not finite",
    "cancelled": "Learning was called off",
}
_PLAIN = (
    (r"a burst would not pay: ([\d.]+) of error to be expected, ([\d.]+) needed for its cost",
     r"it would hardly pay (the error might fall by \1; to be worth its cost it has to by \2)"),
    (r"\bslow step (rejected|failed)", r"learning gave nothing better (\1)"),
    (r"\bslow step\b", "learning"),
    (r"\bin band\b", "within bounds"),
    (r"\bout of band\b", "out of bounds"),
    (r"\brows\b", "records"),
    (r"steady for long: trying gain ([\d.]+)", r"calm for long: trying a correction of \1"),
    (r"a lower gain made it worse: back to ([\d.]+)", r"less correction made it worse: back to \1"),
    (r"hunting: loop gain lowered to ([\d.e-]+)", r"it corrected to and fro: correcting more slowly from now on (\1)"),
    (r"\bgain ([\d.]+) is the limit\b", r"a correction of \1 is the limit"),
)  # fmt: skip
"""What the log says to those who know the daemon, and what it means."""


class Told(NamedTuple):
    """One decision as a sentence."""

    tone: str
    """quiet, news, good, warning or alarm."""
    text: str


def signal(name: str) -> str:
    """A signal's name in words; its own name where there are none."""
    return SIGNALS.get(name, name.replace("_", " "))


def model(number: Any) -> str:
    """What answers."""
    return "the frozen model" if number == 0 else f"version {number}"


def decision(event: str, facts: Mapping[str, Any]) -> Told | None:
    """A log line of the controller, the slow loop or an operator as a sentence; None for what is no news."""
    match event:
        case "drift":
            names = ", ".join(signal(str(name)).lower() for name in _list(facts.get("signals")))
            kind = KINDS.get(str(facts.get("shift")))
            return Told(
                "warning", f"Drift: {names or 'a signal alarmed'}" + (f"; most likely {kind}." if kind else ".")
            )
        case "shift":
            kind = KINDS.get(str(facts.get("kind")), "something has changed")
            return Told("news", f"By now it looks like this: {kind}.")
        case "no shift any more":
            return Told("good", "No shift of the stream is seen any more.")
        case "decision":
            return _controller(facts)
        case "version promoted":
            return Told("good", f"Version {facts.get('version')} promoted{_gain(facts)}.")
        case "burst without a version":
            result = RESULTS.get(str(facts.get("result")), "Learning ended without a version")
            reason = _clean(facts.get("reason"))
            return Told("quiet", f"{result}{f': {reason}' if reason else ''}.")
        case "version rolled back":
            return Told(
                "news", f"Rolled back: {model(facts.get('version'))} answers, {model(facts.get('before'))} not."
            )
        case "version withdrawn: worse than the frozen model":
            return Told(
                "alarm", f"Version {facts.get('version')} withdrawn: it was shown to be worse than the frozen model."
            )
        case "bundle taken":
            return Told("good", f"A new model as delivered took over{_compared(facts)}.")
        case "bundle refused":
            return Told("warning", f"A new model was refused: {_clean(facts.get('reason'))}. The one before goes on.")
        case "bundle failed":
            return Told("warning", f"A new model could not be taken: {_clean(facts.get('reason'))}.")
        case "restarted":
            return Told("news", "The daemon was started again and went on from its checkpoint.")
        case "fast adaptation served":
            return Told("good", "The fast adaptation has proved itself and now answers.")
        case "fast adaptation in shadow":
            return Told("news", "The fast adaptation runs in the background and no longer answers.")
        case "fast adaptation reset":
            why = TRIPS.get(str(facts.get("reason")), _clean(facts.get("reason")))
            return Told("warning", f"The fast adaptation begins again from nothing: {why}.")
        case "asked by an operator":
            done = "" if facts.get("done") else "not done; "
            tone = "news" if facts.get("done") else "warning"
            return Told(
                tone, f"Operator at {facts.get('who') or 'unknown'}, {facts.get('action')}: {done}{facts.get('text')}."
            )
    if event.startswith("early warning"):
        return Told("quiet", f"Early warning: “{signal(str(facts.get('signal')))}” becomes unsteady.")
    return None


def _controller(facts: Mapping[str, Any]) -> Told | None:
    state, before = str(facts.get("state")), str(facts.get("before"))
    reasons = [_clean(reason) for reason in _list(facts.get("reasons"))]
    why = "; ".join(reasons)
    if state == before:
        return Told("quiet", why[:1].upper() + why[1:] + ".") if why else None
    match state:
        case "fast" if before == "slow":
            return Told("news", f"Back to fast adaptation alone: {why}.")
        case "fast" if before == "fallback":
            return Told("news", "The safety stop is over: fast adaptation may act again.")
        case "fast":
            plain = "drift was noticed" if "drift alarm" in reasons else why
            return Told("warning", f"Fast adaptation began: {plain}.")
        case "steady":
            return Told("good", f"Back in the working range: {why}.")
        case "slow":
            return Told("warning", "Fast adaptation is at its limit and not enough: a better version is being learnt.")
        case "settling":
            return Told("news", f"{model(facts.get('version')).capitalize()} took over and settles in.")
        case "fallback":
            trip = TRIPS.get(str(facts.get("trip")), why)
            return Told("alarm", f"Safety stop: {trip}. {model(facts.get('version')).capitalize()} answers meanwhile.")
    return Told("news", f"{STATES.get(state, state)}: {why}.")


def _gain(facts: Mapping[str, Any]) -> str:
    gain, low = facts.get("gain"), facts.get("gain_low")
    if not isinstance(gain, (int, float)):
        return ""
    least = f" (at least {low:.2f} as far as can be told)" if isinstance(low, (int, float)) and low > 0 else ""
    measure = "error" if facts.get("measure") in (None, "error") else str(facts["measure"]).replace("_", " ")
    return f": in its test on newest labels it lowered the {measure} by {gain:.2f}{least}"


def _compared(facts: Mapping[str, Any]) -> str:
    """On what a new model was compared with the one before."""
    error, served, rows = facts.get("error"), facts.get("served_error"), facts.get("rows")
    if isinstance(error, (int, float)) and isinstance(served, (int, float)):
        return (
            f": on {facts.get('labels')} labelled records its error was {error:.2f}, that of the answers {served:.2f}"
        )
    return f" after a comparison on {rows} records" if isinstance(rows, int) else ""


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _clean(reason: Any) -> str:
    """A reason of the log in plain words and without its full stop."""
    text = "" if reason is None else str(reason).rstrip(".")
    for pattern, plain in _PLAIN:
        text = re.sub(pattern, plain, text)
    return text


def version(record: Mapping[str, Any]) -> str:
    """Where a promoted version comes from, in one sentence."""
    parts = []
    if "imported" in record:
        parts.append("taken in from a file")
    rows = record.get("rows")
    if isinstance(rows, int):
        parts.append(f"learnt from {rows:,} labelled records")
    low, high, gain = (record.get(name) for name in ("gain_low", "gain_high", "gain"))
    if isinstance(gain, (int, float)):
        span = ""
        if isinstance(low, (int, float)) and isinstance(high, (int, float)):
            span = f" (likely {low:.2f} to {high:.2f})"
        parts.append(f"lowered the error by {gain:.2f} in its test{span}")
    if "withdrawn" in record:
        parts.append("withdrawn: " + TRIPS.get(str(record["withdrawn"]), _clean(record["withdrawn"])))
    text = "; ".join(parts) or "nothing is written down about it"
    return text[:1].upper() + text[1:] + "."
