"""The slow methods by name. A method is one file in ``adapters/slow/methods``, named as the method."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import nn

from adapters.slow import methods

_METHODS: dict[str, type[SlowMethod]] = {}


class SlowMethod(ABC):
    """Says which parameters of a model a burst may move. Holds no state of its own."""

    name: ClassVar[str]
    missing: ClassVar[str]
    """What a model lacks that this method can't serve, and what to use instead: the text of the error."""

    @abstractmethod
    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that may move, by their name in ``state_dict``; empty when the model has none."""

    def check(self, model: nn.Module) -> str | None:
        """Why this method can't serve ``model`` and what to use instead; None when it can."""
        return None if self.select(model) else f"slow method {self.name!r}: {self.missing}"

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that may move, by their name in ``state_dict``.

        ``requires_grad`` is not looked at: a served model has it off everywhere.

        Raises:
            ValueError: nothing can move; the message says what to use instead.
        """
        if (problem := self.check(model)) is not None:
            raise ValueError(problem)
        return self.select(model)


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


def get(name: str) -> SlowMethod:
    """The method called ``name``; only its own file is imported.

    Raises:
        ValueError: no such method; the message lists those there are.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
        raise ValueError(f"slow method {name!r} does not exist; {advice}")
    importlib.import_module(f"{methods.__name__}.{name}")
    return _METHODS[name]()
