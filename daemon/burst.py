"""One look for a better version, in a thread of its own: known regimes, an exact head, then a burst; each is judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import structlog
import torch
from torch import Tensor, nn

import adapters.slow as slow
from adapters.reference import Reference
from adapters.slow.gate.judge import look_level
from adapters.slow.gate.scores import score
from adapters.slow.heads.backbone import Backbone

log = structlog.get_logger("homeostat.learner")

Result = Literal["promoted", "rejected", "declined", "failed", "overrun", "out_of_memory", "non_finite", "cancelled"]
ENDED: dict[str, Result] = {"overrun": "overrun", "out of memory": "out_of_memory", "non-finite": "non_finite"}
"""Results of bursts that did not come to their end, by the reason."""
JUDGE_ROWS = 512
"""Rows of one forward pass of the gate."""


@dataclass(slots=True)
class Outcome:
    """What became of a look."""

    result: Result
    reason: str
    delta: dict[str, Tensor] = field(default_factory=dict)
    """New values against the served version, or against the frozen model."""
    over_frozen: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: float = float("nan")
    """Mean loss of what was promoted on the rows that judged it."""
    regime: int | None = None
    """Number of the bank's entry that was promoted."""
    signature: slow.Signature | None = None
    """Of the rows that judged it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a look needs; nothing in it changes while it runs."""

    version: nn.Module
    """What serves."""
    frozen: nn.Module
    number: int
    """Of the version."""
    memory: slow.Snapshot
    held: slow.Rows
    query: int
    class_shares: Any
    """(K,) of the labels so far; None for a regression."""
    exact: dict[str, Tensor]
    """An exact head's values; empty for none."""
    exact_name: str
    bank: tuple[slow.Entry, ...]
    nearest: Callable[[slow.Signature], slow.Entry | None]
    burst: bool
    """Whether a burst is to be made when nothing cheaper is promoted."""
    declined: str
    """Why not, if not."""
    unlabelled: Any
    """(n, *input_shape) rows for pseudo-labels; None for none."""
    seed: int
    stop: Callable[[], bool]

    @property
    def most(self) -> int:
        """Most candidates that the held-back rows may be asked about: as many looks, the first of them ``query``."""
        return max(1, bool(self.bank) + bool(self.exact) + self.burst)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What does not change between looks."""

    method: slow.SlowMethod
    name: str
    options: slow.BurstOptions
    task: slow.Task
    alpha: float
    reference_margin: float | Literal["auto"] | None
    max_queries: int
    run_rows: int | None = None
    reference: Reference
    head: str | None
    classes: int | None

    def run(self, job: Job) -> Outcome:
        """Look for a better version; whatever goes wrong is an outcome and not an exception."""
        started = time.perf_counter()
        try:
            outcome = self._look(job)
        except Exception as error:
            # A model that can't be copied, or an optimiser that can't train it: the stream goes on, the log says why.
            memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            log.exception("burst failed")
            outcome = Outcome("out_of_memory" if memory else "failed", f"{type(error).__name__}: {error}")
        outcome.seconds = time.perf_counter() - started
        return outcome

    def _look(self, job: Job) -> Outcome:
        seen = self._signature(job)
        entry = job.nearest(seen) if seen is not None and job.bank else None
        if entry is not None and _serves(job, entry.delta):
            entry = None  # judged against itself it would only take level from the others
        tried: list[dict[str, Any]] = []
        # Any of them may be promoted by chance: they share the level of their queries, as the gate has it.
        count = max(1, (entry is not None) + bool(job.exact) + job.burst)
        share = look_level(1.0, job.query, count) / look_level(1.0, job.query)
        if entry is not None:
            outcome = self._judged(job, dict(entry.delta), "regime", {"regime": entry.number}, share, over_frozen=True)
            outcome.regime, outcome.signature = entry.number, seen
            if outcome.result == "promoted":
                return outcome
            tried.append(_brief(outcome))
        if job.exact and not job.stop():
            outcome = self._judged(job, job.exact, job.exact_name, {}, share, over_frozen=True)
            outcome.signature = seen
            if outcome.result == "promoted":
                outcome.record["tried"] = tried
                return outcome
            tried.append(_brief(outcome))
        if not job.burst:
            reason = job.declined if not tried else f"{job.declined}; {tried[-1]['method']}: {tried[-1]['reason']}"
            return Outcome("declined", reason, record={"tried": tried, "from_version": job.number})
        outcome = self._burst(job, share)
        outcome.signature = seen
        outcome.record["tried"] = tried
        return outcome

    def _burst(self, job: Job, share: float) -> Outcome:
        result = slow.run_burst(
            job.version,
            self.method,
            job.memory,
            self.options,
            task=self.task,
            seed=job.seed,
            stop=job.stop,
            frozen=job.frozen,
            unlabelled=job.unlabelled,
        )
        record = {"steps": result.steps, "pseudo_labels": result.pseudo_labels}
        if job.stop():
            return Outcome("cancelled", "no longer wanted")
        if not result.delta:
            return Outcome(ENDED.get(result.reason, "failed"), result.reason, record=record)
        outcome = self._judged(job, result.delta, self.name, record, share)
        if outcome.result != "promoted" and result.reason == "overrun":
            # What it had by then was not good enough: the clock ended it, not the gate.
            outcome.result = "overrun"
        return outcome

    def _judged(
        self,
        job: Job,
        delta: dict[str, Tensor],
        method: str,
        record: dict[str, Any],
        share: float,
        *,
        over_frozen: bool = False,
    ) -> Outcome:
        """The gate's verdict on the served version, or the frozen model, with the values of ``delta`` in place.

        ``share`` of the level is this candidate's.
        """
        candidate = slow.apply_delta(job.frozen if over_frozen else job.version, delta)
        if not len(job.held.y):
            verdict = slow.judge_unlabelled(
                job.version, candidate, job.held.x, self.reference, alpha=share * self.alpha, query=job.query
            )
        else:
            verdict = slow.judge(
                job.version,
                candidate,
                job.held.x,
                job.held.y,
                job.memory.reference_x,
                job.memory.reference_y,
                task=self.task,
                alpha=share * self.alpha,
                reference_margin=self.reference_margin,
                query=job.query,
                max_queries=self.max_queries,
                segment=job.held.segment,
                class_shares=job.class_shares,
                run_rows=self.run_rows,
            )
        plain = {name: value for name, value in asdict(verdict).items() if name not in ("promote", "reason", "slices")}
        said = {
            "method": method,
            "rows": len(job.memory),
            "held_back": len(job.held.x),
            "query": job.query,
            "from_version": job.number,
            **record,
            **plain,
        }
        if not verdict.promote:
            return Outcome("rejected", verdict.reason, record=said)
        error = self.mean_loss(candidate, job.held.x, job.held.y)
        return Outcome("promoted", verdict.reason, delta, over_frozen, record=said, error=error)

    def mean_loss(self, model: nn.Module, x: Any, y: Any) -> float:
        """Mean error rate, or squared error as a share of the target's variance; NaN without rows."""
        if not len(y):
            return float("nan")
        scores = score(model, x, y, self.task, JUDGE_ROWS)
        if self.task == "classification":
            return float(scores.wrong.mean())
        return float(scores.loss.mean()) / max(float(self.reference.output_var), 1e-12)

    def _signature(self, job: Job) -> slow.Signature | None:
        """Of the newest rows' features by the frozen model: which regime this is."""
        if self.head is None or not len(job.held.x):
            return None
        device = next(job.frozen.parameters()).device
        try:
            features = Backbone(job.frozen, self.classes, str)(torch.from_numpy(job.held.x).to(device))
        except ValueError:
            return None  # what goes into the head does not decide the answer: no regime can be told by it
        return slow.signature(features)


def _serves(job: Job, delta: Mapping[str, Tensor]) -> bool:
    """Whether the served version is the frozen model with these values already."""
    own = dict(job.version.named_parameters(remove_duplicate=False))
    wanted = {**dict(job.frozen.named_parameters(remove_duplicate=False)), **delta}
    return own.keys() == wanted.keys() and all(
        value.shape == own[name].shape and torch.equal(value.to(own[name]), own[name]) for name, value in wanted.items()
    )


def _brief(outcome: Outcome) -> dict[str, Any]:
    record = outcome.record
    return {
        "method": record["method"],
        "reason": outcome.reason,
        "gain": record["gain"],
        "gain_low": record["gain_low"],
    }
