"""Variables out of a file: what is read, what holds before it, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.config import load_settings
from daemon.env_file import merged, read_env_file
from daemon.errors import SettingsError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "homeostat.env"
    monkeypatch.setenv("HOMEOSTAT_ENV_FILE", str(path))
    return path


def test_a_file_sets_what_the_environment_does_not(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(
        "# of the press in hall 3\n\nHOMEOSTAT_BATCH_ROWS=64\nexport HOMEOSTAT_SLOW__STEPS='7'\n"
        'HOMEOSTAT_FAST=tent\nHOMEOSTAT_FAST__LR=0.01\nHOMEOSTAT_KAFKA__PASSWORD="a$HOME#b"\n'
    )
    monkeypatch.setenv("HOMEOSTAT_BATCH_ROWS", "32")
    monkeypatch.setenv("HOMEOSTAT_SLOW__DUTY", "0.25")
    settings = load_settings()
    assert settings.batch_rows == 32 and settings.slow.steps == 7 and settings.slow.duty == 0.25
    assert settings.fast.name == "tent" and settings.fast.options() == {"lr": "0.01"}
    assert settings.kafka.password.get_secret_value() == "a$HOME#b" and settings.env_file == file


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("HOMEOSTAT_LOG_LEVEL=loud", "HOMEOSTAT_LOG_LEVEL=loud: input should be 'debug'.*line 1\\)$"),
        ("\n\nHOMEOSTAT_SLOW__STEP=3", "HOMEOSTAT_SLOW__STEP=3: no such variable; did you mean .*STEPS.*line 3\\)$"),
        ("HOMEOSTAT_SLOW__STEPS", "line 1: not NAME=value"),
        ("a secret word", "line 1: not NAME=value"),
        ("OTEL_SERVICE_NAME=x", "line 1: OTEL_SERVICE_NAME can't be set there"),
        ("HOMEOSTAT_ENV_FILE=other", "line 1: HOMEOSTAT_ENV_FILE can't be set there"),
        ("HOMEOSTAT_SHED=3\nhomeostat_shed=4", "line 2: HOMEOSTAT_SHED is set twice, first in line 1"),
    ],
)
def test_a_fault_is_named_with_file_and_line(file: Path, text: str, problem: str) -> None:
    file.write_text(text)
    with pytest.raises(SettingsError, match=problem) as caught:
        load_settings()
    assert str(file) in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_refused_by_its_variable(file: Path) -> None:
    with pytest.raises(SettingsError, match="HOMEOSTAT_ENV_FILE=.*: No such file"):
        load_settings()
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="HOMEOSTAT_ENV_FILE=.*: not UTF-8 text"):
        load_settings()
    file.write_bytes(b"#" * (1 << 21))
    with pytest.raises(SettingsError, match="longer than 1 MB"):
        load_settings()


def test_without_the_variable_no_file_is_read() -> None:
    assert merged({"HOMEOSTAT_SHED": "3"}) == ({"HOMEOSTAT_SHED": "3"}, {})


@given(st.text(max_size=200))
def test_no_text_is_more_than_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        found = read_env_file(path)
    except SettingsError as error:
        assert all(str(path) in problem for problem in error.problems)
    else:
        assert all(name.startswith("HOMEOSTAT_") for name in found)
