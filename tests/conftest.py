"""What every test may use: the Kafka fixtures, and the rule that no skip is silent."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.kafka", "tests.skips", "tests.sweeps"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers (``-n 2 --dist loadgroup``) one has the broker and the tests that start processes."""
    for item in items:
        if "integration" in item.path.parts or "trial_kafka" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("processes"))
