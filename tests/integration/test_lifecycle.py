from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.daemon_process import (
    DaemonProcess,
    answers,
    committed,
    eventually,
    ids,
    on_kafka,
    record,
    records,
)
from tests.kafka import produce

RARELY = {"HOMEOSTAT_CHECKPOINT__EVERY_S": "1000"}


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.slow
def test_a_drained_worker_has_committed_what_it_answered_and_the_next_goes_on_from_there(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source = topic()
    names = [str(number) for number in range(20_000)]
    produce(kafka_broker, source, records(names[:15_000]))
    streams = on_kafka(settings, kafka_broker, source) | RARELY
    with DaemonProcess(streams, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_out_total", 1)
        assert daemon.terminate() == 0
    answered = ids(answers(kafka_broker, f"{source}.answers"))
    assert answered == names[: committed(kafka_broker, f"g-{source}", source)]

    produce(kafka_broker, source, records(names[15_000:]))
    with DaemonProcess(streams, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_out_total", len(names) - len(answered))
        assert daemon.terminate() == 0
    assert ids(answers(kafka_broker, f"{source}.answers")) == names
    assert committed(kafka_broker, f"g-{source}", source) == len(names)


def test_a_killed_worker_leaves_no_record_unanswered(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source = topic()
    names = [str(number) for number in range(10_000)]
    produce(kafka_broker, source, records(names))
    # A static member takes its partitions back at once; another one would wait for the dead one's session to end.
    streams = on_kafka(settings, kafka_broker, source) | {
        "HOMEOSTAT_KAFKA__INSTANCE_ID": "edge-1",
        "HOMEOSTAT_CHECKPOINT__EVERY_BATCHES": "2",
        "HOMEOSTAT_BATCH_ROWS": "64",
    }
    for least in (1, 1_000):
        with DaemonProcess(streams, tmp_path) as daemon:
            daemon.wait_for_kill("homeostat_records_out_total", least)
            daemon.kill()
    with DaemonProcess(streams, tmp_path) as daemon:
        daemon.wait_until_ready()
        eventually("nothing is left to read", lambda: daemon.metrics()["homeostat_lag_records"] == 0)
        assert daemon.terminate() == 0
    found = ids(answers(kafka_broker, f"{source}.answers"))
    assert set(found) == set(names)
    assert committed(kafka_broker, f"g-{source}", source) == len(names)


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    settings: dict[str, str], tmp_path: Path
) -> None:
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    streams = settings | {
        "HOMEOSTAT_SOURCE": f"file:{source}",
        "HOMEOSTAT_SINK": f"file:{sink}",
        "HOMEOSTAT_CHECKPOINT__EVERY_BATCHES": "1",
        "HOMEOSTAT_BATCH_ROWS": "100",
        "HOMEOSTAT_LOG_FORMAT": "json",
    }
    names = [str(number) for number in range(300)]
    source.write_bytes(b"".join(line + b"\n" for line in records(names)))
    with DaemonProcess(streams, tmp_path) as daemon:
        assert daemon.wait() == 0
    *_, before, newest = sorted((tmp_path / "state" / "checkpoints").iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)

    with DaemonProcess(streams, tmp_path) as daemon:
        assert daemon.wait() == 0
        said = [json.loads(line) for line in daemon.log.splitlines() if line.startswith("{")]
    (refusal,) = [line for line in said if "refused" in line["event"]]
    assert f"{newest}: damaged: checksum differs" in refusal["problem"]
    (restored,) = [line for line in said if line["event"] == "restored"]
    assert restored["file"] == str(before)
    found = Counter(answer["id"] for answer in lines(sink))
    assert set(found) == set(names)
    # From the older checkpoint on, and not from the start.
    (offset,) = restored["positions"].values()
    assert {name for name, count in found.items() if count == 2} == set(names[offset:])


def test_a_file_is_answered_line_by_line_and_the_process_ends_by_itself(
    settings: dict[str, str], tmp_path: Path
) -> None:
    source, sink, report = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "report.json"
    names = [str(number) for number in range(1_500)]
    source.write_bytes(b"".join(line + b"\n" for line in [*records(names), b"not json"]))
    streams = settings | {"HOMEOSTAT_SOURCE": f"file:{source}", "HOMEOSTAT_SINK": f"file:{sink}"}
    with DaemonProcess(streams, tmp_path, "--report", str(report)) as daemon:
        assert daemon.wait() == 0
        assert "1,501" in daemon.output
    assert [(answer["id"], answer["status"]) for answer in lines(sink)] == [(name, "ok") for name in names]
    (letter,) = lines(tmp_path / "state" / "dead-letters.jsonl")
    assert (letter["offset"], letter["reason"]) == (1_500, "undecodable")
    counted = json.loads(report.read_text())
    assert (counted["records"], counted["dead"], counted["invalid"]) == (1_501, 1, 0)


def test_a_pipe_is_answered_while_it_is_open_and_its_end_is_the_end(settings: dict[str, str], tmp_path: Path) -> None:
    streams = settings | {"HOMEOSTAT_SOURCE": "-", "HOMEOSTAT_SINK": "-", "HOMEOSTAT_CHECKPOINT": "off"}
    with DaemonProcess(streams, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as daemon:
        assert daemon.process.stdin is not None and daemon.process.stdout is not None
        for name in ("first", "second"):
            daemon.process.stdin.write(record(name) + b"\n")
            daemon.process.stdin.flush()
            assert json.loads(daemon.process.stdout.readline())["id"] == name
        daemon.process.stdin.close()
        # Nothing but answers on standard output: the closing table goes to standard error.
        assert daemon.process.stdout.read() == b""
        assert daemon.wait() == 0
        assert "seconds in state" in daemon.log


def test_rows_of_an_npz_archive_are_answered_by_their_ids(settings: dict[str, str], tmp_path: Path) -> None:
    x = np.asarray([json.loads(line)["x"] for line in records([str(number) for number in range(200)])], np.float32)
    x[7, 3] = np.nan
    np.savez(tmp_path / "rows.npz", x=x, ids=np.asarray([f"row-{number}" for number in range(200)]))
    sink = tmp_path / "out.jsonl"
    streams = settings | {"HOMEOSTAT_SOURCE": f"file:{tmp_path / 'rows.npz'}", "HOMEOSTAT_SINK": f"file:{sink}"}
    with DaemonProcess(streams, tmp_path) as daemon:
        assert daemon.wait() == 0
    status = {answer["id"]: answer["status"] for answer in lines(sink)}
    assert list(status) == [f"row-{number}" for number in range(200)]
    assert [name for name, value in status.items() if value != "ok"] == ["row-7"]


def test_check_approves_a_good_setup(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    streams = on_kafka(settings, kafka_broker, topic())
    with DaemonProcess(streams, tmp_path, command="check") as daemon:
        assert daemon.wait() == 0
        assert "ok: settings, bundle, streams" in daemon.output


def test_check_masks_a_password_and_says_what_it_lacks(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    streams = on_kafka(settings, kafka_broker, topic()) | {"HOMEOSTAT_KAFKA__PASSWORD": "hunter2"}
    with DaemonProcess(streams, tmp_path, command="check") as daemon:
        assert daemon.wait() == 2
        assert "HOMEOSTAT_KAFKA__PASSWORD=***" in daemon.output.splitlines()
        assert "HOMEOSTAT_KAFKA__PASSWORD: needs a HOMEOSTAT_KAFKA__SASL_MECHANISM" in daemon.log
        assert "hunter2" not in daemon.output + daemon.log


def test_check_says_every_problem_in_a_line_of_its_own(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    streams = on_kafka(settings, kafka_broker, topic()) | {
        "HOMEOSTAT_SOURCE": f"kafka://{kafka_broker}/nowhere",
        "HOMEOSTAT_LABELS": f"kafka://{kafka_broker}/no-labels",
        "HOMEOSTAT_HTTP": "9464",
    }
    with DaemonProcess(streams, tmp_path, command="check") as daemon:
        assert daemon.wait() == 2
        problems = [line for line in daemon.log.splitlines() if line.startswith("homeostat: ")]
        assert sorted(problem.removeprefix("homeostat: ").partition("=")[0] for problem in problems) == [
            "HOMEOSTAT_HTTP",
            "HOMEOSTAT_LABELS",
            "HOMEOSTAT_SOURCE",
        ]
        assert "ok:" not in daemon.output


@pytest.mark.slow
def test_two_workers_share_a_topic_and_nothing_is_left_when_one_ends(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source = topic(partitions=4)
    names = [str(number) for number in range(4_000)]

    def send(part: list[str]) -> None:
        for partition in range(4):
            produce(kafka_broker, source, records(part[partition::4]), partition=partition)

    streams = on_kafka(settings, kafka_broker, source) | {
        "HOMEOSTAT_CHECKPOINT__EVERY_S": "0.5",
        # A static member says no farewell: the other one gets its partitions when its session is over.
        "HOMEOSTAT_KAFKA__SESSION_TIMEOUT_MS": "6000",
    }
    with (
        DaemonProcess(streams | {"HOMEOSTAT_STATE_DIR": str(tmp_path / "a")}, tmp_path) as leaving,
        DaemonProcess(streams | {"HOMEOSTAT_STATE_DIR": str(tmp_path / "b")}, tmp_path) as staying,
    ):
        # Ready means to have a partition.
        leaving.wait_until_ready()
        staying.wait_until_ready()
        send(names[:2_000])
        for worker in (leaving, staying):
            worker.wait_for("homeostat_records_out_total", 1)
        send(names[2_000:3_000])
        assert leaving.terminate() == 0
        send(names[3_000:])
        # The one that stays checkpoints by itself, so the offsets come to the end without its being stopped.
        eventually("all is committed", lambda: committed(kafka_broker, f"g-{source}", source) == len(names))
        assert staying.terminate() == 0
    assert set(ids(answers(kafka_broker, f"{source}.answers"))) == set(names)
