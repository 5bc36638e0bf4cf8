"""What was learnt for regimes that may come back, found again by the look of the features."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adapters.slow.signature import Signature, distance
from adapters.slow.trainee import Values

CLOSE = 1.75
"""Distance up to which a regime is the same. Simulated with 5 classes, 8 or 64 features, windows of 128 rows or more:
of one regime at most 2% are farther apart (5% in runs of 20 rows, where a miss costs an offer); of regimes a deviation
apart 95% are 2.5 or more away, half a deviation apart 1.8 or more where classes are mixed."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One regime."""

    number: int
    """Rises with every `Bank.add`; a regime that is learnt anew gets a new one."""
    delta: Values = field(repr=False)
    """New values by parameter name over the frozen model, on the host; not to be written to."""
    signature: Signature = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    """Decision record of the version that it was made for: plain values."""
    uses: int = 0
    touched: int = 0
    """When it was last added or used, in calls."""

    @property
    def bytes(self) -> int:
        """Host memory of its tensors."""
        tensors = (*self.delta.values(), self.signature.mean, self.signature.var)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Bank:
    """At most ``capacity`` regimes of ``max_bytes`` together, each with the delta that served it.

    A regime that is there already takes the newer delta and both signatures. When there is no room, the entry that was
    used least gives way, of those the one untouched for longest: no random numbers, so a bank is the same for the same
    calls. Needs no labels and no clock. A regime is told by moments of features, so that one with the same features and
    other labels (a concept change that comes back) is taken for the same: its delta is only ever offered to the gate.

    Args:
        capacity: most entries.
        max_bytes: most host memory of all tensors.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, capacity: int, max_bytes: int) -> None:
        if capacity < 1 or max_bytes < 1:
            raise ValueError(f"capacity is {capacity}, max_bytes {max_bytes}; both must be 1 or more")
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.refused = 0
        """Deltas that were too large for the bank, empty or not finite."""
        self._entries: list[Entry] = []
        self._calls = 0

    def __len__(self) -> int:
        """Regimes held."""
        return len(self._entries)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, the oldest first."""
        return tuple(self._entries)

    @property
    def bytes(self) -> int:
        """Host memory of all tensors."""
        return sum(entry.bytes for entry in self._entries)

    def add(self, delta: Mapping[str, Tensor], signature: Signature, record: Mapping[str, Any]) -> Entry | None:
        """Keep a copy of ``delta`` for the regime; None where it is refused.

        Raises:
            ValueError: the signature is of features of another width than those held.
        """
        same = self.nearest(signature)
        self._calls += 1
        entry = Entry(
            number=self._calls,
            delta={name: value.detach().to("cpu", copy=True).contiguous() for name, value in delta.items()},
            signature=signature if same is None else same.signature.joined(signature),
            record=copy.deepcopy(dict(record)),
            uses=0 if same is None else same.uses,
            touched=self._calls,
        )
        finite = all(bool(value.isfinite().all()) for value in entry.delta.values())
        if not entry.delta or not finite or entry.bytes > self.max_bytes:
            self.refused += 1
            return None
        self._entries = [other for other in self._entries if other is not same]
        self._make_room(self.capacity - 1, self.max_bytes - entry.bytes)
        self._entries.append(entry)
        return entry

    def _make_room(self, entries: int, most_bytes: int) -> None:
        while len(self._entries) > entries or self.bytes > most_bytes:
            self._entries.remove(min(self._entries, key=lambda entry: (entry.uses, entry.touched)))

    def nearest(self, signature: Signature) -> Entry | None:
        """The entry of the nearest regime; None when none is within ``CLOSE``.

        Raises:
            ValueError: the signature is of features of another width than those held.
        """
        apart = [(distance(signature, entry.signature), entry.number, entry) for entry in self._entries]
        if not apart:
            return None
        least = min(apart, key=lambda found: found[:2])
        return least[2] if least[0] <= CLOSE else None

    def used(self, number: int) -> None:
        """Count that the entry was promoted again; one that has gone meanwhile is no error."""
        self._calls += 1
        self._entries = [
            replace(entry, uses=entry.uses + 1, touched=self._calls) if entry.number == number else entry
            for entry in self._entries
        ]

    def state_dict(self) -> dict[str, Any]:
        """All entries and counters; the tensors are shared, as nothing writes to them."""
        return {
            "calls": self._calls,
            "refused": self.refused,
            "entries": [
                {
                    "number": entry.number,
                    "delta": dict(entry.delta),
                    "signature": entry.signature.state(),
                    "record": copy.deepcopy(entry.record),
                    "uses": entry.uses,
                    "touched": entry.touched,
                }
                for entry in self._entries
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; a smaller bank keeps what it would have kept."""
        self._calls, self.refused = int(state["calls"]), int(state["refused"])
        self._entries = [
            Entry(
                number=int(saved["number"]),
                delta={name: torch.as_tensor(value).clone() for name, value in saved["delta"].items()},
                signature=Signature.of_state(saved["signature"]),
                record=copy.deepcopy(dict(saved["record"])),
                uses=int(saved["uses"]),
                touched=int(saved["touched"]),
            )
            for saved in state["entries"]
        ]
        self._make_room(self.capacity, self.max_bytes)
