"""Traces by their settings: off, passed on, on; and what is said where they can't be."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from daemon.assembly import Worker, assemble
from daemon.config import RESERVED, load_settings
from daemon.errors import SettingsError
from daemon.loop import Loop
from daemon.records import RawBatch
from daemon.seldom import Seldom, by_place
from daemon.settings import Settings
from daemon.streams.base import SplitSink
from daemon.tracing import exporting
from daemon.tracing.loops import PassingLoop, TracedLoop
from daemon.tracing.opening import tracing_of
from tests.unit.test_traces import HeaderMemory, context
from tests.unit.worlds import MemorySink, raw, records, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_") or (name.startswith("HOMEOSTAT_") and name not in RESERVED):
            monkeypatch.delenv(name)


def worker(folder: Path, mode: str) -> Worker:
    made = assemble(settings(folder, traces={"mode": mode}))
    made.sink = made.loop.sink = HeaderMemory()
    return made


def headed() -> RawBatch:
    made = raw(records(3))
    made.headers = {("mem/0", 1): [*context(1), ("tracestate", b"a=1"), ("baggage", b"k=v"), ("mine", b"x")]}
    return made


def test_the_short_form_switches_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().traces.mode == "off"
    monkeypatch.setenv("HOMEOSTAT_TRACES", "pass")
    assert load_settings().traces.mode == "pass"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TRACES", "maybe", "'off', 'pass' or 'on'"),
        ("TRACES__SAMPLE_RATIO", "2", "less than or equal to 1"),
        ("TRACES__RECORD_SPANS", "-1", "greater than or equal to 0"),
        ("TRACES__ENDPOINT", "collector:4318", "right would be one like http://127.0.0.1:4318"),
        ("TRACES__ENDPOINT", "http://", "right would be one like http://127.0.0.1:4318"),
        ("TRACES__ENDPOINT", "http://h:x", "right would be one like http://127.0.0.1:4318"),
        ("TRACES__ENDPOINT", "http://h/?a=b", "no place here"),
        ("TRACES__ENDPOINT", "https://me:hunter2@h", "OTEL_EXPORTER_OTLP_HEADERS"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(f"HOMEOSTAT_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    (line,) = caught.value.problems
    assert said in line and "hunter2" not in line and "\n" not in line


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("", None),
        ("http://h:4318", "http://h:4318/v1/traces"),
        ("https://h/otlp/", "https://h/otlp/v1/traces"),
        ("http://h/v1/traces", "http://h/v1/traces"),
    ],
)
def test_the_path_is_added_to_the_collectors_address(given: str, url: str | None) -> None:
    assert Settings(traces={"endpoint": given}).traces.url == url


def test_off_is_the_plain_loop_which_reads_no_header(tmp_path: Path) -> None:
    made = worker(tmp_path, "off")
    made.loop.process(headed())
    assert type(made.loop) is Loop and made.sink.headers == [None] * 3


def test_off_imports_nothing_of_opentelemetry_and_pass_neither(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tests.unit.worlds import raw, records, worker
for mode in ("off", "pass"):
    made = worker(Path(sys.argv[1]) / mode, traces={"mode": mode})
    made.loop.process(raw(records(3)))
    made.tracing.close(1.0)
sys.exit(any(name.partition(".")[0] == "opentelemetry" for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_pass_carries_the_context_over_unchanged_and_nothing_else(tmp_path: Path) -> None:
    made = worker(tmp_path, "pass")
    made.loop.process(headed())
    assert type(made.loop) is PassingLoop
    (row,) = [found for found in made.sink.headers if found]
    assert list(row) == [context(1)[0], ("tracestate", b"a=1"), ("baggage", b"k=v")]
    assert made.sink.headers.index(row) == 1


def test_a_sink_without_headers_gets_its_answers_as_ever(tmp_path: Path) -> None:
    made = worker(tmp_path, "pass")
    made.loop.sink = MemorySink()
    made.loop.process(headed())
    split = SplitSink(MemorySink(), MemorySink())
    made.loop.sink = split
    made.loop.process(headed())
    assert not split.takes_headers and len(split.sinks[0].values) == 3


def test_a_split_sink_hands_headers_to_the_answers_sink(tmp_path: Path) -> None:
    made = worker(tmp_path, "pass")
    answers = HeaderMemory()
    made.loop.sink = SplitSink(answers, MemorySink())
    made.loop.process(headed())
    assert [bool(found) for found in answers.headers] == [False, True, False]


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.exporter.otlp.proto.http"])
def test_without_the_extra_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if name.startswith((missing, "daemon.tracing.exporting"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SettingsError) as caught:
        tracing_of(settings(tmp_path, traces={"mode": "on"}))
    (line,) = caught.value.problems
    assert line.startswith("HOMEOSTAT_TRACES=on: ") and line.endswith("run: pip install homeostat[otel]")


def test_the_variables_of_opentelemetry_count_where_ours_are_unset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://elsewhere:1")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "line-7")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=plant")
    theirs = worker(tmp_path / "a", "on")
    ours = assemble(settings(tmp_path / "b", traces={"mode": "on", "sample_ratio": 0.5, "endpoint": "http://here:2"}))
    assert isinstance(theirs.tracing, exporting.Traced) and isinstance(ours.tracing, exporting.Traced)
    assert type(theirs.loop) is TracedLoop
    for tracing, url in ((theirs.tracing, "http://elsewhere:1/v1/traces"), (ours.tracing, "http://here:2/v1/traces")):
        provider = tracing._provider
        assert provider is not None and tracing._exporter is not None
        assert tracing._exporter._endpoint == url
        attributes = provider.resource.attributes
        assert attributes["service.name"] == "line-7" and attributes["deployment.environment.name"] == "plant"
        assert attributes["homeostat.bundle"] == theirs.bundle.hash
    assert isinstance(theirs.tracing._provider.sampler, TraceIdRatioBased)
    assert theirs.tracing._provider.sampler.rate == 0.25
    assert isinstance(ours.tracing._provider.sampler, ParentBased)
    for made in (theirs, ours):
        made.tracing.close(5.0)


def test_a_variable_that_the_sdk_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")
    with pytest.raises(SettingsError, match="HOMEOSTAT_TRACES=on: a variable of OpenTelemetry can't be used"):
        assemble(settings(tmp_path, traces={"mode": "on"}))


def test_the_sdks_own_switch_turns_them_off_and_context_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    made = worker(tmp_path, "on")
    made.loop.process(headed())
    assert made.sink.headers[1][0] == context(1)[0] and made.loop.exemplar is None
    made.tracing.close(5.0)


def passed(monkeypatch: pytest.MonkeyPatch) -> list[logging.LogRecord]:
    found: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger(), "handle", found.append)
    return found


def test_a_complaint_passes_once_a_minute_whatever_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    now, found = [0.0], passed(monkeypatch)
    log = Seldom(by_place, lambda: now[0])
    for second in range(150):
        now[0] = float(second)
        log.handle(logging.LogRecord("sdk", logging.WARNING, "f", 7, "at 0x%x", (second * 7919,), None))
    log.handle(logging.LogRecord("sdk", logging.INFO, "f", 8, "never", (), None))
    assert len([record for record in found if record.levelno == logging.WARNING]) == 3
    assert "(59 more like this since the last one)" in found[1].getMessage()


def test_what_the_sdk_says_of_headers_does_not_tell_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = passed(monkeypatch)
    record = logging.LogRecord("opentelemetry.util.re", logging.WARNING, "f", 1, "wrong: %s", ("token=hunter2",), None)
    exporting._SdkLog().handle(record)
    assert len(found) == 1 and "hunter2" not in found[0].getMessage()


def test_closing_twice_or_before_the_beginning_is_allowed(tmp_path: Path) -> None:
    made = worker(tmp_path, "on")
    tracing = tracing_of(made.settings)
    tracing.close(1.0)
    made.tracing.close(5.0)
    made.tracing.close(5.0)
