# ruff: noqa: E501 — a sentence is compared best on one line
"""What an operator reads: each decision of the log has a sentence, and the sentence on top says what matters most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.page import words
from daemon.page.verdict import Facts, verdict
from daemon.regulator import State
from daemon.shift_kind import ShiftKind
from daemon.signals import CLASSIFICATION, REGRESSION
from daemon.telemetry import BURSTS, TRIPS

WELL = Facts(
    alive=(True, "progress"),
    ready=(True, "ready"),
    state="steady",
    frozen=False,
    version=3,
    served=0.12,
    frozen_error=0.28,
    labels=500,
    lag_s=0.0,
    overload=0,
    state_at=90.0,
)


def sentence(**changes: Any) -> str:
    found = verdict(replace(WELL, **changes))
    assert all(isinstance(part, str) or set(part) == {"at"} for part in found["text"])
    return "".join(part if isinstance(part, str) else f"<{part['at']:g}>" for part in found["text"])


@pytest.mark.parametrize(
    ("changes", "tone", "text"),
    [
        ({}, "good", "All is well: the model is in its working range."),
        ({"state": "fast", "drift_at": 80.0}, "busy", "The model drifted at <80>; fast adaptation is at work."),
        ({"state": "fast", "out_at": 70.0}, "busy", "The model left its working range at <70>; fast adaptation is at work."),
        ({"state": "slow"}, "busy", "The model is out of its working range; correcting is not enough, a better version is being learnt."),
        ({"state": "settling"}, "busy", "Version 3 took over at <90> and settles in."),
        ({"state": "fallback", "version": 0, "trip": "harm"}, "alarm", "Safety stop at <90>: labels showed that adapting made the answers worse. Adaptation pauses; the frozen model answers."),
        ({"frozen": True, "frozen_at": 60.0, "state": "fast"}, "warning", "Frozen by an operator since <60>: version 3 answers as it is, nothing adapts or learns."),
        ({"ready": (False, "starting")}, "busy", "Starting: the model is being loaded, nothing is answered yet."),
        ({"ready": (False, "draining"), "frozen": True}, "warning", "Finishing: it answers what it has read, then it ends."),
        ({"ready": (False, "waiting: no broker")}, "alarm", "No records are answered: waiting: no broker."),
        ({"alive": (False, "no progress for 80 s"), "state": "fast"}, "alarm", "The daemon is stuck: no progress for 80 s."),
        ({"lag_s": 30.0}, "warning", "All is well: the model is in its working range. It falls behind: more records come than it can answer."),
    ],
)  # fmt: skip
def test_the_sentence_on_top(changes: dict[str, Any], tone: str, text: str) -> None:
    assert sentence(**changes) == text
    assert verdict(replace(WELL, **changes))["tone"] == tone


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "Served error 0.12, frozen would be 0.28."),
        ({"frozen_error": 0.121}, "Served error 0.12, the same as the frozen model's."),
        ({"frozen_error": 0.05}, "Served error 0.12, at present worse than frozen: 0.05."),
        ({"frozen_error": None}, "Served error 0.12."),
    ],
)
def test_the_numbers_beside_it(changes: dict[str, Any], text: str) -> None:
    assert verdict(replace(WELL, **changes))["numbers"] == text


def test_without_labels_it_says_so() -> None:
    assert "No labels" in verdict(replace(WELL, served=None, labels=0))["numbers"]
    assert "still to come" in verdict(replace(WELL, served=None))["numbers"]


def test_every_state_signal_trip_result_and_kind_has_words() -> None:
    assert set(words.STATES) == set(words.MEANING) == {state.value for state in State}
    assert {*CLASSIFICATION, *REGRESSION} <= set(words.SIGNALS)
    assert set(words.TRIPS) == set(TRIPS)
    assert set(words.RESULTS) == set(BURSTS) - {"promoted"}
    assert set(words.KINDS) == {kind.value for kind in ShiftKind} - {"none"}


@pytest.mark.parametrize(
    ("event", "facts", "text"),
    [
        ("drift", {"signals": ["entropy", "error"], "shift": "concept"}, "Drift: the model is unsure, answers are wrong; most likely the same inputs now mean something else."),
        ("decision", {"state": "fast", "before": "steady", "reasons": ["drift alarm"]}, "Fast adaptation began: drift was noticed."),
        ("decision", {"state": "steady", "before": "fast", "reasons": ["in band for 336 rows"]}, "Back in the working range: within bounds for 336 records."),
        ("decision", {"state": "fallback", "before": "fast", "trip": "harm", "version": 0, "reasons": []}, "Safety stop: labels showed that adapting made the answers worse. The frozen model answers meanwhile."),
        ("version promoted", {"version": 4, "gain": 0.375, "gain_low": 0.14, "measure": "error"}, "Version 4 promoted: in its test on newest labels it lowered the error by 0.38 (at least 0.14 as far as can be told)."),
        ("burst without a version", {"result": "declined", "reason": "a burst would not pay: 0.0003 of error to be expected, 0.2133 needed for its cost"}, "No learning was started: it would hardly pay (the error might fall by 0.0003; to be worth its cost it has to by 0.2133)."),
        ("asked by an operator", {"action": "freeze", "who": "10.0.0.7", "done": True, "text": "frozen"}, "Operator at 10.0.0.7, freeze: frozen."),
        ("bundle taken", {"error": 0.05, "served_error": 0.06, "labels": 700, "rows": 2048}, "A new model as delivered took over: on 700 labelled records its error was 0.05, that of the answers 0.06."),
        ("bundle taken", {"error": None, "served_error": None, "rows": 2048}, "A new model as delivered took over after a comparison on 2048 records."),
        ("bundle refused", {"reason": "it answered what is not finite"}, "A new model was refused: it answered what is not finite. The one before goes on."),
        ("version rolled back", {"version": 0, "before": 4}, "Rolled back: the frozen model answers, version 4 not."),
    ],
)  # fmt: skip
def test_a_decision_in_words(event: str, facts: dict[str, Any], text: str) -> None:
    told = words.decision(event, facts)
    assert told is not None and told.text == text


def test_what_is_no_decision_is_not_told() -> None:
    assert words.decision("answered by", {"ways": ["runs"]}) is None
    assert words.decision("decision", {"state": "steady", "before": "steady", "reasons": []}) is None


@given(
    st.sampled_from(["drift", "shift", "decision", "version promoted", "burst without a version", "early warning", "bundle taken"]),
    st.dictionaries(
        st.sampled_from(["signals", "shift", "state", "before", "reasons", "gain", "gain_low", "result", "reason", "version"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
    ),
)  # fmt: skip
def test_no_record_is_too_odd_for_words(event: str, facts: dict[str, Any]) -> None:
    told = words.decision(event, facts)
    assert told is None or (told.text and told.tone)
    assert words.version(facts).endswith(".")
