"""Sending dead letters again: ``homeostat replay-dlq``."""
