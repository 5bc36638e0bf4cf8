from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.streams.codecs import REASONS
from tests.daemon_process import DaemonProcess, answers, on_kafka, read_all, record, records
from tests.kafka import produce

GOOD, TEXT = "0.5", '"0.5"'
ROW = ", ".join([GOOD] * 16)


def row_with(number: str) -> str:
    return ROW.replace(GOOD, number, 1)


# What is known by its id is answered with the reason.
ANSWERED: dict[str, tuple[str, str]] = {
    "wrong shape": ("[1, 2]", "wrong_shape"),
    "empty list": ("[]", "wrong_shape"),
    "ragged": ("[[1, 2], 3]", "wrong_shape"),
    "no x": ("null", "missing_field"),
    "text for x": ('"0.5"', "wrong_type"),
    "text in x": (f"[{row_with(TEXT)}]", "wrong_type"),
    "NaN": (f"[{row_with('NaN')}]", "not_finite"),
    "null": (f"[{row_with('null')}]", "not_finite"),
    "Infinity": (f"[{row_with('Infinity')}]", "not_finite"),
    "-Infinity": (f"[{row_with('-Infinity')}]", "not_finite"),
    "beyond float32": (f"[{row_with('1e39')}]", "out_of_range"),
}
# The others are nobody's.
DEAD: list[tuple[bytes | None, str]] = [
    (b"\xff\xfe\x00", "undecodable"),
    (b"not json", "undecodable"),
    (b'{"id": "cut", "x": [0.5', "undecodable"),
    (b"[1, 2, 3]", "undecodable"),
    (b"[" * 100_000, "undecodable"),
    (b'{"id": "deep", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "undecodable"),
    (b'{"id": "\\ud800", "x": [1]}', "undecodable"),
    (b"", "empty"),
    (None, "tombstone"),
    (b'{"x": [1, 2]}', "wrong_shape"),
    (b'{"id": ["a", "list"], "x": [1]}', "wrong_type"),
    (b"{}", "missing_field"),
]


@pytest.mark.slow
def test_among_bad_records_every_good_one_is_answered_and_every_bad_one_accounted_for(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source = topic()
    bad: list[bytes | None] = [f'{{"id": "{name}", "x": {x}}}'.encode() for name, (x, _) in ANSWERED.items()]
    bad += [value for value, _ in DEAD]
    # A key that is not UTF-8 names nobody.
    keys: list[bytes | None] = [None] * len(ANSWERED) + [b"\xff" if value is None else None for value, _ in DEAD]
    good: list[bytes | None] = [*records([f"good-{number}" for number in range(len(bad))])]
    mixed = [value for pair in zip(good, bad, strict=True) for value in pair]
    produce(kafka_broker, source, mixed, [key for bad_key in keys for key in (None, bad_key)])
    with DaemonProcess(on_kafka(settings, kafka_broker, source), tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_in_total", len(mixed))
        metrics = daemon.metrics()
        assert daemon.terminate() == 0

    found = answers(kafka_broker, f"{source}.answers")
    fine = {answer["id"] for answer in found if answer["status"] == "ok"}
    assert fine == {f"good-{number}" for number in range(len(bad))}
    refused = {answer["id"]: answer["reason"] for answer in found if answer["status"] == "invalid_input"}
    assert refused == {name: reason for name, (_, reason) in ANSWERED.items()}
    assert len(found) == len(fine) + len(refused)

    letters = read_all(kafka_broker, f"{source}.dead-letters")
    headers = [{name: value.decode() for name, value in letter.headers} for letter in letters]
    origins = [(item["homeostat.partition"], int(item["homeostat.offset"])) for item in headers]
    assert origins == [(f"{source}/0", 2 * (len(ANSWERED) + number) + 1) for number in range(len(DEAD))]
    assert [(letter.value, item["homeostat.reason"]) for letter, item in zip(letters, headers, strict=True)] == [
        # An empty value: a tombstone would delete what its key names, were the topic compacted.
        (value or b"", reason)
        for value, reason in DEAD
    ]

    expected = Counter([reason for _, reason in ANSWERED.values()] + [reason for _, reason in DEAD])
    counted = {reason: metrics[f'homeostat_records_invalid_total{{reason="{reason}"}}'] for reason in REASONS}
    assert {reason: count for reason, count in counted.items() if count} == expected


def test_a_batch_of_only_bad_records_is_passed_like_any_other(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source = topic()
    produce(kafka_broker, source, [b"not json"] * 40 + [record(f"bad-{number}", [1.0]) for number in range(40)])
    # Four rows a batch: no batch has a row for the model.
    streams = on_kafka(settings, kafka_broker, source) | {"HOMEOSTAT_BATCH_ROWS": "4"}
    with DaemonProcess(streams, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_in_total", 80)
        produce(kafka_broker, source, records(["good"]))
        daemon.wait_for("homeostat_records_in_total", 81)
        assert daemon.terminate() == 0
    found = answers(kafka_broker, f"{source}.answers")
    assert [answer["id"] for answer in found] == [*(f"bad-{number}" for number in range(40)), "good"]
    assert [answer["status"] for answer in found] == ["invalid_input"] * 40 + ["ok"]
    assert len(read_all(kafka_broker, f"{source}.dead-letters")) == 40


@pytest.mark.slow
def test_finite_numbers_that_overflow_the_model_are_answered_as_invalid(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source = topic()
    huge = [record(f"huge-{number}", [3e38, -3e38] * 8) for number in range(20)]
    good = records([f"good-{number}" for number in range(20)])
    produce(kafka_broker, source, [value for pair in zip(huge, good, strict=True) for value in pair])
    with DaemonProcess(on_kafka(settings, kafka_broker, source), tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_in_total", 40)
        assert daemon.terminate() == 0
    status = {answer["id"]: answer["status"] for answer in answers(kafka_broker, f"{source}.answers")}
    assert status == {f"huge-{number}": "invalid_input" for number in range(20)} | {
        f"good-{number}": "ok" for number in range(20)
    }


@pytest.mark.slow
def test_labels_that_are_garbage_are_counted_and_ignored(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source, labels = topic(), topic(prefix="labels")
    names = [f"row-{number}" for number in range(20)]
    garbage: list[bytes | None] = [
        b"\xff",
        b"",
        None,
        b"[]",
        b"[" * 100_000,
        b'{"id": "row-0"}',
        b'{"y": 1}',
        b'{"id": "row-0", "y": "zero"}',
        b'{"id": "row-0", "y": true}',
        b'{"id": "row-0", "y": NaN}',
        b'{"id": "row-0", "y": 1e400}',
        b'{"id": "row-0", "y": 1, "ts": "yesterday"}',
    ]
    # Of records that were answered, but no class of this model.
    garbage += [json.dumps({"id": name, "y": y}).encode() for name, y in zip(names, (4, -1, 1.5, 2**60), strict=False)]
    good = [json.dumps({"id": name, "y": 1}).encode() for name in names[4:]]
    produce(kafka_broker, source, records(names))
    produce(kafka_broker, labels, [*garbage, *good], [b"key"] * (len(garbage) + len(good)))
    streams = on_kafka(settings, kafka_broker, source) | {"HOMEOSTAT_LABELS": f"kafka://{kafka_broker}/{labels}"}
    with DaemonProcess(streams, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for('homeostat_labels_total{result="joined"}', len(good))
        daemon.wait_for('homeostat_labels_total{result="rejected"}', len(garbage))
        metrics = daemon.metrics()
        assert daemon.terminate() == 0
    assert metrics['homeostat_labels_total{result="joined"}'] == len(good)
    assert metrics['homeostat_labels_total{result="rejected"}'] == len(garbage)
    assert metrics['homeostat_labels_total{result="late"}'] == 0
    assert sorted(answer["id"] for answer in answers(kafka_broker, f"{source}.answers")) == sorted(names)
