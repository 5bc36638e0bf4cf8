"""Exact heads: solved per label from sums over frozen features."""
