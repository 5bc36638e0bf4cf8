"""A member of a consumer group that polls for moments only, as a worker does whose batches linger for 5 ms."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from kafka import KafkaAdminClient

from daemon.stream_settings import KafkaClient
from daemon.streams.kafka import KafkaSource
from tests.daemon_process import eventually
from tests.kafka import produce_to_new


@pytest.mark.parametrize("busy_s", [0.0, 0.05])
def test_joining_gets_through_and_commits_are_taken(
    kafka_broker: str, topic: Callable[..., str], busy_s: float
) -> None:
    """Also when it works between two polls for longer than it waits in them."""
    name = topic()
    source = KafkaSource(f"kafka://{kafka_broker}/{name}", KafkaClient(group=f"g-{name}", metadata_max_age_ms=1000))
    source.open(None)
    placed: set[str] = set()

    def look() -> None:
        source.poll(100, 0.002)
        source.take_revoked()
        placed.update(source.take_starts())
        time.sleep(busy_s)

    def has(count: int) -> Callable[[], bool]:
        def claim() -> bool:
            look()
            return len(placed) == count

        return claim

    def committed() -> bool:
        look()
        source.commit(dict.fromkeys(placed, 0), "")
        return not source.uncommitted

    try:
        eventually("it has the partition", has(1))
        assert source.group_metadata().generation_id == 1, "joined once, not once for nothing and once more"
        for count in range(2, 6):
            with KafkaAdminClient(bootstrap_servers=kafka_broker) as admin:
                admin.create_partitions({name: count})
            produce_to_new(kafka_broker, name, [b"x"], count - 1)
            eventually(f"it has {count} partitions", has(count))
            eventually("a commit is taken", committed)
    finally:
        source.close()
