from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from kafka import TopicPartition
from structlog.testing import capture_logs

from daemon.inspecting import digest
from daemon.load import Load
from daemon.overload import Step
from daemon.pressure import BATCH_S, SAY_EVERY_S, SHED_EVERY_S, Pressure
from daemon.regulator import Decision, Reading
from daemon.streams.kafka_waiting import HOLD_S, KEEP_ALIVE_S, KeepAlive, skip
from tests.unit.worlds import MemorySource, raw, records, worker


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Shedding(MemorySource):
    """Skips what it is asked to."""

    def __init__(self) -> None:
        super().__init__([])
        self.asked: list[int] = []

    def skip(self, rows: int) -> dict[str, tuple[int, int]]:
        self.asked.append(rows)
        start, self.next = self.next, self.next + rows
        return {"mem/0": (start, self.next)}


class World:
    """A worker's pressure, on a clock and a stream of its own."""

    def __init__(self, folder: Path, *, row_seconds: float | None = None, live: bool = True, **changes: Any) -> None:
        self.clock, self.source = Clock(), Shedding()
        self.made = worker(folder, **changes)
        self.loop = self.made.loop
        self.pressure = Pressure(
            self.made.settings,
            self.loop,
            self.source,
            live=live,
            row_bytes=16,
            row_seconds=row_seconds,
            clock=self.clock,
        )

    def overloaded(self, seconds: float, lag: int) -> None:
        """Full batches, each in a quarter of a second, before a lag that does not change."""
        for _ in range(int(seconds * 4)):
            self.clock.now += 0.25
            self.loop.load.seconds = 0.2
            self.pressure.batch(self.pressure.rows)
            self.pressure.lag(lag)

    @property
    def step(self) -> Step:
        return self.pressure.overload.step


