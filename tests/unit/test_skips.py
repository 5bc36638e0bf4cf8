from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SUITE = """
import pytest

@pytest.fixture
def broker():
    pytest.skip("no broker here")

def test_passes(): pass

def test_needs_a_broker(broker): pass

@pytest.mark.skipif(True, reason="no GPU here")
def test_needs_a_gpu(): pass

@pytest.mark.xfail(reason="known", strict=True)
def test_known_to_fail(): raise ValueError
"""


def run(folder: Path, require_all: str) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").write_text("[pytest]\n")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "tests.skips", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*line, "--rootdir", str(folder), "-c", str(folder / "pytest.ini"), str(folder)],
        cwd=ROOT,
        env={**os.environ, "HOMEOSTAT_REQUIRE_ALL": require_all},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_skip_is_listed_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    done = run(tmp_path, "")
    assert done.returncode == 0, done.stdout
    listed = done.stdout.partition("not run, and why:")[2]
    assert "test_suite.py::test_needs_a_broker: no broker here" in listed
    assert "test_suite.py::test_needs_a_gpu: no GPU here" in listed
    assert "test_known_to_fail" not in listed


def test_where_all_is_required_a_skip_is_a_failure_and_an_expected_failure_is_not(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    done = run(tmp_path, "1")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "no broker here" in done.stdout
    assert "no GPU here" in done.stdout
    assert "1 passed, 1 xfailed, 2 errors" in done.stdout


def test_a_skipped_module_counts_too(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text("import pytest\npytest.skip('no torch here', allow_module_level=True)\n")
    assert "test_suite.py: no torch here" in run(tmp_path, "").stdout
    required = run(tmp_path, "1")
    assert required.returncode == pytest.ExitCode.INTERRUPTED, required.stdout
    assert "no torch here" in required.stdout


def test_without_skips_nothing_is_listed(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text("def test_passes(): pass\n")
    assert "not run" not in run(tmp_path, "").stdout
