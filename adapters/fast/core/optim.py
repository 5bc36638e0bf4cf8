"""Optimisers of one vector: a step can be declined on the device, and the state is plain.

SGD and Adam are written out, equal to torch's: on a few hundred values the book-keeping of ``torch.optim`` takes
longer than the network's forward pass, and its fused kernels leave a momentum uninitialised when the first step is
declined.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class VectorOptimizer(ABC):
    """Moves ``theta`` (P,) in place."""

    def __init__(self, theta: Tensor) -> None:
        self.theta = theta

    @abstractmethod
    def step(self, gradient: Tensor, wanted: Tensor) -> None:
        """Step by ``gradient`` (P,) if the 0-d bool ``wanted`` is true, else leave theta and the state as they are."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Copy of what a step changes, theta included."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; ValueError when shapes differ."""


# The methods of the subclasses are documented here above.
# ruff: noqa: D102


class _Written(VectorOptimizer):
    """An optimiser whose whole state is ``self.tensors``; `_next` computes their successors."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__(theta)
        self.tensors: dict[str, Tensor] = {"theta": theta}

    @abstractmethod
    def _next(self, gradient: Tensor) -> dict[str, Tensor]:
        """Return the successor of each of ``self.tensors``."""

    def step(self, gradient: Tensor, wanted: Tensor) -> None:
        for name, new in self._next(gradient).items():
            torch.where(wanted, new, self.tensors[name], out=self.tensors[name])

    def state_dict(self) -> dict[str, Any]:
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _restore(self.tensors, state)


class Sgd(_Written):
    """v ← momentum·v + gradient, theta ← theta − lr·v."""

    def __init__(self, theta: Tensor, *, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(theta)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.tensors["momentum"] = torch.zeros_like(theta)

    def _next(self, gradient: Tensor) -> dict[str, Tensor]:
        if self.weight_decay:
            gradient = gradient.add(self.theta, alpha=self.weight_decay)
        momentum = gradient.add(self.tensors["momentum"], alpha=self.momentum)
        return {"momentum": momentum, "theta": self.theta.add(momentum, alpha=-self.lr)}


class Adam(_Written):
    """Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015; ε = 1e-8, weight decay in the gradient."""

    def __init__(
        self,
        theta: Tensor,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(theta)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self._log_betas = torch.tensor(betas, dtype=torch.float64, device=theta.device).log()
        self.tensors["mean"] = torch.zeros_like(theta)
        self.tensors["square"] = torch.zeros_like(theta)
        self.tensors["steps"] = torch.zeros((), dtype=torch.float64, device=theta.device)

    def _next(self, gradient: Tensor) -> dict[str, Tensor]:
        if self.weight_decay:
            gradient = gradient.add(self.theta, alpha=self.weight_decay)
        mean = torch.lerp(self.tensors["mean"], gradient, 1.0 - self.betas[0])
        square = (self.tensors["square"] * self.betas[1]).addcmul_(gradient, gradient, value=1.0 - self.betas[1])
        steps = self.tensors["steps"] + 1.0
        one, two = torch.expm1(self._log_betas * steps).neg_().to(gradient.dtype)  # 1 − βᵗ, exact for small t too
        update = (mean / one).div_((square / two).sqrt_().add_(1e-8))
        return {"mean": mean, "square": square, "steps": steps, "theta": self.theta.add(update, alpha=-self.lr)}


class FromLibrary(VectorOptimizer):
    """An optimiser of ``pytorch_optimizer`` by name; whether to step is decided on the host."""

    def __init__(self, theta: Tensor, name: str, **wanted: Any) -> None:
        """Take those of the ``wanted`` options that the optimiser has; ValueError when there is none of this name."""
        import pytorch_optimizer  # takes seconds, so only for those who ask for it

        super().__init__(theta)
        try:
            factory = pytorch_optimizer.load_optimizer(name)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"no optimiser is called {name!r}: sgd, adam or a name of pytorch_optimizer") from error
        accepted = inspect.signature(factory).parameters
        options = {key: value for key, value in wanted.items() if key in accepted}
        self._parameter = nn.Parameter(theta)  # shares the memory
        self._factory: Callable[..., torch.optim.Optimizer] = factory
        self._options = options
        self._optimizer = self._factory([self._parameter], **options)

    def step(self, gradient: Tensor, wanted: Tensor) -> None:
        if bool(wanted):
            self._parameter.grad = gradient
            self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        group = {key: value for key, value in self._optimizer.param_groups[0].items() if key != "params"}
        state = self._optimizer.state.get(self._parameter, {})
        return {"theta": self.theta.clone(), "group": _plain(group), "state": _plain(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _restore({"theta": self.theta}, state)
        self._parameter.grad = None
        self._optimizer = self._factory([self._parameter], **self._options)  # anew: some keep more than their state
        group = self._optimizer.param_groups[0]
        group.update({key: self._like(group.get(key), value) for key, value in state["group"].items()})
        if state["state"]:
            self._optimizer.state[self._parameter] = self._like(None, state["state"])

    def _like(self, present: Any, value: Any) -> Any:
        """Copy a stored value onto theta's device; a list becomes a tuple where the optimiser has one."""
        if isinstance(value, Tensor):
            return value.to(self.theta.device, copy=True)
        if isinstance(value, dict):
            return {key: self._like(None, inner) for key, inner in value.items()}
        copied = _plain(value)
        return tuple(copied) if isinstance(present, tuple) else copied


def make_optimizer(
    theta: Tensor, name: str, *, lr: float | None, betas: tuple[float, float], momentum: float, weight_decay: float
) -> VectorOptimizer:
    """Return "sgd", "adam", or the optimiser of this name in ``pytorch_optimizer``, for theta (P,).

    ``lr=None`` is 1e-3 for the first two and the library's own default for the others. ``betas`` and ``momentum`` go
    to those that have them. ValueError when there is no such optimiser.
    """
    rate: dict[str, Any] = {} if lr is None else {"lr": lr}
    if name == "sgd":
        return Sgd(theta, momentum=momentum, weight_decay=weight_decay, **rate)
    if name == "adam":
        return Adam(theta, betas=betas, weight_decay=weight_decay, **rate)
    return FromLibrary(theta, name, betas=betas, momentum=momentum, weight_decay=weight_decay, **rate)


def _restore(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    values = {name: torch.as_tensor(state[name]) for name in tensors}
    for name, value in values.items():
        if value.shape != tensors[name].shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(tensors[name].shape)}")
    for name, value in values.items():
        tensors[name].copy_(value)


def _plain(value: Any) -> Any:
    """Copy with tensors cloned, tuples as lists, keys as strings."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
