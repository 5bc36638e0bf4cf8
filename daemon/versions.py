"""The promoted versions that can be served: the current one, those that served last, and those that are pinned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from daemon.errors import HomeostatError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PINS = 16
"""Most versions that can be pinned: each holds its weights in memory and in every checkpoint."""


class VersionError(HomeostatError):
    """A version is not there, or its file is damaged or made for another bundle."""

    exit_code = 2


@dataclass(slots=True)
class Version:
    """A promoted set of weights: what changed against the frozen model, and why it was kept."""

    number: int
    delta: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def parent(self) -> int:
        """The version it was learnt from; 0 is the frozen model."""
        return int(self.record.get("parent", 0))


class Versions:
    """Which versions there are and which one serves. Number 0 is the frozen model: always there, kept nowhere.

    Numbers are given once: after a rollback the next version still gets a new one. Beside the current version the
    newest ``ring`` by when they last served are kept, so the one before a promotion is always among them, and up to
    `PINS` pinned ones for as long as they are pinned.
    """

    def __init__(self, ring: int, device: torch.device) -> None:
        if ring < 1:
            raise ValueError(f"ring is {ring}; at least 1 version must be kept for a rollback")
        self.size = ring
        self.device = device
        self.current = Version(0)
        self.highest = 0
        self.pins: set[int] = set()
        self.held = False
        """An operator wants the served version to stay: nothing is promoted until it is released."""
        self.trigger: dict[str, Any] = {}
        """Why the slow loop was last asked: reasons, alarms, shift, value. A part of what its burst leaves behind."""
        self._kept: dict[int, Version] = {}

    @property
    def ring(self) -> list[Version]:
        """The kept versions without the current one, the one that served last at the end."""
        return list(self._kept.values())

    def numbers(self) -> list[int]:
        """Every version that can be served, 0 included."""
        return sorted({0, self.current.number, *self._kept})

    def find(self, number: int) -> Version:
        """A version by its number.

        Raises:
            VersionError: it is not kept (any more).
        """
        if number == self.current.number:
            return self.current
        if number == 0:
            return Version(0)
        if number not in self._kept:
            there = ", ".join(map(str, self.numbers()))
            raise VersionError(f"version {number} is not kept; there are {there} (0 is the frozen model)")
        return self._kept[number]

    def parent(self) -> int:
        """Where to go when the current version fails: its parent, or that one's where it was withdrawn; else 0."""
        version = self.current
        # A parent's number is the smaller one: a record that says otherwise must not lead round in a circle.
        while version.parent < version.number and version.parent in self._kept:
            version = self._kept[version.parent]
            if "withdrawn" not in version.record:
                return version.number
        return 0

    def withdraw(self, reason: str) -> None:
        """Mark the current version as one that nothing but an operator goes back to."""
        if self.current.number:
            # A new dict: another thread may be writing the old one to a file.
            self.current.record = {**self.current.record, "withdrawn": reason}

    def add(self, delta: Mapping[str, Tensor], record: Mapping[str, Any], *, over_frozen: bool = False) -> Version:
        """Make the current version plus ``delta`` the current one, or the frozen model plus ``delta``."""
        own = {name: value.to(self.device) for name, value in delta.items()}
        self.highest += 1
        merged = own if over_frozen else {**self.current.delta, **own}
        self._swap(Version(self.highest, merged, {**record, "parent": self.current.number}))
        return self.current

    def go_to(self, number: int) -> Version:
        """Make a kept version, or 0, the current one.

        Raises:
            VersionError: it is not kept.
        """
        self._swap(self.find(number))
        return self.current

    def _swap(self, version: Version) -> None:
        left, self.current = self.current, version
        self._kept.pop(version.number, None)
        if left.number and left.number != version.number:
            self._kept[left.number] = left
        self._bound()

    def _bound(self) -> None:
        loose = [number for number in self._kept if number not in self.pins]
        for number in loose[: max(0, len(loose) - self.size)]:
            del self._kept[number]

    def pin(self, number: int) -> None:
        """Keep a version until it is unpinned.

        Raises:
            VersionError: it is not kept, it is 0, or too many are pinned.
        """
        if number == 0:
            raise VersionError("version 0 is the frozen model: it is always kept and needs no pin")
        self.find(number)
        if number not in self.pins and len(self.pins) >= PINS:
            raise VersionError(f"{PINS} versions are pinned already; unpin one of {sorted(self.pins)} first")
        self.pins.add(number)

    def unpin(self, number: int) -> None:
        """Let a version go with the others of its age.

        Raises:
            VersionError: it is not pinned.
        """
        if number not in self.pins:
            raise VersionError(f"version {number} is not pinned; pinned are {sorted(self.pins) or 'none'}")
        self.pins.discard(number)
        self._bound()

    def adopt(self, delta: Mapping[str, Tensor], record: Mapping[str, Any], number: int | None = None) -> Version:
        """Take in a version made elsewhere, pinned and not served; with the next number unless it brings its own.

        Raises:
            VersionError: too many are pinned, or the number is taken.
        """
        chosen = self.highest + 1 if number is None else number
        if chosen < 1 or chosen == self.current.number or chosen in self._kept:
            raise VersionError(f"version {chosen} exists already")
        if len(self.pins) >= PINS:
            raise VersionError(f"{PINS} versions are pinned already; unpin one of {sorted(self.pins)} first")
        own = {name: value.to(self.device) for name, value in delta.items()}
        self._kept[chosen] = Version(chosen, own, {"parent": 0, **record})
        self.pins.add(chosen)
        self.highest = max(self.highest, chosen)
        return self._kept[chosen]

    def reserve(self, numbers: Iterable[int]) -> None:
        """Never give these numbers: they belong to versions of an earlier start."""
        self.highest = max(self.highest, *numbers, 0)

    def state_dict(self) -> dict[str, Any]:
        """All versions with their weights."""
        return {
            "highest": self.highest,
            "current": _state(self.current),
            "ring": [_state(version) for version in self._kept.values()],
            "pinned": sorted(self.pins),
            "held": self.held,
            "trigger": self.trigger,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; what a smaller ring has no room for is let go."""
        self.highest = int(state["highest"])
        self.current = self._version(state["current"])
        self._kept = {int(item["number"]): self._version(item) for item in state["ring"] if item["number"]}
        # Checkpoints of before there were pins have none of these.
        self.pins = set(map(int, state.get("pinned", ())))
        self.held, self.trigger = bool(state.get("held", False)), dict(state.get("trigger", {}))
        self._bound()

    def _version(self, state: Mapping[str, Any]) -> Version:
        delta = {name: value.to(self.device) for name, value in state["delta"].items()}
        return Version(int(state["number"]), delta, dict(state["record"]))


def _state(version: Version) -> dict[str, Any]:
    return {"number": version.number, "delta": dict(version.delta), "record": version.record}
