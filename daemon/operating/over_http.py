"""Operator actions as HTTP: ``POST /ctl/ACTION`` with ``Authorization: Bearer TOKEN`` and, for a rollback, JSON.

Off without a token's file. A request is counted before its token is looked at, so that guessing is slow. No answer has
a CORS header, and what a browser sends for a page of another origin than the daemon's own is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, NamedTuple

from daemon.operating.desk import ACTIONS, Desk, Wish
from daemon.operating.operator_settings import OperatorActions
from daemon.operating.token import Pace, Token

LARGEST = 4_096
"""Bytes of a request's body."""
WAIT_S = 10.0
"""Longest wait for the loop; a slow model's batch may take 5 s."""


class Answer(NamedTuple):
    """What goes back."""

    status: HTTPStatus
    text: str
    headers: Mapping[str, str] = MappingProxyType({})

    def body(self) -> bytes:
        """As JSON: whether it was done, and what was."""
        return json.dumps({"done": self.status is HTTPStatus.OK, "text": self.text}).encode() + b"\n"


class OperatorHttp:
    """Takes requests from any thread and has the loop carry them out."""

    def __init__(self, desk: Desk, settings: OperatorActions, wait_s: float = WAIT_S) -> None:
        """Raises SettingsError when the token's file can't be used."""
        self._desk, self._wait_s = desk, wait_s
        self._token = None if settings.token_file is None else Token(settings.token_file)
        self._pace = Pace(settings.per_minute)

    def answer(self, action: str, headers: Any, body: bytes, who: str) -> Answer:
        """Act on one request.

        Args:
            action: the path after ``/ctl/``.
            headers: with ``get``, as http.server gives them.
            body: empty, or a JSON object.
            who: the other side's address, for the journal.
        """
        if self._token is None:
            text = "operator actions are off: HOMEOSTAT_OPERATOR__TOKEN_FILE is not set"
            return Answer(HTTPStatus.NOT_FOUND, text)
        if wait_s := self._pace.take():
            text = f"too many requests: try again in {wait_s:.0f} s"
            return Answer(HTTPStatus.TOO_MANY_REQUESTS, text, {"Retry-After": f"{wait_s:.0f}"})
        if _foreign(headers.get("Origin"), headers.get("Host")):
            return Answer(HTTPStatus.FORBIDDEN, "a page of another origin may not act here")
        if not self._token.accepts(headers.get("Authorization") or ""):
            return Answer(HTTPStatus.UNAUTHORIZED, "no token, or a wrong one", {"WWW-Authenticate": "Bearer"})
        if action not in ACTIONS:
            return Answer(HTTPStatus.NOT_FOUND, f"there is no such action; there are {', '.join(ACTIONS)}")
        try:
            wish = _wish(action, body, who)
        except ValueError as error:
            return Answer(HTTPStatus.BAD_REQUEST, str(error))
        if not self._desk.ask(wish):
            return Answer(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests wait already")
        if not wish.wait(self._wait_s):
            return Answer(HTTPStatus.ACCEPTED, "not carried out yet: it will be, between two batches")
        return Answer(HTTPStatus.OK if wish.fine else HTTPStatus.CONFLICT, wish.text)


def _foreign(origin: str | None, host: str | None) -> bool:
    """Whether a browser sent this for another page than the one that came from here.

    Either scheme will do: before the daemon there may be a proxy that speaks TLS.
    """
    return bool(origin) and (not host or origin not in (f"http://{host}", f"https://{host}"))


def _wish(action: str, body: bytes, who: str) -> Wish:
    try:
        given = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise ValueError("the body is no JSON") from None
    allowed = {"version", "hold"} if action == "rollback" else set()
    if not isinstance(given, dict) or set(given) - allowed:
        raise ValueError(f"{action} takes {' and '.join(sorted(allowed)) or 'no fields'}")
    number, hold = given.get("version", 0), given.get("hold", False)
    if action == "rollback" and "version" not in given:
        raise ValueError("rollback takes version, the number of one (0: the frozen model)")
    if type(number) is not int or not 0 <= number < 2**31 or type(hold) is not bool:
        raise ValueError("version is a number from 0 on, hold is true or false")
    return Wish(action, number, hold, who)
