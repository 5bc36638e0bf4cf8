"""A Kafka of several nodes for chaos tests: KRaft, each node broker and controller, three copies of every partition.

A node can be killed, stopped in its tracks (SIGSTOP), woken, and started again on its data and ports; a majority must
be alive for the cluster to answer. Nodes end with the process that started them.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kafka import KafkaAdminClient
from kafka import errors as kafka_errors
from kafka.protocol.admin import DescribeClusterRequest

from daemon.broker import JVM_FLAGS, LOG4J
from daemon.broker_runtime import BrokerError, jars, java
from tests.daemon_process import DEADLINE_S, free_ports

HOST = "127.0.0.1"
SESSION_MS = 6_000
"""Silence after which the controllers take a node for dead and its partitions get other leaders."""


class Cluster:
    """``nodes`` Kafka nodes with their data in ``folder``, numbered from 1.

    ``properties`` are added to each node's ``server.properties`` and win over the ones here. As a context manager it is
    started, and killed at the end.

    Raises:
        BrokerError: on `start`, with the ends of the nodes' logs.
    """

    def __init__(self, folder: Path, *, nodes: int = 3, properties: Mapping[str, str] | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.nodes = range(1, nodes + 1)
        self.properties = dict(properties or {})
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._watchers: dict[int, subprocess.Popen[bytes]] = {}
        self._paused: set[int] = set()
        ports = free_ports(2 * nodes)
        self._ports = dict(zip(self.nodes, ports[:nodes], strict=True))
        self._controllers = dict(zip(self.nodes, ports[nodes:], strict=True))

    @property
    def address(self) -> str:
        """``host:port,host:port,...`` for clients: every node, dead or alive."""
        return ",".join(self.address_of(node) for node in self.nodes)

    def address_of(self, node: int) -> str:
        """``host:port`` of one node."""
        return f"{HOST}:{self._ports[node]}"

    def log_of(self, node: int) -> Path:
        """What the node says."""
        return self._folder(node) / "broker.log"

    def alive(self, node: int) -> bool:
        """Whether its process runs, stopped in its tracks or not."""
        return node in self._processes and self._processes[node].poll() is None

    def start(self, timeout_s: float = DEADLINE_S) -> None:
        """Start every node that is not alive; return once each is known to all."""
        classpath = str(jars() / "*")
        base = [java(), *JVM_FLAGS, "-cp", classpath]
        # The zero byte makes the first letter "A": an id that begins with "-" is taken for an option.
        identity = self.folder / "cluster.id"
        if not identity.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            identity.write_text(base64.urlsafe_b64encode(b"\0" + os.urandom(15)).decode().rstrip("="))
        fresh = [node for node in self.nodes if not self.alive(node)]
        self._format([node for node in fresh if self._write_properties(node)], base, identity.read_text(), timeout_s)
        for node in fresh:
            self._launch(node, base)
        try:
            self.wait_for_nodes(len(self.nodes), timeout_s)
        except BaseException:
            self.close()
            raise

    def start_node(self, node: int, timeout_s: float = DEADLINE_S, *, wait: bool = True) -> None:
        """Start a dead node again, on its data and ports; with ``wait`` until the others have taken it in."""
        if not self.alive(node):
            self._reap(node)
            self._launch(node, [java(), *JVM_FLAGS, "-cp", str(jars() / "*")])
        if wait:
            deadline = time.monotonic() + timeout_s
            self._until(f"node {node} is known to the others", lambda: node in self.known(), deadline)

    def kill(self, node: int) -> None:
        """SIGKILL: no farewell, nothing flushed."""
        self._processes[node].kill()
        self._reap(node)

    def pause(self, node: int) -> None:
        """SIGSTOP: its connections stay open and nothing comes from them."""
        self._processes[node].send_signal(signal.SIGSTOP)
        self._paused.add(node)

    def resume(self, node: int) -> None:
        """SIGCONT."""
        self._processes[node].send_signal(signal.SIGCONT)
        self._paused.discard(node)

    def stop_node(self, node: int, timeout_s: float = 30) -> None:
        """SIGTERM: it hands its partitions over and leaves; SIGKILL when that takes longer than ``timeout_s``."""
        self._processes[node].terminate()
        try:
            self._processes[node].wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._processes[node].kill()
        self._reap(node)

    def stop(self, timeout_s: float = 30) -> None:
        """Shut every node down. The last ones have no majority to ask and are killed; the data stays."""
        living = [node for node in self.nodes if self.alive(node)]
        for node in living:
            self._processes[node].send_signal(signal.SIGCONT)
            self._processes[node].terminate()
        deadline = time.monotonic() + timeout_s
        for node in living:
            try:
                self._processes[node].wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._processes[node].kill()
        self.close()

    def close(self) -> None:
        """SIGKILL for all."""
        for node, process in list(self._processes.items()):
            process.kill()
            self._reap(node)

    def create_topic(self, name: str, partitions: int = 1, timeout_s: float = DEADLINE_S, **config: str) -> None:
        """A topic with a copy on every node; acknowledged records are on two at least. ``min_insync_replicas="1"``."""
        settings = {"min.insync.replicas": "2" if len(self.nodes) > 2 else "1"}
        settings |= {key.replace("_", "."): value for key, value in config.items()}
        shape = {"num_partitions": partitions, "replication_factor": len(self.nodes), "configs": settings}
        deadline = time.monotonic() + timeout_s

        # Again until it is there: a node that has just come may not know of the others yet.
        def created() -> bool:
            with self._admin(timeout_s) as admin, suppress(kafka_errors.TopicAlreadyExistsError):
                admin.create_topics({name: shape}, wait_for_metadata=True)
            return True

        self._until(f"topic {name} is made", created, deadline)
        self._until(
            f"every copy of {name} is in sync",
            lambda: all(len(part["isr_nodes"]) == len(self.nodes) for part in self.partitions(name)),
            deadline,
        )

    def partitions(self, topic: str, timeout_s: float = DEADLINE_S) -> list[dict[str, Any]]:
        """Each partition's ``partition_index``, ``leader_id`` (-1: none), ``isr_nodes`` and more, in order."""
        with self._admin(timeout_s) as admin:
            found = admin.describe_topics([topic])
        return sorted(found[0]["partitions"], key=lambda part: int(part["partition_index"]))

    def leader(self, topic: str, partition: int = 0, timeout_s: float = DEADLINE_S) -> int:
        """Number of the node that leads the partition; waits while there is none."""

        def led() -> int:
            number = int(self.partitions(topic)[partition]["leader_id"])
            return number if number in self.nodes else 0

        return int(self._until(f"{topic}/{partition} has a leader", led, time.monotonic() + timeout_s))

    def wait_for_leader(self, topic: str, partition: int, but: int, timeout_s: float = DEADLINE_S) -> int:
        """The partition's leader once it is another than ``but``."""

        def led() -> int:
            number = int(self.partitions(topic)[partition]["leader_id"])
            return number if number in self.nodes and number != but else 0

        what = f"{topic}/{partition} is led by another than node {but}"
        return int(self._until(what, led, time.monotonic() + timeout_s))

    def wait_for_isr(self, topic: str, copies: int, timeout_s: float = DEADLINE_S) -> None:
        """Until each partition of the topic has so many copies in sync."""
        self._until(
            f"{topic} has {copies} copies in sync",
            lambda: all(len(part["isr_nodes"]) >= copies for part in self.partitions(topic)),
            time.monotonic() + timeout_s,
        )

    def known(self, timeout_s: float = 10) -> set[int]:
        """Numbers of the nodes that each one that can answer takes for alive."""
        with self._admin(timeout_s) as admin:

            async def told_by(node: int) -> set[int]:
                # kafka-python's own question goes to any node, and brings those that are fenced with it: dead, or not
                # taken in yet.
                answer = await admin._manager.send(DescribeClusterRequest(include_fenced_brokers=False), node_id=node)
                return {int(broker.broker_id) for broker in answer.brokers}

            return set.intersection(*(admin._manager.run(told_by, node) for node in self._answering()))

    def wait_for_nodes(self, count: int, timeout_s: float = DEADLINE_S) -> None:
        """Until so many nodes are taken for alive, by each of them."""
        deadline = time.monotonic() + timeout_s
        self._until(f"{count} nodes are known", lambda: len(self.known()) >= count, deadline)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self._said())
        self.close()

    def _answering(self) -> list[int]:
        return [node for node in self.nodes if self.alive(node) and node not in self._paused]

    def _admin(self, timeout_s: float) -> Any:
        # Only nodes that can answer: a client that begins with a stopped one waits for it.
        answering = [self.address_of(node) for node in self._answering()]
        if not answering:
            raise BrokerError("every node is dead or stopped: start one before you ask")
        return KafkaAdminClient(
            bootstrap_servers=answering, bootstrap_timeout_ms=int(timeout_s * 1000), request_timeout_ms=5_000
        )

    def _until(self, what: str, claim: Callable[[], Any], deadline: float) -> Any:
        """The first true value of ``claim``; BrokerError with the logs' ends after ``deadline``."""
        waited = None
        while True:
            try:
                # A port that refuses costs a client seconds of back-off, so it is asked first.
                if any(_listens(self._ports[node]) for node in self.nodes if node not in self._paused):
                    if found := claim():
                        return found
                    waited = None
            except kafka_errors.KafkaError as error:
                waited = error
            ended = [node for node in self._processes if not self.alive(node)]
            if time.monotonic() > deadline or len(ended) == len(self.nodes):
                raise BrokerError(f"not in time: {what}; {waited or 'no error'}; ended: {ended}\n{self._said()}")
            time.sleep(0.1)

    def _folder(self, node: int) -> Path:
        return self.folder / f"node-{node}"

    def _write_properties(self, node: int) -> bool:
        """Write the node's files; whether its storage has to be formatted."""
        copies = str(len(self.nodes))
        enough = "2" if len(self.nodes) > 2 else "1"
        voters = ",".join(f"{each}@{HOST}:{port}" for each, port in self._controllers.items())
        settings = {
            "process.roles": "broker,controller",
            "node.id": str(node),
            "controller.quorum.voters": voters,
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{self.address_of(node)},CONTROLLER://{HOST}:{self._controllers[node]}",
            "advertised.listeners": f"PLAINTEXT://{self.address_of(node)}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": "data",
            "auto.create.topics.enable": "false",
            "default.replication.factor": copies,
            "min.insync.replicas": enough,
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            "broker.heartbeat.interval.ms": "500",
            "broker.session.timeout.ms": str(SESSION_MS),
            "replica.lag.time.max.ms": "5000",
            "offsets.topic.replication.factor": copies,
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": enough,
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": enough,
            "share.coordinator.state.topic.num.partitions": "1",
            # The default, 128 MiB, is half of a node's heap.
            "log.cleaner.dedupe.buffer.size": str(16 << 20),
            **self.properties,
        }
        folder = self._folder(node)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "server.properties").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        (folder / "log4j2.properties").write_text(LOG4J)
        return not (folder / "data" / "meta.properties").exists()

    def _format(self, nodes: list[int], base: list[str], identity: str, timeout_s: float) -> None:
        if not nodes:
            return
        # One Java for all: what it writes differs between nodes in two lines.
        first, data = nodes[0], self._folder(nodes[0]) / "data"
        line = [*base, "kafka.tools.StorageTool", "format", "-t", identity, "-c", "server.properties"]
        with open(self.log_of(first), "ab") as log:
            try:
                subprocess.run(
                    line,
                    cwd=self._folder(first),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    timeout=timeout_s,
                    check=True,
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                raise BrokerError(f"Kafka's storage can't be formatted\n{self._said()}") from None
        written = (data / "meta.properties").read_text()
        for node in nodes[1:]:
            own = {"node.id": str(node), "directory.id": base64.urlsafe_b64encode(b"\0" + os.urandom(15)).decode()}
            lines = [
                f"{key}={own.get(key, value)}"
                for key, _, value in (each.partition("=") for each in written.splitlines())
            ]
            shutil.copytree(data, self._folder(node) / "data")
            (self._folder(node) / "data" / "meta.properties").write_text("\n".join(lines) + "\n")

    def _launch(self, node: int, base: list[str]) -> None:
        with open(self.log_of(node), "ab") as log:
            process = subprocess.Popen(
                [*base, "kafka.Kafka", "server.properties"],
                cwd=self._folder(node),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes[node] = process
        # Reads a pipe that only this process holds, so that a node ends with it, SIGKILL included.
        self._watchers[node] = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -KILL "$0"', str(process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _reap(self, node: int) -> None:
        # The watcher first: once the node is waited for, its number may be another process's.
        if (watcher := self._watchers.pop(node, None)) is not None:
            watcher.kill()
            watcher.communicate()
        if (process := self._processes.pop(node, None)) is not None:
            process.wait()
        self._paused.discard(node)

    def _said(self) -> str:
        ends = []
        for node in self.nodes:
            if self.log_of(node).exists():
                lines = self.log_of(node).read_text(encoding="utf-8", errors="replace").splitlines()
                said = [line for line in lines if not line.startswith("\tat ")]
                ends.append("\n  ".join([f"the end of {self.log_of(node)}:", *said[-8:]]))
        return "\n".join(ends)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0 and probe.getsockname() != probe.getpeername()
