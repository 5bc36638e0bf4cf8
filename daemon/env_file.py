"""``HOMEOSTAT_ENV_FILE``: further variables, in the form of systemd's EnvironmentFile and of docker's --env-file.

A process can't see its environment change; a file it can read again. What the environment itself sets holds before it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dotenv.parser import parse_stream

from daemon.errors import SettingsError

VARIABLE = "HOMEOSTAT_ENV_FILE"
_LARGEST = 1 << 20


class Given(NamedTuple):
    """A value, and the line that it stands in."""

    value: str
    line: int


def read_env_file(path: Path) -> dict[str, Given]:
    """By name in capitals; ``${NAME}`` is left as it is, so that a password may have a dollar sign.

    Raises:
        SettingsError: one line for each fault, with the file and its line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{VARIABLE}={path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"]) from None
    if len(text) > _LARGEST:
        raise SettingsError([f"{VARIABLE}={path}: longer than 1 MB: is that the right file?"])
    found: dict[str, Given] = {}
    problems = []
    for one in parse_stream(io.StringIO(text)):
        where, name = (
            f"{VARIABLE}={path}, line {_line(one.original.string, one.original.line)}",
            (one.key or "").upper(),
        )
        if one.error or (one.key is not None and one.value is None):
            # Not what the line says: it may be a secret that a quote is missing from.
            problems.append(f"{where}: not NAME=value")
        elif one.key is None or one.value is None:
            continue
        elif not name.startswith("HOMEOSTAT_") or name == VARIABLE:
            problems.append(f"{where}: {one.key} can't be set there, only HOMEOSTAT_* and not {VARIABLE} itself")
        elif name in found:
            problems.append(f"{where}: {name} is set twice, first in line {found[name].line}")
        else:
            found[name] = Given(one.value, _line(one.original.string, one.original.line))
    if problems:
        raise SettingsError(problems)
    return found


def merged(environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The environment with the file's variables, if it names one; and where each that came from there stands.

    Raises:
        SettingsError: see `read_env_file`.
    """
    path = next((value for name, value in environ.items() if name.upper() == VARIABLE), "")
    if not path:
        return dict(environ), {}
    given, own = read_env_file(Path(path)), {name.upper() for name in environ}
    used = {name: one for name, one in given.items() if name not in own}
    return (
        dict(environ) | {name: one.value for name, one in used.items()},
        {name: f"{path}, line {one.line}" for name, one in used.items()},
    )


def _line(text: str, first: int) -> int:
    """The parser counts blank lines before a variable as its own."""
    return first + len(text) - len(text.lstrip("\n"))
