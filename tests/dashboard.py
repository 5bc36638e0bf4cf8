"""The Grafana dashboard, made from a list of panels: ``python -m tests.dashboard`` writes it to deploy/grafana.

What a panel says about a metric is the metric's own help text, so that the two can't differ.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.telemetry import Telemetry

DASHBOARD = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "homeostat.json"
WHERE = 'job="$job",instance=~"$instance"'
"""Matches what the dashboard's variables choose."""
COLUMNS, HEIGHT = 24, 8


@dataclass(frozen=True)
class Panel:
    """One picture. In ``queries``, legend and PromQL, ``WHERE`` stands in each selector as ``@``."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    width: int = 8
    kind: str = "timeseries"


def _rate(metric: str, by: str) -> tuple[str, str]:
    return f"{{{{{by}}}}}", f"sum by (instance, {by}) (rate({metric}{{@}}[$__rate_interval]))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Is it well?": (
        Panel("Ready", "bool_yes_no", (("{{instance}}", "homeostat_ready{@}"),), 4, "stat"),
        Panel(
            "Since progress", "s", (("{{instance}}", "time() - homeostat_progress_timestamp_seconds{@}"),), 4, "stat"
        ),
        Panel("Version served", "none", (("{{instance}}", "homeostat_version{@}"),), 4, "stat"),
        Panel("Frozen", "bool_yes_no", (("{{instance}}", "homeostat_frozen{@}"),), 4, "stat"),
        Panel("State", "none", (("{{state}}", "homeostat_state{@} == 1"),), 8, "state-timeline"),
    ),
    "How well does it answer?": (
        Panel("Error by model", "percentunit", (("{{model}}", "homeostat_error_ratio{@}"),), 12),
        Panel(
            "Signals, in bands",
            "none",
            (("{{signal}}", "homeostat_signal_deviation_ratio{@}"), ("bound", "vector(1)")),
            12,
        ),
        Panel("Drifts", "short", (("{{signal}}, {{kind}}", "increase(homeostat_drifts_total{@}[$__rate_interval])"),)),
        Panel("Kind of shift", "none", (("{{kind}}", "homeostat_shift{@} == 1"),), 8, "state-timeline"),
        Panel("Answered by", "rowsps", (_rate("homeostat_answered_rows_total", "by"),)),
        Panel("Levels of signals", "none", (("{{signal}}", "homeostat_signal{@}"),)),
        Panel(
            "Detectors against their thresholds",
            "none",
            (("{{signal}}", "homeostat_detector_statistic{@} / (homeostat_detector_threshold{@} > 0)"),),
        ),
        Panel("Gain", "percentunit", (("{{instance}}", "homeostat_gain_ratio{@}"),)),
    ),
    "What does the slow loop do?": (
        Panel("Bursts", "short", (("{{result}}", "increase(homeostat_slow_bursts_total{@}[$__rate_interval])"),)),
        Panel(
            "Seconds of a burst",
            "s",
            (("mean", "rate(homeostat_slow_seconds_sum{@}[1h]) / rate(homeostat_slow_seconds_count{@}[1h])"),),
        ),
        Panel("Labels", "rowsps", (_rate("homeostat_labels_total", "result"),)),
        Panel("Bundles", "short", (("{{result}}", "increase(homeostat_bundle_changes_total{@}[$__rate_interval])"),)),
        Panel("Guard trips", "short", (("{{reason}}", "increase(homeostat_guard_trips_total{@}[$__rate_interval])"),)),
        Panel("Evidence of harm, log10", "none", (("{{test}}", "homeostat_guard_evidence{@}"),)),
        Panel("Labels asked for", "rowsps", (_rate("homeostat_label_queries_total", "why"),)),
    ),
    "Does it keep up?": (
        Panel(
            "Records",
            "rowsps",
            (
                ("in", "rate(homeostat_records_in_total{@}[$__rate_interval])"),
                ("out", "rate(homeostat_records_out_total{@}[$__rate_interval])"),
            ),
        ),
        Panel(
            "End to end",
            "s",
            tuple(
                (
                    f"p{share}",
                    f"histogram_quantile(0.{share}, rate(homeostat_end_to_end_seconds_bucket{{@}}[$__rate_interval]))",
                )
                for share in (50, 99)
            ),
        ),
        Panel("Lag", "s", (("{{instance}}", "homeostat_lag_seconds{@}"),)),
        Panel("Lag, records", "short", (("{{instance}}", "homeostat_lag_records{@}"),)),
        Panel("What gives way under load", "none", (("{{instance}}", "homeostat_overload_step{@}"),)),
        Panel(
            "Seconds of a batch",
            "s",
            (("p99", "histogram_quantile(0.99, rate(homeostat_batch_seconds_bucket{@}[$__rate_interval]))"),),
        ),
    ),
    "Is anything lost?": (
        Panel("Records that can't be answered", "rowsps", (_rate("homeostat_records_invalid_total", "reason"),)),
        Panel(
            "Left out",
            "short",
            (
                ("skipped", "increase(homeostat_records_skipped_total{@}[$__rate_interval])"),
                ("shed", "increase(homeostat_records_shed_total{@}[$__rate_interval])"),
                ("read again", "increase(homeostat_records_rebuilt_total{@}[$__rate_interval])"),
            ),
        ),
        Panel(
            "Age of the checkpoint",
            "s",
            (("{{instance}}", "time() - (homeostat_checkpoint_timestamp_seconds{@} > 0)"),),
        ),
        Panel(
            "What could not be written",
            "short",
            (
                ("checkpoints", "increase(homeostat_checkpoint_failures_total{@}[$__rate_interval])"),
                ("versions", "increase(homeostat_version_failures_total{@}[$__rate_interval])"),
            ),
        ),
        Panel(
            "Memory",
            "bytes",
            (("in use", "homeostat_device_memory_bytes{@}"), ("there is", "homeostat_device_memory_limit_bytes{@}")),
        ),
        Panel(
            "Early warnings",
            "short",
            (("{{signal}}", "increase(homeostat_early_warnings_total{@}[$__rate_interval])"),),
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """As Grafana (10 and later) imports it."""
    panels: list[dict[str, Any]] = []
    texts, top = _texts(), 0
    for title, row in ROWS.items():
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
             "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top}}
        )  # fmt: skip
        top, left = top + 1, 0
        for panel in row:
            if left + panel.width > COLUMNS:
                top, left = top + HEIGHT, 0
            place = {"h": HEIGHT, "w": panel.width, "x": left, "y": top}
            panels.append(_panel(len(panels) + 1, panel, place, texts))
            left += panel.width
        top += HEIGHT
    return {
        "uid": "homeostat", "title": "homeostat", "tags": ["homeostat"], "schemaVersion": 39, "version": 1,
        "editable": True, "refresh": "10s", "time": {"from": "now-6h", "to": "now"}, "timezone": "browser",
        "templating": {"list": [
            _datasource(),
            _variable("job", "label_values(homeostat_ready, job)", several=False),
            _variable("instance", 'label_values(homeostat_ready{job="$job"}, instance)', several=True),
        ]},
        "annotations": {"list": [_drifts()]},
        "panels": panels,
    }  # fmt: skip


def _panel(number: int, panel: Panel, place: dict[str, int], texts: dict[str, str]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    queries = [
        {"refId": chr(ord("A") + at), "expr": query.replace("@", WHERE), "legendFormat": legend, "datasource": source}
        for at, (legend, query) in enumerate(panel.queries)
    ]
    named = dict.fromkeys(name for _, query in panel.queries for name in re.findall(r"homeostat_\w+", query))
    told = dict.fromkeys(texts[name] for name in named)
    return {
        "id": number, "type": panel.kind, "title": panel.title, "description": "\n".join(told), "datasource": source,
        "gridPos": place, "targets": queries, "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {},
    }  # fmt: skip


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(name: str, query: str, *, several: bool) -> dict[str, Any]:
    return {
        "name": name, "type": "query", "query": query, "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "refresh": 2, "includeAll": several, "multi": several,
    }  # fmt: skip


def _drifts() -> dict[str, Any]:
    """Marks on every picture: alarms."""
    return {
        "name": "drifts", "enable": True, "iconColor": "orange", "titleFormat": "drift: {{signal}}, {{kind}}",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "expr": f"increase(homeostat_drifts_total{{{WHERE}}}[$__interval]) > 0",
    }  # fmt: skip


def _texts() -> dict[str, str]:
    """By a sample's name its metric's help text."""
    signals = ["entropy", "error"]
    registry = Telemetry(signals, signals, signals, signals).registry
    return {sample.name: family.documentation for family in registry.collect() for sample in family.samples}


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.parent.mkdir(parents=True, exist_ok=True)
    DASHBOARD.write_text(text(), encoding="utf-8")
    print(f"{DASHBOARD.name}: {sum(len(row) for row in ROWS.values())} panels")
