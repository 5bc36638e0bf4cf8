from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule
from torch import Tensor

from daemon import checkpoint
from daemon.inspecting import digest
from daemon.versions import PINS, VersionError, Versions

CPU = torch.device("cpu")


def made(ring: int = 3, promoted: int = 0) -> Versions:
    versions = Versions(ring, CPU)
    for number in range(1, promoted + 1):
        versions.add({"w": torch.full((2,), float(number))}, {"rows": number})
    return versions


def reborn(versions: Versions) -> Versions:
    other = Versions(versions.size, CPU)
    other.load_state_dict(checkpoint.decode(checkpoint.encode(versions.state_dict())))
    return other


def test_the_version_before_a_promotion_can_always_be_gone_back_to() -> None:
    versions = made(ring=1, promoted=4)
    assert versions.numbers() == [0, 3, 4] and versions.current.parent == 3
    assert versions.go_to(3).record == {"rows": 3, "parent": 2}
    assert versions.numbers() == [0, 3, 4]


def test_the_ring_forgets_what_served_longest_ago() -> None:
    versions = made(ring=2, promoted=3)
    versions.go_to(1)
    versions.add({"w": torch.zeros(2)}, {})
    # 3 served before 1 did, and 2 before both.
    assert [version.number for version in versions.ring] == [3, 1] and versions.current.parent == 1


def test_a_pinned_version_stays_and_takes_no_place_in_the_ring() -> None:
    versions = made(ring=2, promoted=1)
    versions.pin(1)
    for _ in range(5):
        versions.add({}, {})
    assert versions.numbers() == [0, 1, 4, 5, 6]
    versions.unpin(1)
    assert versions.numbers() == [0, 4, 5, 6]


def test_what_is_not_there_is_named_with_what_is() -> None:
    versions = made(ring=1, promoted=3)
    with pytest.raises(VersionError, match=r"version 1 is not kept; there are 0, 2, 3 \(0 is the frozen model\)"):
        versions.go_to(1)
    with pytest.raises(VersionError, match="needs no pin"):
        versions.pin(0)
    with pytest.raises(VersionError, match="version 2 is not pinned; pinned are none"):
        versions.unpin(2)


def test_pins_are_bounded() -> None:
    versions = made(ring=1)
    for number in range(1, PINS + 1):
        versions.add({}, {})
        versions.pin(number)
    versions.add({}, {})
    with pytest.raises(VersionError, match=f"{PINS} versions are pinned already; unpin one of"):
        versions.pin(versions.current.number)
    with pytest.raises(VersionError, match="pinned already"):
        versions.adopt({}, {})
    assert len(versions.numbers()) == PINS + 2


def test_below_a_withdrawn_version_lies_its_nearest_good_parent() -> None:
    versions = made(ring=3, promoted=3)
    versions.withdraw("version_harm")
    assert versions.parent() == 2
    versions.go_to(2)
    versions.withdraw("version_harm")
    versions.go_to(3)
    assert versions.parent() == 1 and reborn(versions).parent() == 1
    versions.go_to(0)
    assert versions.parent() == 0


def test_a_parent_that_is_gone_or_points_upwards_leads_to_the_frozen_model() -> None:
    versions = made(ring=1, promoted=3)
    versions.go_to(2)
    assert versions.parent() == 0
    circle = made(ring=3)
    circle.adopt({}, {"parent": 2, "withdrawn": "x"}, number=1)
    circle.adopt({}, {"parent": 1, "withdrawn": "x"}, number=2)
    circle.go_to(2)
    assert circle.parent() == 0


def test_an_adopted_version_is_pinned_not_served_and_numbered_on() -> None:
    versions = made(promoted=2)
    version = versions.adopt({"w": torch.zeros(2)}, {"method": "merge"})
    assert (version.number, version.parent, versions.current.number, versions.pins) == (3, 0, 2, {3})
    assert versions.add({}, {}).number == 4
    with pytest.raises(VersionError, match="version 2 exists already"):
        versions.adopt({}, {}, number=2)


def test_reserved_numbers_are_never_given() -> None:
    versions = made(promoted=1)
    versions.reserve([7, 3])
    versions.reserve([])
    assert versions.add({}, {}).number == 8


def test_a_checkpoint_from_before_there_were_pins_is_read() -> None:
    state = made(promoted=2).state_dict()
    del state["pinned"], state["held"], state["trigger"]
    state["ring"].insert(0, {"number": 0, "delta": {}, "record": {}})
    other = made()
    other.load_state_dict(state)
    assert other.numbers() == [0, 1, 2] and other.pins == set() and not other.held


def test_a_ring_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="ring is 0"):
        Versions(0, CPU)


class VersionsMachine(RuleBasedStateMachine):
    """Whatever is done in whatever order: weights by number never change, and what must be there is there."""

    numbers = Bundle("numbers")

    def __init__(self) -> None:
        super().__init__()
        self.versions = Versions(2, CPU)
        self.given: dict[int, Tensor] = {}
        self.before = 0

    def _try(self, act: Any) -> bool:
        state = digest(self.versions.state_dict())
        try:
            act()
        except VersionError:
            # Refused: nothing changed.
            assert digest(self.versions.state_dict()) == state
            return False
        return True

    @rule(target=numbers, value=st.integers(-5, 5))
    def promote(self, value: int) -> int:
        self.before, highest = self.versions.current.number, self.versions.highest
        version = self.versions.add({"w": torch.tensor([float(value)])}, {"value": value})
        assert version.number == highest + 1 and version.parent == self.before
        assert self.before in self.versions.numbers()
        self.given[version.number] = torch.tensor([float(value)])
        return version.number

    @rule(target=numbers)
    def adopt(self) -> Any:
        if not self._try(lambda: self.versions.adopt({"w": torch.ones(1)}, {})):
            return multiple()
        self.given[self.versions.highest] = torch.ones(1)
        return self.versions.highest

    @rule(number=numbers | st.just(0))
    def go_to(self, number: int) -> None:
        there = number in self.versions.numbers()
        assert self._try(lambda: self.versions.go_to(number)) == there
        assert not there or self.versions.current.number == number

    @rule(number=numbers)
    def pin(self, number: int) -> None:
        there = number in self.versions.numbers()
        assert self._try(lambda: self.versions.pin(number)) == (there and len(self.versions.pins | {number}) <= PINS)

    @rule(number=numbers)
    def unpin(self, number: int) -> None:
        pinned = number in self.versions.pins
        assert self._try(lambda: self.versions.unpin(number)) == pinned

    @precondition(lambda self: self.versions.current.number)
    @rule()
    def withdraw(self) -> None:
        self.versions.withdraw("harm")
        self.versions.go_to(self.versions.parent())
        assert "withdrawn" not in self.versions.current.record

    @rule()
    def restart(self) -> None:
        state = digest(self.versions.state_dict())
        self.versions = reborn(self.versions)
        assert digest(self.versions.state_dict()) == state

    @invariant()
    def bounded_and_unchanged(self) -> None:
        versions = self.versions
        loose = set(versions.numbers()) - versions.pins - {0, versions.current.number}
        assert len(loose) <= versions.size
        assert versions.pins <= set(versions.numbers())
        assert versions.highest == max(self.given, default=0)
        for version in [*versions.ring, versions.current]:
            if version.number:
                assert torch.equal(version.delta["w"], self.given[version.number])


TestVersionsMachine = VersionsMachine.TestCase
TestVersionsMachine.settings = hypothesis_settings(max_examples=40, stateful_step_count=30, deadline=None)
