"""TLS at the HTTP side: who is let in, which files are refused, and what `homeostat ctl` trusts."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry

from daemon.errors import SettingsError
from daemon.front.opening import front
from daemon.front.settings import Https
from daemon.front.tls import client_context, server_certificates
from daemon.front.web import Web
from daemon.operating.command import _ask
from daemon.operating.desk import Desk
from daemon.operating.operator_settings import OperatorActions
from daemon.operating.over_http import OperatorHttp
from tests.secure_broker import Authority, Pair
from tests.unit.worlds import worker

TOKEN = "correct-horse-battery-staple"
NEVER_S = 3600.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "plant")


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.issue("homeostat", hosts="IP:127.0.0.1")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), "somebody")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Https], Web]]:
    """``serve(settings)``: a running HTTP side with operator actions that nobody carries out."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    running: list[Web] = []

    def start(settings: Https) -> Web:
        operator = OperatorHttp(Desk(), OperatorActions(token_file=token), wait_s=0.0)
        probe = (True, "fine")
        certificates = server_certificates(settings)
        web = Web(
            "127.0.0.1:0",
            CollectorRegistry(),
            lambda: probe,
            lambda: probe,
            operator=operator,
            certificates=certificates,
        )
        web.start()
        running.append(web)
        return web

    yield start
    for web in running:
        web.stop()


def https(pair: Pair, **more: object) -> Https:
    return Https.model_validate({"ssl_certfile": pair.cert, "ssl_keyfile": pair.key, "ssl_reload_s": NEVER_S} | more)


