"""The options of `homeostat ctl`; what does the work is imported when the command runs."""

from __future__ import annotations

import argparse
import http.client
import json
import ssl
from typing import Any

from daemon.errors import HomeostatError, SettingsError
from daemon.operating.desk import ACTIONS

DESCRIPTION = """\
Act on a running daemon, at HOMEOSTAT_HTTP, with the token in HOMEOSTAT_OPERATOR__TOKEN_FILE, which the daemon has too:

  freeze          the version that serves answers as it is: nothing adapts, nothing is learnt, until resume
  resume          adapt and learn again; also ends the hold of a rollback
  reset           begin the fast adaptation again from nothing
  rollback N      serve version N; 0 is the frozen model; with --hold nothing is promoted until resume
  checkpoint      write a checkpoint now
  reload          read HOMEOSTAT_ENV_FILE again: bounds, paces and the log's level change, for others it says that they
                  need a restart; SIGHUP does the same
  drain           answer what was read, checkpoint, end

It is done between two batches and written into the journal of decisions and the log; what changes the state is
followed by a checkpoint."""

TAIL = """\
exit codes: 0: done; 1: refused, or not carried out in time; 2: a setting is wrong, or nothing answers

examples:
  homeostat ctl freeze
  homeostat ctl rollback 4 --hold"""

VARIABLES = ("HOMEOSTAT_HTTP", "HOMEOSTAT_OPERATOR__TOKEN_FILE", "HOMEOSTAT_HTTPS__")
_TIMEOUT_S = 15.0
REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""All addresses of this machine is where a daemon listens, not where one asks."""


class _RefusedError(HomeostatError):
    """The daemon did not do it."""


def add(commands: Any) -> None:
    """Add the command to ``commands``, what ``add_subparsers`` gave."""
    ctl = commands.add_parser(
        "ctl", help="freeze, resume, reset, roll back, reload or drain a running daemon", description=DESCRIPTION,
        variables=VARIABLES, tail=TAIL,
    )  # fmt: skip
    ctl.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    ctl.add_argument("number", type=int, nargs="?", metavar="N", help="of the version, for rollback")
    ctl.add_argument("--hold", action="store_true", help="with rollback: promote nothing until resume")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from daemon.config import load_settings

    settings = load_settings()
    from daemon.front.tls import client_context
    from daemon.front.web import parse_address

    if (arguments.action == "rollback") == (arguments.number is None) or (arguments.hold and arguments.number is None):
        raise SettingsError(["rollback needs the number of a version; the other actions take neither that nor --hold"])
    if settings.operator.token_file is None:
        raise SettingsError(["HOMEOSTAT_OPERATOR__TOKEN_FILE is not set: it holds the token that the daemon was given"])
    if settings.http == "off":
        raise SettingsError(["HOMEOSTAT_HTTP=off: there is nowhere to ask"])
    try:
        token = settings.operator.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = f"HOMEOSTAT_OPERATOR__TOKEN_FILE={settings.operator.token_file}: {error}"
        raise SettingsError([problem]) from None
    body = {"version": arguments.number, "hold": arguments.hold} if arguments.action == "rollback" else {}
    print(_ask(parse_address(settings.http), arguments.action, body, token, client_context(settings.https)))
    return 0


def _ask(address: tuple[str, int], action: str, body: dict[str, Any], token: str, tls: ssl.SSLContext | None) -> str:
    """What the daemon says it has done.

    Raises:
        SettingsError: nothing answers there.
        HomeostatError: it did not do it.
    """
    host, port = REACHED_AT.get(address[0], address[0]), address[1]
    connection = (
        http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        if tls is None
        else http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=tls)
    )
    try:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection.request("POST", f"/ctl/{action}", json.dumps(body), headers)
        answer = connection.getresponse()
        data = answer.read(65_536)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        where = f"HOMEOSTAT_HTTP={address[0]}:{address[1]}"
        raise SettingsError([f"{where}: no daemon answers there ({error or type(error).__name__})"]) from None
    finally:
        connection.close()
    try:
        text = str(json.loads(data)["text"])
    except (ValueError, KeyError, TypeError):
        text = f"HTTP status {answer.status}: is it homeostat that answers there?"
    if answer.status != 200:
        raise _RefusedError(text)
    return text
