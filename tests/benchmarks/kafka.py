"""`make bench-kafka`: the daemon, the bare kafka-python loop and Quix Streams on one broker, in one run.

Every subject answers the same records with the same model and the same words. Rounds are interleaved, so that a machine
whose speed drifts favours nobody, and ratios are taken round by round. Each run of a subject is one process: it works
off a backlog (records per second, processor time, memory), then answers a live load at half of that rate, then one at
half of the bare loop's. All is seen from outside: the end of the answers' topic, the process's own accounts, and an
independent sender and reader with one clock.

`--million` has the daemon answer a million records of 200 bytes and shows its memory at every tenth.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import kafka_load, kafka_subjects, kafka_tables, kafka_watch
from tests.benchmarks.kafka_subjects import BARE, Run, Subject
from tests.benchmarks.kafka_tables import Measured
from tests.benchmarks.kafka_world import Stream

STREAMS = {"raw-200": Stream("raw", 200), "raw-4096": Stream("raw", 4096), "json-200": Stream("json", 200)}
BACKLOG = {200: 200_000, 4096: 40_000}
WARM_SHARE = 0.1
"""Share of the backlog that is answered before anything is counted."""
LIVE_S = 14.0
"""Seconds of a live load; longer than the ten after which daemon and bare loop flush and commit."""
MARK = "<!-- bench-kafka -->"


def label(stream: Stream) -> str:
    """``raw 200 B``."""
    size = "200 B" if stream.value_bytes == 200 else "4 KB"
    return f"{stream.codec} {size}"


@dataclass
class Bench:
    """One broker, and what is measured on it."""

    address: str
    folder: Path
    live_s: float
    cpus: Sequence[int]

    def __post_init__(self) -> None:
        from kafka import KafkaConsumer

        self._consumer = KafkaConsumer(
            bootstrap_servers=self.address,
            isolation_level="read_committed",
            enable_auto_commit=False,
            allow_auto_create_topics=False,
        )
        self._bundles: dict[Stream, Path] = {}

    def _run(self, stream: Stream) -> Run:
        if stream not in self._bundles:
            self._bundles[stream] = stream.make_bundle(self.folder)
        name = f"bench-{uuid.uuid4().hex[:8]}"
        for topic in (name, f"{name}.answers"):
            kafka_watch.make_topic(self.address, topic)
        return Run(self.address, name, f"{name}.answers", stream, self._bundles[stream], self.folder)

    def _fill(self, run: Run, count: int) -> None:
        kafka_watch.load(
            do="fill",
            address=run.address,
            topic=run.topic,
            codec=run.stream.codec,
            value_bytes=run.stream.value_bytes,
            count=count,
        )

    def measure(self, subject: Subject, stream: Stream, backlog: int, common_rate: float) -> Measured:
        """One run of one subject; ``common_rate`` is the bare loop's half, nan for its own."""
        run, found = self._run(stream), Measured(subject.name, label(stream))
        self._fill(run, backlog)
        warm = int(backlog * WARM_SHARE)
        with kafka_watch.Watched(subject, run, self._consumer, self.cpus) as watched:
            watched.until(backlog)
            found.rate, found.cpu_us = kafka_tables.rates(watched.samples, warm, backlog)
            memory = kafka_tables.memory_steps(watched.samples, backlog)
            found.growth = memory[-1] - memory[0]
            sent = backlog
            if self.live_s:
                found.half = self._live(watched, found.rate / 2)
                sent += int(found.half["sent"])
                rate = common_rate if math.isfinite(common_rate) else found.rate / 2
                found.common = found.half if subject is BARE else self._live(watched, rate)
                sent += 0 if subject is BARE else int(found.common["sent"])
            found.peak = max(float(sample.rss) for sample in watched.samples)
            on_topic = watched.look().answers
            watched.stop()
            log = watched.log
        found.notes = self._notes(subject, run, sent, on_topic, log, found)
        kafka_watch.drop_topics(run.address, run.topic, run.out)
        return found

    def _live(self, watched: kafka_watch.Watched, rate: float) -> dict[str, float]:
        """Latencies (ms) of a live load of ``rate`` records per second."""
        run, stream = watched.run, watched.run.stream
        where = {"address": run.address, "codec": stream.codec, "value_bytes": stream.value_bytes}
        count = int(rate * self.live_s)
        discarded = int(rate * min(kafka_load.DISCARDED_S, self.live_s / 4))
        after = watched.look().answers
        reader = {"address": run.address, "topic": run.out, "after": after, "count": count, "discarded": discarded}
        with kafka_watch.receiving(**reader) as receiver:
            offered = kafka_watch.load(do="offer", topic=run.topic, rate=rate, seconds=self.live_s, **where)
            received = kafka_watch.finish_load(receiver)
        if received["received"] < count:
            raise watched.fail(f"{received['received']} of {count} live records answered at {rate:,.0f}/s")
        watched.look()
        return {**received, **offered}

    def _notes(self, subject: Subject, run: Run, sent: int, on_topic: int, log: str, found: Measured) -> str:
        counted = kafka_watch.load(do="count", address=run.address, topic=run.out, count=sent)
        said = []
        if counted["answered"] < sent:
            said.append(f"**{sent - counted['answered']:,} of {sent:,} records unanswered**")
        if counted["answers"] > counted["answered"]:
            said.append(f"{counted['answers'] - counted['answered']:,} answers twice")
        # The end of a transaction takes an offset: from outside that is the proof that there were any.
        if subject.exactly_once and on_topic <= counted["answers"]:
            said.append("**wrote no transactions: not exactly once**")
        late = max((part.get("late_p99_ms", 0.0) for part in (found.half, found.common)), default=0.0)
        if late > 25:
            said.append(f"the sender itself was up to {late:.0f} ms late (p99)")
        if subject.kind == "daemon":
            said.append(kafka_watch.path_taken(log) or "its log does not say whether in bulk")
        return "; ".join(said)

    def million(self, subject: Subject, count: int) -> tuple[list[float], float]:
        """Resident bytes at every tenth of ``count`` records of 200 bytes, and records per second."""
        run = self._run(STREAMS["raw-200"])
        self._fill(run, count)
        with kafka_watch.Watched(subject, run, self._consumer, self.cpus) as watched:
            watched.until(count)
            watched.stop()
        kafka_watch.drop_topics(run.address, run.topic, run.out)
        rate, _ = kafka_tables.rates(watched.samples, count // 10, count)
        return kafka_tables.memory_steps(watched.samples, count), rate


def report(results: Sequence[Mapping[str, Measured]], streams: Sequence[Stream], setting: str) -> str:
    """Tables and notes as Markdown."""
    rivals = {
        subject.name: [rival.name for rival in kafka_subjects.RIVALS if rival.exactly_once == subject.exactly_once]
        for subject in kafka_subjects.subjects()
        if subject.kind == "daemon"
    }
    parts = [setting]
    for stream in streams:
        name = label(stream)
        found = kafka_tables.table(_by_subject(results, name), name, BARE.name, rivals)
        parts.append(f"### {name}, {stream.features} numbers\n\n{found}")
    if said := kafka_tables.notes(results):
        parts.append(said)
    return "\n\n".join(parts)


def _by_subject(results: Sequence[Mapping[str, Measured]], stream: str) -> list[dict[str, Measured]]:
    return [{found.subject: found for found in each.values() if found.stream == stream} for each in results]


def measure_all(
    bench: Bench, streams: Sequence[Stream], compared: Sequence[Subject], rounds: int, scale: float
) -> list[dict[str, Measured]]:
    """Every subject on every stream, round after round; one that fails is named and its cell stays empty."""
    results: list[dict[str, Measured]] = []
    for number in range(rounds):
        results.append({})
        for stream in streams:
            common = math.nan
            # The bare loop first: its rate is what the others are offered half of. The others take turns.
            others = [subject for subject in compared if subject is not BARE]
            turn = number % max(1, len(others))
            for subject in [BARE, *others[turn:], *others[:turn]]:
                backlog = int(BACKLOG[stream.value_bytes] * scale)
                try:
                    found = bench.measure(subject, stream, backlog, common)
                except (kafka_watch.SubjectError, ValueError) as error:
                    found = Measured(subject.name, label(stream), notes=f"**failed**: {str(error).splitlines()[0]}")
                    print(f"{subject.name}: {error}", flush=True)
                if subject is BARE:
                    common = found.rate / 2
                results[-1][f"{subject.name} {found.stream}"] = found
                print(
                    f"round {number + 1}, {found.stream}, {subject.name}: {found.rate:,.0f}/s, {found.cpu_us:.1f} µs, "
                    f"p99 {found.half.get('p99_ms', math.nan):.1f} ms; {found.notes}",
                    flush=True,
                )
    return results


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kafka", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", default=",".join(STREAMS), help=f"of {', '.join(STREAMS)}, comma-separated")
    parser.add_argument("--subjects", default="", help="parts of names, comma-separated; all by default")
    parser.add_argument("--scale", type=float, default=1.0, help="of the backlog: 0.1 for a quick look")
    parser.add_argument("--live", type=float, default=LIVE_S, metavar="S", help="seconds of a live load; 0: none")
    parser.add_argument("--pin", type=int, default=None, metavar="CPU", help="subjects on this processor alone")
    parser.add_argument("--million", type=int, nargs="?", const=1_000_000, metavar="N", help="memory over N records")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between the marks of this file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every measurement")
    given = parser.parse_args()
    from daemon.broker import TrialBroker

    wanted = [part.strip().lower() for part in given.subjects.split(",") if part.strip()]
    compared = [
        subject
        for subject in kafka_subjects.subjects()
        if not wanted or subject is BARE or any(part in subject.name.lower() for part in wanted)
    ]
    if not kafka_subjects.rival_installed():
        print("Quix Streams is not installed: the tables are made without it")
    # Disk: a stream of live records is deleted with its topic, and the log is cut small so that this frees it soon.
    properties = {"log.segment.bytes": str(64 << 20), "log.segment.delete.delay.ms": "1000"}
    with (
        tempfile.TemporaryDirectory(prefix="bench-kafka-") as temporary,
        TrialBroker(Path(temporary) / "kafka", port=0, properties=properties) as broker,
    ):
        bench = Bench(broker.address, Path(temporary), given.live, [] if given.pin is None else [given.pin])
        if given.million:
            daemons = [subject for subject in compared if subject in (kafka_subjects.PUBLIC, kafka_subjects.BULK)]
            found = {subject.name: bench.million(subject, given.million) for subject in daemons}
            steps = {f"{name} ({rate:,.0f}/s)": each for name, (each, rate) in found.items()}
            text = f"### Memory over {given.million:,} records\n\nResident MB.\n\n{kafka_tables.memory_table(steps)}"
            mark = MARK.replace("kafka", "kafka-memory")
        else:
            streams = [STREAMS[name.strip()] for name in given.streams.split(",")]
            results = measure_all(bench, streams, compared, given.rounds, given.scale)
            text, mark = report(results, streams, setting(given)), MARK
            if given.json:
                given.json.write_text(json.dumps(kafka_tables.as_rows(results), indent=1))
    print(text)
    if given.write:
        before = given.write.read_text(encoding="utf-8") if given.write.exists() else ""
        given.write.write_text(kafka_tables.between(before, mark, text), encoding="utf-8")


def setting(given: Any) -> str:
    """What the numbers were taken on, in a sentence or two."""
    pinned = "nothing pinned" if given.pin is None else f"subjects on processor {given.pin} alone"
    return (
        f"{given.rounds} rounds, {os.cpu_count()} processors shared by broker, load and subject ({pinned}), "
        f"Python {platform.python_version()}, one partition, batches of 512, linger 5 ms, no compression, "
        f"live loads of {given.live:g} s. Medians; ratios round by round: median (least–most)."
    )


if __name__ == "__main__":
    main()
