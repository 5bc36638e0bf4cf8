from __future__ import annotations

import importlib.util
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon import broker_runtime
from daemon.broker import TrialBroker
from daemon.broker_runtime import BrokerError, jar_folder, jars, java


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No extra installed, no Java, an empty cache; gives the folder that is the PATH."""
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.delenv("HOMEOSTAT_KAFKA_CACHE", raising=False)
    return path


def fake_java(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "java"
    script.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2021-10-19' >&2\n")
    script.chmod(0o755)
    return script


def test_without_java_the_extra_is_named(bare: Path) -> None:
    with pytest.raises(BrokerError, match=r'none on the PATH: .*pip install "homeostat\[broker\]"'):
        java()


@pytest.mark.parametrize("version", ["1.8.0_402", "11.0.2"])
def test_an_old_java_is_refused_by_its_version(bare: Path, version: str) -> None:
    fake_java(bare, version)
    with pytest.raises(BrokerError, match=version):
        java()


def test_a_java_on_the_path_is_enough(bare: Path) -> None:
    found = fake_java(bare, "17.0.1")
    assert java() == str(found)


def test_java_home_wins_over_the_path(bare: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_java(bare, "17.0.1")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    with pytest.raises(BrokerError, match=r"JAVA_HOME=.*jdk"):
        java()
    own = fake_java(tmp_path / "jdk" / "bin", "21")
    assert java() == str(own)


def test_without_jgo_the_extra_and_the_cache_folder_are_named(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r'cache/homeostat/kafka-.* pip install "homeostat\[broker\]"'):
        jars()
    assert not jar_folder().exists()


def test_a_failed_download_leaves_no_cache_and_quotes_the_resolver(
    bare: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    failed = subprocess.CompletedProcess([], 1, stdout="lots of progress\n" * 50, stderr="no route to the repository")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(BrokerError, match="no route to the repository"):
        jars()
    assert [path.name for path in jar_folder().parent.iterdir()] == [f"{jar_folder().name}.lock"]


def test_parallel_starts_download_once(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []
    all_called = threading.Barrier(4)

    def download(scratch: Path, timeout_s: float) -> Path:
        downloads.append(scratch)
        (scratch / "jars").mkdir()
        return scratch / "jars"

    def call() -> Path:
        all_called.wait()
        return jars()

    monkeypatch.setattr(broker_runtime, "_download", download)
    with ThreadPoolExecutor(4) as pool:
        folders = [future.result() for future in [pool.submit(call) for _ in range(4)]]
    assert len(downloads) == 1
    assert folders == [jar_folder()] * 4


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOMEOSTAT_KAFKA_CACHE", str(tmp_path))
    assert jar_folder().parent == tmp_path


def test_a_broker_without_a_port_yet_has_no_address(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="start"):
        _ = TrialBroker(tmp_path, port=0).address
