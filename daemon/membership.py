"""What a rebalance of the consumer group means for the worker: partitions that come, are revoked, or are lost."""

from __future__ import annotations

import time

import structlog

from daemon.assembly import Worker
from daemon.batcher import Batcher
from daemon.commits import Commits
from daemon.errors import TransactionError
from daemon.pressure import Pressure

log = structlog.get_logger("homeostat.service")

REVOKE_S = 20.0
"""Longest time to finish what was revoked; the group waits for it, and liveness fails after 60 s."""


def follow(worker: Worker, batcher: Batcher, commits: Commits, pressure: Pressure) -> None:
    """Act on what the last poll brought: to be called between a poll and the batch that came of it.

    Raises:
        TransactionError: with exactly-once, answers are in the open transaction whose offsets can't be committed in it.
    """
    source, loop = worker.shared, worker.loop
    if source is None:
        return
    starts = source.take_starts()
    for name, start in starts.items():
        loop.positions[name] = start.offset
        if start.emit_from > start.offset:
            loop.emit_from[name] = start.emit_from
        worker.telemetry.records_skipped.inc(start.skipped)
    if starts:
        commits.begin()
    revoked, lost = source.take_revoked()
    if starts or revoked or lost:
        pressure.moved()
    if not (revoked or lost):
        return
    dropped = batcher.drop(revoked | lost)
    log.info("partitions given up", revoked=sorted(revoked), lost=sorted(lost), unanswered=dropped)
    for name in lost:
        loop.positions.pop(name, None)
    finished = not revoked or _finish(commits)
    for name in revoked | lost:
        loop.positions.pop(name, None)
        loop.emit_from.pop(name, None)
    if commits.exact and (lost or not finished):
        # Whoever has them now gives their answers again: those in the transaction at hand must never be seen.
        raise TransactionError(f"partitions given up with answers uncommitted: {', '.join(sorted(revoked | lost))}")


def _finish(commits: Commits) -> bool:
    """Commit what was answered, within one deadline; whether that worked."""
    deadline = time.monotonic() + REVOKE_S
    while not commits.save(max(0.1, min(5.0, deadline - time.monotonic()))):
        if commits.settled:
            return True  # only the checkpoint could not be written
        if time.monotonic() > deadline:
            log.warning("revoked partitions not committed in time: others answer from the last commit on")
            return False
    return True
