"""One run of `make bench-slow`: who serves a stream with which labels, what is measured, and what each promotion did.

run = Run(stream="gas", subject=BOTH, labels="100%", delay=200)
result = measured(run)
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import adapters.slow as slow
from daemon.bundle import Bundle, open_bundle
from daemon.evaluation.answers import Frozen, Replayed, frozen_answers
from daemon.evaluation.baselines import FROZEN as FROZEN_MODEL
from daemon.evaluation.baselines import REFIT as REFIT_SMALLER
from daemon.evaluation.baselines import RefusedError, replay_baseline
from daemon.evaluation.intervals import mean_interval
from daemon.evaluation.recording import Recording
from daemon.evaluation.replay import replay
from daemon.evaluation.score import recovery
from daemon.resident import Resident
from daemon.settings import Settings
from daemon.versions import Version
from tests.benchmarks.slow_refit import replay_refit
from tests.benchmarks.slow_streams import DELAYS, STREAMS, Labels, model_of, plan, recording
from tests.streams.auto import sources
from tests.streams.auto.bundles import bundle_for

Result = dict[str, Any]
Wrong = NDArray[np.bool_]

ROOT = Path(__file__).resolve().parents[2]
FROZEN, PLAIN, REFIT, REFIT_SMALL = "frozen", "frozen in the daemon", "refit", "refit, small"
"""The bare model; the daemon that never adapts; all weights trained anew by the clock; the slow loop's alone so."""
FAST, SLOW, BOTH = "fast only", "slow only", "fast + slow"
EXACT, REGRESSION = ("lda_head", "prototype_head"), ("ridge_head",)
"""Heads that are solved for, and those that serve no stream of classes; every other slow method learns by gradients."""
KEPT = ("lae+norm_affine_head", "fisher+norm_affine_head", "interpolate+norm_affine_head")
COSTLY = "cifar_recurring"
USUAL_DELAY = 200
PIECES = 8
"""Parts of a stream, in order, whose errors are shown."""
AFTER_ROWS, LEAST_AFTER = 500, 100
"""Most and fewest rows after a promotion on which it is compared with its parent."""


def kinds() -> tuple[str, ...]:
    """Slow methods that learn by gradients, by name, then the ways of keeping."""
    return (*(name for name in slow.names() if name not in (*EXACT, *REGRESSION)), *KEPT)


@dataclass(frozen=True, kw_only=True, order=True)
class Run:
    """Everything that a result depends on but the code."""

    stream: str
    subject: str
    labels: Labels = "100%"
    delay: int = USUAL_DELAY
    seed: int = 0

    @property
    def name(self) -> str:
        """What no other run is called."""
        return f"{self.stream}/{self.subject}/{self.labels}/{self.delay}/{self.seed}"


def all_runs(seeds: int, *, everything: bool = True) -> list[Run]:
    """The full cross of labels and delays for the daemon; methods by themselves with labels all, and 200 rows late.

    ``everything``: these on every stream. Else those that learn by gradients are left out on the second one of images,
    where each of them takes a minute.
    """
    left_out = () if everything else kinds()
    return [
        Run(stream=stream, subject=subject, labels=labels, delay=delay, seed=seed)
        for stream in STREAMS
        for seed in range(seeds)
        for subject, labels, delay in _cells()
        if stream != COSTLY or subject not in left_out
    ]


def _cells() -> list[tuple[str, Labels, int]]:
    given: list[Labels] = ["100%", "10%", "1%"]
    cross: list[tuple[Labels, int]] = [*((labels, delay) for labels in given for delay in DELAYS), ("none", 0)]
    found: list[tuple[str, Labels, int]] = [(FROZEN, "none", 0), (PLAIN, "none", 0)]
    found += [(subject, labels, delay) for labels, delay in cross for subject in (FAST, SLOW, BOTH)]
    found += [(subject, labels, USUAL_DELAY) for subject in (REFIT, REFIT_SMALL) for labels in given[:2]]
    found += [(subject, "100%", USUAL_DELAY) for subject in (*EXACT, *kinds())]
    return found


