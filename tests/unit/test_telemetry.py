from __future__ import annotations

import numpy as np
from prometheus_client import CollectorRegistry

from daemon.regulator import State
from daemon.telemetry import ArrayHistogram, Telemetry

METRICS = {
    "homeostat_build": ("info", ()),
    "homeostat_records_in": ("counter", ()),
    "homeostat_records_out": ("counter", ()),
    "homeostat_records_rebuilt": ("counter", ()),
    "homeostat_records_skipped": ("counter", ()),
    "homeostat_records_invalid": ("counter", ("reason",)),
    "homeostat_labels": ("counter", ("result",)),
    "homeostat_label_queries": ("counter", ("why",)),
    "homeostat_batch_rows": ("histogram", ()),
    "homeostat_batch_seconds": ("histogram", ()),
    "homeostat_end_to_end_seconds": ("histogram", ()),
    "homeostat_adapt_seconds": ("histogram", ()),
    "homeostat_lag_records": ("gauge", ()),
    "homeostat_lag_seconds": ("gauge", ()),
    "homeostat_overload_step": ("gauge", ()),
    "homeostat_records_shed": ("counter", ()),
    "homeostat_state": ("gauge", ("state",)),
    "homeostat_state_seconds": ("counter", ("state",)),
    "homeostat_answered_rows": ("counter", ("by",)),
    "homeostat_frozen": ("gauge", ()),
    "homeostat_gain_ratio": ("gauge", ()),
    "homeostat_signal": ("gauge", ("signal",)),
    "homeostat_signal_deviation_ratio": ("gauge", ("signal",)),
    "homeostat_detector_statistic": ("gauge", ("signal",)),
    "homeostat_detector_threshold": ("gauge", ("signal",)),
    "homeostat_drifts": ("counter", ("kind", "signal")),
    "homeostat_shift": ("gauge", ("kind",)),
    "homeostat_early_warnings": ("counter", ("signal",)),
    "homeostat_slow_bursts": ("counter", ("result",)),
    "homeostat_bundle_changes": ("counter", ("result",)),
    "homeostat_slow_seconds": ("histogram", ()),
    "homeostat_version": ("gauge", ()),
    "homeostat_version_failures": ("counter", ()),
    "homeostat_error_ratio": ("gauge", ("model",)),
    "homeostat_guard_trips": ("counter", ("reason",)),
    "homeostat_guard_evidence": ("gauge", ("test",)),
    "homeostat_checkpoint_timestamp_seconds": ("gauge", ()),
    "homeostat_checkpoint_seconds": ("histogram", ()),
    "homeostat_checkpoint_failures": ("counter", ()),
    "homeostat_device_memory_bytes": ("gauge", ()),
    "homeostat_device_memory_limit_bytes": ("gauge", ()),
    "homeostat_progress_timestamp_seconds": ("gauge", ()),
    "homeostat_ready": ("gauge", ()),
}


def test_the_metrics_are_these_with_these_types_and_labels() -> None:
    families = list(Telemetry(["entropy"], ["entropy", "error"], ["entropy", "error"], ["entropy"]).registry.collect())
    found = {}
    for family in families:
        labels = {name for sample in family.samples for name in sample.labels if name != "le"}
        found[family.name] = (family.type, () if family.type == "info" else tuple(sorted(labels)))
        assert family.documentation.endswith(".") and family.samples, family.name
    assert found == METRICS


def test_an_array_is_counted_in_its_buckets() -> None:
    registry = CollectorRegistry()
    histogram = ArrayHistogram("rows", "Rows.", (1, 2, 4), registry)
    histogram.observe(np.array([0.5, 1, 2, 3, 100]))
    histogram.observe(4)
    histogram.observe([])
    buckets = {
        bound: registry.get_sample_value("rows_bucket", {"le": bound}) for bound in ("1.0", "2.0", "4.0", "+Inf")
    }
    assert buckets == {"1.0": 2, "2.0": 3, "4.0": 5, "+Inf": 6}
    assert registry.get_sample_value("rows_sum") == 110.5


def test_exactly_one_state_is_on() -> None:
    telemetry = Telemetry([], [], [])
    for state in (State.FAST, State.FAST, State.FALLBACK):
        telemetry.enter(state)
        on = [name for name, gauge in telemetry.in_state.items() if gauge._value.get()]
        assert on == [state]


def test_label_counters_never_go_down() -> None:
    telemetry = Telemetry([], [], [])
    telemetry.labels_seen(joined=5)
    telemetry.labels_seen(joined=3)
    assert telemetry.labels["joined"]._value.get() == 5
