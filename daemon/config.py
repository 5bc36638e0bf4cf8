"""Turns the environment into ``Settings``, and its problems into one line each; lists every variable for the help."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import SettingsError as PydanticSettingsError

from daemon.env_file import merged
from daemon.errors import SettingsError
from daemon.settings import ENVIRON, PREFIX, Method, Settings

_OF_TESTS = ("DATA", "GOLDEN", "TEST_KAFKA", "TEST_OUTPUT", "REQUIRE_ALL", "LONG", "SWEEP", "CHAOS", "KAFKA_CACHE")
RESERVED = frozenset(PREFIX + name for name in _OF_TESTS)
"""Variables of the test suite and of the trial broker: allowed, not settings of the daemon."""

_SECRET = re.compile("PASS|SECRET|TOKEN|KEY$", re.IGNORECASE)
"""Names whose values are never printed, misspelt ones included."""

_SHORT_FORMS = {"fast": "name", "detect": "name", "slow": "name", "checkpoint": "dir", "traces": "mode"}


class Variable(NamedTuple):
    """One environment variable."""

    name: str
    kind: str
    default: str
    help: str


def _attribute_docs(cls: type) -> dict[str, str]:
    """The string under each field of a class body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return docs


def _fields(cls: type) -> Iterator[tuple[str, Any, Any, str]]:
    docs = _attribute_docs(cls)
    if dataclasses.is_dataclass(cls):
        for item in dataclasses.fields(cls):
            yield item.name, item.type, item.default, docs.get(item.name, "")
    elif issubclass(cls, BaseModel):
        for name, info in cls.model_fields.items():
            yield name, info.annotation, info.default, docs.get(name, "")


