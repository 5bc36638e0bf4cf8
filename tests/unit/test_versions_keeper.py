from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daemon import checkpoint
from daemon.inspecting import digest
from daemon.resident import Resident
from daemon.versioning import files, journal
from daemon.versioning.keeper import FEW, Keeper
from daemon.versioning.requests import FOLDER, submit
from tests.unit.worlds import source_rows, worker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


class Daemon:
    """Resident and keeper as the service drives them; a checkpoint is its bytes."""

    def __init__(self, folder: Path, bundle: str = "b1", ring: int = 3) -> None:
        self.resident: Resident = worker(folder, fast={"name": "none"}, versions=ring).loop.resident
        self.rows, self.failures = 0, 0
        self.sequence = 0
        self.keeper = Keeper(
            folder / "versions",
            self.resident,
            bundle=bundle,
            position=lambda: (self.rows, {"p/0": self.rows}),
            failed=self._fail,
            clock=Clock(),
        )

    def _fail(self) -> None:
        self.failures += 1

    def start(self, saved: bytes | None = None, sequence: int | None = None, lineage: str = "x") -> Daemon:
        if saved is not None:
            self.resident.load_state_dict(checkpoint.decode(saved))
        self.sequence = sequence or 0
        self.keeper.open(lineage, sequence)
        self.keeper.close(20)
        return self

    def rollback(self, number: int) -> None:
        self.resident.rollback(number)

    def promote(self, value: float, **record: Any) -> None:
        self.rows += 10
        version = self.resident.promote({"3.bias": torch.tensor([0.0, value, 0.0])}, {"gain": value, **record})
        self.keeper.decided("promoted", version.record, version=version.number)
        self.keeper.close(20)

    def save(self) -> bytes:
        self.sequence += 1
        state = checkpoint.encode(self.resident.state_dict())
        self.keeper.saved(self.sequence)
        self.keeper.close(20)
        return state

    def step(self) -> bool:
        changed = self.keeper.step(self)
        self.keeper.close(20)
        return changed

    def events(self) -> list[tuple[str, Any]]:
        return [(item["event"], item.get("version")) for item in journal.live(journal.read(self.keeper.folder))]

    def waiting(self) -> list[str]:
        folder = self.keeper.folder / FOLDER
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_a_promotion_is_a_line_and_a_file(tmp_path: Path) -> None:
    made = Daemon(tmp_path).start()
    made.promote(1.5, rows=200, trigger={"reasons": ["drift alarm"]})
    (line,) = journal.live(journal.read(made.keeper.folder))
    assert (line["event"], line["version"], line["serves"]) == ("promoted", 1, 1)
    assert line["at"] == {"rows": 10, "positions": {"p/0": 10}} and line["record"]["trigger"]["reasons"]
    card = files.read_card(files.path_of(made.keeper.folder, 1))
    assert card.record == line["record"] == {**made.resident.current.record}


def test_a_burst_without_a_version_is_a_line(tmp_path: Path) -> None:
    made = Daemon(tmp_path).start()
    for event in ("rejected", "failed", "cancelled"):
        made.keeper.decided(event, {"reason": "not better"})
    assert made.events() == [("rejected", None), ("failed", None), ("cancelled", None)]
    assert files.files(made.keeper.folder) == {}


def test_offsets_of_very_many_partitions_are_counted_instead(tmp_path: Path) -> None:
    made = Daemon(tmp_path)
    made.keeper._position = lambda: (1, {f"p/{n}": n for n in range(FEW + 1)})
    made.start().keeper.decided("rejected", {})
    assert journal.read(made.keeper.folder)[-1]["at"]["positions"] == FEW + 1


def test_after_a_kill_the_same_decision_counts_once_and_its_file_is_the_new_one(tmp_path: Path) -> None:
    first = Daemon(tmp_path).start()
    first.promote(1.0)
    saved = first.save()
    first.promote(2.0, made_at="before the kill")
    first.keeper.decided("rejected", {"reason": "not better"})

    second = Daemon(tmp_path).start(saved, 1)
    assert second.events() == [("promoted", 1)]
    # The version that the killed one made is no part of this state's past: its file goes.
    assert list(files.files(second.keeper.folder)) == [1]
    second.promote(2.0, made_at="after it")
    second.keeper.decided("rejected", {"reason": "not better"})
    assert second.events() == [("promoted", 1), ("promoted", 2), ("rejected", None)]
    assert files.read_card(files.path_of(second.keeper.folder, 2)).record["made_at"] == "after it"


