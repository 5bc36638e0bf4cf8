"""How the factors B A of a low-rank adapter may start: from the weights, or from what the layer is fed.

Each function gives B (rows, rank) and A (rank, columns) in float64. A start other than B = 0 is taken off the adapter's
product, so that the burst starts at the model whatever the start is: W' = W + (alpha / rank) (B A - B₀ A₀).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 1e-4
"""Share of its mean eigenvalue that is added to a covariance before it is inverted: few rows leave it singular."""


class Factors(NamedTuple):
    """The two thin matrices."""

    b_RK: Tensor
    a_KC: Tensor


def pissa(weight_RC: Tensor, rank: int) -> Factors:
    """The largest singular triples of W: training moves its principal part.

    Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    NeurIPS 2024.
    """
    u, s, v = torch.linalg.svd(weight_RC.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return Factors(u[:, :rank] * root, root[:, None] * v[:rank])


def olora(weight_RC: Tensor, rank: int) -> Factors:
    """The leading part of W = Q R: B has orthonormal columns.

    Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024.
    """
    q, r = torch.linalg.qr(weight_RC.double())
    return Factors(q[:, :rank], r[:rank])


def eva(weight_RC: Tensor, rank: int, second_CC: Tensor) -> Factors:
    """A spans the directions in which the layer's inputs vary most, B = 0.

    Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024. Every layer keeps its
    rank: the paper's handing of ranks from layer to layer is left out.

    Args:
        weight_RC: the weights; only their shape is looked at.
        rank: of the adapter.
        second_CC: Σ x xᵀ of the layer's inputs; its eigenvectors are the right singular vectors of the inputs.
    """
    _, vectors = torch.linalg.eigh(second_CC.double())
    leading = vectors.flip(1)[:, :rank].T
    return Factors(leading.new_zeros(len(weight_RC), rank), leading)


def corda(weight_RC: Tensor, rank: int, second_CC: Tensor, *, keep: bool) -> Factors:
    """Singular triples of W C for the covariance C of the layer's inputs, with C undone: U S (Vᵀ C⁻¹) = W.

    Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
    Parameter-Efficient Fine-tuning", NeurIPS 2024.

    Args:
        weight_RC: the weights.
        rank: of the adapter.
        second_CC: Σ x xᵀ of the layer's inputs, on the rows to learn from, or with ``keep`` on those to keep.
        keep: the smallest triples move, which matter least to these inputs; else the largest.
    """
    c_CC = second_CC.double()
    c_CC = c_CC / c_CC.diagonal().mean().clamp(min=1e-30)
    c_CC = c_CC + DAMPING * torch.eye(len(c_CC), dtype=c_CC.dtype, device=c_CC.device)
    u, s, v = torch.linalg.svd(weight_RC.double() @ c_CC, full_matrices=False)
    chosen = slice(len(s) - rank, None) if keep else slice(rank)
    root = s[chosen].sqrt()
    return Factors(u[:, chosen] * root, root[:, None] * torch.linalg.solve(c_CC, v[chosen].T).T)
