from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from daemon.errors import StreamError
from daemon.streams.mqtt_address import MqttAddress, check_no_circle, matches


def test_everything_after_the_first_slash_is_the_topic_number_sign_included() -> None:
    address = MqttAddress.parse("mqtt://broker/plant/+/readings/#", "HOMEOSTAT_SOURCE", wildcards=True)
    assert (address.host, address.port, address.tls) == ("broker", 1883, False)
    assert address.topic == "plant/+/readings/#"
    assert address.partition == "mqtt:plant/+/readings/#"


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "topic"),
    [
        ("mqtts://broker/a", "broker", 8883, True, "a"),
        ("mqtts://broker:1234/a", "broker", 1234, True, "a"),
        ("mqtt://[::1]:1884//a/", "::1", 1884, False, "/a/"),
        ("mqtt://broker/a%2Fb%20c%3F", "broker", 1883, False, "a/b c?"),
        ("mqtt://broker/a?b", "broker", 1883, False, "a?b"),
    ],
)
def test_addresses_are_read_as_they_stand(url: str, host: str, port: int, tls: bool, topic: str) -> None:
    address = MqttAddress.parse(url, "HOMEOSTAT_SINK")
    assert (address.host, address.port, address.tls, address.topic) == (host, port, tls, topic)


def test_the_setting_switches_tls_on_and_moves_the_default_port() -> None:
    assert MqttAddress.parse("mqtt://broker/a", "V", tls=True).port == 8883


@pytest.mark.parametrize("url", ["mqtt://", "mqtt://h", "mqtt://h/", "mqtt:///a", "mqtt://h:x/a", "mqtt://h/%ff"])
def test_an_address_without_a_broker_or_a_topic_is_refused_by_variable_and_value(url: str) -> None:
    with pytest.raises(StreamError, match=rf"HOMEOSTAT_SOURCE={url}: .*right would be mqtt://"):
        MqttAddress.parse(url, "HOMEOSTAT_SOURCE", wildcards=True)


def test_a_login_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(StreamError, match="HOMEOSTAT_MQTT__PASSWORD_FILE") as refused:
        MqttAddress.parse("mqtt://me:secret@h/a", "V")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("topic", "problem"),
    [("a+/b", "whole level"), ("a/#/b", "at the end"), ("$share/g", r"\$share/NAME/FILTER"), ("a%00", "control")],
)
def test_a_filter_that_no_broker_takes_is_refused_at_once(topic: str, problem: str) -> None:
    with pytest.raises(StreamError, match=problem):
        MqttAddress.parse(f"mqtt://h/{topic}", "V", wildcards=True)


@pytest.mark.parametrize("topic", ["a/+", "a/#", "$SYS/x"])
def test_what_is_written_goes_to_one_topic_that_is_not_the_brokers(topic: str) -> None:
    with pytest.raises(StreamError):
        MqttAddress.parse(f"mqtt://h/{topic}", "V")


_LEVELS = st.lists(st.sampled_from(["a", "b", "", "$c"]), min_size=1, max_size=4)


@given(_LEVELS, st.lists(st.sampled_from(["a", "b", "", "+", "$c"]), min_size=1, max_size=4), st.booleans())
def test_filters_take_in_what_paho_says_they_do(topic: list[str], wanted: list[str], more: bool) -> None:
    name, filter_ = "/".join(topic), "/".join([*wanted, "#"] if more else wanted)
    if name:
        assert matches(filter_, name) == topic_matches_sub(filter_, name)


def test_a_shared_subscription_takes_in_what_its_filter_does() -> None:
    shared = MqttAddress.parse("mqtt://h/$share/workers/plant/+", "V", wildcards=True)
    assert shared.takes("plant/1")
    assert not shared.takes("workers/plant")


def test_answers_that_the_source_would_read_again_are_refused() -> None:
    with pytest.raises(StreamError, match="HOMEOSTAT_SINK=mqtt://h/plant/answers: HOMEOSTAT_SOURCE=.* again"):
        check_no_circle("mqtt://h/plant/#", {"HOMEOSTAT_SINK": "mqtt://h/plant/answers"})
    for fine in ("mqtt://h/answers", "mqtt://other/plant/answers", "kafka://h:1/plant", "null:", ""):
        check_no_circle("mqtt://h/plant/#", {"HOMEOSTAT_SINK": fine})
    check_no_circle("kafka://h:1/t", {"HOMEOSTAT_SINK": "mqtt://h/t"})