def ask(web: Web, path: str, authority: Authority, shown: Pair | None = None, timeout_s: float = 10.0) -> int:
    """Status of an answer, from a client that checks the whole chain and the name."""
    context = ssl.create_default_context(cafile=str(authority.cert))
    if shown is not None:
        context.load_cert_chain(shown.cert, shown.key)
    connection = http.client.HTTPSConnection("127.0.0.1", web.port, timeout=timeout_s, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_with_a_certificate_https_alone_is_spoken(
    serve: Callable[[Https], Web], authority: Authority, server: Pair
) -> None:
    web = serve(https(server))
    assert ask(web, "/metrics", authority) == 200
    plain = http.client.HTTPConnection("127.0.0.1", web.port, timeout=10)
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.request("GET", "/metrics")
        plain.getresponse()
    plain.close()
    assert ask(web, "/healthz", authority) == 200


def test_with_authorities_the_probes_alone_are_for_everybody(
    serve: Callable[[Https], Web], authority: Authority, server: Pair, other: Authority
) -> None:
    web = serve(https(server, ssl_cafile=authority.cert))
    scraper = authority.issue("prometheus")
    assert [ask(web, path, authority) for path in ("/healthz", "/readyz", "/metrics", "/", "/ctl/freeze")] == [
        200, 200, 403, 403, 403,
    ]  # fmt: skip
    assert ask(web, "/metrics", authority, scraper) == 200
    with pytest.raises(OSError):
        ask(web, "/healthz", authority, other.issue("stranger"))
    assert ask(web, "/healthz", authority) == 200


def test_a_new_certificate_holds_for_the_next_connection(
    serve: Callable[[Https], Web], authority: Authority, other: Authority, tmp_path: Path
) -> None:
    first, second = authority.issue("before", hosts="IP:127.0.0.1"), other.issue("after", hosts="IP:127.0.0.1")
    pair = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")
    for old, new in zip(first, pair, strict=True):
        new.write_bytes(old.read_bytes())
    settings = https(pair)
    certificates = server_certificates(settings)
    assert certificates is not None
    probe = (True, "fine")
    web = Web("127.0.0.1:0", CollectorRegistry(), lambda: probe, lambda: probe, certificates=certificates)
    web.start()
    try:
        assert ask(web, "/healthz", authority) == 200
        for new, old in zip(second, pair, strict=True):
            old.write_bytes(new.read_bytes())
        assert certificates.look()
        assert ask(web, "/healthz", other) == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(web, "/healthz", authority)
    finally:
        web.stop()


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"ssl_certfile": "gone.pem"}, "HOMEOSTAT_HTTPS__SSL_CERTFILE=gone.pem: No such file"),
        ({"ssl_keyfile": "gone.key"}, "HOMEOSTAT_HTTPS__SSL_KEYFILE=gone.key: No such file"),
        ({"ssl_cafile": "gone.pem"}, "HOMEOSTAT_HTTPS__SSL_CAFILE=gone.pem: No such file"),
        ({"ssl_certfile": None}, "HOMEOSTAT_HTTPS__SSL_CERTFILE is not set: HOMEOSTAT_HTTPS__SSL_KEYFILE is of no use"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(server: Pair, wrong: dict[str, str], line: str) -> None:
    with pytest.raises(SettingsError, match=line):
        server_certificates(https(server, **wrong))


def test_a_key_of_another_certificate_and_an_expired_one_are_refused(authority: Authority, server: Pair) -> None:
    with pytest.raises(SettingsError, match="SSL_KEYFILE=.*: the key does not fit the certificate"):
        server_certificates(https(Pair(server.cert, authority.issue("x").key)))
    with pytest.raises(SettingsError, match="SSL_CERTFILE=.*: the certificate expired on"):
        server_certificates(https(authority.issue("old", days=-1)))


def test_ctl_trusts_the_certificate_of_its_settings_and_no_other_of_the_same_authority(
    serve: Callable[[Https], Web], authority: Authority, server: Pair
) -> None:
    web = serve(https(server))
    address = ("127.0.0.1", web.port)
    with pytest.raises(Exception, match="not carried out yet"):
        _ask(address, "freeze", {}, TOKEN, client_context(https(server)))
    with pytest.raises(SettingsError, match="no daemon answers there"):
        _ask(address, "freeze", {}, TOKEN, client_context(https(authority.issue("sibling", hosts="IP:127.0.0.1"))))
    with pytest.raises(SettingsError, match="no daemon answers there"):
        _ask(address, "freeze", {}, TOKEN, None)


def test_ctl_shows_a_certificate_where_one_is_asked_for(
    serve: Callable[[Https], Web], authority: Authority, server: Pair, tmp_path: Path
) -> None:
    operator = authority.issue("operator")
    both = tmp_path / "operator.pem"
    both.write_bytes(operator.cert.read_bytes() + operator.key.read_bytes())
    settings = https(server, ssl_cafile=authority.cert)
    web = serve(settings)
    with pytest.raises(Exception, match="a client certificate is needed here|HTTP status 403"):
        _ask(("127.0.0.1", web.port), "freeze", {}, TOKEN, client_context(settings))
    with pytest.raises(Exception, match="not carried out yet"):
        _ask(
            ("127.0.0.1", web.port), "freeze", {}, TOKEN,
            client_context(settings.model_copy(update={"client_certfile": both})),
        )  # fmt: skip
    with pytest.raises(SettingsError, match="CLIENT_CERTFILE=.*: "):
        client_context(settings.model_copy(update={"client_certfile": authority.cert}))


def test_a_client_that_never_shakes_hands_holds_up_nobody(
    serve: Callable[[Https], Web], authority: Authority, server: Pair
) -> None:
    web = serve(https(server))
    with socket.create_connection(("127.0.0.1", web.port), timeout=10):
        assert ask(web, "/metrics", authority, timeout_s=5.0) == 200, "it waited for the silent one's 10 s"


@pytest.mark.parametrize(
    ("address", "token", "warned"),
    [("0.0.0.0:0", True, True), ("0.0.0.0:0", False, False), ("127.0.0.1:0", True, False)],
)
def test_a_token_in_the_clear_outside_of_this_machine_is_warned_of(
    tmp_path: Path, address: str, token: bool, warned: bool
) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    made = worker(tmp_path, http=address, operator={"token_file": file} if token else {})
    probe = (True, "fine")
    with structlog.testing.capture_logs() as logs:
        web = front(made, Desk(), lambda: probe, lambda: probe)
    assert web is not None
    web.start()
    web.stop()
    assert any("in the clear" in line["event"] for line in logs) is warned
    assert not any(TOKEN in str(line) for line in logs)
