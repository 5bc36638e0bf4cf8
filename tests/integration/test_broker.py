from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from daemon.broker import TrialBroker
from daemon.broker_runtime import BrokerError
from tests.kafka import consume_all, create_topic, produce

pytestmark = pytest.mark.usefixtures("trial_kafka")


@pytest.mark.slow
def test_acknowledged_records_are_there_after_a_stop_and_after_a_kill(tmp_path: Path) -> None:
    values = [f"record {number}".encode() * 20 for number in range(1000)]
    # The properties file is Latin-1 and Kafka splits its log folders at commas.
    broker = TrialBroker(tmp_path / "kä fka, λ", port=0)
    with broker:
        port = broker.port
        create_topic(broker.address, "kept")
        produce(broker.address, "kept", values, compression_type="zstd")
        assert [record.value for record in consume_all(broker.address, "kept", 1000)] == values
    assert not broker.running
    with broker:
        assert broker.port == port
        assert [record.value for record in consume_all(broker.address, "kept", 1000)] == values
        broker.kill()
        assert not broker.running
        broker.start()
        assert [record.value for record in consume_all(broker.address, "kept", 1000)] == values


def test_a_taken_port_is_named_and_nothing_is_left_running(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        broker = TrialBroker(tmp_path, port=port)
        with pytest.raises(BrokerError, match=f"127.0.0.1:{port} is taken"):
            broker.start()
    assert not broker.running


def test_a_node_that_ends_at_its_start_says_why_in_its_own_words(tmp_path: Path) -> None:
    broker = TrialBroker(tmp_path, port=0, properties={"offsets.topic.num.partitions": "many"})
    with pytest.raises(BrokerError, match=r"(?s)broker\.log.*many"):
        broker.start()
    assert not broker.running


def test_a_second_node_on_the_same_folder_is_refused_and_the_first_lives_on(tmp_path: Path) -> None:
    with TrialBroker(tmp_path, port=0) as first:
        second = TrialBroker(tmp_path, port=0)
        with pytest.raises(BrokerError, match="in use by another broker"):
            second.start()
        assert not second.running
        create_topic(first.address, "alive")
        produce(first.address, "alive", [b"yes"])


def test_the_node_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from daemon.broker import TrialBroker\n"
        "broker = TrialBroker(Path(sys.argv[1]), port=0); broker.start(); print(broker._node.pid, flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        node = psutil.Process(int(parent.stdout.readline()))
        assert node.is_running()
        parent.kill()
    node.wait(timeout=30)  # raises TimeoutExpired where the node outlives its parent


def test_the_command_says_where_it_listens_and_ends_in_order_at_a_signal(tmp_path: Path) -> None:
    code = "import pathlib, sys; from daemon.broker import command; sys.exit(command(pathlib.Path(sys.argv[1]), 0))"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = next(word for word in process.stdout.readline().split() if word.startswith("127.0.0.1:")).rstrip(",")
        assert f"HOMEOSTAT_SOURCE=kafka://{address}/" in process.stdout.readline()
        create_topic(address, "signal")
        process.terminate()
        assert process.wait(timeout=60) == 0
    # Kafka writes it only at the end of an orderly shutdown.
    assert (tmp_path / "data" / ".kafka_cleanshutdown").exists()
