"""What every test may use: the Kafka fixtures, and the rule that no skip is silent."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A machine that pauses says nothing about the code: an example has no time limit. The rest is as hypothesis has it,
# which in CI draws the same examples every time.
settings.register_profile("calm", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("calm")

pytest_plugins = ["tests.kafka", "tests.skips", "tests.spread", "tests.sweeps"]
