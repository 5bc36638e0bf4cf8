"""The slow methods by name. A method is one file in ``adapters/slow/methods``, named as the method."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from adapters.slow import methods
from adapters.slow.trainee import Given, Trainee, of_clones, private_copy

_METHODS: dict[str, type[SlowMethod]] = {}


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


def register(name: str) -> Callable[[type[SlowMethod]], type[SlowMethod]]:
    """Class decorator: enters a method under ``name``, which must be its file's name too."""

    def enter(cls: type[SlowMethod]) -> type[SlowMethod]:
        cls.name = name
        _METHODS[name] = cls
        return cls

    return enter


def names() -> list[str]:
    """Every method's name, sorted. Imports none of them: the file's name is the method's."""
    return sorted(module.name for module in pkgutil.iter_modules(methods.__path__))


def get(name: str, **options: Any) -> SlowMethod:
    """The method called ``name`` with its own options; only its own file is imported.

    Raises:
        ValueError: no such method, and the message lists those there are; or an option that it does not have.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
        raise ValueError(f"slow method {name!r} does not exist; {advice}")
    importlib.import_module(f"{methods.__name__}.{name}")
    method = _METHODS[name]
    known = list(inspect.signature(method).parameters)
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(
                f"slow method {name!r} has no option {option!r}; {f'did you mean {near[0]!r}?' if near else there}"
            )
    return method(**options)
