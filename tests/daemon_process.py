"""The daemon as its users meet it: a process with an environment, a port to ask, and an exit code."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from kafka import KafkaConsumer, TopicPartition

from daemon.streams.simulator import AgeingArray
from tests.kafka import consume_all, wait_for_port

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 90.0
"""Much more than anything takes: a machine that pauses fails nothing, and a wait that succeeds costs no more."""

T = TypeVar("T")


def eventually(what: str, claim: Callable[[], T], timeout_s: float = DEADLINE_S) -> T:
    """The first true value of ``claim``; AssertionError, with ``what``, when there is none within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (found := claim()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on; all are held for a moment, so that they differ."""
    with contextlib.ExitStack() as held:
        opened = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(listener.getsockname()[1]) for listener in opened]


def free_port() -> int:
    return free_ports(1)[0]


def parse_metrics(text: str) -> dict[str, float]:
    """Samples by name and labels as they are written: ``homeostat_state{state="steady"}``."""
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def reached(metrics: dict[str, float], metric: str, least: float) -> bool:
    """Whether it is time for a kill: the metric is ``least`` or more, or nothing is left to read.

    A test that pauses before its kill may find the stream at its end, and the next life has less to do than it asks
    for. A worker can be killed there as well as anywhere else.
    """
    return metrics[metric] >= least or metrics["homeostat_lag_records"] == 0


class DaemonProcess:
    """``homeostat COMMAND`` with ``settings`` as its only HOMEOSTAT_ variables.

    As a context manager it is killed at the end; what it said goes with the error when the block fails.
    """

    def __init__(
        self, settings: dict[str, str], folder: Path, *arguments: str, command: str = "run", **popen: Any
    ) -> None:
        self.port = free_port()
        self.folder = folder
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HOMEOSTAT_")}
        path = os.pathsep.join(filter(None, [str(ROOT), clean.get("PYTHONPATH")]))
        http = {"HOMEOSTAT_HTTP": f"127.0.0.1:{self.port}"}
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / f"{self.port}.out", folder / f"{self.port}.err"
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "daemon.cli", command, *arguments],
                cwd=folder,
                env=clean | {"PYTHONPATH": path} | http | settings,
                **({"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err} | popen),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if error is not None:
            error.add_note(f"exit code {self.process.returncode}; standard error:\n{self.log[-6000:]}")

    @property
    def log(self) -> str:
        """Standard error so far."""
        return self.err.read_text(encoding="utf-8")

    @property
    def output(self) -> str:
        """Standard output so far, where it is not the test's own pipe."""
        return self.out.read_text(encoding="utf-8")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def get(self, path: str) -> tuple[int, str]:
        """Status and text; 0 while nothing answers. AssertionError once the process has ended."""
        assert self.running, f"the daemon has ended with {self.process.returncode}"
        return self._ask(path)

    def _ask(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """A scrape; one that is not answered is made again, while the process runs."""

        def text() -> str:
            status, found = self.get("/metrics")
            return found if status == 200 else ""

        return parse_metrics(eventually("/metrics says 200", text))

    def wait_until_ready(self) -> Self:
        eventually("/readyz says 200", lambda: self.get("/readyz")[0] == 200)
        return self

    def wait_for(self, metric: str, least: float, timeout_s: float = DEADLINE_S) -> None:
        """Until the metric is ``least`` or more."""
        eventually(f"{metric} is {least:g} or more", lambda: self.metrics()[metric] >= least, timeout_s)

    def wait_for_kill(self, metric: str, least: float) -> None:
        """Until it is ready and ``reached``, or has ended by itself and well."""

        def due() -> bool:
            if (code := self.process.poll()) is not None:
                assert code == 0, f"the daemon has ended with {code}"
                return True
            if self._ask("/readyz")[0] != 200:
                return False
            status, text = self._ask("/metrics")
            return status == 200 and reached(parse_metrics(text), metric, least)

        eventually(f"{metric} is {least:g} or more, or the stream at its end", due)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, without effect on one that has ended."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def record(name: str, x: Sequence[float | None] | None = None, **more: Any) -> bytes:
    """A JSON record; without ``x``, one that the model knows."""
    numbers = _readings()[zlib.crc32(name.encode()) % 256] if x is None else x
    return json.dumps({"id": name, "x": numbers, **more}).encode()


def records(names: Sequence[str]) -> list[bytes]:
    return [record(name) for name in names]


@functools.cache
def _readings() -> list[list[float]]:
    found: list[list[float]] = AgeingArray(7).rows(0, 256)[0].tolist()
    return found


def read_all(address: str, topic: str) -> list[Any]:
    """Every record that the topic holds now."""
    wait_for_port(address)
    with KafkaConsumer(bootstrap_servers=address, enable_auto_commit=False) as client:
        parts = [TopicPartition(topic, number) for number in client.partitions_for_topic(topic) or ()]
        count = sum(client.end_offsets(parts).values())
    return consume_all(address, topic, count)


def answers(address: str, topic: str) -> list[dict[str, Any]]:
    """Every answer that the topic holds now."""
    return [json.loads(found.value) for found in read_all(address, topic)]


def ids(found: Sequence[dict[str, Any]]) -> list[str]:
    return [answer["id"] for answer in found]


def committed(address: str, group: str, topic: str) -> int:
    """The group's offsets over all partitions of the topic, added up; 0 for one that has none."""
    with KafkaConsumer(bootstrap_servers=address, group_id=group, enable_auto_commit=False) as client:
        parts = [TopicPartition(topic, number) for number in client.partitions_for_topic(topic) or ()]
        return sum(client.committed(part) or 0 for part in parts)


def on_kafka(settings: dict[str, str], address: str, source: str) -> dict[str, str]:
    """``settings`` for a worker that reads ``source``, answers on ``source.answers`` and commits as ``g-source``."""
    return settings | {
        "HOMEOSTAT_SOURCE": f"kafka://{address}/{source}",
        "HOMEOSTAT_SINK": f"kafka://{address}/{source}.answers",
        "HOMEOSTAT_KAFKA__GROUP": f"g-{source}",
    }
