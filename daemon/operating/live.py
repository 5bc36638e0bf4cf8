"""Settings that may change while the daemon runs: what is different, what of it holds at once, what needs a restart.

Changed are bounds and paces. What decides which state there is (bundle, methods, streams, memories) needs a restart, as
does what a client was opened with.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from pydantic import BaseModel

from daemon.settings import PREFIX, Settings

LIVE = (
    "LOG_LEVEL",
    "LINGER_MS",
    "SHED",
    "OVERLOAD__",
    "REGULATOR__",
    "GUARD__",
    "CHECKPOINT__EVERY_S",
    "CHECKPOINT__EVERY_BATCHES",
    "DETECT__ARL0",
    "LABEL_BUDGET__SHARE",
    "PROGRESS_TIMEOUT_S",
    "DRAIN_TIMEOUT_S",
    "SLOW__EAGER",
    "SLOW__STEPS",
    "SLOW__BATCH_ROWS",
    "SLOW__PRICE",
    "SLOW__MIN_LABELS",
    "SLOW__SECONDS",
    "SLOW__DUTY",
    "SLOW__BURST_BYTES",
    "SLOW__ALPHA",
    "SLOW__RUN_ROWS",
    "SLOW__REFERENCE_SHARE",
    "SLOW__REFERENCE_MARGIN",
)
"""Names without their prefix; those that end in ``__`` are whole sections."""


class Change(NamedTuple):
    """Two trees of settings, compared."""

    settings: Settings
    """What is in force afterwards: the new one where it may change, else the old one."""
    live: list[str]
    """``NAME=new (was old)``, of what holds at once."""
    restart: list[str]
    """Names of what needs a restart; never values, among which are secrets."""


def is_live(name: str) -> bool:
    """Whether the variable ``HOMEOSTAT_name`` may change while the daemon runs."""
    return any(name == one or (one.endswith("__") and name.startswith(one)) for one in LIVE)


def compare(old: Settings, new: Settings) -> Change:
    """What ``new`` changes of ``old``."""
    live: list[str] = []
    restart: list[str] = []

    def walk(before: Any, after: Any, path: str) -> Any:
        changed = {}
        for name in _names(before):
            was, now, full = getattr(before, name), getattr(after, name), f"{path}{name}".upper()
            if type(was) is type(now) and (isinstance(was, BaseModel) or dataclasses.is_dataclass(was)):
                found = walk(was, now, f"{full}__")
                # What a method's section holds beside its fields are its options.
                if getattr(was, "__pydantic_extra__", None) != getattr(now, "__pydantic_extra__", None):
                    restart.append(PREFIX + full)
                changed[name] = found
            elif was != now and is_live(full):
                live.append(f"{PREFIX}{full}={_shown(now)} (was {_shown(was)})")
                changed[name] = now
            elif was != now:
                restart.append(PREFIX + full)
        return _replaced(before, changed)

    return Change(walk(old, new, ""), live, restart)


def _names(section: Any) -> list[str]:
    if isinstance(section, BaseModel):
        return list(type(section).model_fields)
    return [item.name for item in dataclasses.fields(section)]


def _replaced(section: Any, changed: dict[str, Any]) -> Any:
    if isinstance(section, BaseModel):
        return section.model_copy(update=changed)
    return dataclasses.replace(section, **changed)


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
