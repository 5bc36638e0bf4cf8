"""The slow loop beside the stream: what it remembers, when it looks for a better version, and what came of it.

The loop hands over a snapshot (the version's module, which nobody changes, and copies of the memories) and asks for the
outcome at later batches. What is promoted is swapped in by the loop, at a batch boundary.
"""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor, nn

import adapters.slow as slow
from adapters.reference import Reference
from adapters.slow import optimizers
from daemon.burst import Job, Outcome
from daemon.labels import Joined
from daemon.learning import Unlabelled, check_optimizer, make_bench, open_exact
from daemon.records import F32
from daemon.settings import Slow
from daemon.worth import Worth

__all__ = ["Learner", "Outcome"]

log = structlog.get_logger("homeostat.learner")

LEAST_HELD = 32
"""Held-back rows at the least before a gate is asked."""
LEAST_ABOVE = 0.01
"""Error above the source's from which on an exact head, which costs next to nothing, is tried."""


class Learner:
    """Memories of labelled rows, and at most one look for a better version at a time."""

    def __init__(
        self,
        settings: Slow,
        reference: Reference,
        *,
        model: nn.Module,
        task: str,
        classes: int | None,
        input_shape: tuple[int, ...],
        source_error: float = 0.0,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        self.settings = settings
        self._classes, self._frozen = classes, model
        self._y_type = np.int64 if task == "classification" else np.float32
        self.bench = make_bench(settings, reference, model, task, classes, head)
        x, y = reference.exemplars_x.cpu().numpy(), reference.exemplars_y.cpu().numpy()
        self.replay = slow.Replay(
            input_shape,
            settings.memory_rows,
            classes=classes,
            seed=seed,
            reference_x=x,
            reference_y=y,
            max_bytes=settings.memory_bytes,
            recency=settings.recency,
            balance=settings.balance if classes else 0.0,
            pinned=next(model.parameters(), torch.empty(0)).is_cuda,
        )
        self.holdout = slow.Holdout(
            input_shape, settings.holdout_rows, classes=classes, max_queries=settings.max_queries
        )
        self._exact = open_exact(settings, self.bench.method, reference, model, classes)
        self.bank = slow.Bank(settings.regimes, settings.memory_bytes) if settings.regimes else None
        self.worth = Worth(settings.price, source_error)
        self._seen = Unlabelled(input_shape, settings.memory_bytes)
        self._labels = np.zeros(classes or 0)
        self._seed = seed
        self._bursts = self._fresh = 0
        self.wanted = False
        """A look is asked for, whatever it may be expected to bring."""
        self._asked = False
        self._error_then = math.nan
        self._thread: threading.Thread | None = None
        self._cancel = threading.Event()
        self._outcome: Outcome | None = None
        self._warm: threading.Thread | None = None

    def check(self, model: nn.Module) -> str | None:
        """Why nothing of this model can be learnt, None if something can."""
        check_optimizer(self.settings, gradients=self.gradients)
        return self.bench.method.check(model)

    @property
    def gradients(self) -> bool:
        """Whether the method needs bursts at all."""
        return not isinstance(self.bench.method, slow.ExactMethod)

    def warm_up(self) -> None:
        """Import what takes seconds beside the stream, at the first label: without labels nothing is ever learnt."""
        settings = self.settings
        if self._warm is None and settings.enabled and not settings.inline and self.gradients:
            self._warm = threading.Thread(target=self._try_optimizer, name="learner-warm-up", daemon=True)
            self._warm.start()

    def _try_optimizer(self) -> None:
        if callable(warm := getattr(self.bench.method, "warm_up", None)):
            warm()
        if problem := optimizers.check(self.settings.optimizer, lr=self.settings.lr):
            log.error("the slow loop's optimiser can't be used: every burst will fail", problem=problem)

    def add(self, joined: Joined) -> None:
        """Newest labelled rows are held back first, and learnt from once they have left the holdout."""
        self.warm_up()
        refused = self.holdout.dropped
        leaving = self.holdout.add(joined.x, joined.y)
        if len(leaving.y):
            self.replay.add(*leaving)
            if self._exact is not None:
                self._exact.update(leaving.x, leaving.y)
        if self._classes:
            y = np.asarray(joined.y, np.float64)
            classes = y[(y >= 0) & (y < self._classes) & (y == np.floor(y))].astype(np.int64)
            self._labels += np.bincount(classes, minlength=self._classes)
        self._fresh += len(joined) - (self.holdout.dropped - refused)

    def seen(self, x: F32) -> None:
        """Answered rows (B, *input_shape): they count as served, and may be learnt from without labels."""
        self.worth.served(len(x))
        if self.settings.pseudo_labels:
            self._seen.add(x)

    @property
    def busy(self) -> bool:
        """Whether a look is under way or was asked for."""
        return self.wanted or self._thread is not None

    def ask(self) -> None:
        """A look is wanted: it starts as soon as there are labels enough."""
        self.wanted = True

    def cancel(self) -> None:
        """Give up the wanted or running look; what it makes is thrown away."""
        self.wanted = False
        self._cancel.set()

    def step(self, version: nn.Module, number: int, error: float = math.nan) -> Outcome | None:
        """Once a batch: start what is due, hand over what is finished.

        Args:
            version: the module that serves, without fast adaptation.
            number: of the version.
            error: what is served loses on newly labelled rows, NaN while that is not known.
        """
        if self._thread is not None:
            if self._thread.is_alive():
                return None
            self._thread = None
            outcome, self._outcome = self._outcome, None
            return self._ended(outcome or Outcome("failed", "its thread died; standard error says why"))
        if not (self.wanted or self.settings.eager):
            return None
        if self.wanted and self._without_labels:
            return self._start(version, number, math.nan)
        if not self._enough(error):
            return None
        # The newest labels by the version of now: what was served is known of the rows before their delay alone.
        rows = self.holdout.rows()
        lost = self.bench.mean_loss(version, rows.x, rows.y)
        error = min(error, lost) if math.isfinite(error) else lost
        if self.wanted or self._promising(error):
            return self._start(version, number, error)
        self._fresh = 0
        return None

    def _enough(self, error: float) -> bool:
        minimum = self.settings.min_labels
        held = len(self.holdout) >= min(LEAST_HELD, minimum)
        fresh = minimum if self.wanted else minimum * self.worth.wait(error)
        return len(self.replay) >= minimum and self._fresh >= fresh and held

    @property
    def _without_labels(self) -> bool:
        """Whether pseudo-labels are all there is to learn from."""
        return self._seen.full and not len(self.replay)

    def _promising(self, error: float) -> bool:
        """Whether a look of its own accord has anything to hope for."""
        if not self.settings.eager or not error > self.worth.source_error + LEAST_ABOVE:
            return False
        return self._exact is not None or self.worth.estimate(error, self._step_rows).pays

    @property
    def _step_rows(self) -> int:
        return self.settings.steps * self.settings.batch_rows

    def _start(self, version: nn.Module, number: int, error: float) -> Outcome | None:
        self._fresh = 0
        self._bursts += 1
        self._asked, self.wanted, self._error_then = self.wanted, False, error
        estimate = self.worth.estimate(error, self._step_rows)
        unknown = not math.isfinite(error)
        unlabelled, held = None, self.holdout.rows()
        if self._without_labels:
            unlabelled, judged = self._seen.take()
            held = slow.Rows(judged, np.zeros(0, self._y_type), np.zeros(0, np.int64))
        exact: dict[str, Tensor] = {}
        if self._exact is not None and self._exact.rows >= self.settings.min_labels:
            exact = self._exact.values()
        self._cancel = threading.Event()
        job = Job(
            version=version,
            frozen=self._frozen,
            number=number,
            memory=self.replay.snapshot(),
            held=held,
            # The holdout's looks are counted here, in the loop's thread: its state is part of the checkpoint.
            query=self.holdout.look(),
            class_shares=self._labels / self._labels.sum() if self._labels.sum() else None,
            exact=exact,
            exact_name=self.settings.exact if self.gradients else self.settings.name,
            bank=() if self.bank is None else self.bank.entries,
            nearest=lambda seen: None if self.bank is None else self.bank.nearest(seen),
            burst=self.gradients and (unknown or estimate.pays),
            declined=estimate.said if self.gradients else "an exact head needs no burst",
            unlabelled=unlabelled,
            seed=self._seed + self._bursts,
            stop=self._cancel.is_set,
        )
        for _ in range(job.most - 1):
            self.holdout.look()
        if self.settings.inline:
            return self._ended(self.bench.run(job))
        self._thread = threading.Thread(target=self._run_aside, args=(job,), name="learner", daemon=True)
        self._thread.start()
        return None

    def _run_aside(self, job: Job) -> None:
        device = next(job.version.parameters()).device
        if device.type == "cuda":
            # Its own stream, so that serving doesn't queue behind training.
            with torch.cuda.stream(torch.cuda.Stream(device)):
                self._outcome = self.bench.run(job)
        else:
            self._outcome = self.bench.run(job)

    def _ended(self, outcome: Outcome) -> Outcome:
        if self._cancel.is_set():
            # Made for a version that may be gone by now, and finished before it saw that nobody wants it.
            return Outcome("cancelled", "no longer wanted", record={"asked": self._asked}, seconds=outcome.seconds)
        self.worth.tried(self._error_then, promoted=outcome.result == "promoted", burst=outcome.result != "declined")
        if self.bank is not None and outcome.regime is not None and outcome.result == "promoted":
            self.bank.used(outcome.regime)
        outcome.record["asked"] = self._asked
        return outcome

    def keep(self, delta: dict[str, Tensor], outcome: Outcome) -> None:
        """Remember a promoted version, ``delta`` over the frozen model, for when its regime comes back."""
        if self.bank is not None and outcome.signature is not None and outcome.regime is None:
            host = {name: value.detach().cpu() for name, value in delta.items()}
            record = {name: outcome.record.get(name) for name in ("method", "from_version", "gain")}
            self.bank.add(host, outcome.signature, record)

    def close(self, timeout_s: float) -> None:
        """End a running look."""
        self.cancel()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def state_dict(self) -> dict[str, Any]:
        """Memories and counters; a look under way is made again after a restart, from the rows of then."""
        return {
            "replay": copy.deepcopy(self.replay.state_dict()),
            "holdout": copy.deepcopy(self.holdout.state_dict()),
            "exact": None if self._exact is None else copy.deepcopy(self._exact.state_dict()),
            "bank": None if self.bank is None else self.bank.state_dict(),
            "worth": self.worth.state_dict(),
            "seen": self._seen.state(),
            "labels": self._labels.copy(),
            "bursts": self._bursts,
            # A look under way is lost with the process: its labels count as fresh again.
            "fresh": self._fresh if self._thread is None else self.settings.min_labels,
            "wanted": self.wanted or (self._thread is not None and self._asked),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.replay.load_state_dict(state["replay"])
        self.holdout.load_state_dict(state["holdout"])
        if self._exact is not None and state["exact"] is not None:
            self._exact.load_state_dict(state["exact"])
        if self.bank is not None and state["bank"] is not None:
            self.bank.load_state_dict(state["bank"])
        self.worth.load_state_dict(state["worth"])
        self._seen.load(state["seen"])
        self._labels = np.array(state["labels"])
        self._bursts, self._fresh = int(state["bursts"]), int(state["fresh"])
        self.wanted = bool(state["wanted"])
