"""A new bundle takes over while records are answered: after a comparison, between two batches, with nothing lost."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from daemon import checkpoint
from daemon.bundle import read_manifest
from daemon.errors import HomeostatError
from daemon.operating.reloading import NotReloadedError, reload
from daemon.packing import pack
from daemon.service import Service
from daemon.succession import check_fits
from tests.unit.worlds import FACTORY, MemorySink, MemorySource, build, bundle, records, source_rows, worker

ROWS = 300


@functools.cache
def _packed(good: bool) -> Path:
    """A bundle of the same model, or of a spoilt one; packed once a session."""
    folder = Path(tempfile.mkdtemp(prefix="homeostat-next-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    x, y = source_rows(600)
    model = build() if good else spoilt(0.0)
    pack(folder / "next", model=model, factory=FACTORY, x=x, y=y, task="classification", arl0=5_000, watch=("cusum",))
    return folder / "next"


def packed(folder: Path, *, good: bool = True) -> Path:
    return Path(shutil.copytree(_packed(good), folder))


def spoilt(value: float) -> nn.Module:
    """The model with its last layer set to ``value``."""
    model = build()
    with torch.no_grad():
        model[3].weight.fill_(value)  # type: ignore[union-attr,operator]
    return model


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "homeostat.env"
    path.write_text("")
    for name, value in {"ENV_FILE": path, "FACTORY": FACTORY, "BUNDLE_ROWS": ROWS}.items():
        monkeypatch.setenv(f"HOMEOSTAT_{name}", str(value))
    return path


@pytest.fixture
def service(tmp_path: Path, file: Path) -> Iterator[Service]:
    made = worker(tmp_path, env_file=file, bundle_rows=ROWS)
    made.source = MemorySource(records(4_000, labelled=True))
    running = Service(made)
    running.start()
    yield running
    running.close()


def ask(service: Service, file: Path, path: Path, *more: str) -> str:
    file.write_text("\n".join([f"HOMEOSTAT_BUNDLE={path}", *more]))
    told = reload(service)
    thread = service.succession._thread
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()
    return told


def until_decided(service: Service) -> dict[str, object]:
    """Answer batches until the bundle is taken or refused; returns the journal's entry."""
    for _ in range(100):
        service.turn()
        if service.succession._settings is None:
            break
    journal = (service.worker.settings.state_dir / "versions" / "decisions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in journal if '"bundle"' in line][-1]["record"]


def answered(service: Service) -> list[str]:
    sink = service.worker.sink
    assert isinstance(sink, MemorySink)
    return [answer["id"] for answer in sink.answers]


def test_a_bundle_that_is_no_worse_takes_over_and_no_record_is_missed(
    service: Service, file: Path, tmp_path: Path
) -> None:
    loop, before = service.worker.loop, service.worker.bundle.hash
    for _ in range(20):
        service.turn()
    old = loop.resident
    path = packed(tmp_path / "next")
    told = ask(service, file, path, "HOMEOSTAT_DETECT__ARL0=5000")
    assert f"{path} is being loaded" in told and "HOMEOSTAT_BUNDLE" not in told.replace("HOMEOSTAT_BUNDLE_ROWS", "")
    found = until_decided(service)
    assert found["result"] == "taken" and found["before"] == before
    assert int(str(found["rows"])) >= ROWS and found["agreement"] == 1.0 and int(str(found["labels"])) > 0
    assert service.worker.loop is loop and loop.resident is not old
    assert service.worker.bundle.hash == read_manifest(path).hash != before
    assert service.worker.settings.detect.arl0 == 5_000
    answers = service.done
    for _ in range(20):
        service.turn()
    assert service.done > answers and answered(service) == [str(row) for row in range(service.done)]
    assert service.worker.telemetry.bundles["taken"]._value.get() == 1


def test_a_restart_goes_on_with_the_new_bundle_from_its_own_checkpoint(
    service: Service, file: Path, tmp_path: Path
) -> None:
    path = packed(tmp_path / "next")
    ask(service, file, path)
    assert until_decided(service)["result"] == "taken"
    newest = checkpoint.Store(tmp_path / "state/checkpoints").newest()
    assert newest is not None and newest.positions == {"mem/0": service.done - 32}
    service.close()
    again = worker(tmp_path, bundle=path)
    assert again.config_hash == newest.config_hash
    again.load_state_dict(newest.state)


def test_one_that_is_shown_to_be_worse_is_refused_and_the_old_one_answers_on(
    service: Service, file: Path, tmp_path: Path
) -> None:
    resident = service.worker.loop.resident
    ask(service, file, packed(tmp_path / "next", good=False))
    found = until_decided(service)
    assert found["result"] == "refused" and "its error is" in str(found["reason"])
    assert service.worker.loop.resident is resident and service.worker.loop.shadow is None
    assert service.worker.settings.bundle == bundle("classification")
    service.turn()
    assert answered(service) == [str(row) for row in range(service.done)]


def test_one_that_answers_what_is_not_finite_is_refused(service: Service, file: Path, tmp_path: Path) -> None:
    path = packed(tmp_path / "next")
    ask(service, file, path)
    service.turn()
    shadow = service.worker.loop.shadow
    assert shadow is not None
    with torch.no_grad():
        next(shadow.resident.frozen.parameters()).fill_(float("nan"))
    assert until_decided(service)["reason"] == "it failed, or answered what is not finite"


def test_one_that_fails_is_refused_and_ends_nothing(
    service: Service, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(service, file, packed(tmp_path / "next"))
    service.turn()
    shadow = service.worker.loop.shadow
    assert shadow is not None

    def fails(x: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(shadow.resident, "measure_frozen", fails)
    assert until_decided(service)["result"] == "refused"
    service.turn()
    assert answered(service) == [str(row) for row in range(service.done)]


def test_one_that_can_not_be_loaded_changes_nothing(service: Service, file: Path, tmp_path: Path) -> None:
    path = packed(tmp_path / "next")
    (path / "calibration.json").write_text("{}")
    ask(service, file, path)
    found = until_decided(service)
    assert found["result"] == "failed" and "does not match the manifest's hash" in str(found["reason"])
    service.turn()
    assert service.done and service.worker.settings.bundle == bundle("classification")


def test_the_same_folder_with_other_weights_is_another_bundle(service: Service, file: Path, tmp_path: Path) -> None:
    path = packed(tmp_path / "next")
    ask(service, file, path)
    assert until_decided(service)["result"] == "taken"
    assert reload(service).startswith("nothing is changed")
    for name in ("model.safetensors", "reference.safetensors", "calibration.json", "manifest.json"):
        shutil.copy(bundle("classification") / name, path / name)
    assert "is being loaded" in ask(service, file, path)
    assert until_decided(service)["result"] == "taken"
    (path / "manifest.json").write_text("nothing")
    with pytest.raises(NotReloadedError, match="manifest.json: unreadable"):
        reload(service)


def test_one_at_a_time(service: Service, file: Path, tmp_path: Path) -> None:
    ask(service, file, packed(tmp_path / "next"))
    file.write_text(f"HOMEOSTAT_BUNDLE={packed(tmp_path / 'other')}\nHOMEOSTAT_LOG_LEVEL=debug")
    told = reload(service)
    assert "next is on its way already" in told and "HOMEOSTAT_LOG_LEVEL=debug" in told
    assert until_decided(service)["bundle"] == str(tmp_path / "next")


def test_bounds_that_change_while_it_is_compared_hold_for_it_and_a_held_version_stays_held(
    service: Service, file: Path, tmp_path: Path
) -> None:
    path = packed(tmp_path / "next")
    ask(service, file, path)
    service.turn()
    service.worker.loop.resident.versions.held = True
    file.write_text(f"HOMEOSTAT_BUNDLE={path}\nHOMEOSTAT_GUARD__DELTA=0.02\nHOMEOSTAT_SLOW__STEPS=3")
    reload(service)
    assert until_decided(service)["result"] == "taken"
    loop = service.worker.loop
    assert loop.monitor.fast_guard.limits.delta == 0.02 and loop.actions.learner.bench.options.steps == 3
    assert loop.resident.versions.held


def test_what_an_operator_froze_stays_frozen(service: Service, file: Path, tmp_path: Path) -> None:
    service.worker.loop.actions.freeze()
    ask(service, file, packed(tmp_path / "next"))
    assert until_decided(service)["result"] == "taken"
    assert service.worker.loop.actions.frozen and not service.worker.loop.adapt


def test_rows_that_wait_for_labels_are_scored_and_are_no_evidence(service: Service, file: Path, tmp_path: Path) -> None:
    join = service.worker.loop.join
    assert join is not None
    x = np.zeros((2, 4), np.float32)
    facts = np.ones((2, 11), np.float32)
    join.predicted(["a", "b"], x, facts, 1000.0)
    join.outdate()
    from daemon.records import Labels

    join.offer(Labels(["a"], [1.0], [-np.inf]))
    found = join.due()
    assert found is not None and found.served[0] == 1.0 and found.epoch[0] == -1 and np.isnan(found.frozen[0])


@pytest.mark.parametrize(("field", "value"), [("task", "regression"), ("input_shape", [5]), ("outputs", 9)])
def test_a_bundle_for_another_stream_needs_a_restart(field: str, value: object) -> None:
    from dataclasses import replace

    manifest = read_manifest(bundle("classification"))
    check_fits(manifest, manifest)
    with pytest.raises(HomeostatError, match=f"its {field} is .*needs a restart"):
        check_fits(manifest, replace(manifest, **{field: value}))
