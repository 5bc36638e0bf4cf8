"""`make bench-http`: how long a scrape, and the page's numbers, wait while the loop is busy.

The daemon answers the simulator as fast as it can, so that the loop never rests; beside it each path is asked again and
again. Wanted: 50 ms.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.daemon_process import DaemonProcess, eventually

PATHS = ("/metrics", "/state", "/healthz")
BATCHES = (32, 512, 4_096)
ASKED = 200


def waits(port: int, path: str) -> list[float]:
    """Milliseconds of each answer."""
    found = []
    for _ in range(ASKED):
        started = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            answer.read()
        found.append((time.perf_counter() - started) * 1000)
    return found


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| batch | records/s | path | p50 ms | p95 ms | p99 ms |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for rows in BATCHES:
            settings = {
                "HOMEOSTAT_SOURCE": "sim://ageing?rate=10000000",
                "HOMEOSTAT_STATE_DIR": f"{folder}/state",
                "HOMEOSTAT_BATCH_ROWS": str(rows),
                "HOMEOSTAT_LOG_LEVEL": "error",
            }
            with DaemonProcess(settings, Path(folder)) as daemon:
                eventually("it is ready", lambda daemon=daemon: daemon.get("/readyz")[0] == 200, 300)
                for path in PATHS:
                    before, started = daemon.metrics()["homeostat_records_in_total"], time.perf_counter()
                    found = sorted(waits(daemon.port, path))
                    rate = (daemon.metrics()["homeostat_records_in_total"] - before) / (time.perf_counter() - started)
                    cuts = statistics.quantiles(found, n=100)
                    figures = " | ".join(f"{value:.1f}" for value in (statistics.median(found), cuts[94], cuts[98]))
                    print(f"| {rows} | {rate:,.0f} | `{path}` | {figures} |", flush=True)


if __name__ == "__main__":
    main()
