"""The metrics' own samples, read by name: the page shows what a scrape would show, and computes nothing anew."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry

PREFIX = "homeostat_"


class Numbers:
    """One reading of all metrics. Names are without ``homeostat_``; what is not finite, or not there, is None."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in registry.collect():
            if family.type == "histogram":
                continue
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append((dict(sample.labels), float(sample.value)))

    def of(self, name: str) -> float | None:
        """The value of a metric without labels."""
        found = self._samples.get(PREFIX + name)
        return finite(found[0][1]) if found else None

    def by(self, name: str, label: str) -> dict[str, float | None]:
        """A metric's values by one of its labels; where there are more labels, added up over the others."""
        result: dict[str, float | None] = {}
        for labels, value in self._samples.get(PREFIX + name, ()):
            key = labels[label]
            before = result.get(key)
            result[key] = finite(value) if before is None else finite(before + value)
        return result

    def count(self, name: str) -> int:
        """A counter without labels."""
        return int(self.of(name) or 0)

    def counts(self, name: str, label: str) -> dict[str, int]:
        """A counter by one of its labels."""
        return {key: int(value or 0) for key, value in self.by(name, label).items()}


def finite(value: float | None) -> float | None:
    """``value``, or None where strict JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None
