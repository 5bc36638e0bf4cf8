"""`homeostat simulate`: the simulated stream as JSON records on any sink, its labels late on another."""

from __future__ import annotations

import sys
import time

import msgspec

from daemon.config import load_settings
from daemon.streams import open_sink
from daemon.streams.simsource import EPOCH_S, SimOptions
from daemon.streams.simulator import AgeingArray

CHUNK = 256


def simulate(to: str, labels_to: str, records: int, rate: float, seed: int) -> int:
    """Write ``records`` rows to ``to`` and each row's label to ``labels_to``, 200 rows later; returns 0.

    Raises:
        HomeostatError: when a sink can't be opened or written.
    """
    settings = load_settings()
    delay = SimOptions.parse("sim://ageing").label_delay
    array = AgeingArray(seed)
    encode = msgspec.json.Encoder().encode
    data = open_sink(to, dead_letters_url="null:", variable="--to", kafka=settings.kafka)
    labels = None
    if labels_to:
        labels = open_sink(labels_to, dead_letters_url="null:", variable="--labels-to", kafka=settings.kafka)
    data.open()
    if labels is not None:
        labels.open()
    started = time.monotonic()
    try:
        # Labels trail the rows, so that on a live topic each comes after its record.
        for start in range(0, records + delay, CHUNK):
            count = max(0, min(CHUNK, records - start))
            if count:
                x, _ = array.rows(start, count)
                values = [
                    encode({"id": str(row), "x": x[row - start].tolist(), "ts": EPOCH_S + row})
                    for row in range(start, start + count)
                ]
                data.send([None] * count, values)
            first, last = max(0, start - delay), min(records, start + CHUNK - delay)
            if labels is not None and last > first:
                _, y = array.rows(first, last - first)
                late = [
                    encode({"id": str(row), "y": int(y[row - first]), "ts": EPOCH_S + row + delay})
                    for row in range(first, last)
                ]
                labels.send([None] * len(late), late)
            if rate and count:
                time.sleep(max(0.0, started + (start + count) / rate - time.monotonic()))
        data.flush(60.0)
        if labels is not None:
            labels.flush(60.0)
    finally:
        data.close()
        if labels is not None:
            labels.close()
    print(f"{records} records written to {to}" + (f", labels to {labels_to}" if labels_to else ""), file=sys.stderr)
    return 0
