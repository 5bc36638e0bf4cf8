"""Detectors by name. Modules of this package are imported on the first look-up, so that a new file is enough."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from detectors.base import Detector

T = TypeVar("T", bound=type[Detector])

_classes: dict[str, type[Detector]] = {}
_complete = False


def register(name: str) -> Callable[[T], T]:
    """Class decorator: makes the class known as ``name``. Raises ``ValueError`` if the name is taken."""

    def decorate(cls: T) -> T:
        if name in _classes:
            raise ValueError(f"detector name {name!r} is taken by {_classes[name].__qualname__}: choose another")
        cls.name = name
        _classes[name] = cls
        return cls

    return decorate


def _discover() -> None:
    global _complete
    if not _complete:
        package = importlib.import_module("detectors")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"detectors.{module.name}")
        _complete = True


def names() -> list[str]:
    """Names of all detectors, sorted."""
    _discover()
    return sorted(_classes)


def build(name: str, **options: Any) -> Detector:
    """A new detector. Raises ``ValueError`` for an unknown name or an option that the detector does not have."""
    _discover()
    if name not in _classes:
        raise ValueError(f"unknown detector {name!r}: choose one of {', '.join(names())}")
    try:
        return _classes[name](**options)
    except TypeError as error:
        raise ValueError(f"detector {name!r}: {error}") from error
