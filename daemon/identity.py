"""What a worker is called where it must be the same after a restart, and unlike every other one's."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path


def worker_name(state_dir: Path) -> str:
    """The host's name and a mark of ``state_dir``: two workers of one host keep their state in two folders."""
    mark = hashlib.sha256(str(state_dir.absolute()).encode()).hexdigest()[:8]
    return f"{socket.gethostname()}-{mark}"