def settings_of(subject: str, model: str) -> Settings:
    """The daemon's defaults with what the subject leaves out or names; a name that is no subject is a slow method."""
    given: dict[str, Any] = {"enabled": subject not in (FAST, PLAIN, FROZEN)}
    fast = "auto"
    if subject in (SLOW, PLAIN):
        fast = "none"
    elif subject not in (FROZEN, FAST, BOTH, REFIT, REFIT_SMALL):
        fast, given = "none", {"name": subject, "exact": ""}
    return Settings(
        bundle=bundle_for(model), factory=sources.get(model).factory, app_dir=ROOT, fast={"name": fast}, slow=given
    )


@lru_cache(maxsize=4)
def _frozen(stream: str, seed: int) -> tuple[Bundle, Replayed]:
    """The bundle, and the frozen model's answers."""
    settings = settings_of(FROZEN, model_of(stream))
    assert settings.bundle is not None
    bundle = open_bundle(settings.bundle, settings.factory, ROOT)
    return bundle, frozen_answers(Frozen(settings, bundle), recording(stream, seed), plan("none", 0, seed))


def measured(run: Run) -> Result:
    """What came of it.

    Raises:
        RefusedError: the subject can't serve the stream's model.
    """
    model = model_of(run.stream)
    settings, rows = settings_of(run.subject, model), recording(run.stream, run.seed)
    (bundle, frozen), how = _frozen(run.stream, run.seed), plan(run.labels, run.delay, run.seed)
    with watched_promotions() as watched:
        if run.subject == REFIT:
            made = replay_refit(sources.get(model).recipe, settings, bundle, rows, how, frozen)
        elif run.subject in (FROZEN, REFIT_SMALL):
            name = FROZEN_MODEL if run.subject == FROZEN else REFIT_SMALLER
            made = replay_baseline(name, settings, bundle, rows, how, frozen=frozen)
        else:
            _check(settings, bundle)
            made = replay(settings, bundle, rows, how, frozen=frozen)
    begins = [row + 1 for row, text in made.decisions if text.startswith("version promoted")]
    if len(begins) != len(watched.promotions):
        raise RuntimeError(f"{len(watched.promotions)} promotions, and the log has {len(begins)} of them")
    afterwards = []
    for one, at, until in zip(watched.promotions, begins, [*begins[1:], len(rows)][: len(begins)], strict=True):
        if (found := aftermath(one, bundle.model, rows, at, until)) is not None:
            # Since the newest row whose label can have judged it.
            known = [at - run.delay < change < at + found["rows"] for change in rows.changes]
            afterwards.append({**found, "changed": any(known)})
    own = summary(made, rows) | {"promotions": afterwards}
    if settings.slow.enabled and run.subject not in (REFIT, REFIT_SMALL):
        own["version_forgetting"] = forgotten(bundle, watched.last())
    return own


def _check(settings: Settings, bundle: Bundle) -> None:
    if not settings.slow.enabled:
        return
    if problem := slow.get(settings.slow.name, **settings.slow.options).check(bundle.model):
        raise RefusedError(problem)


def summary(made: Replayed, rows: Recording) -> Result:
    """Numbers of one replay; errors in per cent."""
    wrong: Wrong = np.asarray(made.prediction != rows.y, np.bool_)
    losses, scored = wrong.astype(np.float64), np.ones(len(wrong), np.bool_)
    found = [recovery(losses, scored, rows.changes, index) for index in range(len(rows.changes))]
    source = None
    if made.source_error is not None and made.frozen_source_error is not None:
        source = 100.0 * (made.source_error - made.frozen_source_error)
    return {
        "rows": len(wrong),
        "error": 100.0 * float(wrong.mean()),
        "pieces": [100.0 * float(piece.mean()) for piece in np.array_split(wrong, PIECES)],
        "recoveries": [each.rows for each in found if np.isfinite(each.bound)],
        "forgetting": source,
        "slow_seconds": made.slow_seconds,
        "seconds": made.seconds,
        "same": float(made.same.mean()),
        "counts": ended([text for _, text in made.decisions]),
        "wrong": packed(wrong),
    }


