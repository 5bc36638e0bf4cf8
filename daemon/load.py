"""What a loop is told of overload, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.overload import Step
from daemon.predicted import sampled


@dataclass
class Load:
    """One loop's part of `daemon.pressure`."""

    step: Step = Step.NORMAL
    """Part of the checkpoint, so that what is read again after a crash is read in the same step."""
    adapt_share: float = 1.0
    """Share of the batches that adaptation is given."""
    dropped: bool = False
    """Records were skipped since the last reading."""
    seconds: float = 0.0
    """Of the latest batch."""

    def given(self, first: int) -> bool:
        """Whether adaptation is given the batch that begins with record number ``first`` of the stream.

        By a hash of the number, as twins are sampled: the same in every run that cuts the same batches.
        """
        return len(sampled(first, 1, self.adapt_share)) > 0
