"""What is acknowledged, when, and what is known again after a break; against a broker made of lists."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daemon.streams.mqtt_window import QUIET_S, Pace, Row, Window

IN_FLIGHT = 4


def row(mid: int, payload: bytes = b"x", qos: int = 1) -> Row:
    return Row(mid, qos, b"t", payload, 0.0)


def window(first: int = 0, max_rows: int = 10) -> Window:
    made = Window(first, max_rows=max_rows, max_bytes=1000)
    made.connected(False)
    return made


def test_rows_are_numbered_from_the_checkpoint_on() -> None:
    w = window(7)
    w.arrived(row(1, b"a"), again=False)
    w.arrived(row(2, b"b"), again=False)
    assert [(taken.offset, taken.payload) for taken in w.take(5)] == [(7, b"a"), (8, b"b")]


def test_nothing_is_acknowledged_before_its_commit_and_each_once() -> None:
    w = window()
    for mid in (5, 6, 7):
        w.arrived(row(mid), again=False)
    w.take(2)
    assert w.acknowledgements() == []
    assert w.unsettled == 2
    w.commit(1)
    assert w.acknowledgements() == [5]
    w.commit(9)  # a number that was not handed out yet acknowledges nothing
    assert w.acknowledgements() == [6]
    assert w.acknowledgements() == []


def test_a_row_in_hand_that_comes_again_is_not_handed_out_twice_and_is_acknowledged_on_the_new_connection() -> None:
    w = window()
    w.arrived(row(1, b"a"), again=False)
    w.take(1)
    w.connected(True)
    w.commit(1)
    assert w.acknowledgements() == []  # the old connection's identifiers mean nothing before they come again
    w.arrived(row(1, b"a"), again=True)
    assert len(w) == 0
    assert w.acknowledgements() == [1]


@pytest.mark.parametrize(
    ("session", "payload", "again"), [(False, b"a", True), (True, b"b", True), (True, b"a", False)]
)
def test_what_is_not_surely_the_row_in_hand_is_handed_out(session: bool, payload: bytes, again: bool) -> None:
    w = window()
    w.arrived(row(1, b"a"), again=False)
    w.take(1)
    w.connected(session)
    w.arrived(row(1, payload), again=again)
    assert [(taken.payload, taken.offset) for taken in w.take(9)] == [(payload, 1)]


def test_what_was_acknowledged_is_never_taken_for_known() -> None:
    # The broker may have used the identifier for an equal reading since.
    w = window()
    w.arrived(row(1, b"a"), again=False)
    w.take(1)
    w.commit(1)
    assert w.acknowledgements() == [1]
    w.connected(True)
    w.arrived(row(1, b"a"), again=True)
    assert [taken.offset for taken in w.take(9)] == [1]


def test_rows_without_a_quality_of_service_outlive_a_connection_and_are_dropped_only_for_want_of_room() -> None:
    w = window(max_rows=2)
    for payload in (b"a", b"b", b"c"):
        w.arrived(row(0, payload, qos=0), again=False)
    w.arrived(row(1, b"d"), again=False)
    w.connected(True)
    assert [taken.payload for taken in w.take(9)] == [b"a", b"b"]
    assert w.dropped == 1
    w.commit(2)
    assert w.acknowledgements() == []


def test_a_refused_row_is_acknowledged_in_its_turn() -> None:
    w = window()
    w.arrived(row(1), again=False)
    w.refuse(row(2))
    assert w.acknowledgements() == []
    w.take(1)
    w.commit(1)
    assert w.acknowledgements() == [1, 2]


def test_reading_stops_when_what_waits_takes_too_much_memory() -> None:
    w = window()
    w.arrived(row(1, bytes(2000)), again=False)
    assert w.full
    w.take(1)
    assert not w.full


class AgainstABroker(RuleBasedStateMachine):
    """Connections break at any moment, acknowledgements get lost, payloads repeat; and still nothing is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.window = Window(0, max_rows=100, max_bytes=10_000)
        self.waiting: list[tuple[int, bytes]] = []
        self.flying: dict[int, tuple[int, bytes]] = {}
        self.told: list[int] = []
        self.free = list(range(1, IN_FLIGHT + 1))
        self.serial = self.committed = 0
        self.handed: list[bytes] = []
        self.acked: Counter[bytes] = Counter()
        self.wanted: Counter[bytes] = Counter()
        self.gone: Counter[bytes] = Counter()
        self.connected = False

    @rule(payloads=st.lists(st.sampled_from([b"a", b"a", b"b"]), min_size=1, max_size=3))
    def publish(self, payloads: list[bytes]) -> None:
        for payload in payloads:
            self.serial += 1
            self.wanted[payload] += 1
            self.waiting.append((self.serial, payload))
        if self.connected:
            self.send()

    @precondition(lambda self: not self.connected)
    @rule(forgets=st.integers(0, 5))
    def connect(self, forgets: int) -> None:
        session = forgets > 0
        if not session:
            for _, payload in [*self.waiting, *self.flying.values()]:
                self.gone[payload] += 1
            self.waiting.clear()
            self.flying.clear()
            self.free = list(range(1, IN_FLIGHT + 1))
        self.connected = True
        self.told = list(self.flying)
        self.window.connected(session)
        for mid, (_, payload) in self.flying.items():
            self.window.arrived(row(mid, payload), again=True)
        self.send()

    def send(self) -> None:
        while self.waiting and self.free:
            mid = self.free.pop(0)
            self.flying[mid] = self.waiting.pop(0)
            self.told.append(mid)
            self.window.arrived(row(mid, self.flying[mid][1]), again=False)

    @precondition(lambda self: self.connected)
    @rule(payload=st.sampled_from([b"a", b"b"]))
    def publish_into_a_dying_connection(self, payload: bytes) -> None:
        """The broker takes it for sent, and it never came."""
        self.serial += 1
        self.wanted[payload] += 1
        if self.free and not self.waiting:
            self.flying[self.free.pop(0)] = (self.serial, payload)
        else:
            self.waiting.append((self.serial, payload))
        self.connected = False

    @rule(count=st.integers(1, 5))
    def take(self, count: int) -> None:
        for taken in self.window.take(count):
            assert taken.offset == len(self.handed)
            self.handed.append(taken.payload)

    @rule(back=st.integers(0, 3))
    def commit(self, back: int) -> None:
        self.committed = max(self.committed, len(self.handed) - back)
        self.window.commit(self.committed)

    @precondition(lambda self: self.connected)
    @rule(arriving=st.integers(0, IN_FLIGHT))
    def acknowledge(self, arriving: int) -> None:
        mids = self.window.acknowledgements()
        assert mids == self.told[: len(mids)], "not in the order in which they came"
        del self.told[: len(mids)]
        for mid in mids[:arriving]:
            self.acked[self.flying.pop(mid)[1]] += 1
            self.free.append(mid)
        if arriving < len(mids):
            self.connected = False
        else:
            self.send()

    @precondition(lambda self: self.connected)
    @rule()
    def lose_the_connection(self) -> None:
        self.connected = False

    @invariant()
    def what_is_acknowledged_was_committed(self) -> None:
        committed = Counter(self.handed[: self.committed])
        assert all(self.acked[payload] <= committed[payload] for payload in self.acked)

    @invariant()
    def what_is_in_hand_is_bounded(self) -> None:
        assert self.window.unsettled + len(self.window) <= IN_FLIGHT

    def teardown(self) -> None:
        for _ in range(2 * self.serial + 2):
            if not self.connected:
                self.connect(1)
            self.take(5)
            self.commit(0)
            self.acknowledge(IN_FLIGHT)
        assert not self.waiting and not self.flying, "the broker still has something"
        handed = Counter(self.handed)
        assert all(handed[payload] >= count - self.gone[payload] for payload, count in self.wanted.items())


