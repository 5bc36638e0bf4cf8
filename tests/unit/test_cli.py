from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import _COMMANDS, _parser, main
from daemon.config import variables

FLAGS = {
    "run": {"--max-records", "--report"},
    "check": set(),
    "pack": {"--factory", "--weights", "--data", "--calibration", "--out", "--task", "--head", "--seed", "--fast"},
    "inspect": {"--json"},
    "broker": {"--port", "--folder"},
    "detect": {
        "--column",
        "--features",
        "--detector",
        "--reference",
        "--arl0",
        "--rebaseline",
        "--changes",
        "--plot",
        "--json",
    },
    "evaluate": {
        "--records",
        "--last",
        "--from",
        "--to",
        "--order",
        "--changes",
        "--batch",
        "--delay",
        "--label-share",
        "--seeds",
        "--methods",
        "--config",
        "--refit",
        "--window",
        "--json",
        "--html",
        "--state",
    },
    "replay-dlq": {
        "--to",
        "--reason",
        "--since",
        "--until",
        "--partition",
        "--offset",
        "--limit",
        "--max-replays",
        "--dry-run",
        "--again",
    },
    "simulate": {"--to", "--labels-to", "--records", "--rate", "--seed", "--bundle"},
    "versions": {"--state"},
    "ctl": {"--hold"},
}
VERSIONS_FLAGS = {
    "list": {"--all", "--json"},
    "show": {"--json"},
    "export": set(),
    "merge": {"--weights", "--out"},
    "pin": {"--wait"},
    "unpin": {"--wait"},
    "import": {"--wait"},
    "rollback": {"--hold", "--resume", "--wait"},
}


def flags(parser: Any, dest: str) -> dict[str, set[str]]:
    commands = next(action for action in parser._actions if action.dest == dest).choices
    return {
        name: {flag for action in command._actions for flag in action.option_strings} - {"-h", "--help"}
        for name, command in commands.items()
    }


def test_the_commands_and_their_flags_are_these() -> None:
    assert flags(_parser(), "command") == FLAGS and set(FLAGS) == set(_COMMANDS)


def test_the_actions_on_versions_and_their_flags_are_these() -> None:
    commands = next(action for action in _parser()._actions if action.dest == "command").choices
    assert flags(commands["versions"], "action") == VERSIONS_FLAGS  # type: ignore[call-overload, index]


@pytest.mark.parametrize("command", ["run", "check"])
def test_help_lists_every_variable_with_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert [v.name for v in variables() if f"  {v.name}" not in text or v.help not in text] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["run"],
        ["check"],
        ["pack", "--help"],
        ["versions", "--help"],
        ["versions"],
        ["ctl", "freeze"],
    ],
)
def test_help_and_a_wrong_setting_answer_without_torch_or_kafka(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom daemon.cli import main\n"
        f"try: code = main({arguments!r})\nexcept SystemExit as end: code = end.code\n"
        "print('heavy:', sorted({'torch', 'kafka', 'river'} & set(sys.modules)), 'code:', code)"
    )
    environ = {**os.environ, "HOMEOSTAT_NONSENSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, cwd=Path(__file__).parents[2]
    )
    assert f"heavy: [] code: {0 if '--help' in arguments else 2}" in done.stdout, done.stderr


def test_a_wrong_setting_ends_with_code_2_and_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOMEOSTAT_CODEC", "xml")
    assert main(["run"]) == 2
    assert capsys.readouterr().err.startswith("homeostat: HOMEOSTAT_CODEC=xml: ")


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_count_that_is_none_is_refused(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", f"--max-records={count}"])
    assert ended.value.code == 2 and f"{count} is not 1 or more" in capsys.readouterr().err


def test_a_report_without_a_folder_is_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--report", str(tmp_path / "none/out.json")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_inspecting_what_is_nothing_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
