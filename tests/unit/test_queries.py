from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from daemon import checkpoint
from daemon.assembly import Worker, assemble
from daemon.config import load_settings
from daemon.errors import SettingsError, StreamError
from daemon.opening import open_streams
from daemon.queries import LONGEST_NAME, Queries
from daemon.records import Batch, Labels, RawBatch
from daemon.settings import LabelBudget
from daemon.signals import CLASSIFICATION, Rows
from daemon.streams import open_sink
from daemon.streams.codecs import codec
from daemon.telemetry import Telemetry
from tests.unit.worlds import MemoryLabels, raw, record, records, settings, source_rows, worker

BUDGET = LabelBudget(share=0.1, window_rows=50)


class Asked:
    """Keeps the questions, and the keys that they go under."""

    def __init__(self) -> None:
        self.keys: list[bytes | None] = []
        self.values: list[bytes] = []

    def __call__(self, keys: list[bytes | None], values: list[bytes]) -> None:
        assert len(keys) == len(values)
        self.keys += keys
        self.values += values

    @property
    def questions(self) -> list[dict[str, Any]]:
        return [json.loads(value) for value in self.values]

    @property
    def ids(self) -> list[str]:
        return [question["id"] for question in self.questions]


def queries(budget: LabelBudget = BUDGET, task: str = "classification") -> tuple[Queries, Asked]:
    asked = Asked()
    return Queries(asked, budget, task=task, counters=Telemetry([], [], []).queries), asked


def asking(folder: Path, budget: LabelBudget = BUDGET, **changes: Any) -> tuple[Worker, Asked]:
    """A worker in memory that asks for labels."""
    made, asked = worker(folder, **changes), Asked()
    task = changes.get("task", "classification")
    made.loop.queries = Queries(asked, budget, task=task, counters=made.telemetry.queries)
    return made, asked


def test_a_share_of_the_records_is_asked_for_with_all_that_a_labeller_needs(tmp_path: Path) -> None:
    made, asked = asking(tmp_path)
    for first in range(0, 320, 32):
        made.loop.process(raw(records(32, seed=first, first=first), first, partition="sensors/3"))
    assert len(asked.values) == 6 * 5 and len(set(asked.ids)) == 30
    answers = {answer["id"]: answer for answer in made.sink.answers}
    for place, question in enumerate(asked.questions):
        answer = answers[question["id"]]
        assert question["window"] == place // 5 == int(question["id"]) // 50
        assert (question["partition"], question["offset"]) == ("sensors/3", int(question["id"]))
        assert (question["prediction"], question["ts"]) == (answer["y"], 1000.0)
        assert question["confidence"] == pytest.approx(answer["confidence"], abs=1e-4)
        assert 0 < question["probability"] <= 1 and question["why"] in ("representative", "uncertain")
        assert "key" not in question
    counted = {why: child._value.get() for why, child in made.telemetry.queries.items()}
    assert counted == {why: sum(q["why"] == why for q in asked.questions) for why in counted}


def test_asking_changes_no_answer_and_no_state(tmp_path: Path) -> None:
    silent, (curious, _) = worker(tmp_path), asking(tmp_path)
    for first in range(0, 160, 32):
        batch = raw(records(32, seed=first, first=first, labelled=first > 64), first)
        silent.loop.process(batch)
        curious.loop.process(batch)
    assert curious.sink.values == silent.sink.values
    assert checkpoint.encode(curious.loop.resident.state_dict()) == checkpoint.encode(silent.loop.resident.state_dict())


def test_a_regression_is_asked_about_without_a_confidence(tmp_path: Path) -> None:
    made, asked = asking(tmp_path, task="regression")
    made.loop.process(raw(records(100)))
    assert len(asked.values) == 10
    assert all(
        "confidence" not in question and isinstance(question["prediction"], float) for question in asked.questions
    )


def test_a_record_that_brings_its_label_or_is_not_finite_is_never_asked_for(tmp_path: Path) -> None:
    made, asked = asking(tmp_path, LabelBudget(share=1.0, window_rows=50))
    x, y = source_rows(150)
    rows = []
    for row in range(150):
        more = {"y": int(y[row])} if row % 3 == 1 else {}
        rows.append(record(row, [float("nan"), 0, 0, 0] if row % 3 == 2 else x[row], **more))
    made.loop.process(raw(rows))
    assert asked.ids == [str(row) for row in range(0, 150, 3)]


