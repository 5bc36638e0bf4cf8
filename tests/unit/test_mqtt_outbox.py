from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from daemon.streams.mqtt_outbox import Letter, Outbox
from daemon.streams.mqtt_sink import _plain


@given(st.lists(st.sampled_from(["put", "send", "ack", "break"]), max_size=60), st.randoms(use_true_random=False))
def test_every_letter_is_acknowledged_in_the_end_and_sent_in_order_on_each_connection(
    steps: list[str], any_: object
) -> None:
    outbox = Outbox(1000, 1 << 20)
    put = mid = 0
    flying: list[tuple[int, int]] = []
    landed: set[int] = set()

    def send() -> None:
        nonlocal mid
        letter = outbox.peek()
        if letter is not None:
            mid += 1
            number = int(letter.payload)
            assert all(number > earlier for _, earlier in flying)
            flying.append((mid, number))
            outbox.sent(mid)

    def acknowledge(which: int) -> None:
        at, number = flying.pop(which)
        letter = outbox.landed(at)
        assert letter is not None and int(letter.payload) == number
        landed.add(number)
        assert outbox.landed(at) is None

    for step in steps:
        if step == "put":
            outbox.put(Letter("t", b"%d" % put))
            put += 1
        elif step == "send":
            send()
        elif step == "ack" and flying:
            acknowledge(any_.randrange(len(flying)))  # type: ignore[attr-defined]
        elif step == "break":
            outbox.back()
            flying.clear()
        assert len(outbox) == put - len(landed)
        assert outbox.flying == len(flying)
    while len(outbox):
        send()
        acknowledge(0)
    assert landed == set(range(put))
    assert outbox.room


def test_the_queue_is_bounded_in_letters_and_in_bytes_and_takes_one_of_any_size() -> None:
    few, small = Outbox(2, 1 << 20), Outbox(1000, 100)
    for outbox, fits in ((few, 2), (small, 1)):
        count = 0
        while outbox.room:
            outbox.put(Letter("t", bytes(200)))
            count += 1
        assert count == fits


@given(st.binary(max_size=300))
def test_user_properties_are_text_that_every_broker_takes(key: bytes) -> None:
    text = _plain(key)
    assert not any(letter < " " or "\x7f" <= letter <= "\x9f" for letter in text)
    assert len(text.encode()) <= 65_535
