from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.broker import TrialBroker
from tests.daemon_process import DaemonProcess, answers, eventually, free_port, ids, on_kafka, record, records
from tests.kafka import create_topic, produce

pytestmark = pytest.mark.usefixtures("trial_kafka")


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[TrialBroker]:
    """A broker that the test may kill and start again, on the same port and folder."""
    with TrialBroker(tmp_path / "broker", port=free_port()) as broker:
        yield broker


def test_a_broker_that_dies_and_comes_back_costs_no_record(
    own_broker: TrialBroker, settings: dict[str, str], tmp_path: Path
) -> None:
    address, names = own_broker.address, [str(number) for number in range(3_000)]
    create_topic(address, "in")
    produce(address, "in", records(names[:2_000]))
    streams = on_kafka(settings, address, "in") | {"HOMEOSTAT_CHECKPOINT__EVERY_S": "0.5"}
    with DaemonProcess(streams, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_out_total", 1)
        own_broker.kill()
        eventually("/readyz says 503", lambda: daemon.get("/readyz")[0] == 503)
        assert daemon.get("/healthz")[0] == 200
        eventually("a scrape says so too", lambda: daemon.metrics()["homeostat_ready"] == 0)
        own_broker.start()
        daemon.wait_until_ready()
        produce(address, "in", records(names[2_000:]))
        daemon.wait_for("homeostat_records_in_total", len(names))
        assert daemon.get("/healthz")[0] == 200
        assert daemon.terminate() == 0
    assert set(ids(answers(address, "in.answers"))) == set(names)


def piped(settings: dict[str, str], own_broker: TrialBroker, folder: Path, name: str, drain_s: float) -> DaemonProcess:
    """A worker that the test feeds through standard input and that answers on the topic ``name``."""
    settings = settings | {
        "HOMEOSTAT_SOURCE": "-",
        "HOMEOSTAT_SINK": f"kafka://{own_broker.address}/{name}",
        "HOMEOSTAT_STATE_DIR": str(folder / name),
        "HOMEOSTAT_DEAD_LETTERS": "null:",
        "HOMEOSTAT_DRAIN_TIMEOUT_S": str(drain_s),
    }
    return DaemonProcess(settings, folder, stdin=subprocess.PIPE)


def write(daemon: DaemonProcess, name: str) -> None:
    assert daemon.process.stdin is not None
    daemon.process.stdin.write(record(name) + b"\n")
    daemon.process.stdin.flush()


@pytest.mark.slow
def test_a_drain_that_can_not_deliver_ends_with_3_and_a_second_signal_ends_it_with_130(
    own_broker: TrialBroker, settings: dict[str, str], tmp_path: Path
) -> None:
    with (
        piped(settings, own_broker, tmp_path, "acknowledged", 1) as first,
        piped(settings, own_broker, tmp_path, "never-written", 1) as fresh,
        piped(settings, own_broker, tmp_path, "forced", 600) as forced,
    ):
        for daemon in (first, forced):
            daemon.wait_until_ready()
            write(daemon, "before")
            daemon.wait_for("homeostat_records_out_total", 1)
        fresh.wait_until_ready()
        own_broker.kill()
        for daemon in (first, forced):
            write(daemon, "after")
            daemon.wait_for("homeostat_records_out_total", 2)
        # Without the topic's metadata the client can't even take the answer: the loop itself waits.
        write(fresh, "after")
        eventually("it waits for the sink", lambda: '"event": "waiting"' in fresh.log)
        assert fresh.get("/healthz")[0] == 200
        assert fresh.get("/readyz")[0] == 503

        for daemon in (first, fresh, forced):
            daemon.process.send_signal(signal.SIGTERM)
        eventually("it drains", lambda: "draining" in forced.log)
        forced.process.send_signal(signal.SIGTERM)
        assert forced.wait() == 130
        assert first.wait() == 3
        assert fresh.wait() == 3


def damaged(settings: dict[str, str], folder: Path) -> dict[str, str]:
    copy = folder / "damaged-bundle"
    shutil.copytree(settings["HOMEOSTAT_BUNDLE"], copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {"HOMEOSTAT_BUNDLE": str(copy)}


WRONG: dict[str, tuple[dict[str, str], str]] = {
    "no such broker": (
        {"HOMEOSTAT_SOURCE": "kafka://127.0.0.1:1/in", "HOMEOSTAT_KAFKA__BOOTSTRAP_TIMEOUT_S": "1"},
        "HOMEOSTAT_SOURCE=kafka://127.0.0.1:1/in: no broker answers",
    ),
    "no such topic": ({"HOMEOSTAT_SOURCE": "kafka://BROKER/nowhere"}, "HOMEOSTAT_SOURCE=kafka://BROKER/nowhere: topic"),
    "no such labels": (
        {"HOMEOSTAT_LABELS": "kafka://BROKER/no-labels"},
        "HOMEOSTAT_LABELS=kafka://BROKER/no-labels: topic 'no-labels' does not exist",
    ),
    "no bundle": ({"HOMEOSTAT_BUNDLE": "nowhere"}, "HOMEOSTAT_BUNDLE=nowhere"),
    "no such variable": (
        {"HOMEOSTAT_SORCE": "-"},
        "HOMEOSTAT_SORCE=-: no such variable; did you mean HOMEOSTAT_SOURCE",
    ),
    "wrong value": ({"HOMEOSTAT_BATCH_ROWS": "many"}, "HOMEOSTAT_BATCH_ROWS=many"),
}


def refused(streams: dict[str, str], folder: Path) -> list[str]:
    """Lines of the refusal, after its exit code was seen."""
    with DaemonProcess(streams, folder) as daemon:
        assert daemon.wait() == 2
        assert "Traceback" not in daemon.log
        return [line for line in daemon.log.splitlines() if line.startswith("homeostat: ")]


@pytest.mark.parametrize("case", WRONG)
def test_a_start_that_can_not_succeed_is_refused_by_name(
    case: str, kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    wrong, line = WRONG[case]
    wrong = {name: value.replace("BROKER", kafka_broker) for name, value in wrong.items()}
    problems = refused(on_kafka(settings, kafka_broker, topic()) | wrong, tmp_path)
    assert [problem for problem in problems if line.replace("BROKER", kafka_broker) in problem] == problems
    assert len(problems) == 1


def test_a_damaged_bundle_is_refused_with_the_file_that_is_damaged(settings: dict[str, str], tmp_path: Path) -> None:
    streams = settings | damaged(settings, tmp_path) | {"HOMEOSTAT_SOURCE": "-"}
    (problem,) = refused(streams, tmp_path)
    assert "damaged-bundle/model.safetensors" in problem


def test_a_port_in_use_is_refused_with_its_variable(settings: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = f"127.0.0.1:{listener.getsockname()[1]}"
        (problem,) = refused(settings | {"HOMEOSTAT_SOURCE": "-", "HOMEOSTAT_HTTP": taken}, tmp_path)
    assert f"HOMEOSTAT_HTTP={taken}: Address already in use" in problem
