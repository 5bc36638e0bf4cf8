"""The unit in deploy/systemd, by systemd's own tools, and the worker under something that speaks as systemd does."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "homeostat.service"
EXPOSURE = "20"
"""Tenths that `systemd-analyze security` may find: 2.0 of 10."""


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert "ExecStart=/opt/homeostat/.venv/bin/homeostat run" in text
    unit.write_text(text.replace("/opt/homeostat/.venv/bin/homeostat", sys.executable))
    verified = analyze("verify", "--man=no", str(unit))
    assert (verified.returncode, verified.stderr) == (0, "")
    secured = analyze("security", "--offline=yes", f"--threshold={EXPOSURE}", str(unit))
    assert secured.returncode == 0, secured.stdout


def test_a_wrong_line_in_the_unit_would_be_found(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/homeostat/.venv/bin/homeostat", sys.executable) + "Typ=notify\n")
    assert "Typ" in analyze("verify", "--man=no", str(unit)).stderr
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    assert analyze("security", "--offline=yes", f"--threshold={EXPOSURE}", str(unit)).returncode != 0


def test_the_supervisor_hears_that_it_is_ready_alive_and_at_its_end(settings: dict[str, str], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(60)
        made = settings | {"HOMEOSTAT_SOURCE": "sim://ageing?rate=200"}
        made |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"}
        with DaemonProcess(made, tmp_path) as daemon:
            assert end.recv(4096) == b"READY=1"
            assert daemon.get("/readyz")[0] == 200
            assert end.recv(4096) == b"STATUS=ready\nWATCHDOG=1"
            # Read before it has ended: lines that nobody takes fill the queue, and the last one would be dropped.
            daemon.process.send_signal(signal.SIGTERM)
            while (said := end.recv(4096)) != b"STOPPING=1":
                assert said.startswith(b"STATUS=")
            assert daemon.wait() == 0
