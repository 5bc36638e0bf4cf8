"""What the registry's client asks, what it takes for an answer, and what it says when it gets none."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.stream_settings import SchemaRegistry
from daemon.streams.registry import MAX_ANSWER, Reference, Registry, RegistryAwayError, Schema, SchemaError
from tests.daemon_process import free_port
from tests.registry_server import RegistryServer, certificate


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with RegistryServer() as server:
        yield server


def client(url: str, **more: Any) -> Registry:
    return Registry(SchemaRegistry(url=url, **({"timeout_s": 5.0} | more)))


def test_a_schema_comes_with_its_type_and_its_references_deepest_first(server: RegistryServer) -> None:
    server.add('"int"', subject="deep/er")
    server.add('"long"', subject="deep", references=(("Deeper", "deep/er", 1),))
    number = server.add('"float"', "JSON", references=(("Deep", "deep", 1), ("Deeper", "deep/er", 1)))
    registry = client(server.url)
    registry.check()
    expected = (Reference("Deeper", '"int"'), Reference("Deep", '"long"'))
    assert registry.schema(number) == Schema("JSON", '"float"', expected)
    assert registry.schema(1) == Schema("AVRO", '"int"')


def test_an_address_with_a_path_is_asked_below_it(server: RegistryServer) -> None:
    with pytest.raises(RegistryAwayError, match="HTTP 404 Not Found"):
        client(f"{server.url}/apis/ccompat/v7/").check()
    assert server.asked == ["/apis/ccompat/v7/schemas/types"]


def test_references_that_go_round_in_a_circle_come_to_an_end(server: RegistryServer) -> None:
    server.add('"int"', subject="a", references=(("B", "b", 1),))
    server.add('"long"', subject="b", references=(("A", "a", 1),))
    assert {each.name for each in client(server.url).schema(1).references} == {"A", "B"}


@pytest.mark.parametrize(
    ("references", "problem"),
    [
        ([{"name": "n", "subject": "away", "version": 1}], "the registry has none: Subject"),
        ([{"name": "n"}], "its list of references can't be read"),
        ([3], "its list of references can't be read"),
        ([{"name": f"n{at}", "subject": "s", "version": 1} for at in range(101)], "more than 100 references"),
    ],
)
def test_a_schema_whose_references_are_not_to_be_had_is_refused(
    server: RegistryServer, references: list[Any], problem: str
) -> None:
    server.add('"int"', subject="s")
    server.answers.append((200, json.dumps({"schema": '"long"', "references": references}).encode()))
    with pytest.raises(SchemaError, match=problem):
        client(server.url).schema(2)


def test_only_a_registry_that_says_so_has_no_such_schema(server: RegistryServer) -> None:
    with pytest.raises(SchemaError, match="the registry has none: Schema 7 not found"):
        client(server.url).schema(7)


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (404, b"<html>not found</html>", "answers /schemas/ids/1 with HTTP 404"),
        (404, b'{"error_code": 50002}', "with HTTP 404"),
        (503, b"{}", "with HTTP 503"),
        (301, b"", "with HTTP 301"),
        (200, b"not json", "but not with JSON"),
        (200, b"[" * 100_000, "but not with JSON"),
        (200, b"{}", "gives no schema for id 1"),
        (200, b'["schema"]', "gives no schema for id 1"),
        (200, b'{"schema": {}}', "gives no schema for id 1"),
        (200, b" " * (MAX_ANSWER + 1), f"more than {MAX_ANSWER} bytes"),
        (401, b"", "refuses a visitor without login: set HOMEOSTAT_REGISTRY__USERNAME"),
    ],
)
def test_an_answer_that_is_none_says_nothing_about_the_schema(
    server: RegistryServer, status: int, body: bytes, problem: str
) -> None:
    server.add('"int"')
    server.answers.append((status, body))
    with pytest.raises(RegistryAwayError) as caught:
        client(server.url).schema(1)
    assert problem in str(caught.value)
    assert f"HOMEOSTAT_REGISTRY__URL={server.url}: the schema registry " in str(caught.value)
    assert client(server.url).schema(1).text == '"int"', "the next answer is the right one"


def test_where_nothing_listens_the_start_fails_with_what_was_tried() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RegistryAwayError, match=rf"{url}: the schema registry can't be reached: .*refused"):
        client(url, timeout_s=5).check()


def test_a_registry_that_comes_up_within_the_time_is_waited_for() -> None:
    port, made = free_port(), []
    starter = threading.Timer(0.3, lambda: made.append(RegistryServer(port=port)))
    starter.start()
    client(f"http://127.0.0.1:{port}", timeout_s=20).check()
    starter.join()
    assert made[0].asked == ["/schemas/types"]
    made[0].close()


def test_a_silent_registry_is_given_up_after_its_time(server: RegistryServer) -> None:
    server.silent.set()
    with pytest.raises(RegistryAwayError, match=r"does not answer /schemas/ids/1 within 0.2 s"):
        client(server.url, timeout_s=0.2).schema(1)


def test_a_registry_that_drips_its_answer_is_given_up_after_its_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def drip() -> None:
            peer, _ = listener.accept()
            with peer:
                try:
                    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                    while not done.wait(0.05):
                        peer.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(RegistryAwayError, match="does not answer"):
            client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.4).schema(1)
        done.set()
        thread.join()


def test_what_is_no_registry_fails_the_start_at_once(server: RegistryServer) -> None:
    for body in (b'{"a": 1}', b"<html>"):
        server.answers = [(200, body)] * 1000
        with pytest.raises(RegistryAwayError, match="not as a schema registry does|not with JSON"):
            client(server.url, timeout_s=5).check()


def test_a_login_is_read_from_its_file_at_each_question(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("wrong\n")
    with RegistryServer(login="ann:right") as server:
        server.add('"int"')
        registry = client(server.url, username="ann", password_file=secret, timeout_s=20)
        with pytest.raises(RegistryAwayError, match=r"refuses the login of 'ann' \(HTTP 401 to /schemas/types\)") as no:
            registry.check()
        assert server.asked == ["/schemas/types"], "a refused login is not tried again until the time is over"
        assert "wrong" not in str(no.value)
        secret.write_text("right\n")
        registry.check()
        assert registry.schema(1).text == '"int"'
        secret.unlink()
        with pytest.raises(RegistryAwayError, match=r"HOMEOSTAT_REGISTRY__PASSWORD_FILE=.*: No such file"):
            registry.check()


def test_tls_trusts_the_given_authorities_alone(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    with RegistryServer(tls=(cert, key)) as server:
        server.add('"int"')
        assert client(server.url, ssl_cafile=cert).schema(1).text == '"int"'
        with pytest.raises(RegistryAwayError, match="certificate verify failed"):
            client(server.url, timeout_s=20).check()
    with pytest.raises(RegistryAwayError, match=r"HOMEOSTAT_REGISTRY__SSL_CAFILE=.*: No such file"):
        client(server.url, ssl_cafile=tmp_path / "away.crt").check()
    with pytest.raises(RegistryAwayError, match=r"HOMEOSTAT_REGISTRY__SSL_CAFILE=.*registry.key: "):
        client(server.url, ssl_cafile=key).check()


@pytest.mark.parametrize(
    "url", ["registry:8081", "ftp://registry", "http://", "http://h:port", "http://h/?a=b", "https://h/#a"]
)
def test_what_can_not_be_an_address_is_refused_with_one_that_could(url: str) -> None:
    with pytest.raises(Exception, match=r"not a registry's address; right would be https://host:8081"):
        client(url)


def test_a_login_in_the_address_is_refused_and_never_shown() -> None:
    settings = SchemaRegistry(url="https://ann:secret@host:8081")
    assert settings.url == "https://***@host:8081"
    with pytest.raises(Exception, match="holds a login; put it into HOMEOSTAT_REGISTRY__USERNAME") as caught:
        Registry(settings)
    assert "secret" not in str(caught.value)
