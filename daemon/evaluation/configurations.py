"""Which configurations stand side by side: the daemon's, as set and varied, and the baselines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import adapters.fast as fast
from daemon.config import load_settings
from daemon.errors import SettingsError
from daemon.evaluation.baselines import BLIND, FROZEN, REFIT
from daemon.settings import PREFIX, Settings

DAEMON = "homeostat"
METHODS = (
    "norm", "ema_norm", "tent", "eta", "roid", "rotta", "lame", "label_shift", "t3a", "error_memory", "gain_control",
)  # fmt: skip
"""Fast methods run unguarded when none are named: one or two of each family."""
_NOT_VARIED = (
    "source",
    "sink",
    "labels",
    "dead_letters",
    "codec",
    "bundle",
    "factory",
    "app_dir",
    "state_dir",
    "kafka",
)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One line of the table."""

    name: str
    kind: str
    """``baseline``, ``method`` (a fast method unguarded) or ``daemon``."""
    settings: Settings

    @property
    def seeded(self) -> bool:
        """Whether another seed can give another answer."""
        return self.name != FROZEN


def configurations(settings: Settings, methods: Sequence[str], given: Sequence[str]) -> list[Configuration]:
    """All of them, the frozen model first and the daemon as it is set last, before its variants.

    Args:
        settings: as the environment has them.
        methods: names of fast methods, or ``all``.
        given: variants of the daemon, ``NAME:FAST=tent,SLOW__ENABLED=false``.

    Raises:
        SettingsError: an unknown method, a variant that can't be read, or two of one name.
    """
    wanted = fast.names() if list(methods) == ["all"] else list(dict.fromkeys(methods))
    problems = []
    for name in wanted:
        try:
            fast.get(name)
        except ValueError as error:
            problems.append(f"--methods={name}: {error}")
    made = [Configuration(name, "baseline", settings) for name in (FROZEN, BLIND, REFIT)]
    made += [Configuration(name, "method", settings) for name in wanted if name != "none"]
    made.append(Configuration(DAEMON, "daemon", settings))
    for text in given:
        name, colon, changes = text.partition(":")
        if not colon or not name.strip() or not changes.strip():
            problems.append(f"--config={text}: right would be NAME:FAST=tent,SLOW__ENABLED=false")
            continue
        try:
            made.append(Configuration(name.strip(), "daemon", _varied(text, changes)))
        except SettingsError as error:
            problems += [f"--config={text}: {problem}" for problem in error.problems]
    names = [each.name for each in made]
    problems += [
        f"--config={name}: there is another configuration of that name: give another"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise SettingsError(problems)
    return made


def _varied(text: str, changes: str) -> Settings:
    """The environment's settings with ``A=1,B=2`` on top; names without their prefix, or with it."""
    variables = {}
    for part in changes.split(","):
        name, equals, value = part.partition("=")
        name = PREFIX + name.strip().upper().removeprefix(PREFIX)
        if not equals:
            raise SettingsError([f"{part!r} is no assignment; right would be FAST=tent"])
        if name.removeprefix(PREFIX).partition("__")[0].lower() in _NOT_VARIED:
            raise SettingsError([f"{name} is the same for all configurations: set it in the environment"])
        variables[name] = value.strip()
    with _environment(variables):
        return load_settings()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables on top of the environment's while inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def relevant(settings: Settings) -> dict[str, object]:
    """What of the settings a replay depends on, as plain values; no secret is among them."""
    left_out = {*_NOT_VARIED, "http", "checkpoint", "log_level", "log_format", "batch_rows", "linger_ms"}
    left_out |= {"progress_timeout_s", "drain_timeout_s"}
    return settings.model_dump(mode="json", exclude=left_out)
