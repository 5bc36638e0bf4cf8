"""What every test may use: the Kafka fixtures, and the rule that no skip is silent."""

from __future__ import annotations

pytest_plugins = ["tests.kafka", "tests.skips"]
