"""Several calibrated detectors as one, with a joint false-alarm rate that holds however they depend on each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, Self

import numpy as np

from detectors.base import F64, Detector, positive
from detectors.calibrated import calibrate
from detectors.registry import build

How = Literal["bonferroni", "election", "e_average"]
LOG_E_VALUES = frozenset({"e_detector", "risk_monitor", "disagreement"})
"""Detectors whose statistic is the log of an e-value, up to a constant that calibration takes care of."""


class Member(Protocol):
    """What the ensemble asks of a member; ``Calibrated`` has it."""

    drift: bool
    warning: bool

    @property
    def name(self) -> str:
        """Name in the registry."""

    @property
    def arl0(self) -> float:
        """Mean rows between false alarms."""

    @property
    def threshold(self) -> float:
        """Bound of the statistic."""

    @property
    def statistic(self) -> float:
        """Evidence so far."""

    def update(self, value: Any) -> Any:
        """Read one value or row."""

    def update_many(self, values: F64) -> list[int]:
        """Read many; indices of the alarms."""

    def reset(self) -> None:
        """Drop the evidence so far."""

    def rebaseline(self, rows: int) -> None:
        """Take the next rows for normal."""

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore."""


class Ensemble:
    """Reads a stream with n members and alarms when they, taken together, say that it has changed.

    - ``bonferroni``: any member alarms.
    - ``election``: ``quorum`` different members alarmed within the last ``span`` rows (default quorum: the majority).
      An alarm uses up the votes that made it.
    - ``e_average``: sum_j (e_j - 1) / (a_j - 1) reaches 1, where a_j is the member's ARL0 and log e_j = log a_j *
      statistic / threshold its log e-value, stretched so that e_j = a_j where it would alarm alone. What alarms under
      ``bonferroni`` alarms here, and so does evidence that no member has enough of alone. For members whose
      statistic is a log e-value only.

    The mean number of rows between false alarms is at least ``joint_arl0`` however the members depend on each other:
    an election of k uses up k alarms, of which there are sum_j 1 / a_j per row; averages of e-detectors are
    e-detectors. The latter is exact for thresholds of log a_j, and for calibrated ones a good approximation as long
    as the log of the ARL0 grows linearly in the threshold. For an election the bound is far from tight: independent
    members seldom err together.

    ``members`` are calibrated already, each for its own ARL0; ``ensemble`` makes them. Member j reads column
    ``columns[j]`` of a row, or the value or row as it is where that is None. Under ``bonferroni`` and ``election`` a
    member restarts after its own alarm, the others go on, so that a lasting change is likely to be told more than
    once: ``reset`` or ``rebaseline`` once it is acted on. ``e_average`` restarts all.

    Elections of detectors: B. Maciel, S. Santos, R. Barros, "A lightweight concept drift detection ensemble", IEEE
    ICTAI 2015. Averages of e-values: V. Vovk, R. Wang, "E-values: calibration, combination and applications", Annals of
    Statistics 49, 2021.
    """

    def __init__(
        self,
        members: Sequence[Member],
        how: How = "bonferroni",
        *,
        columns: Sequence[int | None] | None = None,
        quorum: int | None = None,
        span: int = 100,
    ) -> None:
        self._members = list(members)
        count = len(self._members)
        self._columns = [None] * count if columns is None else list(columns)
        if not self._members or len(self._columns) != count:
            raise ValueError(f"an ensemble needs members, each with a column: got {count} and {len(self._columns)}")
        self._how = how
        self._quorum = _quorum(how, count, quorum)
        self._span = int(positive("span", span))
        if how == "e_average" and (others := sorted({m.name for m in members} - LOG_E_VALUES)):
            raise ValueError(f"e_average needs e-values, which {', '.join(others)} does not give: use bonferroni")
        self.labels = [
            member.name if column is None else f"{member.name}[{column}]"
            for member, column in zip(self._members, self._columns, strict=True)
        ]
        """Name of each member, with its column if it has one."""
        self.voters: list[str] = []
        """Who made the last alarm: labels."""
        self.drift = self.warning = False
        self._rows = 0
        self._votes = [-1] * count
        self._share = 0.0

    @property
    def members(self) -> list[Member]:
        """The members, in order."""
        return list(self._members)

    @property
    def joint_arl0(self) -> float:
        """Lower bound of the mean number of rows between false alarms, from the members' own ARL0."""
        return self._quorum / sum(1.0 / member.arl0 for member in self._members)

    @property
    def statistic(self) -> float:
        """Evidence as a share of what an alarm needs, at the last row; open votes over the quorum, or the e-average."""
        if self._how == "e_average":
            return self._share
        return len(self._open(self._rows - 1)) / self._quorum

    def update(self, value: Any) -> Self:
        """Read one value, or one row (D,)."""
        for member, column in zip(self._members, self._columns, strict=True):
            member.update(value if column is None else float(value[column]))
        if self._how == "e_average":
            self.drift = self._average()
        else:
            self.drift = self._elect(self._rows, [j for j, member in enumerate(self._members) if member.drift])
        self._rows += 1
        self._warn()
        return self

    def update_many(self, values: F64) -> list[int]:
        """Read ``values`` (B,) or (B, D) in order; indices of the alarms. Same state as one by one.

        ``e_average`` reads them one by one, for it needs every member's statistic at every row.
        """
        values = np.asarray(values)
        if not len(values):
            return []
        if self._how == "e_average":
            return [index for index, value in enumerate(values) if self.update(value).drift]
        found: dict[int, list[int]] = {}
        for j, (member, column) in enumerate(zip(self._members, self._columns, strict=True)):
            for index in member.update_many(values if column is None else values[:, column]):
                found.setdefault(index, []).append(j)
        alarms = [index for index in sorted(found) if self._elect(self._rows + index, found[index])]
        self._rows += len(values)
        self.drift = bool(alarms) and alarms[-1] == len(values) - 1
        self._warn()
        return alarms

    def _elect(self, row: int, who: list[int]) -> bool:
        """Take the votes of ``who`` at ``row``; whether there is a quorum, whose votes are then used up."""
        for j in who:
            self._votes[j] = row
        if not who or len(voters := self._open(row)) < self._quorum:
            return False
        self.voters = [self.labels[j] for j in voters]
        self._votes = [-1] * len(self._votes)
        return True

    def _open(self, row: int) -> list[int]:
        return [j for j, vote in enumerate(self._votes) if vote >= 0 and row - vote < self._span]

    def _average(self) -> bool:
        # A member above its own threshold has restarted, so that its statistic no longer shows it.
        shares = [1.0 if m.drift else _share(m.statistic / m.threshold, m.arl0) for m in self._members]
        self._share = sum(shares)
        if self._share < 1.0:
            return False
        self.voters = [label for label, share in zip(self.labels, shares, strict=True) if share * len(shares) >= 1.0]
        for member in self._members:
            member.reset()
        self._share = 0.0
        return True

    def _warn(self) -> None:
        members = any(member.warning for member in self._members)
        self.warning = self.drift or members or bool(self._open(self._rows - 1))

    def reset(self) -> None:
        """Drop all evidence and votes."""
        for member in self._members:
            member.reset()
        self._votes = [-1] * len(self._votes)
        self._rows, self._share = 0, 0.0
        self.drift = self.warning = False
        self.voters = []

    def rebaseline(self, rows: int) -> None:
        """All members take the next ``rows`` finite values for normal; no alarm meanwhile."""
        self.reset()
        for member in self._members:
            member.rebaseline(rows)

    def state_dict(self) -> dict[str, Any]:
        """The members' states, the votes and the flags; plain values."""
        return {
            "members": [member.state_dict() for member in self._members],
            "labels": list(self.labels),
            "rows": self._rows,
            "votes": list(self._votes),
            "share": self._share,
            "voters": list(self.voters),
            "drift": self.drift,
            "warning": self.warning,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore. Raises ``ValueError`` if the state is that of other members."""
        if state["labels"] != self.labels:
            raise ValueError(f"the state is that of {state['labels']}, not of {self.labels}: start the ensemble anew")
        for member, inner in zip(self._members, state["members"], strict=True):
            member.load_state_dict(inner)
        self._rows, self._votes = int(state["rows"]), [int(vote) for vote in state["votes"]]
        self._share, self.voters = float(state["share"]), list(state["voters"])
        self.drift, self.warning = bool(state["drift"]), bool(state["warning"])


def ensemble(
    detectors: Sequence[str | Detector],
    reference: F64,
    arl0: float = 10_000,
    how: How = "bonferroni",
    *,
    quorum: int | None = None,
    span: int = 100,
    seed: int = 0,
) -> Ensemble:
    """Calibrate ``detectors`` (names, or detectors as built) on ``reference`` for a joint ARL0 of at least ``arl0``.

    A ``reference`` (N, D) gives each detector of single values D members, one for each column, and a detector of rows
    one member that reads them all. Of n members each is calibrated for n / quorum times ``arl0``. Takes a second or two
    for each. Raises ``ValueError`` for unknown names, advisory detectors, or a reference too short.
    """
    reference = np.asarray(reference, dtype=np.float64)
    made: list[tuple[Detector, int | None]] = []
    for one in detectors:
        detector = build(one) if isinstance(one, str) else one
        if detector.advisory:
            raise ValueError(f"{detector.name} only gives advice: it can't vote on an alarm, leave it out")
        whole = reference.ndim == 1 or detector.reads == "rows"
        made += [(detector, None)] if whole else [(detector, column) for column in range(reference.shape[1])]
    share = len(made) / _quorum(how, len(made), quorum)
    # One seed for each: members then differ in their Monte Carlo errors instead of sharing them.
    members = [
        calibrate(detector, reference if column is None else reference[:, column], share * arl0, seed + j)
        for j, (detector, column) in enumerate(made)
    ]
    return Ensemble(members, how, columns=[column for _, column in made], quorum=quorum, span=span)


def _quorum(how: How, count: int, quorum: int | None) -> int:
    """How many votes make an alarm. Raises ``ValueError`` if that many members can't vote, or votes don't count."""
    if how not in ("bonferroni", "election", "e_average"):
        raise ValueError(f"how must be 'bonferroni', 'election' or 'e_average', got {how!r}")
    if how != "election":
        if quorum is not None:
            raise ValueError(f"quorum is for an election, not for {how}")
        return 1
    needed = count // 2 + 1 if quorum is None else int(quorum)
    if not 1 <= needed <= max(count, 1):
        raise ValueError(f"quorum must be from 1 to {count}, the number of members, got {quorum}")
    return needed


def _share(progress: float, arl0: float) -> float:
    """(e - 1) / (arl0 - 1) for log e = ``progress`` * log arl0; 0 for e below 1."""
    return math.expm1(min(max(progress, 0.0), 1.0) * math.log(arl0)) / (arl0 - 1.0)
