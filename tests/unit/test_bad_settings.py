"""Wrong settings as a person makes them: each ends the start with code 2 and the one line that helps."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from daemon.cli import main
from tests.unit.worlds import FACTORY, bundle, record

HERE = "{here}"
WRONG: list[tuple[dict[str, str], str]] = [
    ({"BATCH_ROW": "4"}, "HOMEOSTAT_BATCH_ROW=4: no such variable; did you mean HOMEOSTAT_BATCH_ROWS?"),
    ({"BATCH_ROWS": "0"}, "HOMEOSTAT_BATCH_ROWS=0: input should be greater than or equal to 1; .*default 512"),
    ({"CODEC": "xml"}, "HOMEOSTAT_CODEC=xml: input should be 'json', 'raw', 'msgpack'"),
    ({"SHED": "-1"}, "HOMEOSTAT_SHED=-1: input should be greater than 0; right would be float, default unset"),
    ({"PROGRESS_TIMEOUT_S": "soon"}, "HOMEOSTAT_PROGRESS_TIMEOUT_S=soon: input should be a valid number.*default 60.0"),
    ({"GUARD__DELTA": "2"}, "HOMEOSTAT_GUARD__DELTA=2.0: give a number between 0 and 1"),
    ({"REGULATOR__GAIN_MIN": "5"}, "HOMEOSTAT_REGULATOR: gains 5.0, .*give finite gain_min <= gain_start <= gain_max"),
    ({"SOURCE": "ftp://x"}, "HOMEOSTAT_SOURCE=ftp://x: ftp: can't be used here; right would be one like file:rows"),
    ({"SOURCE": "kafka://"}, "HOMEOSTAT_SOURCE=kafka://: not a topic's address; right would be kafka://127"),
    ({"SOURCE": f"file:{HERE}/gone"}, f"HOMEOSTAT_SOURCE=file:{HERE}/gone: No such file or directory"),
    ({"SINK": "kafka:topic"}, "HOMEOSTAT_SINK=kafka:topic: not a topic's address"),
    ({"LABELS": f"file:{HERE}/gone"}, f"HOMEOSTAT_LABELS=file:{HERE}/gone: No such file"),
    ({"LABEL_QUERIES": "nowhere"}, "HOMEOSTAT_LABEL_QUERIES=nowhere: no scheme; .*file:nowhere"),
    ({"BUNDLE": ""}, "HOMEOSTAT_BUNDLE is empty: .*needs a folder made by `homeostat pack`"),
    ({"BUNDLE": f"{HERE}/gone"}, f"HOMEOSTAT_BUNDLE={HERE}/gone: no manifest.json there"),
    ({"BUNDLE": f"{HERE}/damaged"}, f"{HERE}/damaged/model.safetensors: does not match the manifest's hash"),
    ({"FACTORY": ""}, f"HOMEOSTAT_FACTORY is empty: .*set HOMEOSTAT_FACTORY={FACTORY}"),
    ({"FACTORY": "nothere:build"}, "HOMEOSTAT_FACTORY=nothere:build: can't import 'nothere'"),
    ({"FAST": "tents"}, "HOMEOSTAT_FAST=tents: no fast adapter is called 'tents'; there are: .*tent"),
    ({"FAST": "tent", "FAST__RATE": "3"}, "HOMEOSTAT_FAST=tent: tent: rate: .*Its options are: .*lr"),
    ({"DETECT": "cusums"}, "HOMEOSTAT_DETECT=cusums: there is no such detector of a signal; there are .*cusum"),
    ({"DETECT": "page_hinkley"}, "HOMEOSTAT_DETECT=page_hinkley: the bundle is not calibrated for it"),
    ({"SLOW": "heads"}, "HOMEOSTAT_SLOW=heads: slow method 'heads' does not exist; did you mean 'head'?"),
    ({"SLOW__OPTIMIZER": "best"}, "HOMEOSTAT_SLOW__OPTIMIZER=best: optimizer 'best' can't be used"),
    ({"DEVICE": "gpu"}, "HOMEOSTAT_DEVICE=gpu: no such device; right would be auto, cpu, cuda or cuda:N"),
    ({"SLOTS": "key"}, "HOMEOSTAT_SLOTS=key: auto keeps one state for all slots"),
    ({"HTTP": "9464"}, "HOMEOSTAT_HTTP=9464: not an address; right would be 127.0.0.1:9464, or off"),
    (
        {"HTTP": "127.0.0.1:0", "OPERATOR__TOKEN_FILE": f"{HERE}/short"},
        "HOMEOSTAT_OPERATOR__TOKEN_FILE=.*holds no token",
    ),
    ({"HTTP": "127.0.0.1:0", "HTTPS__SSL_KEYFILE": "k"}, "HOMEOSTAT_HTTPS__SSL_CERTFILE is not set: .*no use without"),
    ({"DELIVERY": "exactly-once"}, "HOMEOSTAT_SOURCE=.*: with HOMEOSTAT_DELIVERY=exactly-once it has to be on .*Kafka"),
    ({"STATE_DIR": f"{HERE}/short/x"}, f"HOMEOSTAT_STATE_DIR={HERE}/short/x: Not a directory"),
    ({"CHECKPOINT": f"{HERE}/short"}, f"HOMEOSTAT_CHECKPOINT__DIR={HERE}/short: File exists"),
    ({"ENV_FILE": f"{HERE}/gone"}, f"HOMEOSTAT_ENV_FILE={HERE}/gone: No such file"),
    ({"TRACES": "yes"}, "HOMEOSTAT_TRACES=yes: input should be 'off', 'pass' or 'on'"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    (folder / "short").write_text("abc")
    (folder / "in.jsonl").write_bytes(record(1, [1, 2, 3, 4]) + b"\n")
    shutil.copytree(bundle("classification"), folder / "damaged")
    (folder / "damaged/model.safetensors").write_bytes(b"x")
    return folder


@pytest.fixture
def environment(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("HOMEOSTAT_")]:
        monkeypatch.delenv(name)
    given = {
        "BUNDLE": bundle("classification"),
        "FACTORY": FACTORY,
        "SOURCE": f"file:{here / 'in.jsonl'}",
        "STATE_DIR": tmp_path / "state",
        "HTTP": "off",
        "LOG_LEVEL": "error",
    }
    # Loggers keep the stream that they first wrote to, here one that ends with the test.
    monkeypatch.setattr("daemon.running.configure", lambda *_: None)
    for name, value in given.items():
        monkeypatch.setenv(f"HOMEOSTAT_{name}", str(value))
    return monkeypatch


def test_with_none_of_them_it_runs(environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 0
    assert "records           1" in capsys.readouterr().out


@pytest.mark.parametrize(("wrong", "line"), WRONG, ids=[" ".join(f"{k}={v}" for k, v in w.items()) for w, _ in WRONG])
def test_a_wrong_setting_ends_the_start_with_its_line(
    environment: pytest.MonkeyPatch,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: dict[str, str],
    line: str,
) -> None:
    for name, value in wrong.items():
        environment.setenv(f"HOMEOSTAT_{name}", value.replace(HERE, str(here)))
    assert main(["run"]) == 2
    said = capsys.readouterr().err.splitlines()
    lines = [one for one in said if one.startswith("homeostat: ")]
    assert lines and re.match(f"homeostat: {line.replace(HERE, str(here)).replace('?', '[?]')}", lines[0]), said
    assert not any("Traceback" in one for one in said)
