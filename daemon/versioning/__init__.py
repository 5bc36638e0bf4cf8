"""Versions on disk and in an operator's hands: files of small deltas, the journal of decisions, requests."""
