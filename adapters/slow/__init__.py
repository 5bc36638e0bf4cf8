"""The slow loop's substance: what may move, the bounded burst, the memory it learns from, the gate that judges it.

    method = slow.get("head")
    replay = slow.Replay((16,), 2_000, classes=4, seed=0, reference_x=x_ref, reference_y=y_ref)
    holdout = slow.Holdout((16,), 96, classes=4)
    replay.add(*holdout.add(x, y))                                  # newest rows are held back first
    result = slow.run_burst(model, method, replay, slow.BurstOptions(), task="classification", seed=0)
    candidate = slow.apply_delta(model, result.delta)
    held, query = holdout.rows(), holdout.look()
    verdict = slow.judge(model, candidate, held.x, held.y, x_ref, y_ref, task="classification", query=query)

Nothing here starts a thread, reads a clock or knows the daemon. No function changes the model it is given.
"""

from __future__ import annotations

from adapters.slow.burst import BurstOptions, BurstResult, run_burst
from adapters.slow.fork import apply_delta, fork
from adapters.slow.gate import Verdict, judge
from adapters.slow.holdout import Holdout
from adapters.slow.losses import Task
from adapters.slow.registry import SelectingMethod, SlowMethod, get, names, register
from adapters.slow.replay import Replay
from adapters.slow.rows import Rows
from adapters.slow.snapshot import Snapshot
from adapters.slow.trainee import Given, Group, Trainee

__all__ = [
    "BurstOptions",
    "BurstResult",
    "Given",
    "Group",
    "Holdout",
    "Replay",
    "Rows",
    "SelectingMethod",
    "SlowMethod",
    "Snapshot",
    "Task",
    "Trainee",
    "Verdict",
    "apply_delta",
    "fork",
    "get",
    "judge",
    "names",
    "register",
    "run_burst",
]
