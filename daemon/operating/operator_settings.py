"""Settings of the operator's actions."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from daemon.section import Section


class OperatorActions(Section):
    """Who may act on a running daemon."""

    token_file: Path | None = None
    """File that holds the token for `homeostat ctl`, 20 characters or more; unset: nobody may act over HTTP."""
    per_minute: int = Field(30, ge=1)
    """Most requests to act in a minute, refused ones included."""
