"""Exactly once, between a source and a sink in memory: the order of commits, and going back when one is void."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from daemon import checkpoint
from daemon.errors import TransactionError
from daemon.losses import AGAIN
from daemon.records import Positions
from daemon.service import Service
from daemon.streams.resume import Start
from tests.unit.worlds import MemorySink, MemorySource, records, worker


class Group(MemorySource):
    """A shared source of one partition; ``committed_to`` is what the group knows."""

    def __init__(self, values: list[bytes]) -> None:
        super().__init__(values)
        self.checkpoint_id, self.topic_id, self.uncommitted = "", "", False
        self.committed_to: int | None = None
        self.revoked: set[str] = set()
        self.lost: set[str] = set()
        self._starts: dict[str, Start] = {}

    def open(self, positions: Positions | None) -> None:
        file = (positions or {}).get("mem/0", 0)
        self.next = file
        self._starts = {"mem/0": Start(file, max(file, self.committed_to or 0), 0, "test")}

    def take_starts(self) -> dict[str, Start]:
        starts, self._starts = self._starts, {}
        return starts

    def take_revoked(self) -> tuple[set[str], set[str]]:
        given, self.revoked, self.lost = (self.revoked, self.lost), set(), set()
        return given

    def offsets(self, positions: Positions, note: str) -> dict[Any, Any]:
        return dict(positions)

    def group_metadata(self) -> str:
        return "member"


class Transactional(MemorySink):
    """Answers are seen when their transaction is committed, together with the offsets."""

    def __init__(self, source: Group) -> None:
        super().__init__()
        self.source, self.open_answers = source, list[bytes]()
        self.fails, self.slow = 0, 0
        self._ending: tuple[list[bytes], dict[str, int]] | None = None
        self._lost = False

    def open(self) -> None:
        self.open_answers, self._ending, self._lost = [], None, False

    def send(self, keys: list[bytes | None], values: list[bytes]) -> None:
        self.open_answers += values

    @property
    def ending(self) -> bool:
        return self._ending is not None

    def end(self, offsets: dict[Any, Any], group: Any) -> None:
        assert self._ending is None and group == "member"
        self._ending, self.open_answers = (self.open_answers, offsets), []

    def verify(self) -> None:
        if self._ending is None or self.slow:
            return
        answers, offsets = self._ending
        self._ending = None
        if self.fails:
            self.fails -= 1
            raise TransactionError("void")
        self.values += answers
        self.source.committed_to = offsets["mem/0"]

    def settle(self, timeout_s: float) -> None:
        if self._ending is not None and self.slow:
            self.slow -= 1
            raise TimeoutError("not yet")
        self.verify()


def started(folder: Path, count: int = 200, **changes: Any) -> tuple[Service, Group, Transactional]:
    # Its streams are in memory: the settings ask for exactly-once after they were assembled.
    made = worker(folder, kafka={"transaction_ms": 0.001}, **changes)
    made.settings = made.settings.model_copy(update={"delivery": "exactly-once"})
    source = Group(records(count, labelled=True))
    sink = Transactional(source)
    made.source, made.sink, made.loop.sink = source, sink, sink
    service = Service(made)
    service.start()
    return service, source, sink


def ids(sink: Transactional) -> list[str]:
    return [answer["id"] for answer in sink.answers]


def test_answers_are_seen_with_their_offsets_and_the_checkpoint_is_never_ahead_of_them(tmp_path: Path) -> None:
    service, source, sink = started(tmp_path, checkpoint={"every_batches": 2})
    seen = 0
    for _ in range(8):
        service.turn()
        newest = checkpoint.Store(tmp_path / "state/checkpoints").newest()
        assert newest is not None and newest.positions["mem/0"] <= (source.committed_to or 0)
        assert len(sink.values) == (source.committed_to or 0) >= seen
        seen = len(sink.values)
    assert service.run() == 0
    assert ids(sink) == [str(row) for row in range(200)]


def test_decisions_are_told_of_every_checkpoint_that_they_come_after(tmp_path: Path) -> None:
    service, _, _ = started(tmp_path)
    told: list[int] = []
    service.worker.keeper.saved = told.append  # type: ignore[method-assign]
    service.turn()
    assert told and told[-1] == service.commits.sequence, "the one at a partition's assignment"
    assert service.save() and told[-1] == service.commits.sequence
    service.close()


def test_what_is_read_again_counts_once_towards_the_records_of_a_run(tmp_path: Path) -> None:
    service, _, sink = started(tmp_path)
    service.max_records = 128
    service.turn()
    sink.fails = 1
    assert service.run() == 0
    assert (ids(sink), service.done) == ([str(row) for row in range(128)], 128)


@pytest.mark.parametrize("fails", [1, 3])
def test_a_void_transaction_brings_state_and_stream_back_to_the_checkpoint(tmp_path: Path, fails: int) -> None:
    through, _, _ = started(tmp_path / "through")
    assert through.run() == 0
    service, _, sink = started(tmp_path / "void")
    for _ in range(3):
        service.turn()
    sink.fails = fails
    assert service.run() == 0
    assert ids(sink) == [str(row) for row in range(200)]
    assert service.worker.loop.tally.state_dict() == through.worker.loop.tally.state_dict()


def test_one_void_transaction_after_the_other_ends_the_worker_with_a_question(tmp_path: Path) -> None:
    service, _, sink = started(tmp_path)
    sink.fails = AGAIN + 1
    with pytest.raises(TransactionError, match="another worker with the same HOMEOSTAT_KAFKA__GROUP"):
        service.run()
    assert sink.values == []


def test_lost_partitions_make_the_open_answers_void(tmp_path: Path) -> None:
    service, source, sink = started(tmp_path)
    service.worker.settings = service.worker.settings.model_copy(
        update={"kafka": service.worker.settings.kafka.model_copy(update={"transaction_ms": 1e9})}
    )
    service.turn()
    assert sink.open_answers and not sink.values
    source.lost = {"mem/0"}
    service.turn()
    assert not sink.open_answers and not sink.values
    assert service.run() == 0
    assert ids(sink) == [str(row) for row in range(200)]


def test_revoked_partitions_are_committed_before_they_are_given_up(tmp_path: Path) -> None:
    service, source, sink = started(tmp_path)
    service.turn()
    sink.slow, source.revoked = 2, {"mem/0"}
    service.turn()
    assert len(sink.values) == (source.committed_to or 0) > 0 and "mem/0" not in sink.open_answers


def test_a_second_process_is_refused_the_folder(tmp_path: Path) -> None:
    first, second = checkpoint.Store(tmp_path), checkpoint.Store(tmp_path)
    first.lock()
    with pytest.raises(checkpoint.CheckpointError, match=r"in use by another homeostat \(process \d+\)"):
        second.lock()
    first.close()
    second.lock()
    second.close()
