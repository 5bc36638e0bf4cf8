"""LAE: an online model learns, an offline one follows it slowly, both predict."""

from __future__ import annotations

from torch import nn

from adapters.slow.fork import fork
from adapters.slow.keeping.base import Keeping, share_of, values_now, with_values
from adapters.slow.offline import PREFIX, detach_offline, offline_of
from adapters.slow.registry import register_keeping
from adapters.slow.trainee import Given, Trainee, Values


@register_keeping("lae")
class Lae(Keeping):
    """offline <- momentum offline + (1 - momentum) online after each burst; the answer is the surer of both.

    The online model starts where the last burst left it and answers alone while it trains. The offline one starts at
    the model as it was served without one. Gao et al., "A Unified Continual Learning Framework with General
    Parameter-Efficient Tuning" (learning, accumulation, ensemble), ICCV 2023; they fold at each step by 0.9999.

    The delta holds the online values by name and the offline ones as ``offline::NAME``. Serving costs a second forward
    pass. Where labels changed their meaning the offline model goes on answering by the old one: use it for inputs that
    moved.

    Args:
        momentum: share of the offline model that a burst leaves, in [0, 1).
    """

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = share_of("momentum", momentum, closed=False)

    def start(self, model: nn.Module) -> nn.Module:
        """The online model alone."""
        if offline_of(model) is None:
            return model
        online = fork(model, {})
        detach_offline(online)
        return online

    def keep(self, model: nn.Module, given: Given, trainee: Trainee) -> Trainee:
        """Read off both."""
        start = values_now(trainee)
        old = offline_of(model)
        if old is not None:
            # What the bursts so far did not move is not in the offline model's own values, or is what it was packed as.
            known = dict(old.named_parameters(remove_duplicate=False))
            start = {name: known[name].detach().clone() if name in known else new for name, new in start.items()}

        def values() -> Values:
            online = trainee.values()
            offline = {PREFIX + name: start[name].lerp(new, 1 - self.momentum) for name, new in online.items()}
            return online | offline

        return with_values(trainee, values)
