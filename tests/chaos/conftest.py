"""The worker of these tests is the one of the integration tests."""

from tests.integration.conftest import bundle, settings

__all__ = ["bundle", "settings"]
