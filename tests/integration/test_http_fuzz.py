"""Any request at a daemon that works: answered without a fault, without a secret, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.daemon_process import DaemonProcess, eventually
from tests.unit.test_front_port import STATUS, headers, methods, paths, send

TOKEN, PASSWORD = "the-token-that-nobody-may-see", "a-password-of-the-plant"
CALM = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def daemon(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "token").write_text(TOKEN)
    made = {
        "HOMEOSTAT_STATE_DIR": str(folder / "state"),
        "HOMEOSTAT_BUNDLE": str(bundle),
        "HOMEOSTAT_SOURCE": "sim://ageing?rate=10000000",
        "HOMEOSTAT_OPERATOR__TOKEN_FILE": str(folder / "token"),
        "HOMEOSTAT_OPERATOR__PER_MINUTE": "1000000",
        "HOMEOSTAT_KAFKA__PASSWORD": PASSWORD,
        "HOMEOSTAT_LOG_LEVEL": "debug",
    }
    with DaemonProcess(made, folder) as process:
        yield process.wait_until_ready()


def check(answer: bytes) -> None:
    found = STATUS.match(answer)
    assert found is None or int(found[1]) < 500 or int(found[1]) in (503, 505), answer
    for secret in (TOKEN, PASSWORD, "Traceback"):
        assert secret.encode() not in answer


def left_open(daemon: DaemonProcess) -> tuple[int, int]:
    """Sockets and threads of the process."""
    own = Path(f"/proc/{daemon.process.pid}")
    links = []
    for one in (own / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            links.append(os.readlink(one))
    return sum(link.startswith("socket:") for link in links), len(list((own / "task").iterdir()))


@CALM
@given(method=methods, path=paths | st.just("/state"), given_headers=headers, body=st.binary(max_size=200))
@example("GET", "/state", {}, b"")
@example("GET", "/", {"Accept-Encoding": "gzip"}, b"")
def test_no_request_is_answered_by_a_fault_or_a_secret(
    daemon: DaemonProcess, method: str, path: str, given_headers: dict[str, str], body: bytes
) -> None:
    # The token itself is left out: what an operator may do, such as a drain, is no fault.
    given = {name: value for name, value in given_headers.items() if "Bearer" not in value}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    check(send(daemon, "\r\n".join(lines).encode("utf-8", "surrogatepass") + body))


@CALM
@given(st.binary(max_size=300))
def test_no_bytes_are_answered_by_a_fault_or_a_secret(daemon: DaemonProcess, data: bytes) -> None:
    check(send(daemon, data))


def test_afterwards_it_works_as_before_and_nothing_is_left_open(daemon: DaemonProcess) -> None:
    before = left_open(daemon)
    for _ in range(300):
        check(send(daemon, b"GET /metrics HTTP/1.1\r\nAccept: */*;q=x\r\n\r\n"))
    eventually(
        "its sockets and threads are those of before",
        lambda: all(now <= then for now, then in zip(left_open(daemon), before, strict=True)),
    )
    records = daemon.metrics()["homeostat_records_in_total"]
    daemon.wait_for("homeostat_records_in_total", records + 1)
    assert daemon.terminate() == 0
    assert TOKEN not in daemon.log and PASSWORD not in daemon.log and "a request was not answered" not in daemon.log
