"""What `/` and `/state` answer: the metrics' own numbers, strict JSON whatever comes, and nothing from elsewhere."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from daemon import gauges
from daemon.chronicle import Chronicle
from daemon.page import words
from daemon.page.document import digest, document
from daemon.page.earlier import earlier
from daemon.page.live import EVERY_S, FRESH_S, Page
from daemon.page.numbers import Numbers
from daemon.page.state import without_secrets
from daemon.records import DeadLetter
from daemon.service import Service
from daemon.versioning.journal import Journal
from tests.unit.worlds import decoded, source_rows, worker

HOSTILE = '</script><img src=x onerror="alert(1)">\u202e\x00'


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Shown:
    """A page over a worker of its own; the clock stands until it is moved."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.clock = Clock()
        self.worker = worker(folder, **changes)
        loop = self.worker.loop
        loop.actions.chronicle._clock = self.clock
        self.page = Page(
            self.worker,
            ready=lambda: (True, "ready"),
            alive=lambda: (True, "moving"),
            refresh=lambda: gauges.refresh(loop, 3),
            clock=self.clock,
            wall=lambda: 1_800_000_000.0 + self.clock.now,
        )
        self.rows = 0

    def answer(self, rows: int, *, shift: float = 0.0) -> None:
        x, _ = source_rows(rows, seed=self.rows)
        self.worker.loop.process(decoded(x + shift, self.rows))
        self.rows += rows
        self.clock.now += EVERY_S
        self.page.tick()

    def state(self) -> dict[str, Any]:
        self.clock.now += FRESH_S
        answer = self.page.answer("/state")
        assert answer is not None
        status, kind, body, _ = answer
        assert (status, kind) == (HTTPStatus.OK, "application/json")

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        found: dict[str, Any] = json.loads(body, parse_constant=refuse)
        return found


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    made = Shown(tmp_path, source="file://user:secret@host/in.jsonl")
    yield made
    made.worker.loop.actions.learner.close(1.0)


def test_before_the_first_record_everything_is_there_and_unknown(shown: Shown) -> None:
    state = shown.state()
    assert state["error"] == {"served": None, "adapted": None, "version": None, "frozen": None}
    assert state["verdict"] == {
        "tone": "good",
        "text": ["All is well: the model is in its working range."],
        "numbers": "No labels have come yet: its error is not known.",
    }
    assert state["history"]["at"] == [] and state["decisions"] == [] and state["operator"] is False
    assert set(state) == {
        "now", "started", "product", "source", "task", "alive", "ready", "verdict", "loop", "error", "labels",
        "signals", "flow", "checkpoint", "dead", "versions", "held", "decisions", "history", "operator",
    }  # fmt: skip


def test_its_numbers_are_those_of_a_scrape(shown: Shown) -> None:
    for _ in range(12):
        shown.answer(32)
    state, registry = shown.state(), shown.worker.telemetry.registry

    def metric(name: str, **labels: str) -> float:
        found = registry.get_sample_value(f"homeostat_{name}", labels)
        assert found is not None
        return found

    assert state["flow"]["in"] == metric("records_in_total") == 12 * 32
    assert state["flow"]["lag"] == metric("lag_records") == 3
    assert state["loop"]["gain"] == metric("gain_ratio") and state["loop"]["version"] == metric("version")
    assert metric("state", state=state["loop"]["state"]) == 1
    for signal in state["signals"]:
        if signal["deviation"] is not None:
            assert signal["deviation"] == metric("signal_deviation_ratio", signal=signal["name"])
        if signal["threshold"] is not None:
            assert signal["statistic"] == metric("detector_statistic", signal=signal["name"])
    assert state["flow"]["in_per_s"] == pytest.approx(9 * 32 / (9 * EVERY_S + FRESH_S), abs=0.01)


def test_a_drift_is_marked_said_and_dated(shown: Shown) -> None:
    for _ in range(20):
        shown.answer(64, shift=4.0)
        if shown.worker.loop.tally.drifts:
            break
    state = shown.state()
    drift = next(mark for mark in state["history"]["marks"] if mark["kind"] == "drift")
    assert state["started"] <= drift["at"] < state["now"]
    assert state["verdict"]["text"] == ["The model drifted at ", {"at": drift["at"]}, "; fast adaptation is at work."]
    assert any(said["text"].startswith("Drift: ") for said in state["decisions"])
    assert state["decisions"][0]["at"] >= state["decisions"][-1]["at"]
    assert len(state["history"]["at"]) == len(state["history"]["served"]) == len(state["history"]["state"])
    assert state["history"]["states"][state["history"]["state"][-1]] == "fast"


def test_hostile_names_come_as_text_and_secrets_not_at_all(shown: Shown) -> None:
    chronicle = shown.worker.loop.actions.chronicle
    chronicle.died([DeadLetter(HOSTILE, 7, None, b"payload", "undecodable", HOSTILE * 500)])
    chronicle.tell(lambda *_, **__: None, "asked by an operator", action="freeze", who=HOSTILE, done=False, text="no")
    text = json.dumps(state := shown.state())
    letter = state["dead"]["last"][0]
    assert (
        letter["where"] == f"{HOSTILE}, offset 7" and letter["reason"] == "undecodable" and len(letter["detail"]) <= 300
    )
    assert HOSTILE in state["decisions"][0]["text"] and "payload" not in text
    assert "secret" not in text and state["source"] == "file://host/in.jsonl"


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("kafka://user:pass@broker:9092/sensors?x=1", "kafka://broker:9092/sensors"),
        ("sim://ageing?rate=1", "sim://ageing"),
        ("file:/data/in.jsonl", "file:/data/in.jsonl"),
        ("-", "-"),
        ("mqtt://h/+/t#", "mqtt://h/+/t"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url: str, plain: str) -> None:
    assert without_secrets(url) == plain


