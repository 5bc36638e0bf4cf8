"""Long sweeps (every method on every kind of model) are thinned where a person waits for them.

Of a test function marked ``sweep`` with many parameter sets, `make test` runs a fixed choice, the same on every
machine, with each value of the first parameter in it; ``HOMEOSTAT_SWEEP=1`` and ``HOMEOSTAT_LONG=1`` run them all.
What is left out is deselected, and counted.
"""

from __future__ import annotations

import os
import zlib
from collections import defaultdict

import pytest

MOST = 24
"""Parameter sets of one test function that are run, about."""
EACH = 1
"""Of each value of its first parameter, at the least."""


def whole() -> bool:
    """Whether every parameter set is to be run."""
    return os.environ.get("HOMEOSTAT_SWEEP") == "1" or os.environ.get("HOMEOSTAT_LONG") == "1"


def chosen(names: list[str], most: int = MOST, each: int = EACH) -> set[str]:
    """Some of ``names``, by their checksums: neighbours in a list are not neighbours in these."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.partition("[")[2].partition("-")[0]].append(name)
    count = max(each, most // len(groups)) if groups else 0
    by_chance = {
        group: sorted(found, key=lambda name: (zlib.crc32(name.encode()), name)) for group, found in groups.items()
    }
    return {name for found in by_chance.values() for name in found[:count]}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sweep: thinned to some of its parameter sets unless HOMEOSTAT_SWEEP=1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if whole():
        return
    functions: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep"):
            functions[str(item.path), getattr(item, "originalname", item.name)].append(item.nodeid)
    kept = {name for names in functions.values() for name in chosen(names)}
    left_out = [item for item in items if item.get_closest_marker("sweep") and item.nodeid not in kept]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(map(id, left_out))
        items[:] = [item for item in items if id(item) not in gone]
