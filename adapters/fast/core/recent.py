"""What the frozen model made of the latest rows, so that their late labels need no forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapters.fast.core.seen import I64

RECENT_ROWS = 4096
MOST_BYTES = 64 << 20


class RecentRows:
    """A ring of outputs (V,) and features (D,) of rows by their numbers, laid out when the first one comes."""

    def __init__(self) -> None:
        self._end = self._first = 0
        self._values: Tensor | None = None
        self._outputs = 0

    def put(self, first: int, outputs: Tensor, features: Tensor) -> None:
        """Remember rows that begin with number ``first``; what does not follow the rows before begins anew."""
        both = torch.cat([outputs.float().reshape(len(outputs), -1), features.float()], 1)
        if self._values is None or self._values.shape[1] != both.shape[1]:
            places = max(1, min(RECENT_ROWS, MOST_BYTES // (4 * both.shape[1])))
            self._values, self._outputs = both.new_zeros(places, both.shape[1]), both.shape[1] - features.shape[1]
            self._first = first
        elif first != self._end:
            self._first = first
        kept = min(len(both), len(self._values))
        self._end = first + len(both)
        places_B = torch.arange(self._end - kept, self._end, device=both.device) % len(self._values)
        self._values[places_B] = both[-kept:]

    def take(self, numbers: I64) -> tuple[Tensor, Tensor] | None:
        """Outputs (n, V) and features (n, D) of rows by number; None unless all are there."""
        if self._values is None or not len(numbers):
            return None
        if numbers.min() < max(self._first, self._end - len(self._values)) or numbers.max() >= self._end:
            return None
        places = torch.from_numpy(numbers % len(self._values)).to(self._values.device)
        rows = self._values[places]
        return rows[:, : self._outputs], rows[:, self._outputs :]

    def forget(self) -> None:
        """Forget everything."""
        self._first, self._values = self._end, None

    def state(self) -> dict[str, Any]:
        """Return a copy of all that there is."""
        values = None if self._values is None else self._values.clone()
        return {"first": self._first, "end": self._end, "values": values, "outputs": self._outputs}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state` gave, on the model's device."""
        self._first, self._end, self._outputs = int(state["first"]), int(state["end"]), int(state["outputs"])
        values = state["values"]
        self._values = None if values is None else torch.as_tensor(values).to(device, copy=True)
