"""The slow loop's substance: what may move, the bounded burst, the memory it learns from, the gate that judges it.

    method = slow.get("head")
    replay = slow.Replay((16,), 2_000, classes=4, seed=0, reference_x=x_ref, reference_y=y_ref)
    holdout = slow.Holdout((16,), 96, classes=4)
    replay.add(*holdout.add(x, y))                                  # newest rows are held back first
    result = slow.run_burst(model, method, replay, slow.BurstOptions(), task="classification", seed=0)
    candidate = slow.apply_delta(model, result.delta)
    held, query = holdout.rows(), holdout.look()
    verdict = slow.judge(model, candidate, held.x, held.y, x_ref, y_ref, task="classification", query=query)

Nothing here starts a thread or knows the daemon, and no clock is read but the one that `run_burst` is given. No
function changes the model it is given.
"""

from __future__ import annotations

from adapters.slow.bank import Bank, Entry
from adapters.slow.burst import BurstOptions, BurstResult, run_burst
from adapters.slow.deltas.encoding import decode, encode, merge, nbytes
from adapters.slow.fork import apply_delta, fork
from adapters.slow.gate.judge import Slice, Verdict, judge, judge_many
from adapters.slow.gate.unlabelled import judge_unlabelled
from adapters.slow.heads.exact import ExactHead, ExactMethod
from adapters.slow.holdout import Holdout
from adapters.slow.losses import Task
from adapters.slow.queries import choose, sketch
from adapters.slow.registry import SelectingMethod, SlowMethod, get, keepings, names, register
from adapters.slow.replay import Replay
from adapters.slow.rows import Rows
from adapters.slow.signature import Signature, distance, signature
from adapters.slow.snapshot import Snapshot
from adapters.slow.trainee import Given, Group, Trainee

__all__ = [
    "Bank",
    "BurstOptions",
    "BurstResult",
    "Entry",
    "ExactHead",
    "ExactMethod",
    "Given",
    "Group",
    "Holdout",
    "Replay",
    "Rows",
    "SelectingMethod",
    "Signature",
    "Slice",
    "SlowMethod",
    "Snapshot",
    "Task",
    "Trainee",
    "Verdict",
    "apply_delta",
    "choose",
    "decode",
    "distance",
    "encode",
    "fork",
    "get",
    "judge",
    "judge_many",
    "judge_unlabelled",
    "keepings",
    "merge",
    "names",
    "nbytes",
    "register",
    "run_burst",
    "signature",
    "sketch",
]
