"""homeostat's process: settings, streams, the loop, the fast/slow controller, metrics."""

from __future__ import annotations

PRODUCT = "homeostat"
"""Marks this package as homeostat's own: other distributions install a top-level ``daemon`` too."""

__version__ = "0.1.0"
