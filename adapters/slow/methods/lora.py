"""LoRA: a low-rank change beside every weight matrix, with its starts and settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import nn

from adapters.slow.lora_family.init import corda, eva, olora, pissa
from adapters.slow.lora_family.inputs import second_moments
from adapters.slow.lora_family.lora import LowRank
from adapters.slow.lora_family.merged import Adapted, Merged
from adapters.slow.lora_family.method import at_least
from adapters.slow.losses import row_losses
from adapters.slow.registry import register
from adapters.slow.trainee import Given, Group, Trainee

Start = Literal["default", "pissa", "olora", "eva", "corda", "corda_keep"]

ROWS = 256
"""Rows that a start by data and the choice of layers look at."""
ROW_CAP = 10.0
"""ALLoRA: largest factor of a row's gradient, reached where the row is zero."""


@register("lora")
class Lora(LowRank):
    """Moves A and B of W' = W + (alpha / rank) B A for every hidden weight matrix W.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. Without dropout, which in bursts this
    short is noise and no regulariser.

    Args:
        rank: of the change; a matrix that is smaller gets what it can hold.
        alpha: scale; None: the rank, so that the product is not scaled.
        init: ``pissa`` (the part of W that is largest), ``default`` (A random, B = 0), ``olora``, ``eva``, ``corda``
            (the part that matters most to the rows to learn from), ``corda_keep`` (the part that matters least to the
            reference exemplars): see ``adapters.slow.lora_family.init``. Layers whose inputs can't be seen start by
            ``default`` under the last three. B = 0 is slow to leave in a burst: after 60 steps of Prodigy on swapped
            classes (6 models, frozen 69% error) 39% were still wrong with it, 13% with ``pissa``; on drifted sensors
            both are within 0.3 points. But a delta of ``default`` has half the rank of one of the others.
        alora: no scale, and each row's gradient divided by the row's norm, at most by a factor of 10: rows that
            start at zero get away from it at once. Huang & Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA
            Fatal Flaws", 2024.
        plus: B learns this many times faster than A. Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large
            Models", ICML 2024, use 16.
        freeze_a: only B moves: half the parameters, a tighter bound on what is learnt by heart. Zhu et al., "Asymmetry
            in Low-Rank Adapters of Foundation Models", ICML 2024.
        selective: only the layers with the largest gradient on rows of the memory are adapted,
        share: this share of them, at least one.
        train_head: the head's weight and bias move as they are.
        head: the head is adapted as the others are.
        layers: names of modules to adapt; none given: all.
        allow_start_off: see ``PeftMethod``; no start of this method needs it.
    """

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        init: Start = "pissa",
        alora: bool = False,
        plus: float = 1.0,
        freeze_a: bool = False,
        selective: bool = False,
        share: float = 0.5,
        train_head: bool = True,
        head: bool = False,
        layers: Sequence[str] = (),
        allow_start_off: bool = False,
    ) -> None:
        super().__init__(train_head=train_head, head=head, layers=layers, allow_start_off=allow_start_off)
        self.set_rank(rank, alpha)
        at_least("plus", plus, 1e-3)
        if init not in get_args(Start):
            raise ValueError(f"init is {init!r}; it must be one of {', '.join(get_args(Start))}")
        if not 0 < share <= 1:
            raise ValueError(f"share is {share!r}; it must be above 0 and at most 1")
        if alora and alpha is not None:
            raise ValueError(f"alpha is {alpha} and alora is on, which has no scale; leave alpha out")
        if freeze_a and plus != 1:
            raise ValueError(f"plus is {plus} and freeze_a is on: A has no rate then; leave plus out")
        self.init, self.alora, self.plus, self.freeze_a = init, alora, plus, freeze_a
        self.selective, self.share = selective, share

    def start(self, model: nn.Module, items: Sequence[Adapted], given: Given) -> None:
        """Set the factors, and take what they make off the adapter's product."""
        if self.init == "default":
            return
        seen = self._second_moments(model, items, given) if self.init in ("eva", "corda", "corda_keep") else {}
        for item in items:
            weight, rank, second = item.base_RC, self.size(item.target), seen.get(item.target.name)
            scale = self.alpha / self.rank
            if self.init == "pissa":
                b, a = pissa(weight / scale, rank)
            elif self.init == "olora":
                b, a = olora(weight, rank)
            elif second is None:
                continue
            elif self.init == "eva":
                b, a = eva(weight, rank, second)
            else:
                b, a = corda(weight / scale, rank, second, keep=self.init == "corda_keep")
            self.factor_b(item).copy_(b)
            self.factor_a(item).copy_(a)
            item.offset_RC = self.product(item).to(item.base_RC)

    def _second_moments(self, model: nn.Module, items: Sequence[Adapted], given: Given) -> dict[str, torch.Tensor]:
        x = given.reference[0][:ROWS] if self.init == "corda_keep" else given.draw(ROWS)[0]
        if not len(x):
            raise ValueError(
                self.refuse("init='corda_keep' needs reference exemplars, and there are none; use 'corda'")
            )
        return second_moments(model, [item.target for item in items], x)

    def groups(self, items: Sequence[Adapted]) -> list[Group]:
        """A at rate 1, or not at all, and B at ``plus``."""
        b = Group([self.factor_b(item) for item in items], self.plus)
        return [b] if self.freeze_a else [Group([self.factor_a(item) for item in items]), b]

    def begin(self, model: nn.Module, given: Given) -> Trainee:
        """As the others do, with the chosen layers only and the gradients scaled."""
        items, module = self.build(model, given)
        if self.selective:
            items = self._largest_gradients(items, module, given)
            module.keep(items)
        trainee = self.trainee(items, module)
        if self.alora:
            rows = [leaf for group in self.groups(items) for leaf in group.parameters]
            trainee.scale_gradients = lambda: divide_by_row_norms(rows)
        return trainee

    def _largest_gradients(self, items: list[Adapted], module: Merged, given: Given) -> list[Adapted]:
        x, y = given.draw(ROWS)
        leaves = [leaf for item in items for leaf in (self.factor_a(item), self.factor_b(item))]
        loss = row_losses(module(x), y.cpu().numpy(), given.task).mean()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        squares = [0.0 if g is None else float(g.double().square().sum().nan_to_num(0.0)) for g in gradients]
        norms = [a + b for a, b in zip(squares[::2], squares[1::2], strict=True)]
        kept = sorted(range(len(items)), key=lambda i: (-norms[i], i))[: max(1, round(self.share * len(items)))]
        return [items[i] for i in sorted(kept)]


@torch.no_grad()
def divide_by_row_norms(leaves: Sequence[nn.Parameter]) -> None:
    """g_i / sqrt(|w_i|² + 1 / cap²) for each row i: the factor is 1 / |w_i|, at most ``ROW_CAP``."""
    for leaf in leaves:
        if leaf.grad is not None:
            norm = leaf.square().sum(1, keepdim=True)
            leaf.grad.mul_((norm + ROW_CAP**-2).rsqrt())
