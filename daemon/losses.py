"""How often transactions may be lost before that is no passing trouble."""

from __future__ import annotations

import time

from daemon.errors import TransactionError

AGAIN, AGAIN_S = 10, 600.0
"""How often, within how many seconds, lost transactions are taken for something that passes."""


class Losses:
    """When transactions were lost."""

    def __init__(self) -> None:
        self._at: list[float] = []

    def count(self, reason: str) -> None:
        """One more was lost, because of ``reason``.

        Raises:
            TransactionError: that was too often: most likely another worker has this one's name.
        """
        now = time.monotonic()
        self._at = [at for at in self._at if now - at < AGAIN_S] + [now]
        if len(self._at) > AGAIN:
            raise TransactionError(
                f"{reason}; for the {len(self._at)}th time within {AGAIN_S / 60:.0f} minutes. Is there another "
                "worker with the same HOMEOSTAT_KAFKA__GROUP and HOMEOSTAT_KAFKA__INSTANCE_ID?"
            )