def test_versions_have_their_records_and_say_which_one_answers(shown: Shown) -> None:
    resident, actions = shown.worker.loop.resident, shown.worker.loop.actions
    weights = {name: value.clone() for name, value in resident.frozen.named_parameters()}
    number = resident.promote(weights, {"rows": 120, "gain": 0.25, "gain_low": 0.1, "gain_high": float("inf")}).number
    shown.answer(32)
    newest, original = shown.state()["versions"]
    assert (newest["number"], newest["serves"], newest["kept"]) == (number, True, True)
    assert newest["record"]["rows"] == 120 and newest["record"]["gain_high"] is None
    assert (original["number"], original["serves"]) == (0, False)
    actions.rollback(0)
    assert [one["serves"] for one in shown.state()["versions"]] == [False, True], "at once, not with the next sample"
    assert shown.state()["history"]["marks"][-1]["kind"] == "rolled back"


def test_after_a_restart_the_decisions_of_before_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "versions"
    decided = {"lineage": "a", "after": 1, "serves": 1, "at": {}, "time": "2026-11-21T10:00:00+00:00"}
    lines = [
        {**decided, "event": "promoted", "version": 1, "record": {"gain": 0.25, "reason": "better"}},
        {**decided, "event": "declined", "version": None, "record": {"reason": "too few rows"}},
        {**decided, "event": "operator", "record": {"asked": "freeze", "who": "me", "done": True, "text": "frozen"}},
        {**decided, "event": "promoted", "version": 2, "after": 3, "record": {}},
        {**decided, "event": "restored", "after": 2, "undone": 1},
        {**decided, "event": "withdrawn", "version": 1, "time": "not a time", "record": None},
        {**decided, "event": "pin", "version": 1, "record": {}},
    ]
    journal = Journal(folder)
    for line in lines:
        journal.append(line)
    found = earlier(folder, lambda at: at)
    assert [one.event for one in found] == [
        "version promoted", "burst without a version", "asked by an operator", "restarted"
    ]  # fmt: skip
    assert found[0].at == 1_795_255_200.0 and all(words.decision(one.event, one.facts) for one in found)
    assert earlier(tmp_path / "nowhere", lambda at: at) == []
    chronicle = Chronicle()
    chronicle.tell(lambda *_, **__: None, "drift", signals=[])
    chronicle.before(found)
    assert [one.event for one in chronicle.entries()][-2:] == ["restarted", "drift"]


def test_readers_and_the_loop_do_not_meet(shown: Shown) -> None:
    """Many readers while versions, marks and letters change: each answer is whole."""
    problems: list[BaseException] = []
    over = threading.Event()

    def read() -> None:
        try:
            while not over.is_set():
                shown.clock.now += FRESH_S
                answer = shown.page.answer("/state")
                assert answer is not None and json.loads(answer[2])["product"]
        except BaseException as error:
            problems.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    resident = shown.worker.loop.resident
    weights = {name: value.clone() for name, value in resident.frozen.named_parameters()}
    for step in range(40):
        resident.promote(weights, {"rows": step})
        shown.worker.loop.actions.chronicle.died([DeadLetter("t/0", step, None, None, "schema", "x")])
        shown.answer(8)
    over.set()
    for reader in readers:
        reader.join()
    assert not problems


def test_many_readers_cost_no_more_than_one(shown: Shown) -> None:
    asked: list[int] = []
    shown.page.refresh = lambda: asked.append(1)
    for _ in range(5):
        shown.page.answer("/state")
    assert len(asked) == 1


def test_samples_are_taken_by_time_and_not_by_batch(shown: Shown) -> None:
    for _ in range(50):
        shown.page.tick()
    assert len(shown.page.history.points()) == 1


def test_metrics_that_are_not_finite_or_not_there_are_none() -> None:
    registry = CollectorRegistry()
    Gauge("homeostat_lag_records", "", registry=registry).set(float("nan"))
    counter = Counter("homeostat_drifts", "", ["signal", "kind"], registry=registry)
    counter.labels("error", "concept").inc(2)
    counter.labels("error", "label").inc(3)
    numbers = Numbers(registry)
    assert numbers.of("lag_records") is None and numbers.of("nothing") is None and numbers.by("nothing", "x") == {}
    assert numbers.counts("drifts_total", "signal") == {"error": 5}


@pytest.mark.parametrize("operator", [True, False])
def test_the_page_is_one_document_that_runs_and_loads_nothing_else(operator: bool) -> None:
    body, headers = document(operator=operator)
    html = body.decode()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    [style], [script] = (re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL) for tag in ("style", "script"))
    assert policy["style-src"] == f"'{digest(style)}'" and policy["script-src"] == f"'{digest(script)}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and headers["Referrer-Policy"] == "no-referrer"
    assert "{{" not in html and " style=" not in html and " onclick=" not in html
    elsewhere = re.findall(r"""(?:src|href)=["']?(?!/|#|data:)[^"'>]+""", html)
    assert not elsewhere and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "localStorage",
        "sessionStorage",
    ):
        assert way not in script
    assert ('id="token"' in html) is operator and "<!-- operator" not in html


def test_the_token_s_file_decides_whether_there_are_controls(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("an-operators-token-of-a-plant")
    shown = Shown(tmp_path, operator={"token_file": token})
    answer = shown.page.answer("/")
    assert answer is not None and b'id="token"' in answer[2] and shown.state()["operator"] is True
    assert shown.page.answer("/nothing") is None


def test_the_service_feeds_its_page(tmp_path: Path) -> None:
    made = worker(tmp_path)
    service = Service(made)
    assert service.page.worker is made and service.page.ready() == (False, "starting")
