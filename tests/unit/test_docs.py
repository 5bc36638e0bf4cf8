from __future__ import annotations

import re
from pathlib import Path

import pytest

from daemon import __version__
from daemon.cli import _COMMANDS
from tests.docs import README, TABLES, rendered


@pytest.mark.parametrize("document", TABLES, ids=lambda path: path.parent.name)
def test_tables_say_what_there_is(document: Path) -> None:
    assert rendered(document) == document.read_text(encoding="utf-8"), "run python -m tests.docs"


def test_readme_names_every_command() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in _COMMANDS if f"homeostat {name}" not in text] == []


def test_every_variable_and_metric_that_the_text_mentions_exists() -> None:
    text = README.read_text(encoding="utf-8")
    prose = re.sub(r"<!-- (variables|metrics) -->.*?<!-- end -->", "", text, flags=re.DOTALL)
    tables = text[text.index("<!-- variables -->") :]
    known = set(re.findall(r"`((?:HOMEOSTAT|homeostat)_\w+)`", tables))
    allowed = {"HOMEOSTAT_DATA", "HOMEOSTAT_GOLDEN", "HOMEOSTAT_TEST_KAFKA", "HOMEOSTAT_REQUIRE_ALL", "HOMEOSTAT_LONG"}
    allowed |= {"HOMEOSTAT_SWEEP", "HOMEOSTAT_CHAOS", "HOMEOSTAT_TEST_OUTPUT"}
    allowed |= {"HOMEOSTAT_FAST__MEMORY_ROWS", "HOMEOSTAT_FAST__LR", "HOMEOSTAT_KAFKA_CACHE"}
    mentioned = set(re.findall(r"\b((?:HOMEOSTAT|homeostat)_\w+)", prose))
    assert mentioned - known - allowed == set()


def test_the_changelog_has_this_version() -> None:
    assert f"## {__version__}" in (README.parent / "CHANGELOG.md").read_text(encoding="utf-8")
