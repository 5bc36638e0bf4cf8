from __future__ import annotations

from pathlib import Path

import pytest

from daemon.assembly import assemble
from daemon.errors import SettingsError
from tests.unit.worlds import settings


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"detect": {"name": "kswinn"}},
            r"HOMEOSTAT_DETECT=kswinn: there is no such detector of a signal; there are adwin",
        ),
        (
            {"detect": {"name": "adwin"}},
            r"HOMEOSTAT_DETECT=adwin: the bundle is not calibrated .* or use cusum",
        ),
        ({"fast": {"name": "tentt"}}, r"HOMEOSTAT_FAST=tentt: no fast adapter is called 'tentt'"),
        ({"fast": {"name": "tent", "lrr": 1}}, r"HOMEOSTAT_FAST=tent: tent: lrr: .*Its options are: "),
        ({"slow": {"name": "x"}}, r"HOMEOSTAT_SLOW=x: slow method 'x' does not exist; there are bottleneck"),
        ({"device": "cuda:99"}, r"HOMEOSTAT_DEVICE=cuda:99: "),
        ({"bundle": None}, r"HOMEOSTAT_BUNDLE is empty: "),
    ],
)
def test_what_the_bundle_or_the_methods_do_not_have_is_refused_by_variable(
    tmp_path: Path, change: dict[str, object], line: str
) -> None:
    with pytest.raises(SettingsError, match=line):
        assemble(settings(tmp_path, **change))
