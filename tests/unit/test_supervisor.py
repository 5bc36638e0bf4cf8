from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from daemon.supervisor import Supervisor


@pytest.fixture(params=["file", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The other end, and its name as NOTIFY_SOCKET has it."""
    name = str(tmp_path / "notify") if request.param == "file" else f"@homeostat-{os.getpid()}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind("\0" + name[1:] if name.startswith("@") else name)
        end.settimeout(30)
        yield end, name


def heard(end: socket.socket) -> list[str]:
    return end.recv(4096).decode().split("\n")


def test_it_is_ready_then_fed_while_there_is_progress_and_not_when_there_is_none(
    systemd: tuple[socket.socket, str],
) -> None:
    end, name = systemd
    fine = threading.Event()
    fine.set()
    supervisor = Supervisor(
        lambda: (fine.is_set(), "progress" if fine.is_set() else "no progress for 61 s"),
        lambda: "waiting: no broker",
        {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "60000", "WATCHDOG_PID": str(os.getpid())},
    )
    supervisor.ready()
    assert heard(end) == ["READY=1"]
    assert heard(end) == ["STATUS=waiting: no broker", "WATCHDOG=1"]
    assert heard(end) == ["STATUS=waiting: no broker", "WATCHDOG=1"]
    fine.clear()
    while "WATCHDOG=1" in (said := heard(end)):
        pass
    assert said == ["STATUS=no progress for 61 s"]
    # Beside it we read: lines that nobody takes fill the queue, and the last one would be dropped.
    closing = threading.Thread(target=supervisor.close)
    closing.start()
    while (said := heard(end)) != ["STOPPING=1"]:
        assert said == ["STATUS=no progress for 61 s"]
    closing.join()


def test_without_a_supervisor_nothing_is_said() -> None:
    before = threading.active_count()
    supervisor = Supervisor(lambda: (True, ""), lambda: "ready", {})
    supervisor.ready()
    assert threading.active_count() == before
    supervisor.close()


def test_a_supervisor_that_went_away_harms_nobody(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda: (True, ""), lambda: "ready", {"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    supervisor.ready()
    supervisor.close()


def test_a_supervisor_that_reads_nothing_holds_nobody_up_and_that_is_said_once(
    systemd: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    end, name = systemd
    monkeypatch.setattr("daemon.supervisor._WAIT_S", 0.01)
    fed = threading.Event()

    def alive() -> tuple[bool, str]:
        fed.set()
        return True, ""

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as full:
        full.setblocking(False)
        full.connect(end.getsockname())
        with contextlib.suppress(BlockingIOError):
            while True:
                full.send(b"STATUS=of another one")
    with capture_logs() as logs:
        supervisor = Supervisor(alive, lambda: "ready", {"NOTIFY_SOCKET": name})
        supervisor.ready()
        assert fed.wait(30)
        supervisor.close()
    said = [(line["log_level"], line["said"].partition("\n")[0]) for line in logs]
    assert said == [("warning", "READY=1"), ("debug", "STATUS=ready"), ("debug", "STOPPING=1")]
    end.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            assert heard(end) == ["STATUS=of another one"]


def test_a_watchdog_of_another_process_is_not_ours(systemd: tuple[socket.socket, str]) -> None:
    _, name = systemd
    for environment in (
        {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "0"},
    ):
        supervisor = Supervisor(lambda: (True, ""), lambda: "ready", {"NOTIFY_SOCKET": name, **environment})
        assert supervisor._every_s == 5.0
