"""kafka-python's network client with two traits put right, both of them about a login that is refused later on.

A password that was changed shows when a connection is made anew, days after the start. kafka-python 3.0.12 then
- counts a connection as made once its port is open, whatever the login says afterwards, and so begins its back-off anew
  each time: three logins a second were measured, for ever. Brokers log each of them, and some lock the account.
- gives the refusal to whoever waits for an answer as an error that is not to be retried, or, where the broker's hanging
  up came in the same read, as a lost connection, which is: the same event ends the program, or does not, by chance.

It takes the class of its network client as an option, ``kafka_client``. In ours a refused login is a lost connection,
always, and something to back off from.
"""

from __future__ import annotations

from typing import Any

from kafka import errors
from kafka.net.compat import KafkaNetClient
from kafka.net.connection import KafkaConnection
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector


class PatientConnection(KafkaConnection):  # type: ignore[misc]
    """A connection that ends, for those who wait for its answers, with an error that is to be retried."""

    def connection_lost(self, exc: Any) -> None:
        """Every end comes here; one that is no trouble of the network is made so, with the reason kept in its text."""
        known = isinstance(exc, errors.KafkaError) and exc.retriable
        if exc is not None and not known and not isinstance(exc, errors.IncompatibleBrokerVersion):
            exc = errors.KafkaConnectionError(f"not let in: {exc}")
        super().connection_lost(exc)


class PatientManager(KafkaConnectionManager):  # type: ignore[misc]
    """Backs off from a broker that hung up during the login, as from one that can't be reached."""

    def get_connection(self, node_id: Any, **options: Any) -> Any:
        """The connection to a broker, begun if there is none."""
        connection = super().get_connection(node_id, **options)
        if type(connection) is KafkaConnection:
            # The manager names the class it makes; nothing has happened on this one yet, and the two have one layout.
            connection.__class__ = PatientConnection
        return connection

    def reset_backoff(self, node_id: Any) -> None:
        """Forget the failures of a broker, if the connection to it is there."""
        connection = self._conns.get(node_id)
        if connection is not None and connection.connected:
            super().reset_backoff(node_id)
        else:
            self.update_backoff(node_id)


class PatientClient(KafkaNetClient):  # type: ignore[misc]
    """kafka-python's option ``kafka_client``: the usual client, over the patient manager."""

    def __init__(self, net: Any = None, manager: Any = None, **configs: Any) -> None:
        net = NetworkSelector(**configs) if net is None else net
        super().__init__(net, PatientManager(net, **configs) if manager is None else manager, **configs)