def test_a_clean_restart_undoes_nothing_and_writes_nothing(tmp_path: Path) -> None:
    first = Daemon(tmp_path).start()
    first.promote(1.0)
    saved = first.save()
    before = (first.keeper.folder / journal.NAME).read_bytes()
    Daemon(tmp_path).start(saved, 1)
    assert (first.keeper.folder / journal.NAME).read_bytes() == before


def test_files_that_a_kill_left_unwritten_are_written_at_the_start(tmp_path: Path) -> None:
    first = Daemon(tmp_path).start()
    first.promote(1.0)
    first.promote(2.0)
    saved = first.save()
    for path in files.files(first.keeper.folder).values():
        path.unlink()
    second = Daemon(tmp_path).start(saved, 1)
    assert list(files.files(second.keeper.folder)) == [1, 2]


def test_files_are_bounded_by_the_ring_and_the_pins(tmp_path: Path) -> None:
    made = Daemon(tmp_path, ring=2).start()
    made.promote(1.0)
    submit(made.keeper.folder, "pin", number=1)
    made.step()
    for value in range(2, 8):
        made.promote(float(value))
    found = files.files(made.keeper.folder)
    assert list(found) == [1, 5, 6, 7] and files.read_card(found[1]).pinned


def test_a_rollback_is_taken_up_and_gone_once_a_checkpoint_holds_it(tmp_path: Path) -> None:
    made = Daemon(tmp_path).start()
    made.promote(1.0)
    made.promote(2.0)
    before = made.save()
    submit(made.keeper.folder, "rollback", number=1, hold=True)
    assert made.step() and made.resident.current.number == 1 and made.resident.versions.held
    assert len(made.waiting()) == 1

    # Killed before its checkpoint: taken up again, and written down once.
    again = Daemon(tmp_path).start(before, 1)
    assert again.resident.current.number == 2
    assert again.step() and again.resident.current.number == 1 and again.resident.versions.held
    saved = again.save()
    assert again.waiting() == [] and not again.step()
    assert again.events() == [("promoted", 1), ("promoted", 2), ("rollback", 1)]

    last = Daemon(tmp_path).start(saved, 2)
    assert (last.resident.current.number, last.resident.versions.held) == (1, True)
    submit(last.keeper.folder, "resume")
    assert last.step() and not last.resident.versions.held


def test_a_request_is_not_done_twice_by_a_kill_right_after_its_checkpoint(tmp_path: Path) -> None:
    made = Daemon(tmp_path).start()
    submit(made.keeper.folder, "import", data=exported(tmp_path))
    made.step()
    saved = checkpoint.encode(made.resident.state_dict())
    assert len(made.waiting()) == 2

    again = Daemon(tmp_path).start(saved, 1)
    assert again.waiting() == [] and not again.step()
    assert again.events() == [("import", 1)] and again.resident.versions.numbers() == [0, 1]


def test_what_can_not_be_done_is_refused_in_writing(tmp_path: Path) -> None:
    made = Daemon(tmp_path).start()
    made.promote(1.0)
    before = digest(made.resident.state_dict())
    for action, number in (("rollback", 9), ("pin", 9), ("unpin", 1), ("import", 0)):
        submit(made.keeper.folder, action, number=number)  # type: ignore[arg-type]
    assert made.step() and digest(made.resident.state_dict()) == before
    refused = [item for item in journal.read(made.keeper.folder) if item["event"] == "refused"]
    reasons = " ".join(item["record"]["reason"] for item in refused)
    assert len(refused) == 4 and "version 9 is not kept" in reasons and "not pinned" in reasons
    made.save()
    assert made.waiting() == []


def exported(folder: Path, bundle: str = "b1", **tensors: torch.Tensor) -> bytes:
    base = dict(worker(folder).loop.resident.frozen.named_parameters(remove_duplicate=False))
    delta = tensors or {"3.bias": torch.tensor([0.0, 1e6, 0.0])}
    files.write(folder / "one", delta, base, bundle=bundle, number=7, parent=5, record={"method": "head"})
    return (folder / "one").read_bytes()


