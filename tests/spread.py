"""With several workers (``-n 2``) all tests of a file run on one: what a module makes once is made once.

Those that start processes and brokers count as one file: they have deadlines, and one broker is enough. It goes by
paths because pytest-xdist's own groups (``--dist loadgroup``, 3.8) have no effect with pytest 9.2.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

PROCESSES = ("tests/integration/", "tests/chaos/")


class ByFile(LoadFileScheduling):
    """Hands out whole files, those with the most tests first."""

    def _split_scope(self, nodeid: str) -> str:
        return "processes" if nodeid.startswith(PROCESSES) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)
