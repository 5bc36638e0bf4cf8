"""Dead letters sent again, on a real broker and in files: each once, in order, with all that the record had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from daemon.cli import _Lazy
from daemon.dead_letters import command
from daemon.errors import SettingsError, StreamError
from daemon.records import DeadLetter
from daemon.stream_settings import KafkaClient
from daemon.streams.files import FileSink
from daemon.streams.kafka_sink import KafkaSink
from tests.daemon_process import DaemonProcess, on_kafka, read_all, record
from tests.kafka import consume_all, create_topic, produce

Replay = Callable[..., tuple[int, str]]


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Replay:
    """``replay(source, *options)``: exit code and standard output of `homeostat replay-dlq`."""

    def run(source: str, *options: str, **variables: str) -> tuple[int, str]:
        environment = {"SOURCE": source, "STATE_DIR": str(tmp_path / "state"), "KAFKA__GROUP": "g"} | variables
        for name, value in environment.items():
            monkeypatch.setenv(f"HOMEOSTAT_{name}", value)
        parser = _Lazy(prog="homeostat")
        command.add(parser.add_subparsers(parser_class=_Lazy))
        capsys.readouterr()
        code = command.run(parser.parse_args(["replay-dlq", *options]))
        return code, capsys.readouterr().out

    return run


def letter(source: str, number: int, offset: int, **more: Any) -> DeadLetter:
    given: dict[str, Any] = {"key": b"k%d" % number, "value": b"v%d" % offset, "reason": "undecodable", "detail": ""}
    return DeadLetter(f"{source}/{number}", offset, **(given | more))


def bury(address: str, source: str, letters: Sequence[DeadLetter], settings: KafkaClient | None = None) -> None:
    sink = KafkaSink("", settings or KafkaClient(), dead_letters_url=f"kafka://{address}/{source}.dead-letters")
    sink.open()
    try:
        for item in letters:
            sink.send_dead(item)
        sink.flush(30)
    finally:
        sink.close()


def by_partition(records: Sequence[Any]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for row in records:
        found.setdefault(row.partition, []).append(row)
    return found


def test_each_letter_goes_back_once_to_its_partition_in_its_order_with_all_it_had(
    kafka_broker: str, topic: Callable[..., str], replay: Replay
) -> None:
    source = topic(partitions=3)
    create_topic(kafka_broker, f"{source}.dead-letters", 2)
    url, mine = f"kafka://{kafka_broker}/{source}", [("trace", b"\x00\xff"), ("trace", b"2")]
    buried = [letter(source, offset % 3, offset, headers=mine, time_s=1.0) for offset in range(600)]
    buried.append(letter(source, 2, 600, value=None, reason="tombstone"))
    buried.append(letter(source, 2, 601, value=b"", key=None, reason="empty"))
    bury(kafka_broker, source, buried)
    produce(kafka_broker, f"{source}.dead-letters", [b"a stranger's"])

    code, said = replay(url)
    assert code == 0 and said.startswith(f"sent 602 of 603 dead letters of {url}.dead-letters to {url}\n")
    assert "1  not a dead letter of homeostat" in said
    back = by_partition(read_all(kafka_broker, source))
    for number in range(3):
        expected = [item for item in buried if item.partition == f"{source}/{number}"]
        assert [(row.key, row.value) for row in back[number]] == [(item.key, item.value) for item in expected]
    assert back[1][0].headers == [
        *mine,
        ("homeostat.replays", b"1"),
        ("homeostat.replay-of", f"{source}/1:1".encode()),
    ]

    # A second call goes on: there is nothing but what was left.
    assert "sent 0 of 1 dead letters" in replay(url)[1]
    bury(kafka_broker, source, [letter(source, 0, 700)])
    assert "sent 1 of 2 dead letters" in replay(url)[1]
    assert len(read_all(kafka_broker, source)) == 603
    assert "sent 603 of 604 dead letters" in replay(url, "--again")[1]
    assert len(read_all(kafka_broker, source)) == 2 * 603


def test_what_was_not_asked_for_is_left_for_a_later_call_and_nothing_goes_twice(
    kafka_broker: str, topic: Callable[..., str], replay: Replay
) -> None:
    source = topic()
    url, reasons = f"kafka://{kafka_broker}/{source}", ("undecodable", "wrong_shape", "empty")
    buried = [letter(source, 0, offset, reason=reasons[offset % 3], time_s=float(offset)) for offset in range(30)]
    bury(kafka_broker, source, buried)

    code, said = replay(url, "--dry-run", "--reason", "empty", "--since", "9")
    lines = said.splitlines()
    assert code == 0 and lines[0].startswith(f"{source}/0:11  empty  3 B  1970-01-01T00:00:11.000+00:00  replays 0")
    assert lines[7:9] == [f"would send 7 of 30 dead letters of {url}.dead-letters to {url}", "         7  empty"]
    assert len(lines) == 11  # and 23 that were left, with why
    assert read_all(kafka_broker, source) == []

    def sent(*options: str) -> list[int]:
        before = len(read_all(kafka_broker, source))
        code, _ = replay(url, *options)
        assert code == 0
        return [int(row.value[1:]) for row in read_all(kafka_broker, source)[before:]]

    assert sent("--reason", "empty", "--limit", "3") == [2, 5, 8]
    assert sent("--reason", "empty", "--reason", "wrong_shape", "--until", "12") == [1, 4, 7, 10, 11]
    assert sent("--offset", "20-22", "--partition", "0") == [20, 21, 22]
    assert sent("--partition", f"{source}/1") == []
    assert sent("--partition", "other/0") == []
    rest = [offset for offset in range(30) if offset not in {1, 2, 4, 5, 7, 8, 10, 11, 20, 21, 22}]
    assert sent() == rest
    assert sent() == []


def test_a_record_that_was_replayed_often_enough_is_left_and_counted(
    kafka_broker: str, topic: Callable[..., str], replay: Replay
) -> None:
    source = topic()
    url = f"kafka://{kafka_broker}/{source}"
    often = [letter(source, 0, count, headers=[("homeostat.replays", b"%d" % count)]) for count in range(6)]
    bury(kafka_broker, source, often)
    code, said = replay(url)
    assert code == 0 and "sent 3 of 6 dead letters" in said
    assert "3  replayed 3 times or more already (--max-replays)" in said
    assert "sent 2 of 3 dead letters" in replay(url, "--max-replays", "5")[1]
    counts = [dict(row.headers)["homeostat.replays"] for row in read_all(kafka_broker, source)]
    assert counts == [b"1", b"2", b"3", b"4", b"5"]


def test_what_the_target_does_not_take_is_left_and_the_others_go(
    kafka_broker: str, topic: Callable[..., str], replay: Replay
) -> None:
    source = topic()
    url = f"kafka://{kafka_broker}/{source}"
    # As long as a broker takes at all: with the header that a replay adds it is too long.
    longest = letter(source, 0, 1, value=b"x" * 999_000)
    nobody = letter(source, 0, 3, key=None, value=None, reason="tombstone")
    beyond = letter(source, 0, 4, value=b"x" * 3_000_000, reason="too_large")
    bury(kafka_broker, source, [letter(source, 0, 0), longest, letter(source, 0, 2), nobody, beyond])
    code, said = replay(url)
    assert code == 0 and "sent 3 of 5 dead letters" in said
    assert "a tombstone without a key can't be sent" in said and "too large to be kept in a dead letter" in said
    assert [len(row.value) for row in consume_all(kafka_broker, source, 3)] == [2, 999_000, 2]
    small = f"{source}.small"
    create_topic(kafka_broker, small, max_message_bytes="100000")
    code, said = replay(url, "--again", "--to", f"kafka://{kafka_broker}/{small}")
    assert code == 3 and "refused by the broker: MessageSizeTooLargeError" in said
    assert [len(row.value) for row in consume_all(kafka_broker, small, 2)] == [2, 2]
    # It is left, and not noted as sent.
    assert "sent 1 of 3 dead letters" in replay(url)[1]


def test_letters_of_an_aborted_transaction_never_go_and_the_end_is_reached(
    kafka_broker: str, topic: Callable[..., str], replay: Replay
) -> None:
    source = topic()
    dead = f"{source}.dead-letters"
    create_topic(kafka_broker, dead)
    said = [("homeostat.partition", f"{source}/0".encode()), ("homeostat.offset", b"1"), ("homeostat.reason", b"empty")]
    producer = KafkaProducer(bootstrap_servers=kafka_broker, transactional_id=f"t-{source}")
    try:
        producer.init_transactions()
        for value in (b"aborted", b"kept"):
            producer.begin_transaction()
            producer.send(dead, value, headers=said)
            producer.flush()
            (producer.commit_transaction if value == b"kept" else producer.abort_transaction)()
    finally:
        producer.close()
    assert "sent 1 of 1 dead letters" in replay(f"kafka://{kafka_broker}/{source}")[1]
    assert [row.value for row in read_all(kafka_broker, source)] == [b"kept"]


def test_dead_letters_of_files_go_to_a_file_or_a_topic_and_an_unfinished_line_waits(
    kafka_broker: str, topic: Callable[..., str], replay: Replay, tmp_path: Path
) -> None:
    dead = tmp_path / "dead.jsonl"
    sink = FileSink(f"file:{dead}")
    sink.open()
    partition = f"file:{tmp_path / 'in.jsonl'}"
    for offset, value in enumerate((b'{"id":"a"}', b"two\nlines", b"", b'{"id":"b"}')):
        sink.send_dead(DeadLetter(partition, offset, None, value, "missing_field", "no x"))
    sink.close()
    whole = dead.read_bytes()
    dead.write_bytes(whole[:-20])
    places = {"DEAD_LETTERS": f"file:{dead}"}
    source, out = f"file:{tmp_path / 'in.jsonl'}", tmp_path / "again.jsonl"
    with pytest.raises(SettingsError, match="--to is needed"):
        replay(source, **places)
    code, said = replay(source, "--to", f"file:{out}", **places)
    assert code == 0 and "sent 1 of 3 dead letters" in said and "holds line ends" in said
    dead.write_bytes(whole)
    assert "sent 1 of 3 dead letters" in replay(source, "--to", f"file:{out}", **places)[1]
    assert out.read_bytes() == b'{"id":"a"}\n{"id":"b"}\n'
    target = topic(partitions=2)
    assert "sent 2 of 2 dead letters" in replay(source, "--to", f"kafka://{kafka_broker}/{target}", **places)[1]
    assert {row.value for row in read_all(kafka_broker, target)} == {b"two\nlines", b""}
    # Rotated: another file of that name begins anew.
    dead.write_bytes(whole.splitlines(keepends=True)[3])
    assert "sent 1 of 1 dead letters" in replay(source, "--to", f"file:{out}", **places)[1]
    dead.with_name("dead.jsonl.replayed").write_bytes(b"{")
    with pytest.raises(StreamError, match=r"dead\.jsonl\.replayed is damaged"):
        replay(source, "--to", f"file:{out}", **places)


def test_places_that_can_not_be_used_are_refused_by_name(kafka_broker: str, replay: Replay, tmp_path: Path) -> None:
    url = f"kafka://{kafka_broker}/nowhere-{tmp_path.name}"
    with pytest.raises(SettingsError, match="HOMEOSTAT_DEAD_LETTERS=null:: nothing can be read"):
        replay("sim://ageing")
    with pytest.raises(SettingsError, match="that is where the dead letters lie"):
        replay(url, "--to", f"{url}.dead-letters")
    with pytest.raises(StreamError, match=r"HOMEOSTAT_DEAD_LETTERS=.*does not exist"):
        replay(url)


def test_a_record_that_dies_again_carries_its_headers_and_one_replay_more(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path, replay: Replay
) -> None:
    source = topic()
    url, dead = f"kafka://{kafka_broker}/{source}", f"{source}.dead-letters"
    with KafkaProducer(bootstrap_servers=kafka_broker) as producer:
        producer.send(source, b"not json", b"key", headers=[("trace", b"7")], timestamp_ms=1_700_000_000_123)
        producer.send(source, record("fine"), headers=[("trace", b"8")])
    with DaemonProcess(on_kafka(settings, kafka_broker, source), tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_in_total", 2)
        first = consume_all(kafka_broker, dead, 1)[0]
        assert dict(first.headers)["homeostat.timestamp"] == b"1700000000123"
        assert ("trace", b"7") in first.headers
        assert "sent 1 of 1 dead letters" in replay(url)[1]
        daemon.wait_for("homeostat_records_in_total", 3)
        second = consume_all(kafka_broker, dead, 2)[1]
        assert daemon.terminate() == 0
    found = dict(second.headers)
    assert (second.key, second.value, found["trace"]) == (b"key", b"not json", b"7")
    assert (found["homeostat.replays"], found["homeostat.offset"]) == (b"1", b"2")
    assert found["homeostat.replay-of"] == f"{source}/0:0".encode()


def test_progress_is_the_group_s_own(kafka_broker: str, topic: Callable[..., str], replay: Replay) -> None:
    source = topic()
    dead = TopicPartition(f"{source}.dead-letters", 0)
    bury(kafka_broker, source, [letter(source, 0, offset, reason=reason) for offset, reason in enumerate("abab")])
    replay(f"kafka://{kafka_broker}/{source}", "--reason", "b")
    with KafkaConsumer(bootstrap_servers=kafka_broker, group_id="g.replay-dlq", enable_auto_commit=False) as client:
        noted = client.committed(dead, metadata=True)
        assert (noted.offset, noted.metadata[:9]) == (0, "replay:4:")
    replay(f"kafka://{kafka_broker}/{source}")
    with KafkaConsumer(bootstrap_servers=kafka_broker, group_id="g.replay-dlq", enable_auto_commit=False) as client:
        assert client.committed(dead, metadata=True)[:2] == (4, "")
