from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from daemon import checkpoint
from daemon.errors import CheckpointError
from daemon.service import Service
from daemon.told import FORCED_EXIT
from tests.unit.worlds import MemorySource, records, worker

_EARLIER: list[Service] = []


def started(folder: Path, count: int = 100, *, sizes: list[int] | None = None, **changes: Any) -> Service:
    """A service as a new process would start it: those before it are dead, and hold nothing any more."""
    while _EARLIER:
        _EARLIER.pop().commits.close()
    made = worker(folder, **changes)
    made.source = MemorySource(records(count), sizes)
    service = Service(made)
    _EARLIER.append(service)
    service.start()
    return service


def test_a_run_answers_everything_and_commits_what_its_checkpoint_says(tmp_path: Path) -> None:
    service = started(tmp_path)
    assert service.run() == 0
    assert len(service.worker.sink.values) == 100
    assert service.worker.source.committed[-1] == {"mem/0": 100}
    newest = checkpoint.Store(tmp_path / "state/checkpoints").newest()
    assert newest is not None and newest.positions == {"mem/0": 100}


def test_max_records_are_kept_to_exactly(tmp_path: Path) -> None:
    service = started(tmp_path)
    service.max_records = 45
    assert service.run() == 0
    assert (service.done, len(service.worker.sink.values)) == (45, 45)
    assert service.worker.source.committed[-1] == {"mem/0": 45}


def test_the_next_run_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    first = started(tmp_path)
    first.max_records = 45
    first.run()
    second = started(tmp_path)
    second.run()
    assert [answer["id"] for answer in second.worker.sink.answers] == [str(row) for row in range(45, 100)]
    assert second.worker.loop.tally.records == 100


def test_another_method_keeps_the_offsets_and_drops_the_state(tmp_path: Path) -> None:
    first = started(tmp_path)
    first.max_records = 45
    first.run()
    second = started(tmp_path, fast={"name": "none"})
    assert second.worker.loop.positions == {"mem/0": 45}
    assert second.worker.loop.tally.records == 0


def test_a_state_that_does_not_fit_is_refused_by_file_name(tmp_path: Path) -> None:
    first = started(tmp_path)
    first.run()
    store = checkpoint.Store(tmp_path / "state/checkpoints")
    snapshot = store.newest()
    assert snapshot is not None
    del snapshot.state["regulator"]
    snapshot.sequence += 1
    path = store.write(snapshot)
    with pytest.raises(CheckpointError, match=path.name):
        started(tmp_path)


def test_a_signal_drains_and_what_was_read_is_answered(tmp_path: Path) -> None:
    service = started(tmp_path, sizes=[10, 0, 0, 0, 0, 0])
    service.batcher.linger_s = 60.0

    def interrupt() -> None:
        if service.batcher.held:
            os.kill(os.getpid(), signal.SIGTERM)
            service.worker.source.on_poll = lambda: None

    service.worker.source.on_poll = interrupt
    before = signal.getsignal(signal.SIGTERM)
    assert service.run() == 0
    assert len(service.worker.sink.values) == 10 and service.worker.source.committed[-1] == {"mem/0": 10}
    assert signal.getsignal(signal.SIGTERM) is before
    assert service.ready() == (False, "draining")


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    service = started(tmp_path)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    service.worker.source.on_poll = twice
    with pytest.raises(SystemExit) as ended:
        service.run()
    assert ended.value.code == FORCED_EXIT
    assert service.worker.source.committed == []


def test_a_checkpoint_that_can_not_be_written_commits_nothing_and_the_stream_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = started(tmp_path, checkpoint={"every_batches": 1})
    write, full = service.commits.store.write, [True]  # type: ignore[union-attr]

    def on_a_full_disk(snapshot: checkpoint.Snapshot) -> Path:
        if full[0]:
            raise OSError(28, "No space left on device")
        return write(snapshot)

    monkeypatch.setattr(service.commits.store, "write", on_a_full_disk)
    service.turn()
    service.turn()
    assert len(service.worker.sink.values) == 64 and service.worker.source.committed == []
    assert service.worker.telemetry.checkpoint_failures._value.get() == 2
    full[0] = False
    assert service.run() == 0
    assert service.worker.source.committed[-1] == {"mem/0": 100}


def test_while_the_sink_is_away_nothing_is_committed_and_the_service_is_alive_but_not_ready(tmp_path: Path) -> None:
    service = started(tmp_path, checkpoint={"every_batches": 1})
    service.worker.sink.refusing = True
    service.turn()
    assert service.worker.source.committed == []
    assert service.progress.alive()[0] and service.ready() == (False, "waiting: the sink is away")
    service.worker.sink.refusing = False
    assert service.save() and service.ready() == (True, "ready")
    assert service.worker.source.committed == [{"mem/0": 32}]


def test_a_drain_that_can_not_deliver_ends_with_code_3_and_commits_nothing(tmp_path: Path) -> None:
    service = started(tmp_path, drain_timeout_s=0.3)
    service.worker.sink.refusing = True
    code = None
    try:
        code = service.run()
    except Exception as error:
        code = error.exit_code  # type: ignore[attr-defined]
    assert code == 3 and service.worker.source.committed == []


def test_no_progress_with_lag_is_death_and_no_lag_is_progress(tmp_path: Path) -> None:
    service = started(tmp_path, progress_timeout_s=5.0)
    service.progress._at -= 6.0
    assert service.progress.alive()[0] is False
    service._idle()
    assert service.progress.alive()[0] is False
    service.worker.source.values = []
    service._idle()
    assert service.progress.alive()[0] is True


def test_closing_gives_back_the_source_and_leaves_readiness(tmp_path: Path) -> None:
    service = started(tmp_path, http="127.0.0.1:0")
    service.close()
    assert service.worker.source.closed and service.ready() == (False, "starting")


def test_the_report_is_json_and_counts_what_was_done(tmp_path: Path) -> None:
    from daemon.running import closing, table

    service = started(tmp_path)
    service.run()
    summary = json.loads(json.dumps(closing(service), allow_nan=False))
    assert (summary["records"], summary["positions"]) == (100, {"mem/0": 100})
    assert "100  (0 invalid, 0 dead letters)" in table(summary)


def test_it_is_ready_only_once_the_loop_turns_and_a_signal_to_stop_drains_it(tmp_path: Path) -> None:
    service = Service(worker(tmp_path, records(64)))
    service.start()
    assert service.ready() == (False, "starting")
    seen: list[tuple[bool, str]] = []
    assert service.run(begun=lambda: seen.append(service.ready())) == 0 and seen == [(True, "ready")]
    service.close()
