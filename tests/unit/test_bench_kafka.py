"""The arithmetic of `make bench-kafka`: what a row says follows from what was seen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import kafka_subjects, kafka_tables, kafka_watch
from tests.benchmarks.kafka import label, report
from tests.benchmarks.kafka_subjects import BARE, BULK, BULK_ONCE, PUBLIC, QUIX, QUIX_ONCE, Run
from tests.benchmarks.kafka_tables import MIB, Measured
from tests.benchmarks.kafka_watch import Sample
from tests.benchmarks.kafka_world import Stream


def samples(*rows: tuple[float, int, float, int]) -> list[Sample]:
    return [Sample(time_s, answers, cpu_s, rss * MIB) for time_s, answers, cpu_s, rss in rows]


STEADY = samples((0, 0, 5.0, 200), (1, 100, 5.1, 210), (2, 500, 5.5, 220), (3, 1_000, 6.0, 230), (9, 1_000, 6.4, 230))


def test_a_rate_counts_neither_the_start_nor_the_wait_after_the_last_answer() -> None:
    rate, cpu_us = kafka_tables.rates(STEADY, 100, 1_000)
    assert rate == pytest.approx(450)
    assert cpu_us == pytest.approx(1e6 * 0.9 / 900)


def test_the_ends_of_transactions_are_not_answers() -> None:
    # A tenth of what lies on the topic is ends: 1,000 answers on 1,100 offsets.
    with_ends = samples((0, 0, 0, 1), (1, 110, 0.1, 1), (2, 1_100, 1.0, 1))
    rate, cpu_us = kafka_tables.rates(with_ends, 100, 1_000)
    assert rate == pytest.approx(900)
    assert cpu_us == pytest.approx(1e6 * 0.9 / 900)


@pytest.mark.parametrize("few", [STEADY[:1], STEADY[:3], samples((0, 0, 0, 1), (1, 1_000, 1, 1))])
def test_too_few_samples_are_an_error_and_no_rate(few: list[Sample]) -> None:
    with pytest.raises(ValueError, match="no two samples"):
        kafka_tables.rates(few, 100, 1_000)


def test_memory_is_read_at_every_tenth() -> None:
    steps = [step / MIB for step in kafka_tables.memory_steps(STEADY, 1_000)]
    assert steps == [210, 220, 220, 220, 220, 230, 230, 230, 230, 230]
    short = kafka_tables.memory_steps(STEADY[:3], 1_000)
    assert math.isnan(short[-1]) and short[0] / MIB == 210
    text = kafka_tables.memory_table({"daemon": [step * MIB for step in steps]})
    assert text.splitlines()[-1] == "| daemon | 210 | 220 | 220 | 220 | 220 | 230 | 230 | 230 | 230 | 230 | +20.0 |"


def test_a_ratio_is_taken_within_a_round() -> None:
    # Each round is twice as fast as the other subject's, whatever the machine does between rounds.
    assert kafka_tables.ratio({0: 20.0, 1: 2.0, 2: 8.0}, {0: 10.0, 1: 1.0, 2: 4.0}) == (2.0, 2.0, 2.0)
    assert kafka_tables.ratio({0: 20.0, 1: math.nan}, {0: 10.0, 1: 1.0, 2: 4.0}) == (2.0, 2.0, 2.0)
    assert all(math.isnan(each) for each in kafka_tables.ratio({0: 1.0}, {}))


def results() -> list[dict[str, Measured]]:
    def round_of(speed: float) -> dict[str, Measured]:
        rates = {BARE: 10_000, PUBLIC: 15_000, BULK: 25_000, BULK_ONCE: 20_000, QUIX: 12_500, QUIX_ONCE: 2_000}
        return {
            subject.name: Measured(
                subject.name, "raw 200 B", rate * speed, 1e6 / rate, {"p50_ms": 6.0, "p99_ms": 12.0},
                peak=300.0 * MIB, growth=1.5 * MIB, notes="public" if subject is PUBLIC else "",
            )
            for subject, rate in rates.items()
        }  # fmt: skip

    return [round_of(1.0), round_of(0.5), round_of(2.0)]


def test_the_table_compares_with_the_bare_loop_and_with_the_fastest_rival_of_the_same_promise() -> None:
    text = report(results(), [Stream("raw", 200)], "a machine")
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()
            if line.startswith("| ")}  # fmt: skip
    assert rows[BARE.name][:2] == ["10,000", "1"]
    assert rows[BULK.name] == [
        "25,000", "2.50 (2.50–2.50)", "2.00 (2.00–2.00)",
        "40.0", "6.0 / 12.0", "– / –", "300", "+1.5",
    ]  # fmt: skip
    assert rows[BULK_ONCE.name][2] == "10.00 (10.00–10.00)"
    assert rows[QUIX.name][2] == "–"
    assert f"- {PUBLIC.name}, raw 200 B: public" in text and "a machine" in text


def test_a_subject_that_failed_leaves_its_cells_empty() -> None:
    found = results()
    found[1][BULK.name] = Measured(BULK.name, "raw 200 B", notes="**failed**: no answers")
    text = report(found, [Stream("raw", 200)], "")
    assert "2.50 (2.50–2.50)" in text and "**failed**" in text
    lost = [{BULK.name: Measured(BULK.name, "raw 200 B")}]
    assert f"| {BULK.name} | – | – | – | – | – / – | – / – | – | – |" in report(lost, [Stream("raw", 200)], "")


def test_measurements_go_into_a_file_as_they_are() -> None:
    rows = json.loads(json.dumps(kafka_tables.as_rows(results())))
    assert len(rows) == 18 and rows[-1]["round"] == 2
    assert rows[0]["half"] == {"p50_ms": 6.0, "p99_ms": 12.0} and rows[0]["common"] == {}


def test_only_what_is_between_the_marks_is_replaced() -> None:
    fresh = kafka_tables.between("# Kafka\n\nwords", "<!-- m -->", "table 1")
    assert fresh == "# Kafka\n\nwords\n\n<!-- m -->\ntable 1\n<!-- m -->\n"
    assert kafka_tables.between(fresh + "\nafter\n", "<!-- m -->", "table 2\n") == (
        "# Kafka\n\nwords\n\n<!-- m -->\ntable 2\n<!-- m -->\n\nafter\n"
    )


@pytest.mark.parametrize(("codec", "value_bytes"), [("raw", 200), ("raw", 4096), ("json", 200), ("json", 4096)])
def test_records_have_the_size_that_the_table_says(codec: str, value_bytes: int) -> None:
    from daemon.records import RawBatch
    from daemon.streams.codecs import codec as make_codec

    stream = Stream(codec, value_bytes)
    rows = list(stream.records(b"r%d" % number for number in range(64)))
    sizes = [len(value) for _, value in rows]
    assert np.mean(sizes) == pytest.approx(value_bytes, rel=0.08)
    keys, values = [key for key, _ in rows], [value for _, value in rows]
    raw = RawBatch(values=values, keys=keys, times_s=[0.0] * 64, partitions=["t/0"] * 64, offsets=list(range(64)))
    batch = make_codec(codec, (stream.features,)).decode(raw)
    assert batch.valid.all() and batch.ids == [key.decode() for key in keys]


def test_the_daemon_is_told_its_path_and_its_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOMEOSTAT_BATCH_ROWS", "7")
    run = Run("127.0.0.1:9092", "in", "out", Stream("raw", 200), tmp_path / "bundle", tmp_path)
    public, once = PUBLIC.environment(run), BULK_ONCE.environment(run)
    assert public["HOMEOSTAT_KAFKA__BULK"] == "off" and public["HOMEOSTAT_DELIVERY"] == "at-least-once"
    assert once["HOMEOSTAT_KAFKA__BULK"] == "auto" and once["HOMEOSTAT_DELIVERY"] == "exactly-once"
    assert "HOMEOSTAT_BATCH_ROWS" not in public
    assert json.loads(QUIX_ONCE.command(run)[-1])["exactly_once"] is True
    assert label(run.stream) == "raw 200 B" and label(Stream("json", 4096)) == "json 4 KB"


def test_the_path_taken_is_what_the_log_says() -> None:
    started = '{"event": "started", "level": "info", "seconds": 1.2}'
    slow = '{"event": "records are read one by one", "level": "info", "reason": "crc32c is missing"}'
    assert kafka_watch.path_taken(started) == "read in bulk, written in bulk"
    mixed = "\n".join(["Traceback (most recent call last):", "17", slow, started])
    assert kafka_watch.path_taken(mixed) == "read one by one (crc32c is missing), written in bulk"
    # Without a start its silence proves nothing.
    assert kafka_watch.path_taken(slow) == ""


def test_the_daemon_still_says_when_it_takes_the_slow_path() -> None:
    folder = kafka_subjects.ROOT / "daemon" / "streams"
    source = "".join((folder / name).read_text(encoding="utf-8") for name in ("kafka.py", "kafka_sink.py"))
    assert all(f'"{event}"' in source for event in kafka_watch.SLOW_PATHS)