def test_a_record_whose_label_has_come_is_not_asked_for(tmp_path: Path) -> None:
    made, asked = asking(tmp_path, LabelBudget(share=1.0, window_rows=50))
    made.loop.labels = MemoryLabels(Labels([str(row) for row in range(20)], [0] * 20, [0.0] * 20))
    made.loop.process(raw(records(40)))
    made.loop.process(raw(records(10, first=40), 40))
    assert asked.ids == [str(row) for row in range(20, 50)]


def test_a_label_that_lies_ahead_of_the_stream_is_still_asked_for(tmp_path: Path) -> None:
    made, asked = asking(tmp_path, LabelBudget(share=1.0, window_rows=50))
    made.loop.labels = MemoryLabels(Labels(["7"], [0], [1e9]))
    made.loop.process(raw(records(50)))
    assert "7" in asked.ids


def test_an_answer_that_is_not_a_number_is_not_asked_about(tmp_path: Path) -> None:
    made, asked = asking(tmp_path, LabelBudget(share=1.0, window_rows=10), fast={"name": "none"})
    made.loop.resident.frozen.register_forward_hook(
        lambda module, inputs, outputs: outputs.masked_fill(inputs[0][:, :1] > 0, float("nan"))
    )
    x, _ = source_rows(60)
    made.loop.process(raw([record(row, x[row]) for row in range(60)]))
    assert asked.ids and all(x[int(name), 0] <= 0 for name in asked.ids)


def test_how_the_stream_is_cut_into_batches_does_not_change_the_questions() -> None:
    found = []
    for sizes in ([400], [1] * 400, [49, 1, 51, 99, 200]):
        made, asked = queries()
        first = 0
        for size in sizes:
            take(made, size, first=first, of=400)
            first += size
        found.append(asked.values)
    assert len(found[0]) == 40 and found[0] == found[1] == found[2]


def test_a_restart_from_a_checkpoint_asks_the_same_again(tmp_path: Path) -> None:
    batches = [raw(records(32, seed=n, first=32 * n), 32 * n) for n in range(20)]
    through, heard = asking(tmp_path)
    for batch in batches[:7]:
        through.loop.process(batch)
    assert through.loop.queries is not None and len(through.loop.queries) > 0
    body = checkpoint.encode([through.state_dict(), through.loop.queries.state_dict()])
    before = len(heard.values)
    again, repeated = asking(tmp_path)
    state, open_window = checkpoint.decode(body)
    again.load_state_dict(state)
    assert again.loop.queries is not None
    again.loop.queries.load_state_dict(open_window)
    for batch in batches[7:]:
        through.loop.process(batch)
        again.loop.process(batch)
    assert len(repeated.values) > 10 and repeated.values == heard.values[before:]
    assert checkpoint.encode(again.loop.queries.state_dict()) == checkpoint.encode(through.loop.queries.state_dict())
    assert again.loop.queries.asked == len(heard.values)


def test_the_open_window_is_part_of_a_workers_checkpoint(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"label_queries": f"file:{tmp_path / 'ask.jsonl'}", "label_budget": BUDGET}
    made = assemble(settings(tmp_path, **changes))
    made.sink.open()
    made.loop.process(raw(records(70)))
    state = checkpoint.decode(checkpoint.encode(made.state_dict()))
    again = assemble(settings(tmp_path, **changes))
    again.load_state_dict(state)
    assert again.loop.queries is not None and len(again.loop.queries) == 20
    again.load_state_dict({**state, "queries": None})
    silent = assemble(settings(tmp_path))
    silent.load_state_dict(state)
    assert silent.loop.queries is None and silent.state_dict()["queries"] is None
    made.sink.close()


def test_a_window_of_another_length_is_given_up_and_the_count_goes_on() -> None:
    first, _ = queries()
    take(first, 70)
    state = checkpoint.decode(checkpoint.encode(first.state_dict()))
    other, asked = queries(LabelBudget(share=0.1, window_rows=40))
    other.load_state_dict(state)
    assert len(other) == 0 and other.asked == 5
    take(other, 40, first=70)
    assert [question["window"] for question in asked.questions] == [1] * 4
    other.load_state_dict(None)
    assert other.asked == 9


def test_questions_about_what_was_answered_before_a_restart_are_not_repeated(tmp_path: Path) -> None:
    undisturbed, all_of_them = asking(tmp_path)
    made, asked = asking(tmp_path)
    made.loop.emit_from = {"mem/0": 120}
    for first in range(0, 320, 32):
        batch = raw(records(32, seed=first, first=first), first)
        undisturbed.loop.process(batch)
        made.loop.process(batch)
    # The third window reaches from 100 to 149: it was still open when the worker went down.
    expected = [value for value in all_of_them.values if json.loads(value)["window"] >= 2]
    assert asked.values == expected and made.loop.emit_from == {}


