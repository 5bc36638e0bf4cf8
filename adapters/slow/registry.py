"""The slow methods by name, with ways of keeping in front: ``head``, ``fisher+interpolate+head``.

A method is one file in ``adapters/slow/methods``, a way of keeping one in ``adapters/slow/keeping``, named as it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

from torch import nn

from adapters.slow import keeping, methods
from adapters.slow.keeping.base import Keeping, begin
from adapters.slow.trainee import Given, Trainee, of_clones, private_copy

_METHODS: dict[str, type[SlowMethod]] = {}
_KEEPINGS: dict[str, type[Keeping]] = {}


class SlowMethod(ABC):
    """Says what of a model a burst may move, and how. Holds its options and no state of its own.

    A method's options are keyword arguments of its constructor, with defaults; a wrong value is a ValueError that names
    the option.
    """

    name: ClassVar[str]

    @abstractmethod
    def check(self, model: nn.Module) -> str | None:
        """Why this method can't serve ``model`` and what to use instead; None when it can."""

    @abstractmethod
    def begin(self, model: nn.Module, given: Given) -> Trainee:
        """Make a private copy to train; ``model`` is not changed.

        Raises:
            ValueError: the model can't be served; the text is that of `check`.
        """

    def refuse(self, problem: str) -> str:
        """The text of `check`, with the method's name."""
        return f"slow method {self.name!r}: {problem}"


class SelectingMethod(SlowMethod):
    """A method that moves parameters of the model itself."""

    missing: ClassVar[str]
    """What a model lacks that this method can't serve, and what to use instead: the text of the error."""

    @abstractmethod
    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that may move, by their name in ``state_dict``; empty when the model has none."""

    def check(self, model: nn.Module) -> str | None:
        """Why nothing can move; None when something can."""
        return None if self.select(model) else self.refuse(self.missing)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that may move, by their name in ``state_dict``.

        ``requires_grad`` is not looked at: a served model has it off everywhere.

        Raises:
            ValueError: nothing can move; the message says what to use instead.
        """
        if (problem := self.check(model)) is not None:
            raise ValueError(problem)
        return self.select(model)

    def begin(self, model: nn.Module, given: Given) -> Trainee:
        """Clone the selected parameters, all at one rate."""
        return of_clones(*private_copy(model, self.parameters(model)))


class KeptMethod(SlowMethod):
    """A method with ways of keeping in front of it, made by `get`; the name has all of them."""

    def __init__(self, name: str, keepings: Sequence[Keeping], method: SlowMethod) -> None:
        self.name = name  # type: ignore[misc]  # of the instance: there is no class of this name
        self.keepings, self.method = tuple(keepings), method

    def check(self, model: nn.Module) -> str | None:
        """Why the method can't serve the model; every way of keeping serves what a method can."""
        return self.method.check(model)

    def begin(self, model: nn.Module, given: Given) -> Trainee:
        """Begin the method, then put the ways of keeping around it, the last named first."""
        return begin(self.keepings, model, given, lambda start: self.method.begin(start, given))


def register(name: str) -> Callable[[type[SlowMethod]], type[SlowMethod]]:
    """Class decorator: enters a method under ``name``, which must be its file's name too."""

    def enter(cls: type[SlowMethod]) -> type[SlowMethod]:
        cls.name = name
        _METHODS[name] = cls
        return cls

    return enter


def register_keeping(name: str) -> Callable[[type[Keeping]], type[Keeping]]:
    """Class decorator: enters a way of keeping under ``name``, which must be its file's name too."""

    def enter(cls: type[Keeping]) -> type[Keeping]:
        cls.name = name
        _KEEPINGS[name] = cls
        return cls

    return enter


def names() -> list[str]:
    """Every method's name, sorted. Imports none of them: the file's name is the method's."""
    return _files(methods)


def keepings() -> list[str]:
    """The name of every way of keeping, sorted. Imports none of them."""
    return [name for name in _files(keeping) if name != "base"]


def get(name: str, **options: Any) -> SlowMethod:
    """The method called ``name`` with its own options; only the files that it needs are imported.

    ``fisher+interpolate+head`` is the method `head` with two ways of keeping. An option goes to the part that has it;
    where several have it, it is written with its part, ``**{"interpolate.share": 0.3}``.

    Raises:
        ValueError: no such method or way of keeping, and the message lists those there are; one in the wrong place or
            twice; an option that no part has, or several; or a value that the part refuses.
    """
    *before, last = name.split("+")
    parts: dict[str, Callable[..., Any]] = {}
    for part in before:
        if part in parts:
            raise ValueError(f"slow method {name!r}: {part!r} stands there twice; name it once")
        if part in names():
            raise ValueError(
                f"slow method {name!r}: {part!r} is a method, and only ways of keeping ({', '.join(keepings())}) may "
                "stand before a '+'; name one method, at the end"
            )
        parts[part] = _find("way of keeping", part, keepings(), keeping, _KEEPINGS)
    if last in keepings():
        raise ValueError(f"slow method {name!r}: {last!r} only keeps; name what to learn after it, as '{name}+head'")
    parts[last] = _find("slow method", last, names(), methods, _METHODS)
    if before and hasattr(parts[last], "open"):
        raise ValueError(f"slow method {name!r}: {last!r} is exact, there is no burst to keep; use {last!r} alone")
    given = _deal(name, parts, options)
    built = {part: make(**given[part]) for part, make in parts.items()}
    method = built.pop(last)
    assert isinstance(method, SlowMethod)
    return KeptMethod(name, list(built.values()), method) if built else method


def _files(package: ModuleType) -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _find(kind: str, name: str, known: list[str], package: ModuleType, table: dict[str, type[Any]]) -> type[Any]:
    """The class of a part by its name."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"{kind} {name!r} does not exist; {advice}")
    importlib.import_module(f"{package.__name__}.{name}")
    return table[name]


def _deal(name: str, parts: dict[str, Callable[..., Any]], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each part's own options."""
    known = {part: list(inspect.signature(make).parameters) for part, make in parts.items()}
    dealt: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for written, value in options.items():
        said, _, option = written.rpartition(".")
        if said and said not in parts:
            raise ValueError(
                f"slow method {name!r} has no part {said!r} for option {written!r}; it has {', '.join(parts)}"
            )
        owners = [part for part, there in known.items() if option in there and said in ("", part)]
        if not owners:
            everything = list(dict.fromkeys(one for part in parts if said in ("", part) for one in known[part]))
            near = difflib.get_close_matches(option, everything, n=1)
            there = f"it has {', '.join(everything)}" if everything else "it has none"
            raise ValueError(
                f"slow method {name!r} has no option {written!r}; {f'did you mean {near[0]!r}?' if near else there}"
            )
        if len(owners) > 1:
            ways = " or ".join(f"{part}.{option}" for part in owners)
            raise ValueError(f"slow method {name!r}: several parts have the option {option!r}; write {ways}")
        if option in dealt[owners[0]]:
            raise ValueError(f"slow method {name!r}: option {option!r} of {owners[0]!r} is given twice")
        dealt[owners[0]][option] = value
    return dealt
