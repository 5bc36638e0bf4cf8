"""Logins out of settings and secret files: what contradicts itself is refused, and no secret ever shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.net.sasl import get_sasl_mechanism
from pydantic import SecretStr

from daemon.errors import HomeostatError, SettingsError, StreamError
from daemon.stream_settings import KafkaClient
from daemon.streams.kafka_client import Address, client_config, connect
from daemon.streams.security import FileSecret, Secret, TokenFile, check_security
from daemon.streams.tls import read_secret
from tests.secure_broker import token

WORD = "s3cr3t-of-the-plant"
SECRET = SecretStr(WORD)

RIGHT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "plain": {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "PLAIN",
        "username": "u",
        "password_file": Path("p"),
    },
    "scram": {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "username": "u",
        "password": SECRET,
        "ssl_cafile": Path("ca"),
    },
    "token": {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER", "token_file": Path("t")},
    "tls": {"security_protocol": "SSL"},
    "mutual tls": {
        "security_protocol": "SSL",
        "ssl_cafile": Path("ca"),
        "ssl_certfile": Path("c"),
        "ssl_keyfile": Path("k"),
        "ssl_password_file": Path("w"),
    },
}


@pytest.mark.parametrize("name", RIGHT)
def test_settings_that_fit_bring_no_problem(name: str) -> None:
    assert check_security(KafkaClient(**RIGHT[name])) == []


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        ("plain", {"security_protocol": "SSL"}, "SASL_MECHANISM=PLAIN"),
        ("plain", {"sasl_mechanism": ""}, "SASL_MECHANISM is empty"),
        ("plain", {"username": ""}, "USERNAME is empty"),
        ("plain", {"password_file": None}, "PASSWORD_FILE is empty"),
        ("plain", {"password": SECRET}, "both set"),
        ("plain", {"token_file": Path("t")}, "TOKEN_FILE: is not used"),
        ("token", {"token_file": None}, "TOKEN_FILE is empty"),
        ("token", {"username": "u"}, "USERNAME: is not used"),
        ("nothing", {"username": "u"}, "USERNAME: needs a"),
        ("nothing", {"password_file": Path("p")}, "PASSWORD_FILE: needs a"),
        ("nothing", {"ssl_cafile": Path("ca")}, "SSL_CAFILE: "),
        ("mutual tls", {"ssl_keyfile": None, "ssl_password_file": None}, "its key, is empty"),
        ("mutual tls", {"ssl_certfile": None}, "its certificate, is empty"),
        ("tls", {"ssl_password_file": Path("w")}, "SSL_PASSWORD_FILE=w"),
    ],
)
def test_settings_that_contradict_each_other_are_named(base: str, change: dict[str, Any], named: str) -> None:
    problems = check_security(KafkaClient(**{**RIGHT[base], **change}))
    assert any(named in problem for problem in problems), problems
    assert all("\n" not in problem and problem.startswith("HOMEOSTAT_KAFKA__") for problem in problems)
    assert not any(WORD in problem for problem in problems)


@given(
    st.builds(
        KafkaClient,
        security_protocol=st.sampled_from(["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]),
        sasl_mechanism=st.sampled_from(["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]),
        username=st.sampled_from(["", "u"]),
        password=st.sampled_from([SecretStr(""), SECRET]),
        password_file=st.sampled_from([None, Path("p")]),
        token_file=st.sampled_from([None, Path("t")]),
        ssl_certfile=st.sampled_from([None, Path("c")]),
        ssl_keyfile=st.sampled_from([None, Path("k")]),
    )
)
def test_no_problem_means_that_everything_needed_is_there_and_everything_given_is_used(settings: KafkaClient) -> None:
    login = (settings.username, bool(settings.password.get_secret_value()) + (settings.password_file is not None))
    files = (settings.ssl_certfile is not None, settings.ssl_keyfile is not None)
    wanted = {"": ("", 0), "OAUTHBEARER": ("", 0)}.get(settings.sasl_mechanism, ("u", 1))
    fits = (
        bool(settings.sasl_mechanism) == settings.security_protocol.startswith("SASL")
        and login == wanted
        and (settings.token_file is not None) == (settings.sasl_mechanism == "OAUTHBEARER")
        and (files in ((False, False), (True, True)) if settings.security_protocol.endswith("SSL") else not any(files))
    )
    assert (check_security(settings) == []) == fits


def test_a_client_is_not_even_tried_with_settings_that_contradict_each_other() -> None:
    address = Address.parse("kafka://127.0.0.1:1/t", "HOMEOSTAT_SOURCE")
    with pytest.raises(SettingsError, match="SASL_MECHANISM is empty"):
        connect(lambda **config: None, address, KafkaClient(security_protocol="SASL_SSL"))


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_end_of_line_that_editors_add_is_no_part_of_a_password(tmp_path: Path, end: str) -> None:
    file = tmp_path / "password"
    file.write_bytes(f" {WORD} ".encode() + end.encode())
    assert read_secret(file, "V") == f" {WORD} "


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"\n", "the file is empty"),
        (b"one\ntwo-" + WORD.encode(), "more than one line"),
        (b"\xff" + WORD.encode(), "not UTF-8"),
        (b"nul\0" + WORD.encode(), "more than one line"),
    ],
)
def test_a_password_file_that_holds_none_is_named_and_not_shown(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    settings = KafkaClient(**{**RIGHT["plain"], "password_file": file})
    with pytest.raises(StreamError, match=problem) as raised:
        client_config(settings, ["b:1"])
    assert f"HOMEOSTAT_KAFKA__PASSWORD_FILE={file}: " in str(raised.value)
    assert WORD not in str(raised.value)


def test_a_folder_in_place_of_a_token_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="HOMEOSTAT_KAFKA__TOKEN_FILE=.*Is a directory"):
        client_config(KafkaClient(**{**RIGHT["token"], "token_file": tmp_path}), ["b:1"])


@given(st.text(min_size=1))
def test_a_secret_shows_itself_nowhere_and_encodes_as_itself(word: str) -> None:
    secret = Secret(word)
    shown = f"{secret} {secret!r} {secret:>5} {[secret]} { ({'p': secret}) }" + "%s %r" % (secret, secret)  # noqa: UP031
    assert shown == Secret(" ***").__str__() + shown[3:]
    assert shown.count("***") == 7
    assert secret.encode("utf-8", "surrogatepass") == word.encode("utf-8", "surrogatepass")
    assert "\0".join([secret, secret]) == f"{word}\0{word}"


def test_the_options_of_a_client_do_not_show_the_password() -> None:
    config = client_config(KafkaClient(**{**RIGHT["scram"], "ssl_cafile": None}), ["b:1"])
    assert WORD not in repr(config)
    assert config["sasl_plain_password"].encode() == WORD.encode()


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_every_login_reads_the_password_file_again(tmp_path: Path, mechanism: str) -> None:
    file = tmp_path / "password"
    file.write_text("old\n")
    settings = KafkaClient(**{**RIGHT["plain"], "sasl_mechanism": mechanism, "password_file": file})
    config = client_config(settings, ["b:1"])

    def password() -> bytes:
        login = get_sasl_mechanism(mechanism)(host="b", **config)
        word: bytes = login.password.encode() if mechanism == "PLAIN" else login._scram_client.password
        return word

    assert password() == b"old"
    file.write_text("new\n")
    assert password() == b"new"
    file.unlink()
    assert password() == b"old", "while the file is away, what it held at the start"


def test_a_password_that_is_no_file_is_used_as_it_is() -> None:
    login = get_sasl_mechanism("PLAIN")(host="b", sasl_plain_username="u", sasl_plain_password=Secret(WORD))
    assert login.auth_bytes() == f"u\0u\0{WORD}".encode()


def test_every_login_reads_the_token_file_again(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first.token\n")
    provider = TokenFile(file)
    assert provider.token() == "first.token"
    file.write_text("second.token\n")
    assert provider.token() == "second.token"


@pytest.mark.parametrize("content", ["two tokens", "esc\x01auth=Bearer x", "späti"])
def test_what_could_end_the_tokens_field_is_no_token(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(StreamError, match=f"HOMEOSTAT_KAFKA__TOKEN_FILE={file}: not a token") as raised:
        TokenFile(file)
    assert content not in str(raised.value)


def test_a_web_token_that_expired_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token(lifetime_s=-100))
    assert "expired 10" in TokenFile(file).expired()
    file.write_text(token())
    assert TokenFile(file).expired() == ""


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_no_token_whatever_it_holds_upsets_the_look_at_its_date(text: str) -> None:
    provider = TokenFile.__new__(TokenFile)
    provider.token = lambda: f"head.{text}.tail"  # type: ignore[method-assign]
    provider._path, provider._variable = Path("t"), "V"
    assert provider.expired() == "" or "expired" in provider.expired()


@pytest.mark.parametrize("url", [f"kafka://u:{WORD}@b:9092/t", f"kafka://{WORD}@b:9092/t"])
def test_a_password_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(HomeostatError, match="HOMEOSTAT_SOURCE: .*PASSWORD_FILE") as raised:
        Address.parse(url, "HOMEOSTAT_SOURCE")
    assert WORD not in str(raised.value)


def test_a_broken_password_file_while_running_is_logged_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "password"
    file.write_text(WORD)
    secret = FileSecret.of(file, "HOMEOSTAT_KAFKA__PASSWORD_FILE")
    file.write_text("")
    assert "".join(secret.now()) == WORD
    said = "".join(capsys.readouterr())
    assert str(file) in said
    assert WORD not in said
