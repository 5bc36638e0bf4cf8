"""The classifier of the simulated sensor array: a small perceptron with batch normalisation."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from daemon.streams.simulator import AgeingArray

HIDDEN = 32

_RATE, _MOMENTUM = 0.05, 0.9
_FAULTY = 0.05  # share of the readings in training that are faulty


def build(sensors: int = AgeingArray.features, classes: int = AgeingArray.classes) -> nn.Module:
    """An untrained classifier: x (B, sensors) to logits (B, classes).

    The first layer, a batch normalisation, standardises the readings; the features (B, 32) are the input of
    ``classifier``.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        standardise=nn.BatchNorm1d(sensors),
        linear1=nn.Linear(sensors, HIDDEN),
        norm1=nn.BatchNorm1d(HIDDEN),
        relu1=nn.ReLU(),
        linear2=nn.Linear(HIDDEN, HIDDEN),
        norm2=nn.BatchNorm1d(HIDDEN),
        relu2=nn.ReLU(),
        classifier=nn.Linear(HIDDEN, classes),
    )
    return nn.Sequential(layers)


def train(seed: int = 7, *, rows: int = 8_192, epochs: int = 8, batch: int = 128) -> dict[str, Tensor]:
    """Weights of a classifier trained on the fresh array of that seed (``source_data``, draw 0).

    Stochastic gradient descent with momentum and a rate that falls linearly to zero; written out, because the first
    optimiser of ``torch.optim`` imports the compiler, 5 s of a first start. At the end the running statistics are set
    to those of all training rows under the final weights, since adaptation starts from them. Leaves the global random
    state as it was.

    Raises:
        ValueError: when ``batch`` is under 2 or over ``rows``.
    """
    if not 2 <= batch <= rows:
        raise ValueError(f"batch is {batch} and rows is {rows}: batch must be at least 2 and at most rows")
    readings, labels = AgeingArray(seed).source_data(rows)
    x, y = torch.from_numpy(readings), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        parameters = list(model.parameters())
        momenta = [torch.zeros_like(parameter) for parameter in parameters]
        steps = epochs * (rows // batch)
        for step in range(steps):
            if step % (rows // batch) == 0:
                order = torch.randperm(rows)
            chosen, order = order[:batch], order[batch:]
            # Some readings are another row's: no class may hang on one sensor, which can fail.
            faulty = torch.rand(batch, x.shape[1]) < _FAULTY
            inputs = torch.where(faulty, x[torch.randint(rows, (batch,))], x[chosen])
            loss = nn.functional.cross_entropy(model(inputs), y[chosen])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
                    momentum.mul_(_MOMENTUM).add_(gradient)
                    parameter.sub_(momentum, alpha=_RATE * (1.0 - step / steps))
    _set_statistics(model, x)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _set_statistics(model: nn.Module, x: Tensor) -> None:
    """Set the running statistics of every normalisation layer to those of ``x``, and leave the model in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
