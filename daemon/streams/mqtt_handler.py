"""What a connection to an MQTT broker is for."""

from __future__ import annotations

from typing import Any


class Handler:
    """Told what happens on a connection. All of it is called in the connection's thread, and must not wait."""

    def up(self, client: Any, session: bool, limits: Any) -> None:
        """The broker let us in; ``session``: it knows this client; ``limits``: properties of its answer."""

    def down(self) -> None:
        """The connection is gone, or was refused."""

    def subscribed(self, code: int) -> None:
        """The broker's answer to a subscription: the QoS granted, or a reason."""

    def received(self, message: Any) -> None:
        """A message came."""

    def acknowledged(self, mid: int, code: int) -> None:
        """The broker's answer to a message of ours."""

    def work(self, client: Any) -> None:
        """Connected, in every turn: hand the client what is to be sent."""

    def full(self) -> bool:
        """Whether not to read on for now."""
        return False
