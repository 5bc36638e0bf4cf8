"""The daemon's exceptions. Each message says what was wrong, where it came from and what to do."""

from __future__ import annotations


class HomeostatError(Exception):
    """Base of every error that the daemon raises on purpose. ``exit_code`` is what the process ends with."""

    exit_code = 1


class SettingsError(HomeostatError):
    """A setting is missing, unknown or wrong. ``problems`` holds one line per problem."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BundleError(HomeostatError):
    """A bundle is missing, damaged or does not fit the factory's module."""

    exit_code = 2


class StreamError(HomeostatError):
    """A source, sink or label stream can't be opened, read or written."""

    exit_code = 2


class AwayError(StreamError):
    """A broker can't be reached now; it may be there again later."""


class DeliveryError(HomeostatError):
    """An output was not acknowledged: nothing may be committed past it."""

    exit_code = 3


class TransactionError(DeliveryError):
    """A transaction was not committed: its answers and offsets are void, and state has to go back to the checkpoint."""


class CheckpointError(HomeostatError):
    """A checkpoint file is damaged or belongs to another configuration."""

    exit_code = 2