def test_an_imported_version_is_numbered_pinned_and_served_when_asked(tmp_path: Path) -> None:
    made = Daemon(tmp_path).start()
    made.promote(1.0)
    submit(made.keeper.folder, "import", data=exported(tmp_path))
    assert made.step()
    assert made.events()[-1] == ("import", 2) and made.resident.versions.pins == {2}
    x, _ = source_rows(8)
    assert made.resident.current.number == 1
    submit(made.keeper.folder, "rollback", number=2)
    made.step()
    assert (made.resident.predict(x, adapt=False, serve=False).version == 1).all()
    assert made.resident.current.record["imported"]["number"] == 7 and made.resident.current.parent == 0


@pytest.mark.parametrize("kind", ["another bundle", "damaged", "not finite", "no such file"])
def test_a_file_that_may_not_be_imported_changes_nothing(tmp_path: Path, kind: str) -> None:
    made = Daemon(tmp_path).start()
    before = digest(made.resident.state_dict())
    data: bytes | None = None
    if kind == "another bundle":
        data = exported(tmp_path, "b2")
    elif kind == "damaged":
        data = exported(tmp_path)[:-3]
    elif kind == "not finite":
        good = exported(tmp_path, **{"3.bias": torch.full((3,), 2.5)})
        data = good.replace(np.float32(2.5).tobytes(), np.float32(np.nan).tobytes())
        assert data != good
    submit(made.keeper.folder, "import", data=data)
    assert made.step() and digest(made.resident.state_dict()) == before
    (line,) = journal.read(made.keeper.folder)
    assert line["event"] == "refused" and line["record"]["reason"]


def test_a_pin_outlives_a_lost_checkpoint_and_its_number_is_not_given_again(tmp_path: Path) -> None:
    first = Daemon(tmp_path).start()
    first.promote(1.0)
    first.promote(1e6)
    submit(first.keeper.folder, "pin", number=2)
    first.step()
    first.save()

    fresh = Daemon(tmp_path).start(lineage="y")
    assert fresh.resident.current.number == 0 and fresh.resident.versions.numbers() == [0, 2]
    assert list(files.files(fresh.keeper.folder)) == [2]
    fresh.promote(1.0)
    assert fresh.resident.current.number == 3
    fresh.rollback(2)
    x, _ = source_rows(8)
    assert (fresh.resident.predict(x, adapt=False, serve=False).version == 1).all()


def test_a_pin_of_another_bundle_is_left_alone_and_its_number_is_not_given_again(tmp_path: Path) -> None:
    first = Daemon(tmp_path, "b2").start()
    first.promote(1.0)
    submit(first.keeper.folder, "pin", number=1)
    first.step()
    other = Daemon(tmp_path).start(lineage="y")
    assert other.resident.versions.numbers() == [0]
    other.promote(1.0)
    assert list(files.files(other.keeper.folder)) == [1, 2]


def test_a_fresh_start_without_pins_gives_the_same_numbers_again(tmp_path: Path) -> None:
    first = Daemon(tmp_path).start()
    first.promote(1.0)
    again = Daemon(tmp_path).start(lineage="y")
    again.promote(1.0)
    assert again.events() == [("promoted", 1)]


def test_a_change_of_methods_keeps_the_past_and_goes_on_with_its_numbers(tmp_path: Path) -> None:
    """The checkpoint's offsets are used, its state is not: the frozen model serves."""
    first = Daemon(tmp_path).start()
    first.promote(1.0)
    first.save()
    second = Daemon(tmp_path).start(sequence=1)
    assert second.events() == [("promoted", 1)] and journal.read(second.keeper.folder)[-1]["serves"] == 0
    second.promote(1.0)
    assert second.resident.current.number == 2


def test_a_folder_that_can_not_be_written_is_counted_and_serving_goes_on(tmp_path: Path) -> None:
    (tmp_path / "versions").write_bytes(b"a file where the folder should be")
    made = Daemon(tmp_path).start()
    made.promote(1.0)
    assert made.resident.current.number == 1 and made.failures >= 2
    assert not made.step()
    (tmp_path / "versions").unlink()
    made.save()
    assert made.events() == [("promoted", 1)] and list(files.files(tmp_path / "versions")) == [1]
