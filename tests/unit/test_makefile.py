from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="GNU make is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The Makefile and what it depends on, in a folder of its own."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def calls(tree: Path) -> Path:
    """A .venv without a stamp whose programs only write down how they were called; gives that file."""
    log = tree / "calls"
    for name in ("python", "uv", "homeostat", "ruff", "mypy"):
        script(tree / ".venv" / "bin" / name, f'echo "{name} $*" >>{log}')
    return log


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Without the variables by which a make that runs this test would speak to the one under test.
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS", "HOMEOSTAT_CHAOS"}
    }
    return subprocess.run(["make", *arguments], cwd=tree, env=env, capture_output=True, text=True, check=False)


def test_run_installs_once_and_hands_over_the_arguments(tree: Path, calls: Path) -> None:
    for number in (1, 2):
        done = make(tree, "run", f"ARGS=--number {number}")
        assert done.returncode == 0, done.stderr
    install, *runs = calls.read_text().splitlines()
    assert install.startswith("uv pip install")
    assert "--constraint constraints.txt --editable ." in install
    assert runs == ["homeostat run --number 1", "homeostat run --number 2"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_dependency_installs_again(tree: Path, calls: Path, changed: str) -> None:
    make(tree, "run")
    stamp = tree / ".venv" / ".installed"
    later = stamp.stat().st_mtime + 10
    os.utime(tree / changed, (later, later))
    make(tree, "run")
    assert calls.read_text().count("uv pip install") == 2


def test_a_failed_installation_is_tried_again(tree: Path, calls: Path) -> None:
    good = (tree / ".venv" / "bin" / "uv").read_text()
    script(tree / ".venv" / "bin" / "uv", "exit 1")
    assert make(tree, "run").returncode != 0
    (tree / ".venv" / "bin" / "uv").write_text(good)
    assert make(tree, "run").returncode == 0
    assert "uv pip install" in calls.read_text()


def test_test_checks_style_and_types_before_the_tests(tree: Path, calls: Path) -> None:
    done = make(tree, "test", "ARGS=tests/unit -k name")
    assert done.returncode == 0, done.stderr
    install, *steps = calls.read_text().splitlines()
    assert "--editable .[dev]" in install
    tests = "python -m pytest -q -n 2 tests/unit -k name"
    assert steps == ["ruff check .", "ruff format --check .", "mypy ", tests]


@pytest.mark.parametrize(
    ("asked", "quick", "chaos"),
    [([], ["-m", "not", "slow"], []), (["HOMEOSTAT_CHAOS=1"], [], ["tests/chaos"])],
)
def test_what_is_slow_and_chaos_come_where_they_are_asked_for(
    tree: Path, calls: Path, asked: list[str], quick: list[str], chaos: list[str]
) -> None:
    done = make(tree, "test", *asked)
    assert done.returncode == 0, done.stderr
    *_, side_by_side, one_by_one = calls.read_text().splitlines()
    assert "-n 2" in side_by_side and "--ignore tests/integration --ignore tests/chaos" in side_by_side
    assert ("-m not slow" in side_by_side) is bool(quick)
    assert one_by_one.split() == ["python", "-m", "pytest", "-q", *quick, "tests/integration", *chaos]


def test_an_old_python_is_refused_by_name_and_leaves_nothing(tree: Path) -> None:
    old = script(tree / "python3.9", "exit 1")
    done = make(tree, "run", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"{old} is missing or older than 3.11" in done.stderr
    assert not (tree / ".venv").exists()


def test_a_python_without_venv_is_told_what_to_install(tree: Path) -> None:
    bare = script(tree / "python3", 'case "$2" in *venv*) exit 1;; esac')
    done = make(tree, "run", f"PYTHON={bare}")
    assert done.returncode != 0
    assert "apt-get install python3-venv" in done.stderr
    assert not (tree / ".venv").exists()


def test_clean_keeps_the_environment_and_forgets_that_it_is_complete(tree: Path, calls: Path) -> None:
    make(tree, "run")
    (tree / "daemon" / "__pycache__").mkdir(parents=True)
    assert make(tree, "clean").returncode == 0
    assert (tree / ".venv" / "bin" / "python").exists()
    assert not (tree / "daemon" / "__pycache__").exists()
    make(tree, "run")
    assert calls.read_text().count("uv pip install") == 2
