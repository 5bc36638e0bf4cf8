"""The slow loop's worker: burst, candidate, shadow judgement; beside the stream, in a thread of its own.

The loop hands over a snapshot (the version's module, which nobody changes, and copies of the memories) and asks for the
outcome at later batches. What is promoted is swapped in by the loop, at a batch boundary.
"""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import structlog
import torch
from torch import Tensor, nn

import adapters.slow as slow
from adapters.reference import Reference
from adapters.slow import optimizers
from daemon.labels import Joined
from daemon.settings import Slow

log = structlog.get_logger("homeostat.learner")


@dataclass(slots=True)
class Outcome:
    """What became of a burst."""

    result: Literal["promoted", "rejected", "failed", "cancelled"]
    reason: str
    delta: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Learner:
    """Memories of labelled rows, and at most one burst at a time."""

    def __init__(
        self,
        settings: Slow,
        reference: Reference,
        *,
        task: str,
        classes: int | None,
        input_shape: tuple[int, ...],
        seed: int = 0,
    ) -> None:
        self.settings = settings
        self.task = task
        self._method = slow.get(settings.name)
        self._options = slow.BurstOptions(
            steps=settings.steps,
            batch_size=settings.batch_rows,
            optimizer=settings.optimizer,
            lr=settings.lr,
            reference_share=settings.reference_share,
        )
        self._reference_x = reference.exemplars_x.cpu().numpy()
        self._reference_y = reference.exemplars_y.cpu().numpy()
        self.replay = slow.Replay(
            input_shape,
            settings.memory_rows,
            classes=classes,
            seed=seed,
            reference_x=self._reference_x,
            reference_y=self._reference_y,
        )
        self.holdout = slow.Holdout(input_shape, settings.holdout_rows, classes=classes)
        self._seed = seed
        self._bursts = 0
        self._fresh = 0
        self.wanted = False
        self._thread: threading.Thread | None = None
        self._cancel = threading.Event()
        self._outcome: Outcome | None = None
        self._warm: threading.Thread | None = None

    def check(self, model: nn.Module) -> str | None:
        """Why nothing of this model can be learnt, None if something can."""
        return self._method.check(model)

    def warm_up(self) -> None:
        """Import the optimisers beside the stream: seconds that the first burst then doesn't take.

        At the first label, not at the start: without labels nothing is ever learnt.
        """
        if self._warm is None and not self.settings.inline:
            self._warm = threading.Thread(target=self._try_optimizer, name="learner-warm-up", daemon=True)
            self._warm.start()

    def _try_optimizer(self) -> None:
        if problem := optimizers.check(self.settings.optimizer, lr=self.settings.lr):
            log.error("the slow loop's optimiser can't be used: every burst will fail", problem=problem)

    def add(self, joined: Joined) -> None:
        """Newest labelled rows are held back first, and learnt from once they have left the holdout."""
        self.warm_up()
        y = joined.y.astype(np.int64 if self.task == "classification" else np.float32)
        leaving = self.holdout.add(joined.x, y)
        if len(leaving.y):
            self.replay.add(*leaving)
        self._fresh += len(y)

    @property
    def busy(self) -> bool:
        """Whether a burst runs or is wanted."""
        return self.wanted or self._thread is not None

    def ask(self) -> None:
        """A burst is wanted: it starts as soon as there are labels enough."""
        self.wanted = True

    def cancel(self) -> None:
        """Give up the wanted or running burst; what it makes is thrown away."""
        self.wanted = False
        self._cancel.set()

    def step(self, version: nn.Module, number: int) -> Outcome | None:
        """Once a batch: start what is wanted and ready, hand over what is finished."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            outcome, self._outcome = self._outcome, None
            if outcome is not None and self._cancel.is_set():
                # Made for a version that may be gone by now, and finished before it saw that nobody wants it.
                return Outcome("cancelled", "no longer wanted", seconds=outcome.seconds)
            return outcome
        if self.wanted and self._thread is None and self._enough():
            self.wanted = False
            return self._start(version, number)
        return None

    def _enough(self) -> bool:
        minimum = self.settings.min_labels
        return len(self.replay) >= minimum and self._fresh >= minimum and len(self.holdout) >= min(32, minimum)

    def _start(self, version: nn.Module, number: int) -> Outcome | None:
        self._fresh = 0
        self._bursts += 1
        # The holdout's look is counted here, in the loop's thread: its state is part of the checkpoint.
        held, query = self.holdout.rows(), self.holdout.look()
        job = (version, number, self.replay.snapshot(), held, query, self._seed + self._bursts)
        self._cancel = threading.Event()
        if self.settings.inline:
            return self._run(*job, self._cancel)
        self._thread = threading.Thread(target=self._run_aside, args=(*job, self._cancel), name="learner", daemon=True)
        self._thread.start()
        return None

    def _run_aside(self, *job: Any) -> None:
        version = job[0]
        device = next(version.parameters()).device
        if device.type == "cuda":
            # Its own stream, so that serving doesn't queue behind training.
            with torch.cuda.stream(torch.cuda.Stream(device)):
                self._outcome = self._run(*job)
        else:
            self._outcome = self._run(*job)

    def _run(
        self,
        version: nn.Module,
        number: int,
        memory: slow.Snapshot,
        held: slow.Rows,
        query: int,
        seed: int,
        cancel: threading.Event,
    ) -> Outcome:
        started = time.perf_counter()
        try:
            result = slow.run_burst(
                version, self._method, memory, self._options, task=self._task(), seed=seed, stop=cancel.is_set
            )
            if cancel.is_set():
                return Outcome("cancelled", "no longer wanted", seconds=time.perf_counter() - started)
            if not result.delta:
                return Outcome("failed", result.reason, seconds=time.perf_counter() - started)
            verdict = slow.judge(
                version,
                slow.apply_delta(version, result.delta),
                held.x,
                held.y,
                self._reference_x,
                self._reference_y,
                task=self._task(),
                alpha=self.settings.alpha,
                reference_margin=self.settings.reference_margin,
                query=query,
                max_queries=self.holdout.max_queries,
            )
        except Exception as error:
            # Out of memory, or an optimiser that can't train this model: the stream goes on, the log says why.
            log.exception("burst failed")
            return Outcome("failed", f"{type(error).__name__}: {error}", seconds=time.perf_counter() - started)
        seconds = time.perf_counter() - started
        record = {
            "method": self.settings.name,
            "rows": len(memory),
            "held_back": len(held.y),
            "steps": result.steps,
            "from_version": number,
            **{name: value for name, value in asdict(verdict).items() if name not in ("promote", "reason")},
        }
        if verdict.promote:
            return Outcome("promoted", verdict.reason, result.delta, record, seconds)
        return Outcome("rejected", verdict.reason, {}, record, seconds)

    def _task(self) -> slow.Task:
        return "regression" if self.task == "regression" else "classification"

    def close(self, timeout_s: float) -> None:
        """End a running burst."""
        self.cancel()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def state_dict(self) -> dict[str, Any]:
        """Memories and counters; a running burst is started again after a restart, from the rows of then."""
        return {
            "replay": copy.deepcopy(self.replay.state_dict()),
            "holdout": copy.deepcopy(self.holdout.state_dict()),
            "bursts": self._bursts,
            # A burst under way is lost with the process: its labels count as fresh again.
            "fresh": self._fresh if self._thread is None else self.settings.min_labels,
            "wanted": self.wanted or self._thread is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.replay.load_state_dict(state["replay"])
        self.holdout.load_state_dict(state["holdout"])
        self._bursts, self._fresh = int(state["bursts"]), int(state["fresh"])
        self.wanted = bool(state["wanted"])