def _kind(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    if choices := [str(choice) for choice in get_args(annotation) if isinstance(choice, str)]:
        return "|".join(choice or '""' for choice in choices)
    parts = [part.__origin__ if hasattr(part, "__metadata__") else part for part in get_args(annotation)]
    names = [getattr(part, "__name__", str(part)) for part in parts or (annotation,)]
    return "|".join(name for name in names if name != "NoneType" and not name.startswith(("Gt", "Ge")))


def _is_section(default: Any) -> bool:
    return isinstance(default, BaseModel) or (dataclasses.is_dataclass(default) and not isinstance(default, type))


@functools.cache
def variables() -> tuple[Variable, ...]:
    """Every variable of the daemon, in the order of the tree."""

    def walk(cls: type, prefix: str, given: Any) -> Iterator[Variable]:
        for name, annotation, default, text in _fields(cls):
            value = getattr(given, name, default)
            if _is_section(value):
                if isinstance(value, Method):
                    yield Variable(f"{prefix}{name}".upper(), "name", value.name, text)
                    continue
                if name in _SHORT_FORMS:
                    inner = _SHORT_FORMS[name]
                    shown = getattr(value, inner)
                    yield Variable(
                        f"{prefix}{name}".upper(),
                        "name",
                        "" if shown is None else str(shown),
                        text + f" Short for {prefix}{name}__{inner}.".upper().replace("SHORT FOR", "Short for"),
                    )
                yield from walk(type(value), f"{prefix}{name}__", value)
                continue
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            shown = "" if value is None or value == "" else str(value)
            yield Variable(f"{prefix}{name}".upper(), _kind(annotation), shown, text)

    return tuple(walk(Settings, PREFIX, None))


def _unknown(environ: Mapping[str, str], places: Mapping[str, str]) -> list[str]:
    known = {variable.name for variable in variables()}
    free = tuple(
        f"{PREFIX}{name.upper()}__" for name, info in Settings.model_fields.items() if isinstance(info.default, Method)
    )
    problems = []
    for name in sorted(environ):
        if not name.upper().startswith(PREFIX) or name.upper() in known | RESERVED or name.upper().startswith(free):
            continue
        near = difflib.get_close_matches(name.upper(), known, n=1)
        advice = f"did you mean {near[0]}?" if near else "`homeostat run --help` lists all"
        # A misspelt secret is a secret still, and so is a whole section in one value.
        shown = "***" if "PASS" in name.upper() or "KAFKA" in name.upper() else _shown(environ[name])
        problems.append(f"{name}={shown}: no such variable; {advice}{_place(name, places)}")
    return problems


def _place(name: str, places: Mapping[str, str]) -> str:
    return f" ({places[name.upper()]})" if name.upper() in places else ""


def _shown(value: str) -> str:
    """A value without the login that somebody may have written into its URL."""
    return re.sub(r"//[^/@]*@", "//***@", value)


def _line(error: Any, places: Mapping[str, str]) -> str:
    path = [str(part) for part in error["loc"]]
    name = (PREFIX + "__".join(path)).upper()
    listed = {variable.name: variable for variable in variables()}
    if error["type"] == "value_error" and any(one.startswith(f"{name}__") for one in listed):
        return _section_line(name, error, listed, places)
    while name not in listed and len(path) > 1:
        path.pop()
        name = (PREFIX + "__".join(path)).upper()
    variable = listed.get(name)
    for section, inner in _SHORT_FORMS.items():
        if name == f"{PREFIX}{section}__{inner}".upper() and name not in map(str.upper, ENVIRON.get()):
            name = f"{PREFIX}{section}".upper()
    problem = str(error["msg"]).removeprefix("Value error, ")
    right = ""
    if variable and "right would be" not in problem:
        without = "empty" if variable.kind in ("str", "name") else "unset"
        right = f"; right would be {variable.kind}, default {variable.default or without}"
    right += _place(name, places)
    if _SECRET.search(name):
        return f"{name}=***: {problem}{right}"
    return f"{name}={_shown(str(error['input']))}: {problem[:1].lower()}{problem[1:]}{right}"


def _section_line(name: str, error: Any, listed: Mapping[str, Variable], places: Mapping[str, str]) -> str:
    """What a section's own limits find wrong: "delta is 7.0: give ...", or a sentence on several of its fields."""
    problem = str(error["msg"]).removeprefix("Value error, ")
    found = re.match(r"(\w+) is ([^:]+): ", problem)
    if found and (field := f"{name}__{found[1]}".upper()) in listed:
        return f"{field}={found[2]}: {problem[found.end() :]}{_place(field, places)}"
    return f"{name}: {problem}" + "".join(_place(one, places) for one in places if one.startswith(f"{name}__"))


def load_settings(**overrides: Any) -> Settings:
    """Read the settings from the environment.

    Args:
        overrides: top-level settings that win over the environment (from the command line).

    Raises:
        SettingsError: with one line per problem: variable, value, what is wrong, what would be right.
    """
    environ, places = merged(os.environ)
    problems = _unknown(environ, places)
    token = ENVIRON.set(environ)
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        named = {name.upper() for name in environ}
        wrong = [
            item
            for item in error.errors()
            if item["type"] != "extra_forbidden" or (PREFIX + "__".join(map(str, item["loc"]))).upper() not in named
        ]
        raise SettingsError(problems + [_line(item, places) for item in wrong]) from None
    except PydanticSettingsError as error:
        raise SettingsError([*problems, str(error)]) from None
    finally:
        ENVIRON.reset(token)
    if problems:
        raise SettingsError(problems)
    return settings


def effective(settings: Settings) -> list[tuple[str, str]]:
    """Every variable with the value in force; secrets are masked."""
    rows = []

    def walk(value: Any, prefix: str) -> None:
        pairs = (
            [(item.name, getattr(value, item.name)) for item in dataclasses.fields(value)]
            if dataclasses.is_dataclass(value)
            else [(name, getattr(value, name)) for name in type(value).model_fields]
            + list((value.__pydantic_extra__ or {}).items())
        )
        for name, item in pairs:
            full = f"{prefix}{name}".upper()
            if _is_section(item):
                walk(item, f"{prefix}{name}__")
            elif isinstance(item, SecretStr):
                rows.append((full, "***" if item.get_secret_value() else ""))
            else:
                rows.append((full, "" if item is None else _shown(str(item))))

    walk(settings, PREFIX)
    return [(name.removesuffix("__NAME") if name.endswith(("FAST__NAME",)) else name, value) for name, value in rows]
