"""Deltas as small tensors, to ship and to merge."""
