"""What a reload changes, what it leaves, and that a wrong setting changes nothing."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import BaseModel

from daemon.config import variables
from daemon.logs import configure
from daemon.operating.live import LIVE, compare, is_live
from daemon.operating.reloading import NotReloadedError, reload
from daemon.service import Service
from daemon.settings import Settings
from tests.unit.worlds import MemorySource, records, worker


def test_every_name_that_may_change_is_a_variable() -> None:
    names = [variable.name.removeprefix("HOMEOSTAT_") for variable in variables()]
    for one in LIVE:
        assert any(name == one or (one.endswith("__") and name.startswith(one)) for name in names), one


def test_two_trees_are_compared_by_what_may_change() -> None:
    old = Settings()
    new = Settings.model_validate(
        {"log_level": "debug", "shed": 9.0, "batch_rows": 7, "slow": {"alpha": 0.01, "memory_rows": 5},
         "kafka": {"password": "s3cr3t"}, "fast": {"name": "auto", "lr": "3"}, "regulator": {"slew": 0.5}}
    )  # fmt: skip
    change = compare(old, new)
    assert change.live == [
        f"HOMEOSTAT_REGULATOR__SLEW=0.5 (was {old.regulator.slew})",
        "HOMEOSTAT_SLOW__ALPHA=0.01 (was 0.05)",
        "HOMEOSTAT_SHED=9.0 (was unset)",
        "HOMEOSTAT_LOG_LEVEL=debug (was info)",
    ]
    assert change.restart == [
        "HOMEOSTAT_BATCH_ROWS", "HOMEOSTAT_FAST", "HOMEOSTAT_SLOW__MEMORY_ROWS", "HOMEOSTAT_KAFKA__PASSWORD",
    ]  # fmt: skip
    kept = change.settings
    assert (kept.shed, kept.slow.alpha, kept.regulator.slew, kept.log_level) == (9.0, 0.01, 0.5, "debug")
    assert (kept.batch_rows, kept.slow.memory_rows) == (old.batch_rows, old.slow.memory_rows)
    assert kept.kafka == old.kafka and kept.fast == old.fast
    assert compare(new, new) == (new, [], [])


def test_no_secret_may_change_while_running_so_that_none_is_told() -> None:
    def leaves(section: Any, path: str) -> list[str]:
        names = (
            list(type(section).model_fields)
            if isinstance(section, BaseModel)
            else [item.name for item in dataclasses.fields(section)]
        )
        found = []
        for name in names:
            value = getattr(section, name)
            inner = isinstance(value, BaseModel) or dataclasses.is_dataclass(value)
            found += leaves(value, f"{path}{name}__") if inner else [f"{path}{name}".upper()]
        return found

    live = [name for name in leaves(Settings(), "") if is_live(name)]
    assert live and not [name for name in live if any(word in name for word in ("PASSWORD", "TOKEN", "FILE", "KEY"))]


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    file = tmp_path / "homeostat.env"
    file.write_text("")
    monkeypatch.setenv("HOMEOSTAT_ENV_FILE", str(file))
    run = worker(tmp_path, env_file=file)
    run.source = MemorySource(records(100))
    made = Service(run)
    made.start()
    return made


def again(service: Service, *lines: str) -> str:
    """Reload with these lines beside what the service runs with."""
    assert service.worker.settings.env_file is not None
    service.worker.settings.env_file.write_text("\n".join(lines))
    return reload(service)


def test_bounds_hold_from_the_next_batch_on(service: Service) -> None:
    told = again(
        service,
        "HOMEOSTAT_GUARD__DELTA=0.01",
        "HOMEOSTAT_REGULATOR__PATIENCE_ROWS=77",
        "HOMEOSTAT_REGULATOR__SETTLE_ROWS=99",
        "HOMEOSTAT_SLOW__STEPS=3",
        "HOMEOSTAT_SLOW__ALPHA=0.2",
        "HOMEOSTAT_SLOW__PRICE=0.5",
        "HOMEOSTAT_PROGRESS_TIMEOUT_S=9",
        "HOMEOSTAT_LINGER_MS=20",
        "HOMEOSTAT_OVERLOAD__LAG_S=7",
        "HOMEOSTAT_CHECKPOINT__EVERY_S=3",
    )
    assert "HOMEOSTAT_GUARD__DELTA=0.01 (was 0.001)" in told
    loop = service.worker.loop
    assert loop.monitor.fast_guard.limits.delta == loop.monitor.slow_guard.limits.delta == 0.01
    assert loop.regulator.band.patience_rows == 77 and loop.actions.limits.settle_rows == 99
    learner = loop.actions.learner
    assert (learner.bench.options.steps, learner.bench.alpha, learner.worth.price) == (3, 0.2, 0.5)
    assert service.progress.timeout_s == 9 and service.batcher.linger_s == 0.02
    assert service.pressure.overload.limits.lag_s == 7 and service.worker.settings.checkpoint.every_s == 3
    service.turn()
    assert service.done


def test_another_rate_of_false_alarms_holds_at_once_and_one_that_can_not_be_had_changes_nothing(
    service: Service,
) -> None:
    watch = service.worker.loop.monitor.watch
    service.turn()
    calibrated = [made.threshold for made in watch.detectors.values()]
    told = again(service, "HOMEOSTAT_DETECT__ARL0=20000")
    assert told.startswith("changed: HOMEOSTAT_DETECT__ARL0=20000.0 (was unset); needs a restart: HOMEOSTAT_SOURCE")
    assert all(made.threshold > before for made, before in zip(watch.detectors.values(), calibrated, strict=True))
    raised = [made.threshold for made in watch.detectors.values()]
    with pytest.raises(NotReloadedError, match=r"nothing is changed: HOMEOSTAT_DETECT__ARL0=100.0: .*calibrate anew"):
        again(service, "HOMEOSTAT_DETECT__ARL0=100", "HOMEOSTAT_SHED=3")
    assert [made.threshold for made in watch.detectors.values()] == raised and service.worker.settings.shed is None
    again(service)
    assert [made.threshold for made in watch.detectors.values()] == pytest.approx(calibrated)


def test_a_rate_that_could_not_be_had_at_the_start_is_no_reason_to_refuse_the_rest(service: Service) -> None:
    run = service.worker
    run.settings = run.settings.model_copy(update={"detect": run.settings.detect.model_copy(update={"arl0": 100.0})})
    told = again(service, "HOMEOSTAT_DETECT__ARL0=100", "HOMEOSTAT_SHED=3")
    assert told.startswith("changed: HOMEOSTAT_SHED=3.0 (was unset)") and run.settings.shed == 3


def test_a_wrong_setting_changes_nothing_and_is_told_with_its_line(service: Service) -> None:
    before = service.worker.settings
    with pytest.raises(NotReloadedError, match=r"nothing is changed: HOMEOSTAT_SLOW__ALPHA=7: .*line 2\)"):
        again(service, "HOMEOSTAT_SHED=3", "HOMEOSTAT_SLOW__ALPHA=7")
    assert service.worker.settings is before


def test_a_slow_loop_without_labels_is_not_switched_on(service: Service) -> None:
    loop = service.worker.loop
    loop.regulator.limits = dataclasses.replace(loop.regulator.limits, slow_enabled=False)
    again(service, "HOMEOSTAT_REGULATOR__SLEW=0.5")
    assert loop.regulator.limits.slew == 0.5 and not loop.regulator.limits.slow_enabled


def test_without_a_file_there_is_nothing_to_read_again(tmp_path: Path) -> None:
    service = Service(worker(tmp_path))
    with pytest.raises(NotReloadedError, match="HOMEOSTAT_ENV_FILE is not set"):
        reload(service)


def test_the_log_s_level_holds_for_loggers_that_have_logged_before(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    before = structlog.get_config()
    try:
        configure("info", "json")
        # A cached logger would keep this test's stream for all tests to come.
        structlog.configure(cache_logger_on_first_use=False)
        log = structlog.get_logger("homeostat.test").bind()
        log.debug("unheard")
        log.info("heard")
        again(service, "HOMEOSTAT_LOG_LEVEL=debug")
        log.debug("heard too")
        again(service, "HOMEOSTAT_LOG_LEVEL=error")
        log.warning("unheard again")
        heard = capsys.readouterr().err
        assert '"heard"' in heard and '"heard too"' in heard and "unheard" not in heard
    finally:
        structlog.configure(**before)
        logging.basicConfig(handlers=[], force=True)
