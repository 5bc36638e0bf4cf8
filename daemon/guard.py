"""The no-harm test: trips on values that are not finite, on collapse, and on evidence that adapting does harm."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from adapters.evidence import HarmEvidence
from daemon.guard_limits import GuardLimits
from daemon.records import F64

__all__ = ["Guard", "GuardLimits", "Reason"]

Reason = Literal["non_finite", "harm", "proxy_harm", "collapse"]
"""Why a guard trips; few words, so that they can label a metric."""


class Guard:
    """Compares what is served with what the frozen model would have served; ``verdict`` says when to fall back.

    - Harm: an anytime-valid test (:class:`adapters.evidence.HarmEvidence`) of "the served model is no worse", once on
      paired loss differences of labelled rows, once on a label-free proxy. It holds for correlated rows too, as long
      as no row's expected difference, given the rows before it, is above 0. Trips when the evidence reaches 1 / level.
    - Collapse: entropy of the mean prediction, normalised by log K, over an exponential window. It is judged against
      the smaller one of the reference prior's and the frozen model's on the same rows: a class-sorted stream, on which
      the frozen model's mean prediction is one-sided too, is no collapse.
    - A served value that is not finite trips at once.

    ``reset`` starts all of it anew, so the levels hold from one reset to the next.

    Args:
        limits: when to trip.
        prior: (K,) class prior of the reference data; None judges collapse against the frozen model alone.

    Raises:
        ValueError: the prior is not a distribution over at least two classes.
    """

    def __init__(self, limits: GuardLimits | None = None, prior: F64 | None = None) -> None:
        self.limits = limits if limits is not None else GuardLimits()
        self._prior_entropy = 1.0
        if prior is not None:
            prior_K = np.asarray(prior, dtype=np.float64)
            valid = prior_K.ndim == 1 and prior_K.size > 1 and np.isfinite(prior_K).all() and (prior_K >= 0).all()
            if not valid or prior_K.sum() <= 0:
                raise ValueError(f"class prior {prior!r}: give (K,) shares of at least two classes, none negative")
            self._prior_entropy = _entropy(prior_K)
        self.reset()

    def reset(self) -> None:
        """Forget the verdict, the evidence and the window."""
        self._verdict: Reason | None = None
        self._harm = HarmEvidence()
        self._proxy = HarmEvidence()
        self._seen = 0
        self._means_2K: F64 | None = None

    def observe(self, *, rows: int, finite: bool, mean_p_served: F64 | None, mean_p_frozen: F64 | None) -> None:
        """Take one batch's outputs.

        Args:
            rows: rows behind the means.
            finite: whether every served output, and the served model's state, is finite.
            mean_p_served: (K,) mean of the served class probabilities, or shares of the predicted classes; None for a
                regression. Shares are the better choice for a method that sharpens its probabilities: on a stretch of
                one class, sharper rows alone lower the entropy of the mean probability.
            mean_p_frozen: (K,) mean of the frozen model's, over the same rows. A batch in which either mean is
                missing, or the frozen one is not finite, does not count for the collapse test.

        Raises:
            ValueError: ``rows`` is negative, or the means are not one-dimensional, alike and of at least two classes.
        """
        if rows < 0:
            raise ValueError(f"a batch of {rows} rows: give 0 or more")
        if not finite or (mean_p_served is not None and not np.isfinite(mean_p_served).all()):
            self._trip("non_finite")
            return
        if rows == 0 or mean_p_served is None or mean_p_frozen is None or not np.isfinite(mean_p_frozen).all():
            return
        served, frozen = np.shape(mean_p_served), np.shape(mean_p_frozen)
        known = served if self._means_2K is None else self._means_2K.shape[1:]
        if not served == frozen == known or len(served) != 1 or served[0] < 2:
            raise ValueError(f"mean predictions of shapes {served} and {frozen}: give two of (K,) with one K > 1")
        batch_2K = np.asarray([mean_p_served, mean_p_frozen], dtype=np.float64)
        if self._means_2K is None:
            self._means_2K = np.zeros_like(batch_2K)
        # The window's weights need no normalising: the entropy is one of shares.
        fresh = -math.expm1(-rows / self.limits.collapse_rows)
        self._means_2K += fresh * (batch_2K - self._means_2K)
        self._seen += rows
        if self._seen >= self.limits.collapse_rows and self._collapse() < self.limits.collapse_ratio:
            self._trip("collapse")

    def paired(self, d: F64) -> None:
        """Take (n,) differences "served loss - frozen loss" of newly labelled rows, each in [-1, 1].

        Raises:
            ValueError: a difference is not finite or outside [-1, 1].
        """
        self._harm.update(d)
        if self._harm.log_peak >= -math.log(self.limits.delta):
            self._trip("harm")

    def proxy(self, d: F64) -> None:
        """Take (n,) label-free differences in [-1, 1], positive where the served output looks worse.

        Raises:
            ValueError: a difference is not finite or outside [-1, 1].
        """
        self._proxy.update(d)
        if self._proxy.log_peak >= -math.log(self.limits.proxy_delta):
            self._trip("proxy_harm")

    def verdict(self) -> Reason | None:
        """Why to fall back, or None. The first reason stays until ``reset``."""
        return self._verdict

    @property
    def evidence(self) -> dict[str, float]:
        """For metrics: log10 of both e-values (``-log10(level)`` trips) and the entropy's share of the expected one."""
        return {
            "harm_evidence": self._harm.log_value / math.log(10),
            "proxy_evidence": self._proxy.log_value / math.log(10),
            "collapse": self._collapse(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped."""
        return {
            "verdict": self._verdict,
            "harm": self._harm.state_dict(),
            "proxy": self._proxy.state_dict(),
            "seen": self._seen,
            "means": None if self._means_2K is None else self._means_2K.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``.

        Raises:
            ValueError: keys are missing or unknown.
        """
        differing = state.keys() ^ {"verdict", "harm", "proxy", "seen", "means"}
        if differing:
            raise ValueError(f"guard state does not fit (keys that differ: {sorted(differing)}): start without it")
        self._harm.load_state_dict(state["harm"])
        self._proxy.load_state_dict(state["proxy"])
        self._verdict, self._seen = state["verdict"], state["seen"]
        self._means_2K = None if state["means"] is None else np.array(state["means"], dtype=np.float64)

    def _trip(self, reason: Reason) -> None:
        if self._verdict is None:
            self._verdict = reason

    def _collapse(self) -> float:
        """Entropy of the served mean prediction as a share of the expected one; 1 where nothing can be judged."""
        if self._means_2K is None:
            return 1.0
        served, frozen = (_entropy(mean_K) for mean_K in self._means_2K)
        expected = min(self._prior_entropy, frozen)
        return served / expected if expected >= self.limits.collapse_floor else 1.0


def _entropy(p_K: F64) -> float:
    """Entropy of the shares ``p / sum(p)``, in units of log K."""
    share_K = np.maximum(p_K, 0.0)
    share_K = share_K[share_K > 0] / max(share_K.sum(), np.finfo(np.float64).tiny)
    return float(-(share_K * np.log(share_K)).sum() / math.log(p_K.size))
