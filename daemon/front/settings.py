"""Settings of TLS at HOMEOSTAT_HTTP."""

from __future__ import annotations

from pathlib import Path

from pydantic import PositiveFloat

from daemon.section import Section


class Https(Section):
    """TLS at HOMEOSTAT_HTTP; without a certificate it speaks plain HTTP."""

    ssl_certfile: Path | None = None
    """Certificate that is shown, and what signed it; with it only HTTPS is spoken."""
    ssl_keyfile: Path | None = None
    """Key of that certificate; unset: it is in the same file."""
    ssl_password_file: Path | None = None
    """File that holds the password of that key."""
    ssl_cafile: Path | None = None
    """Authorities of clients: without a certificate of theirs a client is told /healthz and /readyz alone."""
    ssl_reload_s: PositiveFloat = 10.0
    """How often these files are looked at; new ones hold for every new connection."""
    client_certfile: Path | None = None
    """What `homeostat ctl` shows where SSL_CAFILE asks for a certificate, with its key."""
