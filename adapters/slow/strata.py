"""Which slot a row gets in the balanced part of a memory, and which row gives way to it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

Stratum = tuple[int, int]
"""(class, segment); the class is 0 for regression."""


class BalancedSlots:
    """Hands out ``capacity`` slots; when all are taken, a random row of the largest stratum gives way.

    Chrysakis & Moens, "Online Continual Learning from Imbalanced Data", ICML 2020. Unlike theirs it always takes the
    new row, so that within a stratum old rows fade instead of weighing as much as new ones. The largest stratum never
    grows once the slots are full, so a stratum holds at least ``min(rows it was offered, largest - 1)``.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._members: dict[Stratum, list[int]] = {}
        self._rng = np.random.default_rng(seed)

    def place(self, stratum: Stratum) -> int:
        """The slot in [0, capacity) for a new row of ``stratum``."""
        if self.used < self.capacity:
            slot = self.used
            self.used += 1
        else:
            slot = self._evict(stratum)
        self._members.setdefault(stratum, []).append(slot)
        return slot

    def _evict(self, incoming: Stratum) -> int:
        # On a tie the new row's own stratum gives way, else the highest (class, segment): never the order of a dict.
        largest = max(self._members, key=lambda stratum: (len(self._members[stratum]), stratum == incoming, stratum))
        members = self._members[largest]
        chosen = int(self._rng.integers(len(members)))
        members[chosen], members[-1] = members[-1], members[chosen]
        slot = members.pop()
        if not members:
            del self._members[largest]
        return slot

    def sizes(self) -> dict[Stratum, int]:
        """Rows held by stratum."""
        return {stratum: len(members) for stratum, members in self._members.items()}

    def state_dict(self) -> dict[str, Any]:
        """The slots by stratum, in their order, and the state of the random numbers."""
        strata = [[*stratum, len(members)] for stratum, members in self._members.items()]
        slots = [slot for members in self._members.values() for slot in members]
        return {
            "strata": np.array(strata, np.int64).reshape(-1, 3),
            "slots": np.array(slots, np.int64),
            # As text: the generator's integers have 128 bits.
            "rng": json.dumps(self._rng.bit_generator.state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        slots = state["slots"].tolist()
        self._members = {}
        self.used = len(slots)
        for label, segment, size in state["strata"].tolist():
            self._members[label, segment], slots = slots[:size], slots[size:]
        self._rng.bit_generator.state = json.loads(state["rng"])
