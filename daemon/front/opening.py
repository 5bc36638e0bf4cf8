"""What a worker shows over HTTP, and what it lets be done to it there."""

from __future__ import annotations

import ipaddress

import structlog

from daemon.assembly import Worker
from daemon.front.tls import server_certificates
from daemon.front.web import Pages, Probe, Web, parse_address
from daemon.operating.desk import Desk
from daemon.operating.over_http import OperatorHttp
from daemon.settings import Settings
from daemon.streams.tls import Certificates

log = structlog.get_logger("homeostat.http")


def front(worker: Worker, desk: Desk, alive: Probe, ready: Probe, page: Pages | None = None) -> Web | None:
    """The bound, silent HTTP side; None where it is off.

    Raises:
        SettingsError: naming the variable: the address can't be had, a certificate or the token's file can't be used.
    """
    settings = worker.settings
    if settings.http == "off":
        return None
    operator, certificates = _made(settings, desk)
    registry = worker.telemetry.registry
    web = Web(settings.http, registry, alive, ready, operator=operator, certificates=certificates, page=page)
    if certificates is None and settings.operator.token_file is not None and not is_loopback(web.host):
        log.warning(
            "the operator's token crosses the network in the clear: set HOMEOSTAT_HTTPS__SSL_CERTFILE, or bind "
            "HOMEOSTAT_HTTP to 127.0.0.1",
            http=settings.http,
        )
    return web


def check_front(settings: Settings) -> None:
    """Raise what `front` would, without binding anything."""
    if settings.http != "off":
        parse_address(settings.http)
        _made(settings, Desk())


def _made(settings: Settings, desk: Desk) -> tuple[OperatorHttp, Certificates | None]:
    return OperatorHttp(desk, settings.operator), server_certificates(settings.https)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
