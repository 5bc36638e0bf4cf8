"""Certificates from files: each fault by its name, new files for new connections, broken ones never."""

from __future__ import annotations

import gc
import shutil
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.errors import StreamError
from daemon.streams import tls
from daemon.streams.tls import Certificates, TlsFiles, build, certificates
from daemon.streams.x509 import validity
from tests.secure_broker import Authority, Pair

NEVER_S = 3600.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("worker")


def files(authority: Authority, pair: Pair | None = None, **more: Any) -> TlsFiles:
    given = {"cafile": authority.cert} | ({} if pair is None else {"certfile": pair.cert, "keyfile": pair.key})
    return TlsFiles("HOMEOSTAT_KAFKA__", **(given | more))


def test_a_context_of_good_files_demands_the_brokers_certificate_and_a_modern_protocol(
    authority: Authority, pair: Pair
) -> None:
    context, ends = build(files(authority, pair))
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert ends is not None
    assert 19 * 86_400 < ends - time.time() <= 20 * 86_400
    assert not build(files(authority, check_hostname=False))[0].check_hostname


def missing(authority: Authority, pair: Pair, tmp_path: Path) -> tuple[TlsFiles, str]:
    return files(authority, cafile=tmp_path / "gone"), f"SSL_CAFILE={tmp_path / 'gone'}: No such file"


def empty(authority: Authority, pair: Pair, tmp_path: Path) -> tuple[TlsFiles, str]:
    (tmp_path / "empty").touch()
    return files(authority, pair, keyfile=tmp_path / "empty"), "SSL_KEYFILE=.*: the file is empty"


def no_authority(authority: Authority, pair: Pair, tmp_path: Path) -> tuple[TlsFiles, str]:
    return files(authority, cafile=pair.key), "SSL_CAFILE=.*: holds no certificate"


def no_certificate(authority: Authority, pair: Pair, tmp_path: Path) -> tuple[TlsFiles, str]:
    return files(authority, pair, certfile=pair.key), "SSL_CERTFILE=.*: holds no certificate"


def damaged(authority: Authority, pair: Pair, tmp_path: Path) -> tuple[TlsFiles, str]:
    lines = pair.cert.read_text().splitlines()
    (tmp_path / "cut").write_text("\n".join([lines[0], lines[1], lines[-1]]))
    return files(authority, pair, certfile=tmp_path / "cut"), "SSL_CERTFILE=.*cut: holds a damaged certificate"


def another_key(authority: Authority, pair: Pair, tmp_path: Path) -> tuple[TlsFiles, str]:
    other = authority.issue("other")
    return files(authority, pair, keyfile=other.key), "SSL_KEYFILE=.*: the key does not fit the certificate in .*SSL_C"


def no_key(authority: Authority, pair: Pair, tmp_path: Path) -> tuple[TlsFiles, str]:
    return files(authority, pair, keyfile=pair.cert), "SSL_KEYFILE=.*: holds no private key"


def expired(authority: Authority, pair: Pair, tmp_path: Path) -> tuple[TlsFiles, str]:
    return files(authority, authority.issue("old", days=-1)), r"SSL_CERTFILE=.*: the certificate expired on \d{4}-"


def locked(authority: Authority, pair: Pair, tmp_path: Path) -> tuple[TlsFiles, str]:
    return files(authority, authority.issue("locked", password="open sesame")), "key is locked; set .*SSL_PASSWORD_FILE"


def wrong_password(authority: Authority, pair: Pair, tmp_path: Path) -> tuple[TlsFiles, str]:
    word = tmp_path / "word"
    word.write_text("closed sesame\n")
    return (
        files(authority, authority.issue("locked2", password="open sesame"), password_file=word),
        "SSL_KEYFILE=.*: not opened by the password in HOMEOSTAT_KAFKA__SSL_PASSWORD_FILE=.*word",
    )


