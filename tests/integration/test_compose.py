"""compose.yaml without containers: its Kafka, its stream, its worker and its model's script, as they are written there.

Kafka is started as its image starts it: its own wrapper turns the variables into properties and formats the storage.
Names of services become this machine's, ports free ones, and paths of volumes folders of the test.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from kafka import KafkaAdminClient

from daemon.broker import JVM_FLAGS, LOG4J
from daemon.broker_runtime import jars, java
from tests.daemon_process import DaemonProcess, answers, eventually, free_ports
from tests.kafka import create_topic, wait_for_port

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parents[2] / "deploy" / "compose.yaml").read_text()
)["services"]


@contextmanager
def kafka(folder: Path) -> Iterator[str]:
    """The broker of compose.yaml; its address for the other services."""
    inside, host, controller = free_ports(3)
    moved = {
        "//kafka:19092": f"//127.0.0.1:{inside}",
        "//:19092": f"//127.0.0.1:{inside}",
        "127.0.0.1:9092": f"127.0.0.1:{host}",
        "//:9092": f"//127.0.0.1:{host}",
        "localhost:9093": f"127.0.0.1:{controller}",
        "//:9093": f"//127.0.0.1:{controller}",
        "/var/lib/kafka/data": str(folder / "data"),
    }
    variables = {"CLUSTER_ID": "5L6g3nShT-eMCtK--X86sw"}
    for name, value in SERVICES["kafka"]["environment"].items():
        text = str(value)
        for old, new in moved.items():
            text = text.replace(old, new)
        variables[name] = text
    for name in ("default", "mounted", "final"):
        (folder / name).mkdir(parents=True)
    for name in ("server.properties", "log4j2.yaml", "tools-log4j2.yaml"):
        (folder / "default" / name).write_text("")
    (folder / "log4j2.properties").write_text(LOG4J)
    command = [java(), *JVM_FLAGS, "-cp", str(jars() / "*")]
    options = [f"--{name}-configs-dir={folder / name}" for name in ("default", "mounted", "final")]
    done = subprocess.run(
        [*command, "kafka.docker.KafkaDockerWrapper", "setup", *options],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with open(folder / "broker.log", "wb") as log:
        process = subprocess.Popen(
            [*command, "kafka.Kafka", str(folder / "final" / "server.properties")],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for_port(f"127.0.0.1:{inside}")
        yield f"127.0.0.1:{inside}"
    except Exception as error:
        error.add_note((folder / "broker.log").read_text()[-3000:])
        raise
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1_500)  # the model is trained and calibrated once, a minute on an idle machine
def test_the_stream_is_answered_and_its_labels_are_joined(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    command = bin_folder / "homeostat"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m daemon.cli "$@"\n')
    command.chmod(0o755)
    (script,) = SERVICES["bundle"]["command"]
    shell = [*SERVICES["bundle"]["entrypoint"], script.replace("$$", "$")]
    root = str(Path(__file__).parents[2])
    packed = {"PATH": f"{bin_folder}:/usr/bin:/bin", "PYTHONPATH": root, "HOMEOSTAT_HTTP": "off"}
    for _ in range(2):  # the second time it is there already
        done = subprocess.run(shell, cwd=state, env=packed, capture_output=True, text=True, timeout=480, check=False)
        assert done.returncode == 0, done.stderr
    assert "training" not in done.stderr

    with kafka(tmp_path / "kafka") as address:

        def here(text: str) -> str:
            return text.replace("kafka:19092", address).replace("/var/lib/homeostat", str(state))

        with KafkaAdminClient(bootstrap_servers=address) as client:
            assert len(client.describe_cluster()["brokers"]) == 1
        for topic in ("sensors", "labels", "answers"):
            create_topic(address, topic)
        worker = {name: here(value) for name, value in SERVICES["homeostat"]["environment"].items()}
        worker["HOMEOSTAT_STATE_DIR"] = str(state)
        with DaemonProcess(worker, tmp_path / "worker") as daemon:
            daemon.wait_until_ready()
            name, *arguments = [here(text) for text in SERVICES["stream"]["command"]]
            with DaemonProcess({}, tmp_path / "stream", *arguments, command=name):
                daemon.wait_for('homeostat_labels_total{result="joined"}', 100)
            assert daemon.terminate() == 0
        rows = answers(address, "answers")
        assert len(rows) > 100 and {row["status"] for row in rows} == {"ok"}
        eventually("a checkpoint is there", lambda: list((state / "checkpoints").iterdir()))
