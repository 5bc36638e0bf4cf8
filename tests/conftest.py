"""What every test may use: the Kafka fixtures, and the rule that no skip is silent."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# A machine that pauses says nothing about the code: an example has no time limit. The rest is as hypothesis has it,
# which in CI draws the same examples every time.
settings.register_profile("calm", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("calm")

pytest_plugins = ["tests.kafka", "tests.skips", "tests.sweeps"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers (``-n 2 --dist loadgroup``) one has the broker and the tests that start processes."""
    for item in items:
        if "integration" in item.path.parts or "trial_kafka" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("processes"))
