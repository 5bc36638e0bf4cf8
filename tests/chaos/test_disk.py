"""A disk that is full, or has become read-only, where the worker keeps its state."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, committed, eventually, on_kafka, records
from tests.kafka import consume_committed, produce

DISK_BYTES = 16 * 2**20


class Disk:
    """A file system in memory at ``path``, for this test alone."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path = path
        self._stack = stack
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path))

    def _mount(self, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        self._stack.callback(subprocess.run, ["umount", "--lazy", str(self.path)], check=True)

    def full(self) -> Callable[[], None]:
        """Leave no byte free; what frees them again."""
        filler = self.path / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                # Ever smaller, so that the last page is taken too.
                file.write(b"x" * max(1, (os.statvfs(self.path).f_bavail * 4096) // 2))
        return filler.unlink

    def read_only(self) -> Callable[[], None]:
        """As after an error of the medium; files that are open stay writable, as no mount forbids. What ends it."""
        self._mount("--bind", str(self.path), str(self.path))
        done = ["mount", "-o", "remount,bind,ro", str(self.path)]
        subprocess.run(done, check=True, capture_output=True)
        undone = ["mount", "-o", "remount,bind,rw", str(self.path)]
        return lambda: subprocess.run(undone, check=True, capture_output=True) and None


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with contextlib.ExitStack() as stack:
        yield Disk(tmp_path / "disk", stack)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("delivery", "how"), [("at-least-once", "full"), ("exactly-once", "full"), ("at-least-once", "read_only")]
)
def test_a_disk_that_takes_nothing_costs_no_answer(
    disk: Disk,
    settings: dict[str, str],
    kafka_broker: str,
    topic: Callable[..., str],
    tmp_path: Path,
    delivery: str,
    how: str,
) -> None:
    name = topic()
    made = on_kafka(settings, kafka_broker, name) | {
        "HOMEOSTAT_STATE_DIR": str(disk.path / "state"),
        "HOMEOSTAT_DELIVERY": delivery,
        "HOMEOSTAT_CHECKPOINT__EVERY_S": "0.5",
    }

    def feed(first: int, count: int) -> None:
        produce(kafka_broker, name, records([str(row) for row in range(first, first + count)]))

    def done() -> int:
        return committed(kafka_broker, f"g-{name}", name)

    failures, out = "homeostat_checkpoint_failures_total", "homeostat_records_out_total"
    with DaemonProcess(made, tmp_path / "a") as daemon:
        daemon.wait_until_ready()
        feed(0, 200)
        eventually("the first are committed", lambda: done() == 200)
        mend = getattr(disk, how)()
        feed(200, 200)
        daemon.wait_for(failures, 1)
        daemon.wait_for(out, 400)
        assert daemon.get("/healthz")[0] == 200
        # Counted before it is said.
        eventually("it is said", lambda: "checkpoint not written" in daemon.log and str(disk.path) in daemon.log)
        if delivery == "at-least-once":
            assert done() == 200  # no state for them: they would be answered by one that never saw them
        mend()
        eventually("the rest is committed", lambda: done() == 400)
        mend = getattr(disk, how)()
        feed(400, 200)
        daemon.wait_for(out, 600)
        daemon.kill()
    with DaemonProcess(made, tmp_path / "b") as daemon:
        daemon.wait_until_ready()  # the disk still takes nothing
        feed(600, 200)
        daemon.wait_for(failures, 1)
        mend()
        eventually("all is committed", lambda: done() == 800)
        assert daemon.terminate() == 0
        assert "Traceback" not in daemon.log
    counts = Counter(json.loads(found.value)["id"] for found in consume_committed(kafka_broker, f"{name}.answers"))
    assert set(counts) == {str(row) for row in range(800)}
    if delivery == "exactly-once":
        assert set(counts.values()) == {1}


@pytest.mark.parametrize("delivery", ["exactly-once", "at-least-once"])
def test_checkpoints_that_were_damaged_and_cut_short_are_named_and_the_one_before_is_used(
    settings: dict[str, str], kafka_broker: str, topic: Callable[..., str], tmp_path: Path, delivery: str
) -> None:
    name, folder = topic(), tmp_path / "state" / "checkpoints"
    made = on_kafka(settings, kafka_broker, name) | {
        "HOMEOSTAT_DELIVERY": delivery,
        "HOMEOSTAT_CHECKPOINT__EVERY_BATCHES": "1",
        "HOMEOSTAT_CHECKPOINT__EVERY_S": "600",
    }
    with DaemonProcess(made, tmp_path / "a") as daemon:
        daemon.wait_until_ready()
        for first in (0, 100, 200):
            produce(kafka_broker, name, records([str(row) for row in range(first, first + 100)]))
            eventually("committed", lambda wanted=first + 100: committed(kafka_broker, f"g-{name}", name) >= wanted)
        daemon.kill()
    newest, second, *older = sorted(folder.glob("checkpoint-*.bin"), reverse=True)
    assert older
    content = newest.read_bytes()
    newest.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    os.truncate(second, second.stat().st_size // 2)
    produce(kafka_broker, name, records([str(row) for row in range(300, 400)]))
    with DaemonProcess(made, tmp_path / "b") as daemon:
        daemon.wait_until_ready()
        eventually("all is committed", lambda: committed(kafka_broker, f"g-{name}", name) >= 400)
        assert daemon.terminate() == 0
        assert newest.name in daemon.log and second.name in daemon.log and "refused" in daemon.log
    counts = Counter(json.loads(found.value)["id"] for found in consume_committed(kafka_broker, f"{name}.answers"))
    assert set(counts) == {str(row) for row in range(400)}
    if delivery == "exactly-once":
        assert set(counts.values()) == {1}