def test_each_step_withholds_what_it_says_and_is_logged_and_shown(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert (world.pressure.rows, world.loop.load) == (32, Load())
    seen = {}
    with capture_logs() as said:
        for _ in range(200):
            world.overloaded(0.25, 10**9)
            seen[world.step] = (world.pressure.rows, world.loop.load.adapt_share, world.loop.actions.rests)
    grown = world.made.settings.overload.max_rows
    rows = seen[Step.BATCHES][0]
    assert 32 < rows <= grown
    assert seen[Step.NORMAL] == (32, 1.0, False) and seen[Step.BATCHES][1:] == (1.0, False)
    assert seen[Step.SAMPLE][1:] == (0.25, False) and seen[Step.FROZEN][1:] == (0.0, True)
    assert [line["now"] for line in said if line["event"] == "overload"] == [
        Step.BATCHES.words,
        Step.SAMPLE.words,
        Step.FROZEN.words,
    ]
    assert world.loop.telemetry.overload_step._value.get() == 3
    assert world.loop.telemetry.records_shed._value.get() == 0 and world.source.asked == []


def test_what_nobody_waits_for_is_never_overload(tmp_path: Path) -> None:
    world = World(tmp_path, live=False, shed=1.0)
    world.overloaded(60, 10**9)
    assert world.step is Step.NORMAL and world.pressure.rows == 32 and world.source.asked == []


def test_while_the_state_catches_up_the_step_of_the_checkpoint_holds(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.loop.emit_from = {"mem/0": 10**6}
    world.overloaded(60, 10**9)
    assert world.step is Step.NORMAL
    world.loop.load.step = Step.SHEDDING
    again = Pressure(world.made.settings, world.loop, world.source, live=True, row_bytes=16)
    assert again.overload.step is Step.FROZEN and world.loop.load.adapt_share == 0.0


def test_skipped_records_are_counted_logged_now_and_then_and_left_behind_by_the_positions(tmp_path: Path) -> None:
    world = World(tmp_path, shed=10.0)
    with capture_logs() as said:
        world.overloaded(120, 10**6)
    assert world.step is Step.SHEDDING
    skips = len(world.source.asked)
    assert 2 <= skips <= 120 / SHED_EVERY_S
    assert world.loop.positions == {"mem/0": sum(world.source.asked)}
    assert world.pressure.shed == world.loop.telemetry.records_shed._value.get() == sum(world.source.asked)
    lines = [line for line in said if line["event"].startswith("oldest records skipped")]
    assert 1 <= len(lines) <= 1 + 120 / SAY_EVERY_S and lines[0]["offsets"] == {
        "mem/0": f"0 to {world.source.asked[0]}"
    }


def test_a_source_that_can_not_skip_says_so_once_and_stops_at_no_adaptation(tmp_path: Path) -> None:
    world = World(tmp_path, shed=1.0)
    with capture_logs() as said:
        pressure = Pressure(world.made.settings, world.loop, MemorySource([]), live=True, row_bytes=16)
    assert [line["log_level"] for line in said] == ["warning"] and "HOMEOSTAT_SHED" in said[0]["event"]
    assert pressure.overload.most is Step.FROZEN


def test_a_batch_that_took_too_long_is_followed_by_smaller_ones_and_those_by_larger_again(tmp_path: Path) -> None:
    world = World(tmp_path, batch_rows=512)
    world.loop.load.seconds = 40.0
    world.pressure.batch(512)
    assert world.pressure.rows == 64
    world.loop.load.seconds = BATCH_S / 8
    for rows in (128, 256, 512):
        world.pressure.batch(world.pressure.rows)
        assert world.pressure.rows == rows


def test_the_first_batch_of_a_slow_model_is_cut_by_what_the_warm_up_took(tmp_path: Path) -> None:
    assert World(tmp_path, batch_rows=512, row_seconds=1.0).pressure.rows == 16
    assert World(tmp_path, batch_rows=512, row_seconds=0.05).pressure.rows == 512


def test_a_grown_batch_keeps_to_its_time_and_memory(tmp_path: Path) -> None:
    world = World(tmp_path, batch_rows=512)
    world.loop.load.step = Step.FROZEN
    for row_bytes, seconds, rows in ((16, 0.1, 4096), (16, 2.5, 1024), (64 << 10, 0.1, 512), (10**12, 0.1, 512)):
        pressure = Pressure(world.made.settings, world.loop, world.source, live=True, row_bytes=row_bytes)
        pressure._full = (512, seconds)
        assert pressure.rows == rows


def test_the_time_that_a_sink_is_waited_for_is_nobodys_work(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.overloaded(2, 100)
    rate = world.pressure.overload.rate
    world.clock.now += 600
    world.pressure.waiting()
    world.pressure.batch(32)
    world.pressure.lag(100)
    assert world.pressure.overload.rate == rate and world.step is Step.NORMAL


def test_withheld_batches_leave_the_fast_state_alone_and_are_answered_by_it(tmp_path: Path) -> None:
    made = worker(tmp_path, fast={"name": "ema_norm"})
    loop = made.loop
    loop.resident.set_gain(1.0)
    loop.actions.trusted = loop.adapt = True
    loop.process(raw(records(32, shift=1.0)))
    loop.resident.set_gain(1.0)
    loop.load.adapt_share, before = 0.0, digest(loop.resident.adapter.state_dict())
    loop.adapt = loop.actions.trusted = True
    calls: list[dict[str, Any]] = []
    predict = loop.resident.predict

    def spy(x: Any, **how: Any) -> Any:
        calls.append(how | {"by": (found := predict(x, **how)).served_adapted})
        return found

    loop.resident.predict = spy  # type: ignore[method-assign]
    loop.process(raw(records(32, shift=1.0, first=32), 32))
    assert calls[0]["adapt"] is False and calls[0]["serve"] is True and calls[0]["by"]
    loop.resident.set_gain(1.0)  # the controller's, and part of it
    assert digest(loop.resident.adapter.state_dict()) == before


def test_one_that_decides_by_itself_is_given_every_row_in_every_step(tmp_path: Path) -> None:
    whole, frozen = worker(tmp_path), worker(tmp_path)
    frozen.loop.load.adapt_share = 0.0
    frozen.loop.actions.rests = True
    for at in range(0, 320, 32):
        for made in (whole, frozen):
            made.loop.process(raw(records(32, first=at, seed=at), at))
    assert frozen.sink.values == whole.sink.values
    assert frozen.loop.resident.deciding is not None
    assert frozen.loop.resident.deciding.numbered == whole.loop.resident.deciding.numbered == 320  # type: ignore[union-attr]


@pytest.mark.parametrize(("share", "skipped", "expected"), [(1.0, False, False), (0.0, False, True), (1.0, True, True)])
def test_the_controller_hears_of_what_was_withheld_or_skipped(
    tmp_path: Path, share: float, skipped: bool, expected: bool
) -> None:
    made = worker(tmp_path)
    readings: list[Reading] = []
    step = made.loop.regulator.step

    def spy(reading: Reading) -> Decision:
        readings.append(reading)
        return step(reading)

    made.loop.regulator.step = spy  # type: ignore[method-assign]
    made.loop.load.adapt_share, made.loop.load.dropped = share, skipped
    made.loop.process(raw(records(32)))
    made.loop.process(raw(records(32, first=32), 32))
    assert [reading.dropped for reading in readings] == [expected, expected and not skipped]


def test_the_sample_is_its_share_of_the_batches_and_the_same_in_every_run() -> None:
    load = Load(adapt_share=0.25)
    for rows in (1, 7, 512, 1000, 4096, 65_536):
        given = [load.given(batch * rows) for batch in range(2000)]
        assert abs(sum(given) / 2000 - 0.25) < 0.02
        assert given == [Load(adapt_share=0.25).given(batch * rows) for batch in range(2000)]
        gaps = "".join("x" if each else "." for each in given).split("x")
        assert max(map(len, gaps)) <= 30


def test_under_rest_no_burst_begins_and_the_controller_keeps_waiting_for_the_one_it_asked_for(tmp_path: Path) -> None:
    made = worker(tmp_path, slow={"inline": True, "min_labels": 8})
    actions = made.loop.actions
    actions.rests = True
    steps: list[int] = []
    actions.learner.step = lambda *_: steps.append(1)  # type: ignore[assignment, func-returns-value]
    made.loop.process(raw(records(64, labelled=True)))
    assert actions.learn() == "idle" and steps == []
    actions.learner.ask()
    actions.monitor.trust.label_came()
    assert actions.learn() == "busy" and steps == []
    actions.rests = False
    actions.learn()
    assert steps == [1]


PARTS = [TopicPartition("t", number) for number in range(3)]


class Consumer:
    """As much of kafka-python's as a member needs to stay one."""

    def __init__(self, ends: tuple[int, ...] = (100, 40, 0)) -> None:
        self.at = dict.fromkeys(PARTS, 0)
        self.ends = dict(zip(PARTS, ends, strict=True))
        self.stopped: set[TopicPartition] = set()
        self.polled: list[set[TopicPartition]] = []
        self.during: Any = lambda: None

    def assignment(self) -> set[TopicPartition]:
        return set(self.at)

    def paused(self) -> set[TopicPartition]:
        return set(self.stopped)

    def pause(self, *parts: TopicPartition) -> None:
        self.stopped |= set(parts)

    def resume(self, *parts: TopicPartition) -> None:
        self.stopped -= set(parts)

    def poll(self, timeout_ms: int, max_records: int) -> dict[Any, Any]:
        self.polled.append(set(self.at) - self.stopped)
        self.during()
        return {}

    def highwater(self, part: TopicPartition) -> int:
        return self.ends[part]

    def position(self, part: TopicPartition, timeout_ms: int) -> int:
        return self.at[part]

    def seek(self, part: TopicPartition, offset: int) -> None:
        self.at[part] = offset


def test_a_sign_of_life_takes_no_record_and_leaves_what_flowed_flowing() -> None:
    clock, consumer = Clock(), Consumer()
    alive = KeepAlive(clock=clock)
    consumer.pause(PARTS[2])  # newly assigned, and not placed yet
    for wait in (0.0, KEEP_ALIVE_S - 0.1, 0.1):
        clock.now += wait
        alive.step(consumer, PARTS[:2], [], set)
    assert consumer.polled == [set(), set()]
    assert consumer.stopped == {PARTS[2]}


def test_a_partition_that_a_rebalance_took_meanwhile_is_not_let_flow() -> None:
    consumer, touched = Consumer(), set()
    consumer.during = lambda: touched.add(PARTS[0])
    KeepAlive(clock=Clock()).step(consumer, PARTS, [], lambda: touched)
    assert consumer.stopped == {PARTS[0]}


def test_what_was_revoked_is_committed_before_the_group_goes_on_but_it_is_not_kept_waiting_for_ever() -> None:
    clock, consumer = Clock(), Consumer()
    alive = KeepAlive(clock=clock)
    for _ in range(int(HOLD_S / 10)):
        assert not alive.step(consumer, PARTS[1:], PARTS[:1], set)
        clock.now += 10
    assert consumer.polled == []
    assert alive.step(consumer, PARTS[1:], PARTS[:1], set) and len(consumer.polled) == 1


def test_the_oldest_of_each_partition_are_skipped_in_proportion() -> None:
    consumer = Consumer()
    assert skip(consumer, PARTS, 70) == {"t/0": (0, 50), "t/1": (0, 20)}
    assert skip(consumer, PARTS, 10**9) == {"t/0": (50, 100), "t/1": (20, 40)}
    assert skip(consumer, PARTS, 5) == {}
    assert math.isclose(sum(consumer.at.values()), 140)
