"""`homeostat ctl` against a running daemon."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon_process import ROOT, DaemonProcess, eventually

TOKEN = "an-operators-token-of-a-plant"


def ctl(daemon: DaemonProcess, token: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "HOMEOSTAT_HTTP": f"127.0.0.1:{daemon.port}",
        "HOMEOSTAT_OPERATOR__TOKEN_FILE": str(token),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "daemon.cli", "ctl", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_an_operator_freezes_resumes_and_drains_and_a_restart_stays_frozen(
    settings: dict[str, str], tmp_path: Path
) -> None:
    token, wrong = tmp_path / "token", tmp_path / "wrong"
    token.write_text(TOKEN)
    wrong.write_text("somebody-elses-token-entirely")
    made = settings | {
        "HOMEOSTAT_SOURCE": "sim://ageing?rate=500",
        "HOMEOSTAT_CHECKPOINT": str(tmp_path / "checkpoints"),
        "HOMEOSTAT_OPERATOR__TOKEN_FILE": str(token),
    }
    with DaemonProcess(made, tmp_path) as daemon:
        daemon.wait_until_ready()
        refused = ctl(daemon, wrong, "freeze")
        assert refused.returncode == 1 and "wrong" in refused.stderr and daemon.metrics()["homeostat_frozen"] == 0
        done = ctl(daemon, token, "freeze")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("frozen: version 0 answers")
        assert daemon.metrics()["homeostat_frozen"] == 1
        unknown = ctl(daemon, token, "rollback", "9")
        assert unknown.returncode == 1 and "version 9 is not kept" in unknown.stderr
        daemon.kill()
    with DaemonProcess(made, tmp_path) as daemon:
        daemon.wait_until_ready()
        assert daemon.metrics()["homeostat_frozen"] == 1
        assert ctl(daemon, token, "resume").returncode == 0
        eventually("it adapts again", lambda: daemon.metrics()["homeostat_frozen"] == 0)
        assert ctl(daemon, token, "drain").returncode == 0
        assert daemon.wait() == 0
        assert TOKEN not in daemon.log and "asked by an operator" in daemon.log
    gone = ctl(daemon, token, "freeze")
    assert gone.returncode == 2 and "no daemon answers there" in gone.stderr


def test_the_port_acts_for_posts_alone(settings: dict[str, str], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    made = settings | {"HOMEOSTAT_SOURCE": "sim://ageing?rate=100", "HOMEOSTAT_OPERATOR__TOKEN_FILE": str(token)}
    with DaemonProcess(made, tmp_path) as daemon:
        daemon.wait_until_ready()

        def ask(method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], str]:
            connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
            connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}"} | headers)
            answer = connection.getresponse()
            found = answer.status, dict(answer.getheaders()), answer.read().decode()
            connection.close()
            return found

        status, headers, _ = ask("GET", "/ctl/freeze")
        assert status == 405 and headers["Allow"] == "POST"
        status, headers, text = ask("POST", "/ctl/freeze")
        assert status == 200 and json.loads(text)["done"] and headers["Content-Type"] == "application/json"
        assert not any(name.lower().startswith("access-control") for name in headers)
        assert ask("POST", "/ctl/freeze", b"x" * 5_000)[0] == 413
        assert ask("POST", "/metrics")[0] == 404
        assert ask("OPTIONS", "/ctl/freeze")[0] == 405
        assert ask("POST", "/ctl/freeze", Origin="http://elsewhere")[0] == 403


def test_bounds_change_by_ctl_reload_and_by_sighup_while_the_stream_goes_on(
    settings: dict[str, str], tmp_path: Path
) -> None:
    token, file = tmp_path / "token", tmp_path / "homeostat.env"
    token.write_text(TOKEN)
    file.write_text("HOMEOSTAT_GUARD__DELTA=0.002\n")
    made = settings | {
        "HOMEOSTAT_SOURCE": "sim://ageing?rate=500",
        "HOMEOSTAT_ENV_FILE": str(file),
        "HOMEOSTAT_OPERATOR__TOKEN_FILE": str(token),
    }
    with DaemonProcess(made, tmp_path) as daemon:
        daemon.wait_until_ready()
        file.write_text("HOMEOSTAT_GUARD__DELTA=0.01\nHOMEOSTAT_BATCH_ROWS=8\n")
        done = ctl(daemon, token, "reload")
        assert (done.returncode, done.stdout.strip()) == (
            0,
            "changed: HOMEOSTAT_GUARD__DELTA=0.01 (was 0.002); needs a restart: HOMEOSTAT_BATCH_ROWS",
        )
        file.write_text("HOMEOSTAT_GUARD__DELTA=7\n")
        wrong = ctl(daemon, token, "reload")
        assert (
            wrong.returncode == 1
            and "nothing is changed: HOMEOSTAT_GUARD__DELTA=7" in wrong.stderr
            and str(file) in wrong.stderr
        )
        file.write_text("HOMEOSTAT_LOG_LEVEL=debug\n")
        daemon.process.send_signal(signal.SIGHUP)
        eventually("SIGHUP is taken up", lambda: "HOMEOSTAT_LOG_LEVEL=debug (was info)" in daemon.log)
        before = daemon.metrics()["homeostat_records_in_total"]
        daemon.wait_for("homeostat_records_in_total", int(before) + 1)
        assert daemon.terminate() == 0