def rows_of(count: int, width: int = 3, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    signals = rng.random((count, len(CLASSIFICATION)), dtype=np.float32)
    features = rng.normal(size=(count, width)).astype(np.float32)
    confidence = rng.random(count).astype(np.float32)
    return Rows(rng.integers(0, 3, count).astype(np.float32), confidence, signals, None, features=features)


def take(made: Queries, count: int, *, first: int = 0, width: int = 3, of: int = 0, **more: Any) -> None:
    """Hand ``count`` records over; ``of``: they are part of so many, which are always the same."""
    offsets = list(range(first, first + count))
    names = more.get("names") or [str(offset) for offset in offsets]
    batch_raw = RawBatch([], more.get("keys") or [None] * count, [0.0] * count, ["p/0"] * count, offsets)
    x = np.zeros((count, 2), np.float32)
    batch = Batch(names, x, [None] * count, np.asarray(offsets) * 1.0, np.ones(count, bool), list(range(count)))
    part = slice(first, first + count)
    rows = rows_of(of, width) if of else rows_of(count, width, first)
    if of:
        columns = (rows.prediction[part], rows.confidence[part], rows.signals[part])
        rows = Rows(*columns, None, features=None if rows.features is None else rows.features[part])
    made.take(batch_raw, batch, rows, x, answered={}, waits=more.get("waits"))


def test_a_repeated_id_is_asked_for_once_and_at_its_newest_record() -> None:
    made, asked = queries(LabelBudget(share=1.0, window_rows=50))
    take(made, 50, names=[str(row % 30) for row in range(50)])
    assert sorted(map(int, asked.ids)) == list(range(30))
    assert {q["id"]: q["offset"] for q in asked.questions}["3"] == 33


def test_keys_are_text_where_they_are_and_base64_where_not() -> None:
    made, asked = queries(LabelBudget(share=1.0, window_rows=10))
    keys: list[bytes | None] = [b"pump", b"\xff\x00", None, *[b"k"] * 7]
    take(made, 10, keys=keys)
    text, coded, none = asked.questions[:3]
    assert text["key"] == "pump" and coded["key_base64"] == "/wA=" and not {"key", "key_base64"} & set(none)
    assert asked.keys == keys


def test_a_record_with_an_endless_name_or_key_is_not_asked_for() -> None:
    made, asked = queries(LabelBudget(share=1.0, window_rows=10))
    names = [str(row) for row in range(12)]
    names[4] = "x" * (LONGEST_NAME + 1)
    take(made, 12, names=names, keys=[None] * 7 + [b"k" * (LONGEST_NAME + 1)] + [None] * 4)
    assert asked.ids == [names[row] for row in range(12) if row not in (4, 7)]


def test_features_of_another_kind_are_not_compared_with_those_of_the_open_window() -> None:
    made, asked = queries(LabelBudget(share=1.0, window_rows=50))
    take(made, 49)
    take(made, 1, first=49, width=2)
    assert len(made) == 1 and asked.values == []


def test_less_than_one_question_a_window_adds_up() -> None:
    made, asked = queries(LabelBudget(share=0.03, window_rows=10))
    take(made, 1_000)
    assert len(asked.values) == 30
    assert np.diff([question["window"] for question in asked.questions]).max() <= 4


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0.01, 1.0),
    size=st.integers(10, 40),
    batches=st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.floats(0, 1)), min_size=1, max_size=12),
)
def test_whatever_comes_the_budget_holds_and_the_state_goes_on_to_the_bit(
    share: float, size: int, batches: list[tuple[int, bool, float]]
) -> None:
    budget = LabelBudget(share=share, window_rows=size)
    made, asked = queries(budget)
    first, known = 0, set[str]()
    for count, restart, labelled in batches:
        if restart:
            state = checkpoint.decode(checkpoint.encode(made.state_dict()))
            made = Queries(asked, budget, task="classification", counters=Telemetry([], [], []).queries)
            made.load_state_dict(state)
        known |= {str(row) for row in range(first, first + round(count * labelled))}
        before = len(asked.values)
        take(made, count, first=first, waits=lambda name, known=known: name not in known)
        assert not set(asked.ids[before:]) & known
        first += count
        assert len(made) == first % size and len(asked.values) <= share * first + 1e-6
    assert len(set(asked.ids)) == len(asked.ids) == made.asked