_ENDED = re.compile(r"^burst without a version: result (\w+)")


def ended(lines: list[str]) -> dict[str, int]:
    """How often each came about: promoted, rejected, declined, ..., withdrawn; from the daemon's log lines."""
    found: Counter[str] = Counter()
    for text in lines:
        found["promoted"] += text.startswith("version promoted")
        found["withdrawn"] += text.startswith("version withdrawn")
        if match := _ENDED.match(text):
            found[match[1]] += 1
    return {name: count for name, count in sorted(found.items()) if count}


@dataclass(frozen=True, kw_only=True, eq=False)
class Promotion:
    """Both versions as deltas over the frozen model, and by which method the newer one was made."""

    parent: dict[str, Tensor]
    own: dict[str, Tensor]
    method: str


@dataclass(kw_only=True, eq=False)
class Watched:
    """The promotions of a replay, in order, and whose they were."""

    promotions: list[Promotion] = field(default_factory=list)
    resident: Resident | None = None

    def last(self) -> dict[str, Tensor]:
        """What served in the end, over the frozen model: a promoted version may be withdrawn."""
        return {} if self.resident is None else dict(self.resident.current.delta)


@contextmanager
def watched_promotions() -> Iterator[Watched]:
    """Every promotion while inside."""
    found = Watched()
    promote = Resident.promote

    def watched(self: Resident, delta: dict[str, Tensor], record: Result, *, over_frozen: bool = False) -> Version:
        parent = dict(self.current.delta)
        version = promote(self, delta, record, over_frozen=over_frozen)
        method = str(record.get("method", ""))
        found.promotions.append(Promotion(parent=parent, own=dict(version.delta), method=method))
        found.resident = self
        return version

    Resident.promote = watched  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Resident.promote = promote  # type: ignore[method-assign]


def forgotten(bundle: Bundle, delta: dict[str, Tensor]) -> float:
    """Points of error on the source's exemplars that a version, without any fast adaptation, is above the frozen
    model."""
    x, y = bundle.reference.exemplars_x.cpu().numpy(), bundle.reference.exemplars_y.cpu().numpy()
    before, after = (errs(model, x, y) for model in (bundle.model, slow.apply_delta(bundle.model, delta)))
    return 100.0 * float(after.mean() - before.mean())


def aftermath(promotion: Promotion, frozen: nn.Module, rows: Recording, at: int, until: int) -> Result | None:
    """How much more the new version errs than its parent on the rows after it, with the paired interval, in points.

    Args:
        promotion: of the version.
        frozen: the model as it was packed.
        rows: the stream.
        at: first row that the version was there for.
        until: where the next one came; more rows are taken where that was sooner than ``LEAST_AFTER``.

    Returns:
        None where fewer rows than that are left.
    """
    stop = min(max(until, at + LEAST_AFTER), at + AFTER_ROWS, len(rows))
    if stop - at < LEAST_AFTER:
        return None
    parent, own = (
        errs(slow.apply_delta(frozen, delta), rows.x[at:stop], rows.y[at:stop])
        for delta in (promotion.parent, promotion.own)
    )
    more = mean_interval(own.astype(np.float64) - parent).scaled(100.0)
    return {
        "row": at, "rows": stop - at, "method": promotion.method, "parent": 100.0 * float(parent.mean()),
        "mean": more.mean, "low": more.low, "high": more.high,
    }  # fmt: skip


def errs(model: nn.Module, x: NDArray[Any], y: NDArray[Any], size: int = 256) -> Wrong:
    """(n,) whether a classifier is wrong; an answer that is not finite is."""
    with torch.inference_mode():
        outputs = torch.cat([model.eval()(part) for part in torch.from_numpy(x).split(size)])
    right = (outputs.argmax(1).numpy() == y) & outputs.isfinite().all(1).numpy()
    return np.asarray(~right, np.bool_)


def packed(wrong: Wrong) -> str:
    """As text, eight rows a byte."""
    return base64.b64encode(np.packbits(wrong).tobytes()).decode()


def unpacked(text: str, rows: int) -> Wrong:
    """(rows,) as it was packed."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=rows).astype(np.bool_)
