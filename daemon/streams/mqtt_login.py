"""What an MQTT client shows to its broker. Read again for each connection, so that new files hold from then on."""

from __future__ import annotations

import socket
import ssl

from daemon.errors import StreamError
from daemon.stream_settings import Mqtt
from daemon.streams.mqtt_address import MqttAddress


def session_name(settings: Mqtt) -> str:
    """Name of this worker's session; what opens the streams has settled ``auto`` by the state's folder, too."""
    return f"homeostat-{socket.gethostname()}" if settings.client_id == "auto" else settings.client_id


def password(settings: Mqtt) -> str | None:
    """The login password, None without a file.

    Raises:
        StreamError: the file can't be read.
    """
    path = settings.password_file
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"HOMEOSTAT_MQTT__PASSWORD_FILE={path}: {_said(error)}") from None


def tls_context(settings: Mqtt, address: MqttAddress) -> ssl.SSLContext | None:
    """Certificates for ``address``, None where no TLS is spoken.

    Raises:
        StreamError: a file can't be used.
    """
    if not address.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
    except (OSError, ValueError) as error:
        raise StreamError(f"HOMEOSTAT_MQTT__SSL_CAFILE={settings.ssl_cafile}: {_said(error)}") from None
    if settings.ssl_certfile is not None:
        try:
            # Without a password: asked for one, a daemon would wait at a terminal that nobody sees.
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password=lambda: "")
        except (OSError, ValueError) as error:
            raise StreamError(
                f"HOMEOSTAT_MQTT__SSL_CERTFILE={settings.ssl_certfile} with "
                f"HOMEOSTAT_MQTT__SSL_KEYFILE={settings.ssl_keyfile}: {_said(error)}"
            ) from None
    return context


def tried(settings: Mqtt, address: MqttAddress, client_id: str) -> str:
    """What is tried, for messages."""
    login = f" as {settings.username!r}" if settings.username else " without a login"
    return f"{'TLS' if address.tls else 'plain TCP'} to {address.broker}{login}, client id {client_id!r}"


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
