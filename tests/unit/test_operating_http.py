"""Who may act over HTTP, how often, and what is answered; the loop is played by the test."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.errors import SettingsError
from daemon.operating.desk import ACTIONS, MOST, Desk, Wish
from daemon.operating.operator_settings import OperatorActions
from daemon.operating.over_http import Answer, OperatorHttp
from daemon.operating.token import Pace, Token

TOKEN = "correct-horse-battery-staple"
ALLOWED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


class Loop:
    """Carries out what lies on the desk, for as long as the block lasts."""

    def __init__(self, desk: Desk, *, fine: bool = True) -> None:
        self.desk, self.fine = desk, fine
        self.done: list[Wish] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.001):
            for wish in self.desk.take():
                self.done.append(wish)
                wish.end("as you say" if self.fine else "no such version", fine=self.fine)


def over_http(token_file: Path | None, *, wait_s: float = 30.0, **more: Any) -> tuple[Desk, OperatorHttp]:
    desk = Desk()
    return desk, OperatorHttp(desk, OperatorActions(token_file=token_file, **more), wait_s)


def test_without_a_token_s_file_nobody_acts() -> None:
    desk, http = over_http(None)
    assert http.answer("freeze", ALLOWED, b"", "me").status == HTTPStatus.NOT_FOUND
    assert not desk.take()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": ""}, 401),
        ({"Authorization": TOKEN}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Authorization": f"Bearer {TOKEN[:-1]}"}, 401),
        ({"Authorization": f"Bearer {TOKEN}x"}, 401),
        ({"Authorization": "Bearer \udcff"}, 401),
        ({**ALLOWED, "Origin": "https://elsewhere"}, 403),
        ({**ALLOWED, "Origin": "https://elsewhere", "Host": "plant:9464"}, 403),
        ({**ALLOWED, "Origin": "null", "Host": "plant:9464"}, 403),
        ({**ALLOWED, "Origin": "http://plant:9465", "Host": "plant:9464"}, 403),
        ({**ALLOWED, "Origin": "http://plant:9464", "Host": "plant:9464"}, 200),
        ({**ALLOWED, "Origin": "https://plant:9464", "Host": "plant:9464"}, 200),
        ({"Origin": "http://plant:9464", "Host": "plant:9464"}, 401),
        (ALLOWED, 200),
        ({"Authorization": f"bearer  {TOKEN} "}, 200),
    ],
)
def test_only_the_token_lets_in(token_file: Path, headers: dict[str, str], status: int) -> None:
    desk, http = over_http(token_file)
    with Loop(desk) as loop:
        found = http.answer("freeze", headers, b"", "10.0.0.7")
    assert found.status == status and len(loop.done) == (status == 200)
    assert TOKEN not in found.text
    if status == 200:
        assert json.loads(found.body()) == {"done": True, "text": "as you say"} and loop.done[0].who == "10.0.0.7"


def test_a_token_that_is_replaced_holds_at_once_and_one_that_is_gone_lets_nobody_in(token_file: Path) -> None:
    token = Token(token_file)
    assert token.accepts(f"Bearer {TOKEN}")
    token_file.write_text("another-" + TOKEN)
    os.utime(token_file, ns=(1, 1))
    assert not token.accepts(f"Bearer {TOKEN}") and token.accepts(f"Bearer another-{TOKEN}")
    token_file.unlink()
    assert not token.accepts(f"Bearer another-{TOKEN}")


@pytest.mark.parametrize("content", [b"", b"short", b"has spaces in it, many", b"\xff" * 30, None])
def test_a_file_that_holds_no_token_is_refused_at_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"HOMEOSTAT_OPERATOR__TOKEN_FILE={path}: ") as caught:
        over_http(path)
    assert content is None or not content or content.decode("latin-1") not in str(caught.value)


def test_guessing_is_slow(token_file: Path) -> None:
    desk, http = over_http(token_file, per_minute=3)
    statuses = [http.answer("freeze", {"Authorization": f"Bearer {n}"}, b"", "x").status for n in range(3)]
    assert statuses == [401, 401, 401]
    late = http.answer("freeze", ALLOWED, b"", "x")
    assert late.status == 429 and 0 < int(late.headers["Retry-After"]) <= 60 and not desk.take()


def test_the_pace_lets_so_many_through_in_any_minute() -> None:
    now = [0.0]
    pace = Pace(2, lambda: now[0])
    assert pace.take() == 0 and pace.take() == 0 and pace.take() == 60.0
    now[0] = 59.0
    assert pace.take() == 1.0
    now[0] = 60.0
    assert pace.take() == 0 and pace.take() == 0 and pace.take() == 60.0


@pytest.mark.parametrize(
    ("action", "body", "status"),
    [
        ("rollback", b'{"version": 3, "hold": true}', 200),
        ("rollback", b"{}", 400),
        ("rollback", b'{"version": -1}', 400),
        ("rollback", b'{"version": true}', 400),
        ("rollback", b'{"version": 3, "hold": 1}', 400),
        ("rollback", b'{"version": 3, "force": true}', 400),
        ("freeze", b'{"version": 3}', 400),
        ("freeze", b"[]", 400),
        ("freeze", b"{", 400),
        ("freeze", b"[" * 4_000, 400),
        ("freeze", b" ", 200),
        ("explode", b"", 404),
        ("", b"", 404),
    ],
)
def test_what_is_asked_for_is_checked(token_file: Path, action: str, body: bytes, status: int) -> None:
    desk, http = over_http(token_file)
    with Loop(desk) as loop:
        assert http.answer(action, ALLOWED, body, "x").status == status
    if status == 200 and action == "rollback":
        assert (loop.done[0].number, loop.done[0].hold) == (3, True)


def test_a_loop_that_refuses_or_is_busy_is_told_of(token_file: Path) -> None:
    desk, http = over_http(token_file)
    with Loop(desk, fine=False):
        assert http.answer("freeze", ALLOWED, b"", "x")[:2] == (HTTPStatus.CONFLICT, "no such version")
    desk, http = over_http(token_file, wait_s=0.0)
    answers = [http.answer("freeze", ALLOWED, b"", "x").status for _ in range(MOST + 1)]
    assert answers == [202] * MOST + [503] and len(desk.take()) == MOST and not desk.take()


@pytest.fixture(scope="module")
def anybody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorHttp]:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(TOKEN)
    desk, http = over_http(path, per_minute=10**9)
    with Loop(desk):
        yield http


@given(
    action=st.sampled_from(ACTIONS) | st.text(),
    authorization=st.just(f"Bearer {TOKEN}") | st.text(),
    body=st.binary(max_size=200)
    | st.builds(lambda found: json.dumps(found).encode(), st.dictionaries(st.text(), st.integers())),
)
def test_whatever_comes_is_answered(anybody: OperatorHttp, action: str, authorization: str, body: bytes) -> None:
    found: Answer = anybody.answer(action, {"Authorization": authorization}, body, "x")
    assert found.status in (200, 400, 401, 404)
    assert set(json.loads(found.body())) == {"done", "text"} and TOKEN not in found.text
    if authorization != f"Bearer {TOKEN}":
        assert (
            found.status != 200
            or authorization.split() == ["Bearer", TOKEN]
            or authorization.lower().startswith("bearer")
        )
