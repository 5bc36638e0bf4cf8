"""Watches a subject from outside: answers on its topic, processor time, memory; the same way for each."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from tests.benchmarks.kafka_subjects import ROOT, Run, Subject, clean_environment

SAMPLE_S = 0.02
STALL_S = 60.0
"""A subject that answers nothing for so long has failed."""


@dataclass(frozen=True)
class Sample:
    """One look at a subject."""

    time_s: float
    answers: int
    """End of its answers' topic, of committed records; a transaction's end counts as one too."""
    cpu_s: float
    """Of user and system, of all its threads, since its start."""
    rss: int
    """Bytes."""


class SubjectError(RuntimeError):
    """A subject ended, stalled or left records unanswered."""


class Watched:
    """A running subject. As a context manager it is started, and killed if it is still there at the end."""

    def __init__(self, subject: Subject, run: Run, consumer: KafkaConsumer, cpus: Sequence[int] = ()) -> None:
        self.subject, self.run = subject, run
        self._consumer = consumer
        self._out = TopicPartition(run.out, 0)
        self._log = run.folder / f"{run.name}.log"
        self._cpus = cpus
        self.samples: list[Sample] = []

    def __enter__(self) -> Watched:
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                self.subject.command(self.run),
                cwd=ROOT,
                env=self.subject.environment(self.run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._watched = psutil.Process(self._process.pid)
        if self._cpus:
            self._watched.cpu_affinity(list(self._cpus))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def log(self) -> str:
        """What it said so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def fail(self, what: str) -> SubjectError:
        """An error with the end of what it said."""
        return SubjectError(f"{self.subject.name}: {what}; it said:\n{self.log[-3_000:]}")

    def look(self) -> Sample:
        """Take a sample; SubjectError when it has ended."""
        if self._process.poll() is not None:
            raise self.fail(f"ended with {self._process.returncode}")
        answers = int(self._consumer.end_offsets([self._out])[self._out])
        cpu = self._watched.cpu_times()
        sample = Sample(time.monotonic(), answers, cpu.user + cpu.system, self._watched.memory_info().rss)
        self.samples.append(sample)
        return sample

    def until(self, answers: int) -> None:
        """Sample until there are so many answers, and until the end of the last transaction is in."""
        moved = self.look()
        while True:
            sample = self.look()
            if sample.answers > moved.answers:
                moved = sample
            elif sample.time_s - moved.time_s > STALL_S:
                raise self.fail(f"{sample.answers} of {answers} answers, and none for {STALL_S:g} s")
            settled = sample.time_s - moved.time_s > 0.5 if self.subject.exactly_once else True
            if sample.answers >= answers and settled:
                return
            time.sleep(SAMPLE_S)

    def stop(self, timeout_s: float = 30) -> None:
        """SIGTERM; SubjectError unless it ends in order."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.fail(f"did not end within {timeout_s:g} s of SIGTERM") from None
        if code not in (0, -signal.SIGTERM):
            raise self.fail(f"ended with {code} after SIGTERM")


SLOW_PATHS = {"records are read one by one": "read", "answers are written one by one": "written"}
"""What the daemon logs where it does not take the bulk path, with the reason."""


def path_taken(log: str) -> str:
    """Whether the daemon read and wrote in bulk, by the JSON lines of its log; empty where it logged no start."""
    entries = []
    for line in log.splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(entry := json.loads(line), dict):
                entries.append(entry)
    events = {str(entry.get("event")): entry for entry in entries}
    if "started" not in events:
        return ""
    return ", ".join(
        f"{what} one by one ({events[event].get('reason')})" if event in events else f"{what} in bulk"
        for event, what in SLOW_PATHS.items()
    )


def make_topic(address: str, name: str) -> None:
    """An empty topic of one partition that keeps records for an hour."""
    with KafkaAdminClient(bootstrap_servers=address) as admin:
        admin.create_topics({name: {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)


def drop_topics(address: str, *names: str) -> None:
    """Give their disk space back."""
    with KafkaAdminClient(bootstrap_servers=address) as admin:
        admin.delete_topics(list(names))


def load(**given: Any) -> dict[str, Any]:
    """Run one piece of ``kafka_load`` in a process of its own; what it found."""
    return finish_load(start_load(**given))


def start_load(**given: Any) -> subprocess.Popen[str]:
    """The same, not waited for."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.kafka_load", json.dumps(given)],
        cwd=ROOT,
        env=clean_environment(rival=True),
        stdout=subprocess.PIPE,
        text=True,
    )


def finish_load(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a piece of load found; SubjectError when it failed."""
    said, _ = process.communicate()
    if process.returncode:
        raise SubjectError(f"the load ended with {process.returncode}")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


@contextlib.contextmanager
def receiving(**given: Any) -> Iterator[subprocess.Popen[str]]:
    """A reader of answers that has its place on the topic; killed if it is still there at the end."""
    process = start_load(do="receive", **given)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SubjectError("the reader of answers did not start")
        yield process
    finally:
        process.kill()
        process.wait()
