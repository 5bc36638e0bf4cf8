"""Prometheus, Alertmanager and who is told of alerts, as processes and a thread on free ports of this machine.

They read the files of deploy/prometheus. What is changed is time and place, nothing that decides:

- addresses: this machine's in place of the service names of compose.yaml;
- intervals of scraping and evaluation, and how long Alertmanager waits to group: a fraction of a second;
- ``for:`` of each alert: ``FASTER`` times shorter, 5 s for 10 minutes. The expressions stay, with windows and bounds;
- the receiver: it has none, and gets a webhook.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.daemon_process import eventually, free_port

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "prometheus"
TICK = "250ms"
FASTER = 120
SECONDS = {"m": 60, "h": 3600}


def binary(*names: str) -> str:
    """Path of the first that there is; skips, with the reason, where there is none."""
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed (Debian's {names[-1]} has it)")
    return found


def told(*command: str) -> str:
    """What a checking tool said; AssertionError, with it, where it found something."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Webhook:
    """Who is told: ``notices`` are (alert, status, instance, summary) as Alertmanager posts them."""

    def __init__(self) -> None:
        self.notices: list[tuple[str, str, str, str]] = []
        self._changed = threading.Condition()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()
                hook._hear(body)

            def log_message(self, format: str, *args: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _hear(self, body: dict[str, Any]) -> None:
        with self._changed:
            for alert in body["alerts"]:
                labels = alert["labels"]
                summary = alert["annotations"]["summary"]
                self.notices.append((labels["alertname"], alert["status"], labels["instance"], summary))
            self._changed.notify_all()

    def wait_for(self, alert: str, status: str, timeout_s: float = 60) -> tuple[str, str]:
        """Instance and summary of the first such notice."""

        def found() -> tuple[str, str] | None:
            return next((notice[2:] for notice in self.notices if notice[:2] == (alert, status)), None)

        with self._changed:
            assert self._changed.wait_for(found, timeout_s), f"{alert} is not {status}; heard of {self.notices}"
            notice = found()
        assert notice is not None
        return notice

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def quick_rules() -> dict[str, Any]:
    """The rules with ``for:`` made shorter."""
    rules: dict[str, Any] = yaml.safe_load((FOLDER / "homeostat.rules.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "for" in rule:
                count, unit = rule["for"][:-1], rule["for"][-1]
                rule["for"] = f"{int(count) * SECONDS[unit] * 1000 // FASTER}ms"
    return rules


def quick_prometheus(target: str, alertmanager: str) -> dict[str, Any]:
    """prometheus.yml with this machine's addresses and short intervals."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {name: TICK for name in config["global"]}
    (job,) = config["scrape_configs"]
    (job["static_configs"],) = ([{"targets": [target]}],)
    (manager,) = config["alerting"]["alertmanagers"]
    manager["static_configs"] = [{"targets": [alertmanager]}]
    return config


def quick_alertmanager(webhook: str) -> dict[str, Any]:
    """alertmanager.yml with short waits, which tells ``webhook``."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / "alertmanager.yml").read_text())
    for route in (config["route"], *config["route"]["routes"]):
        route |= {"group_wait": TICK, "group_interval": TICK}
    for receiver in config["receivers"]:
        assert "webhook_configs" not in receiver
        receiver["webhook_configs"] = [{"url": webhook, "send_resolved": True}]
    return config


@contextmanager
def server(folder: Path, name: str, path: str, config: str, *arguments: str) -> Iterator[str]:
    """One of the two, from when it is ready to its end by its process id; gives its address."""
    address = f"127.0.0.1:{free_port()}"
    file, log = folder / f"{name}.yml", folder / f"{name}.log"
    file.write_text(config)
    command = [path, f"--config.file={file}", f"--web.listen-address={address}", *arguments]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:

        def ready() -> bool:
            assert process.poll() is None, f"{name} has ended:\n{log.read_text()}"
            try:
                with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5) as answer:
                    return bool(answer.status == 200)
            except (urllib.error.URLError, OSError):
                return False

        eventually(f"{name} is ready", ready)
        yield address
    except AssertionError as error:
        error.add_note(f"{name} said:\n{log.read_text()[-3000:]}")
        raise
    finally:
        process.kill()
        process.wait()


@contextmanager
def watched(folder: Path, target: str) -> Iterator[tuple[Webhook, Callable[[str], float | None]]]:
    """Prometheus scrapes ``target`` and tells Alertmanager, which tells the webhook.

    Gives it and a function that asks Prometheus: a query's one value, None where it has none.
    """
    prometheus, alertmanager = binary("prometheus"), binary("alertmanager", "prometheus-alertmanager")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "homeostat.rules.yml").write_text(yaml.safe_dump(quick_rules()))
    with ExitStack() as stack:
        hook = Webhook()
        stack.callback(hook.close)
        # No gossip: it would look for a private address of this machine.
        told_by = stack.enter_context(
            server(
                folder,
                "alertmanager",
                alertmanager,
                yaml.safe_dump(quick_alertmanager(hook.url)),
                f"--storage.path={folder / 'alerts'}",
                "--cluster.listen-address=",
            )
        )
        asked = stack.enter_context(
            server(
                folder,
                "prometheus",
                prometheus,
                yaml.safe_dump(quick_prometheus(target, told_by)),
                f"--storage.tsdb.path={folder / 'series'}",
            )
        )

        def ask(query: str) -> float | None:
            url = f"http://{asked}/api/v1/query?" + urllib.parse.urlencode({"query": query})
            with urllib.request.urlopen(url, timeout=10) as answer:
                result = json.load(answer)["data"]["result"]
            return float(result[0]["value"][1]) if result else None

        yield hook, ask
