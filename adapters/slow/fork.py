"""A second module over the same tensors: structure copied, memory shared, only what moves is new."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.slow.inserted import Kind, kind_of

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
KEPT = ("torch.nn.utils", "adapters.slow")
"""Packages whose hooks are part of a model's function."""


def _foreign_hooks(model: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """Hooks that are no part of the model's function, as (table, key).

    torch's own (pruning, weight and spectral norm) compute the weight, ours call what a delta inserted: they stay. The
    others watch the served traffic: a copy that trains must not call them, and they may hold what can't be copied.
    """
    for module in model.modules():
        for table in (getattr(module, name) for name in HOOKS):
            for key, hook in list(table.items()):
                if not type(hook).__module__.startswith(KEPT):
                    yield table, key


def fork(model: nn.Module, replaced: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module of the same structure that shares every tensor but the ``replaced`` parameters.

    Tied parameters stay tied. Training flags are copied and can be set without touching ``model``; hooks that come
    neither from torch nor from a delta are left out.

    Args:
        model: the module to copy; not changed.
        replaced: new parameters by the names of ``model.named_parameters(remove_duplicate=False)``.

    Raises:
        ValueError: a name is not the model's, or a shape differs.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*known.values(), *model.buffers())}
    for module in model.modules():
        memo |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
    for table, key in _foreign_hooks(model):
        memo[id(table[key])] = table[key]
    for name, new in replaced.items():
        if name not in known:
            raise ValueError(f"the model has no parameter {name!r}; the delta was made for another architecture")
        if new.shape != known[name].shape:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(known[name].shape)} in the model and {tuple(new.shape)} in the "
                "delta; the delta was made for another architecture"
            )
        memo[id(known[name])] = new
    twin = copy.deepcopy(model, memo)
    for table, key in _foreign_hooks(twin):
        del table[key]
    return twin


def apply_delta(model: nn.Module, delta: Mapping[str, Tensor]) -> nn.Module:
    """A new module with the values of ``delta`` in place of its own; all other tensors are shared with ``model``.

    A reserved name that the model doesn't have (`adapters.slow.inserted`) inserts a module.

    Args:
        model: the module that the delta was made from; not changed.
        delta: new values (not differences) by parameter name; copied to the parameter's device and type.

    Raises:
        ValueError: a name is neither the model's nor reserved, or a shape differs.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    replaced: dict[str, nn.Parameter] = {}
    added: dict[Kind, dict[str, Tensor]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, value in delta.items():
            old = known.get(name)
            if old is None and (kind := kind_of(name)) is not None:
                added.setdefault(kind, {})[name] = value
                continue
            like = value if old is None or old.shape != value.shape else old
            # The model's own memory layout, whatever the delta's: kernels round differently on a transposed weight, and
            # a version restored from a checkpoint must compute what it did before, to the bit.
            new = torch.empty_like(like, requires_grad=False).copy_(value)
            replaced[name] = nn.Parameter(new, requires_grad=old is not None and old.requires_grad)
        twin = fork(model, replaced)
        for kind, values in added.items():
            kind.attach(twin, model, values)
    return twin