@pytest.mark.parametrize(
    "fault",
    [
        missing,
        empty,
        no_authority,
        no_certificate,
        damaged,
        another_key,
        no_key,
        expired,
        locked,
        wrong_password,
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(
    fault: Callable[[Authority, Pair, Path], tuple[TlsFiles, str]], authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    given, said = fault(authority, pair, tmp_path)
    with pytest.raises(StreamError, match=f"HOMEOSTAT_KAFKA__{said}" if said.startswith("SSL") else said) as raised:
        build(given)
    assert "\n" not in str(raised.value)
    assert "sesame" not in str(raised.value)
    assert "PRIVATE KEY" not in str(raised.value)


def test_a_locked_key_is_opened_by_the_password_of_its_file(authority: Authority, tmp_path: Path) -> None:
    word = tmp_path / "word"
    word.write_text("open sesame\n")
    context, _ = build(files(authority, authority.issue("locked3", password="open sesame"), password_file=word))
    assert context is not None


class Server:
    """Asks for a certificate of one of the authorities and notes whose it was."""

    def __init__(self, own: Pair, *trusted: Authority) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(own.cert, own.key)
        context.verify_mode = ssl.CERT_REQUIRED
        for each in trusted:
            context.load_verify_locations(each.cert)
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def greet(self, certificates: Certificates) -> str:
        """One connection with these certificates: whom the server took it for, or the error."""
        seen: list[str] = []

        def serve() -> None:
            raw, _ = self._listener.accept()
            try:
                with self._context.wrap_socket(raw, server_side=True) as peer:
                    subject: Any = peer.getpeercert() or {}
                    seen.append(dict(part[0] for part in subject["subject"])["commonName"])
                    peer.sendall(b".")
            except (ssl.SSLError, OSError) as error:
                seen.append(getattr(error, "reason", "") or type(error).__name__)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(("127.0.0.1", self.port), 10) as raw,
                certificates.wrap_socket(raw, server_hostname="127.0.0.1") as wrapped,
            ):
                wrapped.recv(1)
        except (ssl.SSLError, OSError):
            pass
        thread.join(10)
        return seen[0]

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def world(authority: Authority, tmp_path: Path) -> Any:
    """A client's folder of files that can be replaced, the server that it talks to, and a second authority."""

    class World:
        second = Authority(tmp_path / "second", "second")
        server = Server(authority.issue("server", hosts="IP:127.0.0.1"), authority, second)
        cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"

        def install(self, pair: Pair) -> None:
            shutil.copy(pair.cert, self.cert)
            shutil.copy(pair.key, self.key)

    made = World()
    made.install(authority.issue("before"))
    shutil.copy(authority.cert, made.ca)
    yield made
    made.server.close()


def of(world: Any, reload_s: float = NEVER_S) -> Certificates:
    return Certificates(
        TlsFiles("HOMEOSTAT_KAFKA__", cafile=world.ca, certfile=world.cert, keyfile=world.key), reload_s
    )


def test_a_new_connection_shows_the_certificate_that_was_put_in_place_of_the_old_one(world: Any) -> None:
    client = of(world)
    assert world.server.greet(client) == "before"
    world.install(world.second.issue("after"))
    assert world.server.greet(client) == "before", "nobody has looked yet"
    assert client.look()
    assert world.server.greet(client) == "after"
    assert not client.look(), "nothing changed since"


def test_the_files_are_looked_at_by_themselves(world: Any) -> None:
    client = of(world, reload_s=0.02)
    world.install(world.second.issue("after"))
    deadline = time.monotonic() + 20
    while world.server.greet(client) != "after":
        assert time.monotonic() < deadline


def test_an_authority_that_was_taken_away_is_trusted_no_more(world: Any) -> None:
    client = of(world)
    assert world.server.greet(client) == "before"
    shutil.copy(world.second.cert, world.ca)
    assert client.look()
    assert "UNKNOWN_CA" in world.server.greet(client), "the server is told that its authority is unknown"


def test_a_broken_new_file_leaves_the_old_one_and_is_logged_once_by_name(
    world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client = of(world)
    world.key.write_bytes(world.second.issue("other").key.read_bytes())
    assert not client.look()
    assert "can't be used" not in "".join(capsys.readouterr()), "the certificate may be about to follow"
    assert not client.look()
    assert not client.look()
    said = "".join(capsys.readouterr())
    assert said.count("new certificate files can't be used") == 1
    assert str(world.key) in said
    assert "PRIVATE" not in said
    assert world.server.greet(client) == "before"
    world.install(world.second.issue("after"))
    assert client.look()
    assert world.server.greet(client) == "after"


def test_a_pair_that_is_looked_at_half_written_is_loaded_once_whole_and_not_complained_of(
    world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client = of(world)
    after = world.second.issue("after")
    shutil.copy(after.cert, world.cert)
    assert not client.look()
    shutil.copy(after.key, world.key)
    assert client.look()
    assert world.server.greet(client) == "after"
    assert "can't be used" not in "".join(capsys.readouterr())


def test_files_that_vanish_change_nothing(world: Any) -> None:
    client = of(world)
    for path in (world.ca, world.cert, world.key):
        path.unlink()
    assert not client.look()
    assert not client.look()
    assert world.server.greet(client) == "before"


def test_a_certificate_that_ends_soon_is_warned_of_once_a_day(
    world: Any, authority: Authority, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = of(world)
    now = time.time()
    for days in (0.0, 7.0, 7.5, 8.1):
        monkeypatch.setattr(tls.time, "time", lambda days=days: now + days * 86_400)
        client.look()
    said = "".join(capsys.readouterr())
    assert said.count("certificate ends soon") == 2
    assert str(world.cert) in said


def test_clients_of_the_same_files_share_one_and_it_ends_with_the_last_of_them(world: Any) -> None:
    named = TlsFiles("HOMEOSTAT_KAFKA__", cafile=world.ca)
    first, second = certificates(named, NEVER_S), certificates(named, NEVER_S)
    assert first is second
    gone = weakref.ref(first)
    del first, second
    gc.collect()
    assert gone() is None


@given(st.binary(max_size=400))
def test_no_bytes_are_a_reason_to_fail_otherwise_than_by_saying_so(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"holds (no|a damaged) certificate"):
        validity(content)


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_certificate_with_a_bit_turned_has_dates_or_is_called_damaged(
    authority: Authority, position: int, bit: int
) -> None:
    der = bytearray(ssl.PEM_cert_to_DER_cert(authority.cert.read_text()))
    der[position % len(der)] ^= 1 << bit
    try:
        begins, ends = validity(ssl.DER_cert_to_PEM_cert(bytes(der)).encode())
    except ValueError as error:
        assert "holds a damaged certificate" in str(error)
    else:
        assert isinstance(begins, float)
        assert isinstance(ends, float)
