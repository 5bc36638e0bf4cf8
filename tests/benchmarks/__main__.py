"""`make bench`: records per second of the daemon and of the bare loop, from one run on one broker.

The bare loop is what a team would write without homeostat: kafka-python poll, decode, forward, encode, produce, with
the same codec, model and broker. Rounds alternate, so that a machine whose speed drifts doesn't favour one of them; the
table shows medians and the ratio round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from tests.kafka import produce

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, RECORDS = 5, 40_000
DRIFTED_FROM = 13_000
"""Row of the simulated stream at which humidity, drift and gain loss have come together."""


def records(count: int, *, drifted: bool) -> list[bytes]:
    """JSON records of about 200 bytes: of a steady world, or of one that has drifted."""
    from daemon.streams.simulator import AgeingArray

    array = AgeingArray(7, ageing=drifted)
    span = 2_000 if drifted else count
    x, _ = array.rows(DRIFTED_FROM if drifted else 0, span)
    encode = msgspec.json.Encoder().encode
    return [encode({"id": str(row), "x": [round(float(v), 4) for v in x[row % span]]}) for row in range(count)]


def bare_loop(broker: str, topic: str, out: str, count: int, bundle: Path) -> float:
    """Seconds of the bare loop over ``count`` records, from the first polled record to the last acknowledgement."""
    import torch
    from kafka import KafkaConsumer, KafkaProducer

    from daemon.bundle import open_bundle
    from daemon.records import RawBatch
    from daemon.streams.codecs import codec, encode_predictions

    torch.set_num_threads(1)
    opened = open_bundle(bundle)
    model, decoder = opened.model, codec("json", opened.manifest.input_shape)
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=broker,
        group_id=f"bare-{out}",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        metrics_enabled=False,
        fetch_max_wait_ms=100,
    )
    producer = KafkaProducer(bootstrap_servers=broker, linger_ms=5, batch_size=65_536, metrics_enabled=False)
    done, started = 0, 0.0
    while done < count:
        for rows in consumer.poll(timeout_ms=100, max_records=512).values():
            started = started or time.monotonic()
            raw = RawBatch(
                values=[row.value for row in rows],
                keys=[row.key for row in rows],
                times_s=[row.timestamp / 1000 for row in rows],
                partitions=["t/0"] * len(rows),
                offsets=[row.offset for row in rows],
            )
            batch = decoder.decode(raw)
            with torch.inference_mode():
                confidence, answers = model(torch.from_numpy(batch.x)).softmax(1).max(1)
            for value in encode_predictions(
                "classification", batch.ids, answers.numpy(), confidence.numpy(), 0, "steady"
            ):
                producer.send(out, value)
            done += len(rows)
    producer.flush()
    consumer.commit()
    seconds = time.monotonic() - started
    consumer.close()
    producer.close()
    return seconds


def child(arguments: list[str], environment: dict[str, str] | None = None) -> str:
    """Run one measurement in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HOMEOSTAT_")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=clean | (environment or {}), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def daemon_rate(
    broker: str, topic: str, name: str, count: int, bundle: Path, folder: Path, **more: str
) -> dict[str, float]:
    """One run of the daemon; its report, with the share of time spent in each state."""
    report = folder / f"{name}.json"
    child(
        ["-m", "daemon.cli", "run", "--max-records", str(count), "--report", str(report)],
        {
            "HOMEOSTAT_SOURCE": f"kafka://{broker}/{topic}",
            "HOMEOSTAT_SINK": f"kafka://{broker}/out-{name}",
            "HOMEOSTAT_BUNDLE": str(bundle),
            "HOMEOSTAT_STATE_DIR": str(folder / name),
            "HOMEOSTAT_KAFKA__GROUP": name,
            "HOMEOSTAT_HTTP": "127.0.0.1:0",
            "HOMEOSTAT_LOG_LEVEL": "error",
            **more,
        },
    )
    found = json.loads(report.read_text())
    states = found["seconds_in_state"]
    return {
        "rate": found["records_per_second"],
        **{name: value / sum(states.values()) for name, value in states.items()},
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--bare", nargs=5, metavar="X", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        broker, topic, out, count, bundle = arguments.bare
        print(bare_loop(broker, topic, out, int(count), Path(bundle)))
        return
    from daemon.broker import TrialBroker
    from daemon.streams.simbundle import ensure_bundle

    count = arguments.records
    rates: dict[str, list[float]] = {"bare loop": [], "daemon, steady": [], "daemon, fast": []}
    fast_share: list[float] = []
    with tempfile.TemporaryDirectory() as temporary, TrialBroker(Path(temporary) / "kafka", port=0) as broker:
        folder = Path(temporary)
        bundle = ensure_bundle(folder, "sim://ageing")
        for topic, drifted in (("steady", False), ("drifted", True)):
            produce(broker.address, topic, records(count, drifted=drifted))
        for number in range(arguments.rounds):
            out = f"out-bare-{number}"
            bare = ["-m", "tests.benchmarks", "--bare", broker.address, "steady", out, str(count), str(bundle)]
            rates["bare loop"].append(count / float(child(bare)))
            steady = daemon_rate(broker.address, "steady", f"steady-{number}", count, bundle, folder)
            rates["daemon, steady"].append(steady["rate"])
            # No patience: the controller stays in `fast`, adapting on every batch, for the whole run.
            patience = {"HOMEOSTAT_REGULATOR__PATIENCE_ROWS": str(10 * count)}
            fast = daemon_rate(broker.address, "drifted", f"fast-{number}", count, bundle, folder, **patience)
            rates["daemon, fast"].append(fast["rate"])
            fast_share.append(fast["fast"])
            print(f"round {number + 1}: " + ", ".join(f"{name} {found[-1]:,.0f}/s" for name, found in rates.items()))
    print(f"\n{count:,} JSON records of about 200 bytes, one partition, batches of 512, {arguments.rounds} rounds")
    print(f"{'':<16} {'records/s':>10} {'to bare loop':>13} {'worst':>7} {'best':>7}")
    for name, found in rates.items():
        ratios = [mine / bare for mine, bare in zip(found, rates["bare loop"], strict=True)]
        print(
            f"{name:<16} {statistics.median(found):>10,.0f} {statistics.median(ratios):>13.2f} "
            f"{min(ratios):>7.2f} {max(ratios):>7.2f}"
        )
    print(f"share of the time in state fast during 'daemon, fast': {statistics.median(fast_share):.0%}")


if __name__ == "__main__":
    main()
