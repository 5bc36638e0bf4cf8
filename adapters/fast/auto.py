"""auto: decides by itself which of a few safe answers serves the stream; the frozen model's until another has won."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from adapters.fast.core.aligned import AlignedModel, check_aligned
from adapters.fast.core.aligned_arm import AlignedArm
from adapters.fast.core.arms import Arms
from adapters.fast.core.class_distance import ClassDistance
from adapters.fast.core.class_runs import MOST_CLASSES
from adapters.fast.core.deciding import DecidingAdapter
from adapters.fast.core.effective_rows import EffectiveRows
from adapters.fast.core.memory_arm import MemoryArm
from adapters.fast.core.registry import register
from adapters.fast.core.runs_arm import RunsArm
from adapters.fast.core.seen import F32, I64, RunningMean, Seen, falls, look, merged, rows_of
from adapters.fast.core.source import source_outputs
from adapters.fast.core.suspicion import LEVEL_ROWS, Suspicion
from adapters.fast.error_memory import ErrorMemory
from adapters.features import find_head

SEGMENT_ROWS, SHADOW, TWIN = 32, 2, 4
"""Of the segments of this many rows, the aligned copy sees every second one once it has had its time and does not
serve, the frozen model every fourth while the aligned one serves."""
LABEL_SILENCE_ROWS = 5_000
"""Rows without a label after which a stream counts as unlabelled."""
TINY = 1e-30
ALIGNED, RUNS, MEMORY = 1, 2, 4
"""Bits of `Auto.ways`."""


@register("auto")
class Auto(DecidingAdapter):
    """The frozen model, its aligned copy, runs of classes, a memory of errors: what is shown to serve answers.

    *Frozen* answers until something better is shown, to the bit.

    *Aligned*: a copy whose layers are kept at the source's moments (`AlignedModel`), the batch at hand included, with a
    memory of ``memory_rows`` effective rows: neither the size of batches nor runs of one class matter. It runs in
    shadow once a shift is suspected. It answers while its features lie nearer to those of their predicted class than
    the frozen model's do, and it is no less sure, on the same rows (`NearerToSource`): so it undoes a shift of the
    inputs, and leaves other shares of the classes alone.

    *Runs*: where classes come in runs, a prior from the rows before multiplies the serving model's answer (`ClassRuns`)
    while that model's features are in reach of the source's.

    *Memory*: errors of labelled rows near by are corrected (`ErrorMemory`) once late labels show that it helps.

    Late labels overrule all of it (`Contest`): an arm shown to be worse than the answer without it is left out, one
    shown to be better serves. In regression, and without features or exemplars of the source, only labels decide. No
    gradient anywhere; while nothing happens no forward pass but the frozen model's.

    The aligned copy runs while the caller's detectors see a shift (`alert`), or the frozen model's class distance does.
    At gain g outputs are frozen + g·(chosen − frozen). Without a reference it is the frozen model. State: moments, 6
    answers for each of 16,384 rows, the memory of errors. One state for all rows.

    Moments: Schneider et al., NeurIPS 2020. Effective rows where labels are correlated: Niu et al., ICLR 2023. The
    frozen model as the safe arm: Bar et al., NeurIPS 2024. Tests at any time: Waudby-Smith and Ramdas, JRSS B 2024.
    """

    ways = ("aligned", "runs", "memory")

    class Options(DecidingAdapter.Options):
        """Settings; one set for every stream."""

        memory_rows: float = Field(default=128.0, gt=0.0)
        """Memory of the aligned copy's moments, in effective rows."""
        most_rows: float = Field(default=2000.0, gt=0.0)
        """The same at the most, in rows."""
        source_rows: float = Field(default=16.0, ge=0.0)
        """Weight of the source's moments at the start, in effective rows."""
        capacity: int = Field(default=1024, ge=1)
        """Labelled rows that the memory of errors holds."""

    options: Options

    def _setup(self) -> None:
        o, reference = self.options, self.reference
        head = o.head or find_head(self.model)
        classes = 0 if reference is None or reference.class_prior is None else len(reference.class_prior)
        self._classes = classes
        self._aligned: AlignedArm | None = None
        if reference is not None and check_aligned(self.model, reference.exemplars_x, head) is None:
            self._aligned = AlignedArm(
                AlignedModel(self.model, reference.exemplars_x, head),
                reference,
                o.memory_rows,
                o.most_rows,
                o.source_rows,
            )
        self._memory: MemoryArm | None = None
        self._distance: ClassDistance | None = None
        self._suspicion: Suspicion | None = None
        self._runs: RunsArm | None = None
        if reference is not None and head and ErrorMemory.check(self.model, reference) is None:
            self._memory = MemoryArm(ErrorMemory(self.model, reference, head=head, capacity=o.capacity))
            if classes and len(reference.exemplars_x):
                self._distance = ClassDistance(reference, source_outputs(self.model, reference, head))
                self._suspicion = Suspicion(self._distance)
        if self._distance is not None and reference is not None and 1 < classes <= MOST_CLASSES:
            assert reference.class_prior is not None
            self._runs = RunsArm(reference.class_prior.double().cpu().clamp_min(1e-6).numpy(), self._distance)
        self._arms = Arms(classes=classes > 0, scale=1.0 if reference is None else max(reference.error, 1e-12))
        self._effective = [EffectiveRows(max(classes, 1)) for _ in ("frozen", "aligned")]
        self._clear()

    def _clear(self) -> None:
        self._aligned_level = RunningMean(LEVEL_ROWS)
        """Class distance of the aligned copy."""
        self._served_aligned = False
        self._since_labels = LABEL_SILENCE_ROWS + 1

    def _predict(self, x: Tensor) -> Tensor:
        if self.gain == 0.0:
            return super()._predict(x)
        before = self._state()
        outputs = self._adapt(x)
        features = self._tap.latest if self._tap else None
        self._load(before)
        if self._tap:
            self._tap.latest = features
        return outputs

    def _adapt(self, x: Tensor) -> Tensor:
        if self.gain == 0.0:
            self.numbered += len(x)
            self.changed_by, self.frozen, self.base_outputs = np.zeros(len(x), np.int8), None, None
            return super()._predict(x)
        count, arm = len(x), self._aligned
        everyone = np.arange(count)
        segment = (self.numbered + everyone) // SEGMENT_ROWS
        labelled = self._since_labels <= LABEL_SILENCE_ROWS
        frozen = aligned = None
        serves, self.frozen_share = False, 1.0
        if arm is None or not arm.open:
            frozen = self._seen_by_frozen(x, everyone)
            self._suspect(frozen)
        if arm is not None and arm.open:
            usable = everyone[~arm.outliers(x)]
            served = self._aligned_serves(arm)
            whole = served or labelled or not arm.settled
            aligned = self._seen_by_aligned(arm, x, usable if whole else usable[segment[usable] % SHADOW == 0])
            if frozen is None:
                spare = served and len(usable) == count and not labelled and self.gain == 1.0
                self.frozen_share = 1.0 / TWIN if spare else 1.0
                frozen = self._seen_by_frozen(x, everyone[segment % TWIN == 0] if spare else everyone)
                self._suspect(frozen)
            # What the batch itself shows counts for its own answers: there is no label in it.
            if frozen is not None and aligned is not None and self._distance is not None:
                arm.nearer.update(*falls(frozen, aligned))
            serves = aligned is not None and len(aligned.at) == len(usable) and self._aligned_serves(arm)
            if not serves and (frozen is None or len(frozen.at) < count):
                self.frozen_share, frozen = 1.0, self._seen_by_frozen(x, everyone)
        outputs = self._choose(segment, frozen, aligned if serves else None, aligned, labelled=labelled)
        self._follow(count, frozen, aligned, labelled=labelled)
        return outputs

    def _suspect(self, frozen: Seen | None) -> None:
        """Take in the frozen model's class distances; have the aligned copy run if there may be a shift."""
        if frozen is not None and self._suspicion is not None:
            self._suspicion.update(frozen.distance)
        arm = self._aligned
        if arm is not None and self._suspects():
            again = self._suspicion is not None and self._suspicion.shifted_again(self._effective[0].value)
            if again and not self._aligned_serves(arm) and arm.refresh():
                self._arms.forget("aligned")
            arm.open = True

    def _aligned_serves(self, arm: AlignedArm) -> bool:
        return (self._arms.contests["aligned"].verdict or int(arm.nearer.verdict)) > 0

    def _seen_by_frozen(self, x: Tensor, at: I64) -> Seen | None:
        if not len(at):
            return None
        outputs = super()._predict(rows_of(x, at))
        return look(at, outputs, self._tap.features if self._tap else None, self._classes, self._distance)

    def _seen_by_aligned(self, arm: AlignedArm, x: Tensor, at: I64) -> Seen | None:
        """None for no rows, and for outputs that are not finite, after which it begins again."""
        if not len(at):
            return None
        outputs, features = arm.run(rows_of(x, at), max(part.value for part in self._effective))
        return look(at, outputs, features, self._classes, self._distance) if arm.fine else None

    def _choose(
        self, segment: I64, frozen: Seen | None, serving: Seen | None, aligned: Seen | None, *, labelled: bool
    ) -> Tensor:
        """Outputs (B, V) of what serves; notes what every arm would have answered."""
        count = len(segment)
        if serving is not None or self._aligned is None or not self._aligned_serves(self._aligned):
            if self._runs is not None and self._served_aligned != (serving is not None):
                self._runs.restart()
            self._served_aligned = serving is not None  # a batch of outliers alone leaves it as it is
        outputs, features, p_BK, by_aligned = merged(count, frozen, serving)
        answers = {name: seen.spread(count) for name, seen in (("frozen", frozen), ("aligned", aligned)) if seen}
        self.base_outputs = outputs
        base = self._answer_of(p_BK)
        by = ALIGNED * by_aligned.astype(np.int8)
        answers |= {"base": base, "runs": base, "chosen": base}
        if self._runs is not None and self._runs.looking:
            ratios = self._runs.ratios(p_BK, features, base)
            moved = ratios.any(1)
            if moved.any():
                answers["runs"] = np.where(moved, self._answer_of(np.log(p_BK + TINY) + ratios), base)
                level = self._suspicion.level if self._suspicion and not self._served_aligned else self._aligned_level
                if (self._arms.contests["runs"].verdict or int(self._runs.believed(level.value))) > 0:
                    outputs = outputs + torch.from_numpy(ratios).to(outputs)
                    answers["chosen"], by = answers["runs"], by + RUNS * moved.astype(np.int8)
        memory = self._memory if labelled else None
        if memory is not None and memory.ready and frozen is not None and len(frozen.at) == count:
            trusted = self._arms.contests["memory"].verdict > 0
            if (tried := memory.answer(frozen, segment, serving=trusted)) is not None:
                at, corrected = tried
                answers["memory"] = np.full(count, np.nan, np.float32)
                answers["memory"][at] = self._answer_of(corrected.cpu().numpy())
            if tried is not None and trusted:
                outputs = corrected.clamp_min(TINY).log() if self._classes else corrected.view_as(outputs)
                outputs, by = outputs.to(frozen.outputs.dtype), np.full(count, MEMORY, np.int8)
        if self.gain < 1.0 and frozen is not None:
            outputs = torch.lerp(frozen.outputs, outputs, self.gain)
        self._arms.predicted(self.numbered, answers)
        self.changed_by, self.frozen = by, frozen
        if self._tap is not None:
            self._tap.latest = features
        return outputs

    def _answer_of(self, rows: NDArray[Any]) -> F32:
        """(B,) class or value of (B, V)."""
        answer: F32 = (rows.argmax(1) if self._classes else rows[:, 0]).astype(np.float32)
        return answer

    def _follow(self, count: int, frozen: Seen | None, aligned: Seen | None, *, labelled: bool) -> None:
        """Take the batch in: what every model makes of it now, and who runs on the next."""
        if frozen is not None:
            self._effective[0].update(frozen.p)
            if labelled and self._memory is not None and len(frozen.at) == count:
                self._memory.follow(self.numbered, frozen, suspected=self._suspects())
        if aligned is not None:
            self._effective[1].update(aligned.p)
            self._aligned_level.update(aligned.distance)
        if self._runs is not None:
            self._runs.look(self._effective[self._served_aligned].value)
        self.numbered += count
        self._since_labels = min(self._since_labels + count, LABEL_SILENCE_ROWS + 1)
        if (arm := self._aligned) is not None:
            arm.passed(count)
            if arm.open and arm.settled and not self._suspects() and not self._aligned_serves(arm):
                arm.close()
                self._arms.forget("aligned")
                self._aligned_level.restart()

    def _suspects(self) -> bool:
        """Whether there may be a shift that the aligned copy could undo."""
        own = self._suspicion
        if own is None and self._since_labels > LABEL_SILENCE_ROWS:
            return False  # only labels could show that it serves
        return bool(self.alert) or (self.alert is None if own is None else own.shifted(self._effective[0].value))

    def _learn_numbered(self, x: Tensor, y: Tensor, numbers: Tensor | None) -> None:
        self._since_labels = 0
        on_host = None if numbers is None else numbers.cpu().numpy()
        if on_host is not None:
            self._arms.weigh(on_host, y.cpu().numpy(), max(part.value for part in self._effective))
        if self._memory is not None:
            self._memory.learn(x, y, on_host)

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, by name."""
        parts: dict[str, Any] = {
            "arms": self._arms,
            "aligned_level": self._aligned_level,
            "frozen_rows": self._effective[0],
            "aligned_rows": self._effective[1],
        }
        optional = {"aligned": self._aligned, "runs": self._runs, "suspicion": self._suspicion, "memory": self._memory}
        return parts | {name: part for name, part in optional.items() if part is not None}

    def _state(self) -> dict[str, Any]:
        state = {name: part.state() for name, part in self._parts().items()}
        flags = {"served_aligned": self._served_aligned, "since_labels": self._since_labels}
        return {**state, **flags, "numbered": self.numbered, "alert": self.alert}

    def _load(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load(state[name])
        self._served_aligned, self._since_labels = bool(state["served_aligned"]), int(state["since_labels"])
        self.numbered = int(state["numbered"])
        self.alert = None if state["alert"] is None else bool(state["alert"])
