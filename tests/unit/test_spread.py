from __future__ import annotations

from tests.spread import ByFile


def test_tests_of_a_file_stay_together_and_those_with_processes_are_one_file() -> None:
    scope = ByFile.__new__(ByFile)._split_scope
    assert scope("tests/unit/test_a.py::test_one[x]") == scope("tests/unit/test_a.py::TestB::test_two")
    assert scope("tests/unit/test_a.py::test_one") != scope("tests/unit/test_b.py::test_one")
    assert scope("tests/chaos/test_a.py::test_one") == scope("tests/integration/test_b.py::test_one")
