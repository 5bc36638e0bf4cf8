"""What `make bench-kafka` sends and serves: two sizes of record, the model of each, its bundle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn

FEATURES = {("raw", 200): 50, ("raw", 4096): 1024, ("json", 200): 28, ("json", 4096): 590}
"""Numbers in a record, by codec and about how many bytes its value has."""
CLASSES = 4
POOL = 2_048
"""Different rows in a stream; they come round and round."""
SPREAD = 0.5
"""Length of a class's mean; each number has a noise of 1 around it."""


def build(features: int) -> nn.Module:
    """The simulator's perceptron for another width: x (B, features) to logits (B, 4)."""
    from daemon.streams import simmodel

    return simmodel.build(features, CLASSES)


build_raw_200 = partial(build, FEATURES["raw", 200])
build_raw_4096 = partial(build, FEATURES["raw", 4096])
build_json_200 = partial(build, FEATURES["json", 200])
build_json_4096 = partial(build, FEATURES["json", 4096])


def rows(features: int, count: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (count, features) float32 of a world that never drifts, and their classes (count,)."""
    means = np.random.default_rng(1).standard_normal((CLASSES, features)) * SPREAD
    rng = np.random.default_rng(1_000 + draw)
    y = rng.integers(CLASSES, size=count)
    return (means[y] + rng.standard_normal((count, features))).astype(np.float32), y


@dataclass(frozen=True)
class Stream:
    """Records of one codec and size; the key is the record's name, which its answer bears too."""

    codec: str
    value_bytes: int

    @property
    def features(self) -> int:
        """Numbers in a record."""
        return FEATURES[self.codec, self.value_bytes]

    @property
    def factory(self) -> str:
        """What builds its model, as HOMEOSTAT_FACTORY wants it."""
        return f"{__name__}:build_{self.codec}_{self.value_bytes}"

    def values(self) -> list[bytes]:
        """``POOL`` values; for the codec `json` without their id, which `records` puts before them."""
        x, _ = rows(self.features, POOL, draw=3)
        if self.codec == "raw":
            return [row.tobytes() for row in x]
        return [b'"x":[' + b",".join(b"%.3f" % value for value in row) + b"]}" for row in x.tolist()]

    def records(self, names: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Key and value of record after record, one for each name."""
        pool, raw = self.values(), self.codec == "raw"
        for number, name in enumerate(names):
            value = pool[number % POOL]
            yield name, value if raw else b'{"id":"%s",%s' % (name, value)

    def make_bundle(self, folder: Path) -> Path:
        """Train its model and pack it below ``folder``; the bundle's folder."""
        import torch
        from torch import nn

        from daemon.packing import pack

        x, y = rows(self.features, 4_096, draw=0)
        torch.manual_seed(0)
        model = build(self.features)
        parameters = list(model.parameters())
        inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
        for step in range(96):
            part = slice(step % 32 * 128, step % 32 * 128 + 128)
            loss = nn.functional.cross_entropy(model(inputs[part]), labels[part])
            with torch.no_grad():
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.sub_(0.05 * gradient)
        path = folder / f"bundle-{self.codec}-{self.value_bytes}"
        reference, calibration = rows(self.features, 4_096, draw=1), rows(self.features, 8_192, draw=2)
        pack(
            path,
            model=model.eval(),
            factory=self.factory,
            x=reference[0],
            y=reference[1],
            calibration=calibration,
            watch=("cusum",),  # the default detector; the others take a minute to calibrate
        )
        return path
