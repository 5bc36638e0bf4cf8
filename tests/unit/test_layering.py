from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("daemon", "adapters", "detectors")
MODULES = sorted(path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py"))

FORBIDDEN = {
    "daemon": {"tests"},
    "adapters": {"daemon", "detectors", "tests", "kafka", "prometheus_client", "structlog"},
    "detectors": {"daemon", "adapters", "tests", "kafka", "prometheus_client", "structlog"},
}

HERE = "|".join(re.escape(str(folder)) for folder in (ROOT, ROOT.parent / "shared"))
MACHINE_PATH = re.compile(rf"({HERE})\b|/root/\.(pyenv|cache)|/home/(?!homeostat)\w+|/tmp/\w+")
REGISTRY = re.compile(
    r"pythonhosted\.org|pypi\.org/simple|repo1?\.maven\.(apache\.)?org|(extra-)?index-url|PIP_FIND_LINKS"
)


def imported(source: str) -> set[str]:
    """Top-level names of everything a module imports, also inside functions and under ``TYPE_CHECKING``."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def text_files() -> Iterator[tuple[str, str]]:
    tops = [path for path in ROOT.iterdir() if path.is_file()]
    below = [path for name in (*PACKAGES, "tests", "deploy", ".ci") for path in (ROOT / name).rglob("*")]
    for path in [*tops, *below]:
        if not path.is_file() or "__pycache__" in path.parts or path == Path(__file__):
            continue
        try:
            yield path.relative_to(ROOT).as_posix(), path.read_text()
        except UnicodeDecodeError:
            continue


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    forbidden = FORBIDDEN[module.partition("/")[0]]
    names = imported((ROOT / module).read_text())
    assert not names & forbidden


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_read_in_one_sitting(module: str) -> None:
    lines = (ROOT / module).read_text().count("\n")
    assert lines <= 300


def test_the_rule_sees_imports_wherever_they_stand() -> None:
    source = "import a.b\ndef f():\n    from c.d import e\nif TYPE_CHECKING:\n    import g as h\nfrom . import i\n"
    assert imported(source) == {"a", "c", "g"}


def test_no_file_names_a_developers_machine_or_a_registry() -> None:
    found = {
        f"{name}:{number}: {line.strip()}"
        for name, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line) or REGISTRY.search(line)
    }
    assert not found


@pytest.mark.parametrize("heavy", ["torch", "kafka", "river", "scipy"])
def test_the_command_line_answers_without_loading_what_is_slow(heavy: str) -> None:
    code = f"import sys, daemon.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_package_carries_its_types() -> None:
    assert [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()] == []