TestAgainstABroker = AgainstABroker.TestCase
TestAgainstABroker.settings = settings(
    max_examples=2_000 if os.environ.get("HOMEOSTAT_LONG") == "1" else 60, stateful_step_count=25, deadline=None
)


def test_a_checkpoint_is_wanted_at_half_of_what_may_be_in_hand_and_when_nothing_more_comes() -> None:
    pace = Pace(100)
    assert not pace.wanted(0, 60.0), "an idle stream costs nothing"
    assert not pace.wanted(49, 0.0)
    assert pace.wanted(50, 0.0)
    assert pace.wanted(1, QUIET_S)


def test_a_broker_that_stops_sooner_is_found_out_and_forgotten_when_it_goes_further() -> None:
    pace = Pace(1000)
    for _ in range(2):
        assert not pace.wanted(20, 0.5)
        assert pace.wanted(20, QUIET_S)
        pace.resumed(0.01)
    assert pace.limit == 20
    assert pace.wanted(10, 0.0)
    assert not pace.wanted(21, 0.0)
    assert pace.limit == 1000


def test_a_sensor_that_is_merely_slow_is_not_taken_for_a_broker_that_stops() -> None:
    pace = Pace(1000)
    for rows, after_s in ((3, 0.5), (3, 0.01), (4, 0.01), (3, 0.01), (3, 0.9)):
        assert pace.wanted(rows, QUIET_S)
        pace.resumed(after_s)
    assert pace.limit == 1000
