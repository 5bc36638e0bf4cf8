"""Scale and shift of every hidden channel."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from adapters.slow.fork import fork
from adapters.slow.registry import SlowMethod, register
from adapters.slow.reparametrised import Reparametrised, trainee_of
from adapters.slow.select import NORMS, hidden_layers, last_linear
from adapters.slow.trainee import Given, Trainee, Values, ready


@dataclass(frozen=True)
class _Site:
    """One layer, by the names of what it moves."""

    weight: str
    bias: str | None
    """Where the shift goes; None: there is no place for one."""
    scaled_bias: bool
    """Whether ``bias`` is the layer's own, which the scale applies to as well."""


@register("film")
class Film(SlowMethod):
    """Scales and shifts every output channel c of the hidden layers before their nonlinearity: g_c (W_c x + b_c) + s_c.

    Merged into the weights, W_c' = g_c W_c and b_c' = g_c b_c + s_c, so that serving costs nothing; at the start g = 1
    and s = 0. It repairs what ``norm_affine`` repairs (ageing sensors, light), also in models without normalisation
    layers, with two numbers per channel. Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI
    2018; Lian et al., "Scaling & Shifting Your Features", NeurIPS 2022.

    Hidden layers are ``nn.Linear`` and ``nn.Conv1d`` to ``nn.Conv3d`` but the head. A layer without bias leaves its
    shift to the normalisation layer defined next, if that has a bias of as many channels (the usual pair); else it is
    scaled only. Not moved: recurrent layers, weights that are computed (pruned, weight norm), a weight tied to the
    head's. A weight tied between two layers is scaled once.

    Args:
        train_head: move the head's weight and bias beside, for labels whose meaning moved.
    """

    def __init__(self, train_head: bool = True) -> None:
        self.train_head = train_head

    def check(self, model: nn.Module) -> str | None:
        """Why no channel can be scaled; None when some can."""
        if self._sites(model):
            return None
        return self.refuse("the model has no hidden nn.Linear or nn.Conv1d to nn.Conv3d layer; use 'head' or 'full'")

    def begin(self, model: nn.Module, given: Given) -> Trainee:
        """Scales of one and shifts of zero over a fork; the head cloned."""
        if (problem := self.check(model)) is not None:
            raise ValueError(problem)
        head = last_linear(model) if self.train_head else {}
        return trainee_of(_Filmed(ready(fork(model, {})), self._sites(model), head))

    @staticmethod
    def _sites(model: nn.Module) -> list[_Site]:
        """One per weight; a parameter tied to several names goes by its first."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        taken = {id(parameter) for parameter in last_linear(model).values()}
        leaves = [module for module in model.modules() if not any(True for _ in module.children())]
        following = {id(leaf): after for leaf, after in pairwise(leaves)}

        def free(parameter: Tensor | None) -> bool:
            return id(parameter) in names and id(parameter) not in taken

        sites = []
        for layer in hidden_layers(model).values():
            # Not by attribute: a computed weight is a tensor there, or a parameter of another name.
            weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
            if weight is None or not weight.is_floating_point() or not free(weight):
                continue
            if bias is not None and not free(bias):
                continue  # tied to a bias that has moved: it can't be scaled again
            own = bias is not None
            after = following.get(id(layer))
            if bias is None and isinstance(after, NORMS):
                bias = after._parameters.get("bias")
                bias = bias if bias is not None and free(bias) and bias.shape == weight.shape[:1] else None
            taken |= {id(weight), id(bias)}
            sites.append(_Site(names[id(weight)], None if bias is None else names[id(bias)], own))
        return sites


class _Filmed(Reparametrised):
    def __init__(self, twin: nn.Module, sites: list[_Site], head: dict[str, nn.Parameter]) -> None:
        super().__init__(twin)
        self._given = {name: parameter.detach() for name, parameter in twin.named_parameters()}
        self._sites = sites
        self._head = list(head)
        self.head = nn.ParameterList([value.detach().clone() for value in head.values()])
        # Half precision has no step near one that is fine enough to learn by.
        like = [self._given[site.weight] for site in sites]
        self.scales = nn.ParameterList(
            [torch.ones(len(w), dtype=torch.promote_types(w.dtype, torch.float32), device=w.device) for w in like]
        )
        self.shifts = nn.ParameterList(
            [torch.zeros_like(scale) for scale, site in zip(self.scales, sites, strict=True) if site.bias is not None]
        )

    def weights(self) -> Values:
        """Merged weights and biases of the filmed layers, and the head's."""
        # A copy of each: a result must not change when training goes on.
        out = {name: leaf.clone() for name, leaf in zip(self._head, self.head, strict=True)}
        shifts = iter(self.shifts)
        for site, scale in zip(self._sites, self.scales, strict=True):
            weight = self._given[site.weight]
            out[site.weight] = (weight * scale.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
            if site.bias is not None:
                bias = self._given[site.bias]
                out[site.bias] = ((bias * scale if site.scaled_bias else bias) + next(shifts)).to(bias.dtype)
        return out
