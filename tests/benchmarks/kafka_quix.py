"""The job of `make bench-kafka` on Quix Streams, at least once or exactly once, until SIGTERM.

Two forms. ``batches``: a `BatchingSink`, Quix's own way to work on many records at once; it is handed what came since
the last checkpoint, and writes the answers through a producer of its own. ``records``: `StreamingDataFrame.apply` and
`to_topic`, one forward pass a record; with exactly-once it is the only form, since a sink's own producer takes no part
in Quix's transactions. Its count windows are no way to batch: they are kept by key, through RocksDB.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.benchmarks.kafka_bare import BATCH_ROWS, Job

BATCH_COMMIT = {"commit_every": 4_096, "commit_interval": 0.01}
"""A sink gets its batch at a checkpoint, so checkpoints are frequent: the waiting time is the interval."""
RECORD_COMMIT_S = 10.0
"""As the daemon and the bare loop."""
TRANSACTION_S = 0.1
"""As the daemon's HOMEOSTAT_KAFKA__TRANSACTION_MS."""


def application(given: dict[str, Any], **more: Any) -> Any:
    """A Quix application on the broker, with the linger that every subject has."""
    from quixstreams import Application

    return Application(
        broker_address=given["address"],
        consumer_group=given["group"],
        auto_offset_reset="earliest",
        producer_extra_config={"linger.ms": 5},
        consumer_poll_timeout=0.1,
        auto_create_topics=False,
        state_dir=given["state"],
        loglevel="WARNING",
        **more,
    )


def batching_sink(address: str, out: str, job: Job) -> Any:
    """A sink that answers batch by batch; its records are acknowledged before Quix commits."""
    from confluent_kafka import Producer
    from quixstreams.sinks import BatchingSink

    class Answers(BatchingSink):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._producer = Producer(
                {"bootstrap.servers": address, "linger.ms": 5, "enable.idempotence": True,
                 "queue.buffering.max.messages": 1_000_000}
            )  # fmt: skip
            self._refused: list[str] = []

        def _delivered(self, error: Any, message: Any) -> None:
            if error is not None:
                self._refused.append(str(error))

        def write(self, batch: Any) -> None:
            produce, delivered = self._producer.produce, self._delivered
            for chunk in batch.iter_chunks(BATCH_ROWS):
                keys = [item.key for item in chunk]
                for key, answer in zip(keys, job.answers(keys, [item.value for item in chunk]), strict=True):
                    produce(out, answer, key, on_delivery=delivered)
                self._producer.poll(0)
            # Ends the linger of what is left.
            if self._producer.flush(30) or self._refused:
                raise RuntimeError(f"answers not delivered: {self._refused[:1]}")

    return Answers()


def run(given: dict[str, Any]) -> None:
    """Until SIGTERM, which Quix handles itself."""
    job = Job(given["bundle"], given["factory"], given["codec"])
    if given["form"] == "batches":
        app = application(given, **BATCH_COMMIT)
    elif given["exactly_once"]:
        app = application(given, commit_interval=TRANSACTION_S, processing_guarantee="exactly-once")
    else:
        app = application(given, commit_interval=RECORD_COMMIT_S)
    plain = {"key_deserializer": "bytes", "value_deserializer": "bytes"}
    stream = app.dataframe(app.topic(given["topic"], **plain))
    if given["form"] == "batches":
        stream.sink(batching_sink(given["address"], given["out"], job))
    else:
        answers = job.answers
        stream = stream.apply(lambda value, key, time, headers: answers([key], [value])[0], metadata=True)
        stream.to_topic(app.topic(given["out"], key_serializer="bytes", value_serializer="bytes"))
    app.run()


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
