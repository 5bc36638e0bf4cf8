"""The bare loop of `make bench-kafka`: what a team writes around kafka-python without homeostat.

Poll, decode, forward, the same answer bytes, produce. Every ten seconds, as often as the daemon writes a checkpoint,
it flushes and commits: at least once. Runs until SIGTERM: ``python -m tests.benchmarks.kafka_bare '{...}'``.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

COMMIT_S = 10.0
BATCH_ROWS = 512


class Job:
    """What every subject does with records: the model's answers as bytes, one thread of torch."""

    def __init__(self, bundle: str, factory: str, codec: str) -> None:
        import torch

        torch.set_num_threads(1)
        self._torch = torch
        self._model, self._shape = load(bundle, factory)
        self._decode = self._raw if codec == "raw" else self._json
        self._json_decode = msgspec.json.Decoder().decode
        self._encode = msgspec.json.Encoder().encode

    def _raw(self, values: Sequence[bytes]) -> np.ndarray:
        return np.frombuffer(bytearray().join(values), "<f4").reshape(len(values), *self._shape)

    def _json(self, values: Sequence[bytes]) -> np.ndarray:
        return np.asarray([self._json_decode(value)["x"] for value in values], np.float32)

    def answers(self, keys: Sequence[bytes], values: Sequence[bytes]) -> list[bytes]:
        """One answer per record, in the daemon's own words."""
        x = self._torch.from_numpy(self._decode(values))
        with self._torch.inference_mode():
            confidence, classes = self._model(x).softmax(1).max(1)
        rounded = np.round(confidence.numpy().astype(np.float64), 4).tolist()
        encode = self._encode
        return [
            encode({"id": key.decode(), "status": "ok", "y": y, "version": 0, "state": "steady", "confidence": share})
            for key, y, share in zip(keys, classes.tolist(), rounded, strict=True)
        ]


def load(bundle: str, factory: str) -> tuple[Any, list[int]]:
    """The bundle's model in eval mode, by torch and safetensors alone, and the shape of a row."""
    import importlib
    from pathlib import Path

    from safetensors.torch import load_file

    module, _, name = factory.partition(":")
    model = getattr(importlib.import_module(module), name)()
    model.load_state_dict(load_file(Path(bundle) / "model.safetensors"))
    shape: list[int] = json.loads((Path(bundle) / "manifest.json").read_text())["input_shape"]
    return model.eval(), shape


def stop_on_sigterm() -> threading.Event:
    """Set once this process is asked to end."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop


def run(address: str, topic: str, out: str, group: str, job: Job) -> None:
    """Until SIGTERM."""
    from kafka import KafkaConsumer, KafkaProducer

    stop = stop_on_sigterm()
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=address,
        group_id=group,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        metrics_enabled=False,
        fetch_max_wait_ms=100,
    )
    producer = KafkaProducer(bootstrap_servers=address, linger_ms=5, batch_size=65_536, metrics_enabled=False)
    committed_at = time.monotonic()
    while not stop.is_set():
        for records in consumer.poll(timeout_ms=100, max_records=BATCH_ROWS).values():
            keys = [record.key for record in records]
            for key, answer in zip(keys, job.answers(keys, [record.value for record in records]), strict=True):
                producer.send(out, answer, key)
        if time.monotonic() - committed_at > COMMIT_S:
            producer.flush()
            consumer.commit()
            committed_at = time.monotonic()
    producer.flush()
    consumer.commit()
    consumer.close()
    producer.close()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    work = Job(given["bundle"], given["factory"], given["codec"])
    run(given["address"], given["topic"], given["out"], given["group"], work)
