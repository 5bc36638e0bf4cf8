"""What the tests of the whole process share."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.streams.simbundle import FACTORY, ensure_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulator's bundle, packed once a session: 16 sensors, 4 classes."""
    return ensure_bundle(tmp_path_factory.mktemp("bundle"), "sim://ageing")


@pytest.fixture
def settings(bundle: Path, tmp_path: Path) -> dict[str, str]:
    """What every worker needs; the test adds its streams."""
    return {
        "HOMEOSTAT_BUNDLE": str(bundle),
        "HOMEOSTAT_FACTORY": FACTORY,
        "HOMEOSTAT_STATE_DIR": str(tmp_path / "state"),
    }
