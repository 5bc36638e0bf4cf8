"""What hostile clients can do to the HTTP side: any bytes, many connections, slow ones."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Protocol

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from daemon.front.port import Port
from daemon.front.web import Web
from daemon.operating.desk import ACTIONS, Desk
from daemon.operating.operator_settings import OperatorActions
from daemon.operating.over_http import OperatorHttp

TOKEN = "correct-horse-battery-staple"
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


class Listening(Protocol):
    """Whatever answers at 127.0.0.1."""

    @property
    def port(self) -> int: ...


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    token = tmp_path_factory.mktemp("operator") / "token"
    token.write_text(TOKEN)
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    operator = OperatorHttp(Desk(), OperatorActions(token_file=token, per_minute=1_000_000), wait_s=0.0)
    made = Web("127.0.0.1:0", registry, lambda: (True, "moving"), lambda: (False, "starting"), operator=operator)
    made.start()
    yield made
    made.stop()


def send(web: Listening, data: bytes) -> bytes:
    """All that comes back for these bytes, and the end of the request."""
    with socket.create_connection(("127.0.0.1", web.port), timeout=20) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            parts = []
            while part := connection.recv(65_536):
                parts.append(part)
        except OSError:
            return b"".join(parts) if "parts" in locals() else b""
    return b"".join(parts)


def check(answer: bytes) -> int | None:
    """Its status, None without an answer; a fault of the server's, or a secret in it, fails."""
    found = STATUS.match(answer)
    assert TOKEN.encode() not in answer and b"Traceback" not in answer
    assert b"access-control" not in answer.lower()
    if found is None:
        # HTTP/0.9, which has no head, or nothing at all.
        return None
    status = int(found.group(1))
    assert status < 500 or status in (503, 505), answer
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"x-content-type-options: nosniff" in head and b"server: homeostat\r" in head + b"\r"
    return status


words = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)
paths = st.one_of(
    st.sampled_from(["/", "/metrics", "/healthz", "/readyz", "/ctl", "/ctl/", "//", "*", "http://x/metrics"]),
    st.builds("/ctl/{}".format, st.one_of(st.sampled_from(ACTIONS), words)),
    words,
    st.text(max_size=30),
)
methods = st.one_of(st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"]), words)
headers = st.dictionaries(
    st.one_of(
        st.sampled_from(["Authorization", "Content-Length", "Accept", "Origin", "Host", "Transfer-Encoding", "Expect"]),
        words,
    ),
    st.one_of(
        st.sampled_from([f"Bearer {TOKEN}", "-1", "5000", "0", "chunked", "100-continue", "9" * 30, "٣"]),
        st.builds("application/openmetrics-text; version={}".format, words),
        st.text(max_size=40),
    ),
    max_size=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(method=methods, path=paths, given_headers=headers, body=st.binary(max_size=200))
@example("GET", "/metrics", {"Accept": "application/openmetrics-text; version=x"}, b"")
@example("GET", "/metrics", {"Accept": "application/openmetrics-text; version=1.0.0; escaping=nonsense"}, b"")
@example("POST", "/ctl/rollback", {"Authorization": f"Bearer {TOKEN}", "Content-Length": "20"}, b'{"version":1e999}   ')
@example("POST", "/ctl/freeze", {"Authorization": f"Bearer {TOKEN}", "Content-Length": "4000"}, b"short")
@example("POST", "/ctl/freeze", {"Content-Length": "²"}, b"")
@example("BREW", "/", {}, b"")
def test_no_request_is_answered_by_a_fault(
    web: Web, method: str, path: str, given_headers: dict[str, str], body: bytes
) -> None:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given_headers.items()), "", ""]
    check(send(web, "\r\n".join(lines).encode("utf-8", "surrogatepass") + body))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=300))
@example(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
@example(b"GET /metrics HTTP/9999999999.1\r\n\r\n")
@example(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n")
@example(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")
@example(b"\x00" * 300)
def test_no_bytes_are_answered_by_a_fault(web: Web, data: bytes) -> None:
    check(send(web, data))


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics HTTP/1.1", 200),
        (b"GET /healthz HTTP/1.0", 200),
        (b"GET /readyz HTTP/1.1", 503),
        (b"GET /nothing HTTP/1.1", 404),
        (b"BREW / HTTP/1.1", 405),
        (b"OPTIONS /ctl/freeze HTTP/1.1", 405),
        (b"GET /ctl/freeze HTTP/1.1", 405),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1", 414),
        (b"nonsense", 400),
    ],
)
def test_each_fault_of_a_client_has_its_status(web: Web, request_line: bytes, status: int) -> None:
    assert check(send(web, request_line + b"\r\n\r\n")) == status


def test_a_request_smuggled_behind_another_is_not_answered(web: Web) -> None:
    inner = f"POST /ctl/freeze HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    for head in (b"Content-Length: 0", b"Transfer-Encoding: chunked", b"Content-Length: 0\r\nContent-Length: 200"):
        answer = send(web, b"POST /ctl/nothing HTTP/1.1\r\n" + head + b"\r\n\r\n" + inner)
        assert len(STATUS.findall(answer)) == 1, answer


def test_a_fault_of_ours_is_answered_as_one_and_told_to_the_log_alone() -> None:
    def broken() -> tuple[bool, str]:
        raise RuntimeError("the secret plan")

    made = Web("127.0.0.1:0", CollectorRegistry(), broken, broken)
    made.start()
    try:
        answer = send(made, b"GET /healthz HTTP/1.1\r\n\r\n")
        assert STATUS.match(answer) and b" 500 " in answer and b"secret plan" not in answer
    finally:
        made.stop()


def test_more_connections_than_there_are_threads_for_are_closed_and_the_next_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Port, "most", 3)
    made = Web("127.0.0.1:0", CollectorRegistry(), lambda: (True, "moving"), lambda: (True, "ready"))
    made.start()
    silent = [socket.create_connection(("127.0.0.1", made.port), timeout=20) for _ in range(3)]
    try:
        assert send(made, b"GET /healthz HTTP/1.1\r\n\r\n") == b""
        silent.pop().close()
        answer = b""
        for _ in range(1000):
            # Its thread hears of the end in its own time.
            if answer := send(made, b"GET /healthz HTTP/1.1\r\n\r\n"):
                break
        assert check(answer) == 200
    finally:
        for connection in silent:
            connection.close()
        made.stop()


def test_a_connection_that_drips_is_ended_however_busy_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Port, "longest_s", 0.0)
    made = Web("127.0.0.1:0", CollectorRegistry(), lambda: (True, "moving"), lambda: (True, "ready"))
    made.start()
    try:
        with socket.create_connection(("127.0.0.1", made.port), timeout=20) as connection:
            connection.sendall(b"GET /heal")
            assert connection.recv(100) == b""
    finally:
        made.stop()


def test_an_ipv6_address_is_an_address() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    made = Web("[::1]:0", CollectorRegistry(), lambda: (True, "moving"), lambda: (True, "ready"))
    made.start()
    try:
        with socket.create_connection(("::1", made.port), timeout=20) as connection:
            connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert b" 200 " in connection.recv(1000)
    finally:
        made.stop()


def test_the_decision_s_answer_is_json(web: Web) -> None:
    answer = send(web, f"POST /ctl/freeze HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    assert check(answer) == 202
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["done"] is False