def test_nobody_is_asked_unless_a_place_for_the_questions_is_named(tmp_path: Path) -> None:
    assert open_streams(settings(tmp_path), codec("json", (4,))).ask is None
    made = assemble(settings(tmp_path))
    assert made.loop.queries is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"label_queries": "file:in.jsonl", "source": "file:in.jsonl"}, "HOMEOSTAT_SOURCE is the same"),
        (
            {"label_queries": "kafka://h:1/labels", "labels": "kafka://h:1/labels/", "source": "file:in.jsonl"},
            "HOMEOSTAT_LABELS is the same",
        ),
        (
            {"label_queries": "file:ask.jsonl", "label_window": 100},
            "HOMEOSTAT_LABEL_BUDGET__WINDOW_ROWS=200: labels may come for the newest 100 records only",
        ),
    ],
)
def test_questions_that_would_come_to_nothing_are_refused(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SettingsError, match=problem):
        open_streams(settings(tmp_path, **changes), codec("json", (4,)))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SHARE", "0"), ("SHARE", "1.5"), ("WINDOW_ROWS", "3"), ("WINDOW_ROWS", "100000"), ("WINDOW_ROWS", "many")],
)
def test_a_budget_that_can_not_be_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(f"HOMEOSTAT_LABEL_BUDGET__{variable}", value)
    with pytest.raises(SettingsError, match=f"HOMEOSTAT_LABEL_BUDGET__{variable}={value}"):
        load_settings()


@pytest.mark.parametrize(
    ("answers", "dead", "asked", "problem"),
    [
        (
            "file:out.jsonl",
            "null:",
            "file://./out.jsonl",
            "HOMEOSTAT_LABEL_QUERIES=.*HOMEOSTAT_SINK names the same file",
        ),
        ("null:", "file:d.jsonl", "file:d.jsonl", "HOMEOSTAT_LABEL_QUERIES=.*HOMEOSTAT_DEAD_LETTERS names the same"),
        ("-", "null:", "-", "HOMEOSTAT_LABEL_QUERIES=-: HOMEOSTAT_SINK names the same file"),
        ("null:", "null:", "sim://ageing", "HOMEOSTAT_LABEL_QUERIES=sim://ageing: sim: can't be used here"),
        ("null:", "null:", "ask.csv", "HOMEOSTAT_LABEL_QUERIES=ask.csv: no scheme"),
        ("null:", "null:", "file:ask.csv", "HOMEOSTAT_LABEL_QUERIES=file:ask.csv: what is written is JSON lines"),
    ],
)
def test_a_wrong_place_for_questions_is_refused(answers: str, dead: str, asked: str, problem: str) -> None:
    with pytest.raises(StreamError, match=problem):
        open_sink(answers, dead_letters_url=dead, queries_url=asked)


def test_questions_go_to_a_file_of_their_own_and_are_durable_with_the_answers(tmp_path: Path) -> None:
    sink = open_sink(
        f"file:{tmp_path}/out.jsonl", dead_letters_url="null:", queries_url=f"file:{tmp_path}/questions.jsonl"
    )
    sink.open()
    sink.send([None], [b"1"])
    sink.send_queries([None, b"k"], [b"2", b"3"])
    sink.flush(1)
    assert (tmp_path / "out.jsonl").read_bytes() == b"1\n"
    assert (tmp_path / "questions.jsonl").read_bytes() == b"2\n3\n"
    sink.close()


def test_one_producer_serves_all_topics_of_a_broker_and_each_broker_has_its_own() -> None:
    from daemon.stream_settings import KafkaClient

    kafka = KafkaClient()
    one = open_sink("kafka://h:1/a", dead_letters_url="kafka://h:1/d", queries_url="kafka://h:1/q", kafka=kafka)
    assert type(one).__name__ == "KafkaSink"
    two: Any = open_sink("kafka://h:1/a", dead_letters_url="null:", queries_url="kafka://g:2/q", kafka=kafka)
    assert [type(sink).__name__ for sink in two.sinks] == ["KafkaSink", "NullSink", "KafkaSink"]
    apart: Any = open_sink("kafka://h:1/a", dead_letters_url="kafka://g:2/d", queries_url="kafka://h:1/q", kafka=kafka)
    assert len(apart.sinks) == 2
    with pytest.raises(StreamError, match="HOMEOSTAT_SINK names the same topic"):
        open_sink("kafka://h:1/a", dead_letters_url="null:", queries_url="kafka://h:1/a", kafka=kafka)
