from __future__ import annotations

from tests.sweeps import chosen


def test_the_choice_is_fixed_and_has_every_value_of_the_first_parameter() -> None:
    names = [f"t.py::test_x[{method}-{kind}]" for method in "abcdefgh" for kind in range(40)]
    kept = chosen(names)
    assert kept == chosen(list(reversed(names))) and kept < set(names)
    assert {name.partition("[")[2][0] for name in kept} == set("abcdefgh")
    assert len(kept) == 8 * 3


def test_a_short_list_stays_whole() -> None:
    names = [f"t.py::test_x[{value}]" for value in range(20)]
    assert chosen(names) == set(names)
