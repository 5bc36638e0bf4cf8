"""TLS of the HTTP side: the server's context, from files that may change, and that of `homeostat ctl`."""

from __future__ import annotations

import re
import ssl

from daemon.errors import SettingsError, StreamError
from daemon.front.settings import Https
from daemon.streams.tls import Certificates, TlsFiles, own_certificate, read_file

PREFIX = "HOMEOSTAT_HTTPS__"
_FIRST = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def server_certificates(settings: Https) -> Certificates | None:
    """What the server wraps its connections in; None: plain HTTP.

    Raises:
        SettingsError: one line that names the variable and the file that can't be used.
    """
    if settings.ssl_certfile is None:
        given = [name for name in ("ssl_keyfile", "ssl_password_file", "ssl_cafile") if getattr(settings, name)]
        if given:
            raise SettingsError([f"{PREFIX}SSL_CERTFILE is not set: {PREFIX}{given[0].upper()} is of no use without"])
        return None
    files = TlsFiles(
        PREFIX, settings.ssl_cafile, settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_password_file
    )
    try:
        return Certificates(files, settings.ssl_reload_s, _build_server)
    except StreamError as error:
        raise SettingsError([str(error)]) from None


def _build_server(files: TlsFiles) -> tuple[ssl.SSLContext, float | None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A resumed session would bring back the certificate of its first handshake, after the authorities have changed.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    if files.cafile is not None:
        authorities = read_file(files.cafile, f"{PREFIX}SSL_CAFILE")
        try:
            context.load_verify_locations(cadata=authorities.decode("ascii", "replace"))
        except (ssl.SSLError, ValueError):
            raise StreamError(f"{files.variable('cafile')}: holds no certificate in PEM form") from None
        # Optional: a probe of the platform has none, and is answered.
        context.verify_mode = ssl.CERT_OPTIONAL
    return context, own_certificate(context, files)


def client_context(settings: Https) -> ssl.SSLContext | None:
    """For `homeostat ctl`: it trusts the very certificate in SSL_CERTFILE and no other; None: plain HTTP.

    The address is most often 127.0.0.1, which certificates of a plant do not name: who has the key is what counts.

    Raises:
        SettingsError: one line that names the variable and the file that can't be used.
    """
    if settings.ssl_certfile is None:
        return None
    shown = settings.client_certfile
    try:
        found = _FIRST.search(read_file(settings.ssl_certfile, f"{PREFIX}SSL_CERTFILE").decode("ascii", "replace"))
        if found is None:
            raise StreamError(f"{PREFIX}SSL_CERTFILE={settings.ssl_certfile}: holds no certificate in PEM form")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=found.group())
        if shown is not None:
            context.load_cert_chain(shown, password=lambda: "")
    except StreamError as error:
        raise SettingsError([str(error)]) from None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "holds no certificate with its key in PEM form"
        raise SettingsError([f"{PREFIX}CLIENT_CERTFILE={shown}: {problem}"]) from None
    return context
