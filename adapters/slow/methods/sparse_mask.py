"""The few weights that the loss depends on most."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from adapters.slow.fork import fork
from adapters.slow.losses import row_losses
from adapters.slow.registry import SelectingMethod, register
from adapters.slow.reparametrised import Reparametrised, trainee_of
from adapters.slow.select import everything
from adapters.slow.trainee import Given, Trainee, Values, private_copy, ready

Score = Literal["fisher", "gradient"]

ROWS_AT_ONCE = 64
"""Rows of one backward pass of the score ``gradient``."""


@register("sparse_mask")
class SparseMask(SelectingMethod):
    """Moves the ``share`` of all weights with the largest score, chosen at the burst's start; the others stay.

    The score of weight i is the diagonal of the empirical Fisher information, F_i = mean over rows (dL/dw_i)^2, on rows
    of the memory: it asks which weights the new rows pull at, each in its own direction. ``score="gradient"`` takes
    |dL/dw_i| of the mean loss instead, one backward pass for many rows. Sung, Nair, Raffel, "Training Neural Networks
    with Fixed Sparse Masks" (FISH mask), NeurIPS 2021; Liu et al., "Refining Salience-Aware Sparse Fine-Tuning
    Strategies for Language Models" (SPEFT), ACL 2025.

    The optimiser is given the chosen values alone, so neither momentum nor weight decay can move another, and its state
    is as small as the mask. Deltas ship as indices and values. The Fisher costs one backward pass per row.

    Args:
        share: of all floating-point weights, in (0, 1]; at least one weight.
        score: fisher or gradient.
        rows: drawn from the memory for the score.
    """

    missing = "the model has no floating-point parameters; there is nothing to learn"

    def __init__(self, share: float = 0.01, score: Score = "fisher", rows: int = 128) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; it must be in (0, 1]")
        if score not in get_args(Score):
            raise ValueError(f"score is {score!r}; it must be one of {', '.join(get_args(Score))}")
        if rows < 1:
            raise ValueError(f"rows is {rows}; it must be 1 or more")
        self.share, self.score, self.rows = share, score, rows

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Every floating-point parameter may be chosen from."""
        return everything(model)

    def begin(self, model: nn.Module, given: Given) -> Trainee:
        """Score every weight on rows of the memory and clone the best."""
        module, moved = private_copy(model, self.parameters(model))
        with torch.inference_mode(False), torch.enable_grad():
            scores = self._scores(module, list(moved.values()), given)
        flat = torch.cat([score.flatten() for score in scores])
        chosen = flat.topk(max(1, round(self.share * len(flat)))).indices.sort().values
        ends = torch.tensor([score.numel() for score in scores]).cumsum(0).tolist()
        sites = {}
        for name, end, score in zip(moved, ends, scores, strict=True):
            start = end - score.numel()
            inside = chosen[(chosen >= start) & (chosen < end)] - start
            if len(inside):
                sites[name] = inside
        # The clones were for the score: what doesn't move is shared with the served model again.
        return trainee_of(_Masked(ready(fork(model, {})), sites))

    def _scores(self, module: nn.Module, leaves: list[nn.Parameter], given: Given) -> list[Tensor]:
        x, y = given.draw(self.rows)
        fisher = self.score == "fisher"
        sums = [torch.zeros(leaf.shape, dtype=torch.float32, device=leaf.device) for leaf in leaves]
        size = 1 if fisher else ROWS_AT_ONCE
        for start in range(0, len(x), size):
            loss = row_losses(module(x[start : start + size]), y[start : start + size].cpu().numpy(), given.task).sum()
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square() if fisher else gradient.float()
        # A weight with no finite score is not chosen before another; the burst finds the loss that is not finite.
        return [torch.nan_to_num(total.abs(), nan=0.0, posinf=0.0) for total in sums]


class _Masked(Reparametrised):
    def __init__(self, twin: nn.Module, sites: dict[str, Tensor]) -> None:
        super().__init__(twin)
        given = dict(twin.named_parameters())
        self._given = {name: given[name].detach() for name in sites}
        self._index = sites
        self.chosen = nn.ParameterList([self._given[name].flatten()[index] for name, index in sites.items()])

    def weights(self) -> Values:
        """The chosen values among the others."""
        out = {}
        for (name, index), chosen in zip(self._index.items(), self.chosen, strict=True):
            given = self._given[name]
            out[name] = given.flatten().index_copy(0, index, chosen).view(given.shape)
        return out
