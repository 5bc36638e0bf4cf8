"""How much memory a burst will take, and whether an error means that there was none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapters.slow.trainee import Trainee

COPIES = 7
"""Tensors of the size of what moves: the clone, its gradient, four of Prodigy (the most of ours), the result."""


def needed_bytes(trainee: Trainee, x: Tensor, rows: int) -> int:
    """Estimate of the memory that gradient steps of ``rows`` rows take on the device, in bytes.

    What the forward pass of one and of two rows keeps for the backward one is counted and extended to ``rows``: that
    is linear in the rows. Twice that, because the gradients of the same tensors may all live at once; and the copies of
    what moves. Kernels' workspaces come on top: on the CPU a small convolution network grew by 105, 251 and 775 MB with
    16, 64 and 256 rows, where this says 55, 217 and 867. The allocator's own counters can't tell, on CUDA neither:
    serving allocates from the same pool at the same time.

    Args:
        trainee: what will be trained.
        x: (1 or more, *input_shape).
        rows: of one step.
    """
    one, two = _kept_bytes(trainee, x[:1]), _kept_bytes(trainee, x[:1].expand(2, *x.shape[1:]))
    activations = one + max(two - one, 0) * (rows - 1)
    moved = sum(leaf.numel() * leaf.element_size() for leaf in trainee.parameters)
    return 2 * activations + COPIES * moved


def _kept_bytes(trainee: Trainee, x: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward one; the model's own tensors do not count."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*trainee.module.parameters(), *trainee.module.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def same(tensor: Tensor) -> Any:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, same):
        # The output is held until all is counted: what it keeps must not be freed and its address given out again.
        output = trainee.module(x)
    del output
    return sum(kept.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch's allocator on the CPU and cuBLAS have no class for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "_STATUS_ALLOC_FAILED")
    )
