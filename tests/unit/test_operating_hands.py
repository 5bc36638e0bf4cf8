"""What the loop does when it is asked to; and that a restart does not undo it."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.assembly import Worker
from daemon.operating.desk import Wish
from daemon.operating.hands import Hands
from daemon.versioning.keeper import NoKeeper
from tests.unit.worlds import decoded, source_rows, worker


class Journal(NoKeeper):
    """Notes what is decided."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, object], int | None]] = []

    def decided(self, event: str, record: object, *, version: int | None = None) -> None:
        self.entries.append((event, dict(record), version))  # type: ignore[call-overload]


class Post:
    """A worker with its hands; ``saves`` counts checkpoints."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.worker: Worker = worker(folder, **changes)
        self.journal, self.saves, self.drained, self.writable = Journal(), 0, False, True
        self.worker.keeper = self.journal
        self.hands = Hands(self.worker, self._save, self._drain, lambda: "read again")
        self.next = 0

    def _save(self) -> bool:
        self.saves += 1
        return self.writable

    def _drain(self) -> None:
        self.drained = True

    def ask(self, action: str, number: int = 0, *, hold: bool = False) -> Wish:
        wish = Wish(action, number, hold, "10.0.0.7")
        assert self.hands.desk.ask(wish)
        self.hands.step()
        assert wish.wait(0)
        return wish

    def hang_up(self) -> None:
        self.hands.hang_up()
        self.hands.step()

    def answer(self, rows: int, *, shift: float = 0.0) -> None:
        x, _ = source_rows(rows, seed=self.next)
        self.worker.loop.process(decoded(x + shift, self.next))
        self.next += rows


@pytest.mark.parametrize("fast", ["auto", "tent"])
def test_frozen_answers_are_the_version_s_and_nothing_learns_until_resume(tmp_path: Path, fast: str) -> None:
    post = Post(tmp_path, fast={"name": fast})
    loop = post.worker.loop
    for _ in range(5):
        post.answer(64)
    done = post.ask("freeze")
    assert done.fine and post.saves == 1 and loop.actions.frozen
    before = loop.resident.adapter.state_dict()["state"]
    for _ in range(5):
        post.answer(64, shift=3.0)
        assert not loop.adapt and not loop.actions.trusted
        assert loop.actions.learn() == "idle" and not loop.actions.learner.busy
    after = loop.resident.adapter.state_dict()["state"]
    assert str(before) == str(after)
    state = post.worker.state_dict()
    again = worker(tmp_path / "again", fast={"name": fast})
    again.load_state_dict(state)
    assert again.loop.actions.frozen and not again.loop.adapt
    post.ask("resume")
    assert not loop.actions.frozen and not loop.resident.versions.held
    for _ in range(20):
        post.answer(64, shift=3.0)
    assert loop.adapt


def test_each_wish_is_written_down_with_who_asked_and_followed_by_a_checkpoint(tmp_path: Path) -> None:
    post = Post(tmp_path)
    assert post.ask("reset").fine and post.worker.loop.resident.epoch == 1
    assert post.ask("checkpoint").text == "checkpoint written"
    refused = post.ask("rollback", 7)
    assert not refused.fine and "version 7 is not kept" in refused.text
    assert post.ask("rollback", 0, hold=True).fine and post.worker.loop.resident.versions.held
    assert post.ask("drain").fine and post.drained
    assert post.saves == 3
    told = [(record["asked"], record["done"], record["who"], version) for _, record, version in post.journal.entries]
    assert told == [
        ("reset", True, "10.0.0.7", None),
        ("checkpoint", True, "10.0.0.7", None),
        ("rollback", False, "10.0.0.7", 7),
        ("rollback", True, "10.0.0.7", 0),
        ("drain", True, "10.0.0.7", None),
    ]


def test_a_disk_that_takes_nothing_is_told_of(tmp_path: Path) -> None:
    post = Post(tmp_path)
    post.writable = False
    assert not post.ask("checkpoint").fine
    frozen = post.ask("freeze")
    assert frozen.fine and "no checkpoint could be written" in frozen.text and post.worker.loop.actions.frozen


def test_what_nobody_knows_is_refused(tmp_path: Path) -> None:
    assert not Post(tmp_path).ask("explode").fine


def test_sighup_asks_for_the_settings_to_be_read_again_once(tmp_path: Path) -> None:
    post = Post(tmp_path)
    post.hang_up()
    post.hands.step()
    assert [(event, record["asked"], record["who"]) for event, record, _ in post.journal.entries] == [
        ("operator", "reload", "SIGHUP")
    ]
    assert post.saves == 0, "nothing that a checkpoint holds has changed"
