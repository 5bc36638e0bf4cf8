from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from prometheus_client import CollectorRegistry, Counter

from daemon.errors import SettingsError
from daemon.front.web import Web, parse_address


class Probes:
    alive = (True, "moving")
    ready = (False, "starting")


@pytest.fixture
def web() -> Iterator[Web]:
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    made = Web("127.0.0.1:0", registry, lambda: Probes.alive, lambda: Probes.ready)
    made.start()
    yield made
    made.stop()


def ask(web: Web, path: str, method: str = "GET") -> tuple[int, str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{web.port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers["Content-Type"]


def test_a_scrape_brings_the_gauges_up_to_date_first(web: Web) -> None:
    scrapes: list[int] = []
    web.before_scrape = lambda: scrapes.append(1)
    status, body, kind = ask(web, "/metrics?x=1")
    assert status == 200 and "things_total 3.0" in body and kind.startswith("text/plain") and scrapes == [1]


def test_health_and_readiness_answer_with_their_reason(web: Web) -> None:
    assert ask(web, "/healthz")[:2] == (200, "moving\n")
    assert ask(web, "/readyz")[:2] == (503, "starting\n")


def test_an_unknown_path_is_not_found_and_names_the_known_ones(web: Web) -> None:
    status, body, _ = ask(web, "/nothing")
    assert status == 404 and "/metrics" in body


class Page:
    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes, dict[str, str]] | None:
        return (HTTPStatus.OK, "text/html", b"<p>well</p>", {"X-Page": "yes"}) if path == "/" else None


def test_a_page_answers_its_paths_and_no_other() -> None:
    made = Web("127.0.0.1:0", CollectorRegistry(), lambda: Probes.alive, lambda: Probes.ready, page=Page())
    made.start()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{made.port}/?x=1", timeout=10) as answer:
            assert answer.headers["X-Page"] == "yes" and answer.headers["Cache-Control"] == "no-store"
            assert answer.read() == b"<p>well</p>"
        assert ask(made, "/", "HEAD")[:2] == (200, "")
        assert ask(made, "/nothing")[0] == 404 and ask(made, "/healthz")[:2] == (200, "moving\n")
    finally:
        made.stop()


def test_head_answers_without_a_body(web: Web) -> None:
    assert ask(web, "/healthz", "HEAD")[:2] == (200, "")
    assert ask(web, "/readyz", "HEAD")[:2] == (503, "")


def test_post_is_refused(web: Web) -> None:
    assert ask(web, "/metrics", "POST")[0] == 404


def test_a_busy_port_is_refused_by_variable_name(web: Web) -> None:
    with pytest.raises(SettingsError, match=f"HOMEOSTAT_HTTP=127.0.0.1:{web.port}: .*in use.*port 0"):
        Web(f"127.0.0.1:{web.port}", CollectorRegistry(), lambda: Probes.alive, lambda: Probes.ready)


@pytest.mark.parametrize("text", ["9464", "localhost", ":9464", "localhost:http", "localhost:70000", ""])
def test_what_is_not_an_address_is_refused_by_variable_name(text: str) -> None:
    with pytest.raises(SettingsError, match="HOMEOSTAT_HTTP="):
        parse_address(text)
