"""A real Apache Kafka on this machine, for trials and tests: one process, no container, no system package.

Not for production: one replica, no login, no encryption.
"""

from __future__ import annotations

import base64
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn, Self

from daemon.broker_runtime import KAFKA_VERSION, BrokerError, jar_folder, jars, java

# Serial collector and first-tier compiler: the port opens sooner, and that is what a trial waits for.
JVM_FLAGS = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dlog4j2.configurationFile=log4j2.properties")

LOG4J = """\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{ISO8601} %p %c{1}: %m%n
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
"""


def _free_ports(host: str) -> tuple[int, int]:
    """Two ports that nothing listens on; both are held for a moment, so that they differ."""
    with socket.create_server((host, 0)) as first, socket.create_server((host, 0)) as second:
        return first.getsockname()[1], second.getsockname()[1]


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        # A port of the ephemeral range that nobody listens on may be given to the probe itself: it then "connects".
        return probe.connect_ex((host, port)) == 0 and probe.getsockname() != probe.getpeername()


class TrialBroker:
    """One Kafka node, broker and KRaft controller in one process, with its data in ``folder``.

    A second broker on the same folder goes on with the same topics and records. ``port=0`` takes a free port at the
    first start and keeps it. ``properties`` are added to Kafka's ``server.properties`` and win over the ones here;
    ``format_arguments`` go to the first start's format of the storage (``--add-scram``: a user).
    The node ends with this process, however that ends. As a context manager it is started and stopped.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 9092,
        host: str = "127.0.0.1",
        properties: Mapping[str, str] | None = None,
        format_arguments: Sequence[str] = (),
    ) -> None:
        self.folder = Path(folder).absolute()
        self.host = host
        self.port = port
        self.properties = dict(properties or {})
        self.format_arguments = tuple(format_arguments)
        self.log = self.folder / "broker.log"
        self._node: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def address(self) -> str:
        """``host:port`` for clients."""
        if self.port == 0:
            raise BrokerError("the broker has no port yet (port=0 chooses one at the start): call start() first")
        return f"{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the node's process lives."""
        return self._node is not None and self._node.poll() is None

    def start(self, timeout_s: float = 60) -> None:
        """Start and return once the node answers a metadata request; without effect while it runs.

        Raises BrokerError with the last lines of the node's log when it ends or is not there after ``timeout_s``
        (seconds, without the download of the jars).
        """
        if self.running:
            return
        self._reap()  # a node that ended by itself
        classpath = str(jars() / "*")
        command = [java(), *JVM_FLAGS, "-cp", classpath]
        deadline = time.monotonic() + timeout_s
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.folder / "lock", "w") as lock:
                self._claim(lock)
                self._configure()
                if not (self.folder / "data" / "meta.properties").exists():
                    self._format(command, timeout_s)
                self._launch(command, lock)
            self._wait_for_port(deadline)
            self._wait_for_metadata(deadline)
        except BaseException:
            self.kill()
            raise

    def stop(self, timeout_s: float = 30) -> None:
        """Shut down in order: what was acknowledged is on the disk. Killed when it takes longer than ``timeout_s``."""
        if self._node is not None:
            self._node.terminate()
            try:
                self._node.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._node.kill()
        self._reap()

    def kill(self) -> None:
        """SIGKILL: an end without order, after which the next start recovers the log."""
        if self._node is not None:
            self._node.kill()
        self._reap()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _claim(self, lock: IO[str]) -> None:
        # Kafka's own lock comes too late: a second node was seen to write into the metadata log and damage it.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BrokerError(
                f"{self.folder} is in use by another broker: stop that, or choose another folder"
            ) from None
        self._log_start = self.log.stat().st_size if self.log.exists() else 0

    def _configure(self) -> None:
        free, controller = _free_ports(self.host)
        self.port = self.port or free
        if _listens(self.host, self.port):
            raise BrokerError(f"{self.address} is taken: stop what listens there, or choose another port (0: any)")
        # The node runs in `folder` and every path is relative: the properties file is Latin-1, `log.dirs` splits at
        # commas, and the user's folder may have both.
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{self.host}:{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{self.address},CONTROLLER://{self.host}:{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.address}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": "data",
            "auto.create.topics.enable": "true",
            "num.partitions": "1",
            "group.initial.rebalance.delay.ms": "0",
            # After a kill the node is let in again when the session of its former self is over, by default 9 s.
            "broker.heartbeat.interval.ms": "500",
            "broker.session.timeout.ms": "3000",
            "group.min.session.timeout.ms": "1000",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "share.coordinator.state.topic.num.partitions": "1",
            # The default, 128 MiB, is half of this heap.
            "log.cleaner.dedupe.buffer.size": str(16 << 20),
            **self.properties,
        }
        (self.folder / "server.properties").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        (self.folder / "log4j2.properties").write_text(LOG4J)

    def _format(self, command: list[str], timeout_s: float) -> None:
        # The zero byte makes the first letter "A": an id that begins with "-" is taken for an option.
        cluster = base64.urlsafe_b64encode(b"\0" + os.urandom(15)).decode().rstrip("=")
        line = [*command, "kafka.tools.StorageTool", "format", "--ignore-formatted", "-t", cluster]
        with open(self.log, "ab") as log:
            try:
                subprocess.run(
                    [*line, "-c", "server.properties", *self.format_arguments],
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                    check=True,
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                self._fail("Kafka's storage can't be formatted")

    def _launch(self, command: list[str], lock: IO[str]) -> None:
        # Sessions of their own: a Ctrl-C at the terminal ends us, and we end the node in order. The node inherits the
        # lock, so the folder is free exactly when the node has ended.
        with open(self.log, "ab") as log:
            self._node = subprocess.Popen(
                [*command, "kafka.Kafka", "server.properties"],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        # The watcher reads a pipe that only this process holds, so its end is ours, SIGKILL included. A parent-death
        # signal would need a fork hook, unsafe beside threads, and would fire when the *thread* that started us ends.
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -KILL "$0"', str(self._node.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _reap(self) -> None:
        if self._node is not None:
            self._node.wait()
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.communicate()
        self._node = self._watcher = None

    def _wait_for_port(self, deadline: float) -> None:
        while not _listens(self.host, self.port):
            if not self.running:
                self._fail("Kafka ended while it started")
            if time.monotonic() > deadline:
                self._fail(f"Kafka does not listen on {self.address} in time")
            time.sleep(0.05)

    def _wait_for_metadata(self, deadline: float) -> None:
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError

        remaining_ms = max(1000, int((deadline - time.monotonic()) * 1000))
        try:
            with KafkaAdminClient(bootstrap_servers=self.address, bootstrap_timeout_ms=remaining_ms) as client:
                client.describe_cluster()
        except KafkaError as error:
            self._fail(f"Kafka listens on {self.address} but gives no metadata ({error})")

    def _fail(self, what: str) -> NoReturn:
        with open(self.log, "rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").strip().splitlines()
        # Of a Java stack trace only what was thrown, not where: that would fill the excerpt.
        said = [line for line in lines if not line.startswith("\tat ")]
        raise BrokerError("\n  ".join([f"{what}; the end of {self.log}:", *said[-12:]]))


def command(folder: Path, port: int) -> int:
    """Run a trial broker in the foreground until SIGINT or SIGTERM: ``homeostat broker``.

    Returns the exit status: 0 when it was asked to stop, 1 when the node ended by itself. Raises BrokerError when it
    can't be started.
    """
    # SIGTERM and a closed terminal take the way of Ctrl-C, also in the middle of a start.
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.default_int_handler) for number in ends}
    if not jar_folder().is_dir():
        print(f"fetching Apache Kafka {KAFKA_VERSION} from Maven Central: 44 MB, once", flush=True)
    broker = TrialBroker(folder, port=port)
    try:
        with broker:
            print(f"Apache Kafka {KAFKA_VERSION} at {broker.address}, data and log in {broker.folder}")
            print(f"for example: HOMEOSTAT_SOURCE=kafka://{broker.address}/sensors homeostat run", flush=True)
            while broker.running:
                time.sleep(0.5)
            print(f"the broker ended by itself: see {broker.log}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
