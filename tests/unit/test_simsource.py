from __future__ import annotations

import numpy as np
import pytest

from daemon.errors import StreamError
from daemon.streams.simsource import EPOCH_S, SimLabels, SimOptions, SimSource


@pytest.mark.parametrize(
    "url",
    ["sim://other", "sim://ageing/x", "sim://ageing?speed=1", "sim://ageing?rate=fast", "sim://ageing?rate=-1",
     "sim://ageing?rate=nan", "sim://ageing?rate=inf", "sim://ageing?label_share=1.5", "sim://ageing?seed="],
)  # fmt: skip
def test_a_wrong_url_is_refused_by_variable_name(url: str) -> None:
    with pytest.raises(StreamError, match="HOMEOSTAT_SOURCE="):
        SimOptions.parse(url)


def test_a_restart_goes_on_with_the_same_rows() -> None:
    whole, part = SimSource("sim://ageing?rate=0"), SimSource("sim://ageing?rate=0")
    whole.open(None)
    part.open({"sim/0": 60})
    first, second = whole.poll(100, 0.0), part.poll(40, 0.0)
    assert first.batch is not None and second.batch is not None
    assert np.array_equal(first.batch.x[60:], second.batch.x) and second.offsets == list(range(60, 100))
    assert second.times_s[0] == EPOCH_S + 60


def test_a_slow_pace_has_nothing_at_once_and_says_so() -> None:
    source = SimSource("sim://ageing?rate=0.001")
    source.open(None)
    assert len(source.poll(10, 0.0)) == 0 and not source.can_fill(1) and source.lag() == 0 and not source.ended


def test_each_label_comes_at_its_rows_time_plus_the_delay_and_a_share_is_the_same_in_every_run() -> None:
    labels, again = (SimLabels("sim://ageing?label_delay=50&label_share=0.5") for _ in range(2))
    labels.open(None)
    again.open(None)
    first = labels.poll()
    assert first.ids == again.poll().ids and 200 < len(first) < 312
    assert first.times_s == [EPOCH_S + int(name) + 50 for name in first.ids]
    again.open(labels.positions())
    assert labels.poll().ids == again.poll().ids
