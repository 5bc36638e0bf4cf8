"""`homeostat run`: the worker with its status line, its closing table and its report."""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from daemon.assembly import assemble
from daemon.logs import StatusLine, configure
from daemon.service import Service
from daemon.settings import Settings
from daemon.supervisor import Supervisor
from daemon.tracing.opening import CLOSE_S


def run(settings: Settings, *, max_records: int | None = None, report: Path | None = None) -> int:
    """Start, run, drain; returns the exit code.

    Raises:
        HomeostatError: when the start is refused.
    """
    status = StatusLine(sys.stderr)
    configure(settings.log_level, settings.log_format, status)
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # a watchdog's SIGABRT leaves behind where each thread stood
    worker = assemble(settings, progress=status.show)
    service = Service(worker, max_records=max_records)
    supervisor = Supervisor(service.progress.alive, lambda: service.ready()[1])
    try:
        service.start()
        # What is there by now stays: a collection that walks through all of torch would hold the answers up.
        gc.collect()
        gc.freeze()
        clock = _Clock(service)
        service.on_batch = lambda: clock.tick(status)
        code = service.run(begun=supervisor.ready)
        status.clear()
        summary = closing(service)
        print(table(summary), file=sys.stderr if settings.sink == "-" else sys.stdout, flush=True)
        if report is not None:
            report.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        return code
    finally:
        status.clear()
        service.close()
        worker.tracing.close(min(CLOSE_S, settings.drain_timeout_s))
        supervisor.close()


class _Clock:
    """Rate and status line, twice a second."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._shown = time.monotonic()
        self._last = service.worker.loop.tally.records

    def tick(self, status: StatusLine) -> None:
        """Show the line when it is due."""
        now = time.monotonic()
        if not status.active or now - self._shown < 0.5:
            return
        tally = self._service.worker.loop.tally
        rate = (tally.records - self._last) / (now - self._shown)
        self._last, self._shown = tally.records, now
        status.show(status_text(self._service, rate))


def status_text(service: Service, rate: float) -> str:
    """Records, rate, state, recent served and frozen accuracy, drifts: what an operator glances at."""
    loop = service.worker.loop
    errors = {name: level.value for name, level in loop.monitor.errors.items()}

    def shown(error: float) -> str:
        if error != error:
            return "  -  "
        return f"{1 - error:.3f}" if loop.task == "classification" else f"{error:.4f}"

    what = "accuracy" if loop.task == "classification" else "error"
    # What matters most comes first: a terminal of 80 columns cuts the rest.
    return (
        f"{loop.tally.records:>9,} records {rate:>7,.0f}/s {loop.regulator.state.value:<8} "
        f"{what} {shown(errors['served'])} frozen {shown(errors['frozen'])} drifts {loop.tally.drifts} "
        f"version {loop.resident.current.number} gain {loop.resident.adapter.gain:4.2f} trips {loop.tally.guard_trips}"
    )


def closing(service: Service) -> dict[str, Any]:
    """The report: what was read, how well it was answered, what was done about it.

    The rate counts from the first record on: joining a consumer group is no work.
    """
    worker = service.worker
    seconds = 0.0 if service.first_at is None else time.monotonic() - service.first_at
    summary = worker.loop.tally.report()
    summary |= {
        "state": worker.loop.regulator.state.value,
        "version": {"number": worker.loop.resident.current.number, **summary["version"]},
        "bursts": {name: int(child._value.get()) for name, child in worker.telemetry.bursts.items()},
        "seconds_in_state": worker.telemetry.seconds_in_state(),
        "seconds": round(seconds, 3),
        "records_per_second": round(service.done / seconds, 1) if seconds > 0 else 0.0,
        "positions": dict(worker.loop.positions),
        "config": {"fast": worker.settings.fast.name, "slow": worker.settings.slow.name, "bundle": worker.bundle.hash},
    }
    return summary


def table(summary: dict[str, Any]) -> str:
    """The closing table."""

    def error(name: str) -> str:
        value, rows = summary[name]["error"], summary[name]["rows"]
        return "no labels" if value is None else f"{value:.4f}  (mean loss over {rows:,} labelled rows)"

    states = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["seconds_in_state"].items() if seconds)
    bursts = ", ".join(f"{count} {name}" for name, count in summary["bursts"].items() if count) or "none"
    rows = [
        ("records", f"{summary['records']:,}  ({summary['invalid']} invalid, {summary['dead']} dead letters)"),
        ("rate", f"{summary['records_per_second']:,.0f} records/s over {summary['seconds']:.1f} s"),
        ("served error", error("served")),
        ("frozen error", error("frozen")),
        ("drifts", str(summary["drifts"])),
        ("bursts", bursts),
        ("versions", f"{summary['versions']} promoted, version {summary['version']['number']} serves"),
        ("guard trips", str(summary["guard_trips"])),
        ("seconds in state", states),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
