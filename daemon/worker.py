"""Everything that one process runs, and the state of it that a checkpoint holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from daemon.bundle import Bundle
from daemon.loop import Loop
from daemon.overload import Step
from daemon.settings import Settings
from daemon.streams.base import AcknowledgedSource, LabelSource, SharedSource, Sink, Source
from daemon.telemetry import Telemetry
from daemon.tracing.opening import Untraced
from daemon.versioning.keeper import NoKeeper


@dataclass
class Worker:
    """Everything that one process runs."""

    settings: Settings
    bundle: Bundle
    source: Source
    sink: Sink
    labels: LabelSource | None
    loop: Loop
    telemetry: Telemetry
    config_hash: str
    keeper: NoKeeper = field(default_factory=NoKeeper)
    """Of the versions on disk."""
    tracing: Untraced = field(default_factory=Untraced)
    """Where its spans go."""

    # Asked in every turn, and such a check of a protocol walks through all its names: it is made once.

    @cached_property
    def shared(self) -> SharedSource | None:
        """The source, where other workers read the same stream."""
        return self.source if isinstance(self.source, SharedSource) else None

    @cached_property
    def acknowledged(self) -> AcknowledgedSource | None:
        """The source, where its broker sends on only what is committed."""
        return self.source if isinstance(self.source, AcknowledgedSource) else None

    @cached_property
    def acknowledged_labels(self) -> AcknowledgedSource | None:
        """The labels, where their broker sends on only what is committed."""
        return self.labels if isinstance(self.labels, AcknowledgedSource) else None

    def announce(self) -> None:
        """Tell by a metric what runs."""
        settings, telemetry = self.settings, self.telemetry
        telemetry.build.info(
            {
                "version": telemetry.product_version,
                "bundle": self.bundle.hash,
                "fast": settings.fast.name,
                "slow": settings.slow.name if settings.slow.enabled else "off",
                "device": str(self.loop.resident.device),
                "python": sys.version.split()[0],
                "torch": torch.__version__,
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """All state that a checkpoint holds."""
        loop = self.loop
        return {
            "resident": loop.resident.state_dict(),
            "monitor": loop.monitor.state_dict(),
            "regulator": loop.regulator.state_dict(),
            "adapt": loop.adapt,
            "join": None if loop.join is None else loop.join.state_dict(),
            "learner": loop.actions.learner.state_dict(),
            "tally": loop.tally.state_dict(),
            "overload": int(loop.load.step),
            "frozen": loop.actions.frozen,
            "queries": None if loop.queries is None else loop.queries.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where the checkpoint was taken."""
        loop = self.loop
        loop.resident.load_state_dict(state["resident"])
        loop.monitor.load_state_dict(state["monitor"])
        loop.regulator.load_state_dict(state["regulator"])
        loop.adapt = bool(state["adapt"])
        if loop.join is not None and state["join"] is not None:
            loop.join.load_state_dict(state["join"])
        loop.actions.learner.load_state_dict(state["learner"])
        loop.tally.load_state_dict(state["tally"])
        loop.load.step = Step(state.get("overload", 0))
        loop.actions.frozen = bool(state.get("frozen", False))
        if loop.queries is not None:
            loop.queries.load_state_dict(state.get("queries"))
        loop.actions.resume(loop.regulator.state)
