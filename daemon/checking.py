"""`homeostat check`: everything that can be known to be wrong before the first record."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from daemon.config import effective
from daemon.errors import HomeostatError, SettingsError
from daemon.logs import configure
from daemon.settings import Settings


def check(settings: Settings) -> int:
    """Print the effective settings, then one line per problem; returns 0 or 2."""
    configure("error", settings.log_format)
    for name, value in effective(settings):
        print(f"{name}={value}")
    sys.stdout.flush()
    problems: list[str] = []

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except SettingsError as error:
            problems.extend(error.problems)
        except HomeostatError as error:
            problems.append(str(error))
        return None

    from daemon.assembly import assemble, warm_up
    from daemon.checkpoint import Store
    from daemon.front.opening import check_front
    from daemon.places import checkpoint_folder
    from daemon.tracing.opening import CLOSE_S

    attempt(lambda: check_front(settings))
    if (folder := checkpoint_folder(settings)) is not None:
        attempt(lambda: Store(folder, keep=settings.checkpoint.keep).newest())
    worker = attempt(lambda: assemble(settings))
    if worker is not None:
        for part in (worker.source, worker.sink, worker.labels, worker.loop.codec):
            if hasattr(part, "check"):
                attempt(part.check)
        if settings.source.startswith("file:"):
            attempt(lambda: worker.source.open(None))
        attempt(lambda: warm_up(worker))
        for part in (worker.source, worker.sink, worker.labels):
            if part is not None:
                part.close()
        worker.tracing.close(CLOSE_S)
    for problem in problems:
        print(f"homeostat: {problem}", file=sys.stderr)
    if not problems:
        print("ok: settings, bundle, streams and one warm-up batch")
    return SettingsError.exit_code if problems else 0
