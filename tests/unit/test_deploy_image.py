"""The image's recipe: what it copies is there, what it sets is a setting, and nothing runs as root."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from daemon import __version__
from daemon.config import variables
from daemon.front.settings import Https
from daemon.front.tls import server_certificates
from daemon.front.web import Web
from daemon.settings import PREFIX
from tests.containerfile import CONTAINERFILE, ROOT, arguments, environment, health_command, of, stages
from tests.daemon_process import free_port
from tests.secure_broker import Authority

GLOBAL, BUILD, FINAL = stages()


def test_hadolint_finds_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (no wheel for this machine)")
    done = subprocess.run([hadolint, str(CONTAINERFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    bad = subprocess.run(
        [hadolint, "-"], input="FROM debian\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert bad.returncode != 0 and "DL3006" in bad.stdout


def test_the_base_is_one_argument_that_may_have_a_digest_and_python_is_that_of_the_constraints() -> None:
    base = arguments(GLOBAL)["BASE"]
    assert of("FROM", BUILD) == ["${BASE} AS build"] and of("FROM", FINAL) == ["${BASE}"]
    (python,) = re.findall(r"python:(3\.\d+)-slim-\w+$", base)
    assert f"Python {python} on Linux" in (ROOT / "constraints.txt").read_text()


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [source for text in of("COPY", BUILD) for source in shlex.split(text)[:-1]]
    for source in copied:
        assert f"!{source}" in ignored, source
        assert (ROOT / source).exists(), source
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} | {"pyproject.toml", "LICENSE"} <= set(copied)
    assert {line for line in ignored if line.startswith("!")} == {f"!{source}" for source in copied}
    assert of("COPY", FINAL) == ["--from=build /opt/homeostat /opt/homeostat"]


def test_what_runs_is_no_root_and_writes_to_one_folder() -> None:
    assert of("USER", FINAL) == ["65532:65532"]
    (made,) = of("RUN", FINAL)
    state = environment(FINAL)["HOMEOSTAT_STATE_DIR"]
    assert "--uid 65532 --gid 65532" in made and f"install -d -o 65532 -g 65532 -m 0750 {state}" in made
    assert of("WORKDIR", FINAL) == [state] and of("VOLUME", FINAL) == [f'["{state}"]']
    last = [instruction.word for instruction in FINAL]
    assert not {"RUN", "COPY", "ADD"} & set(last[last.index("USER") :])


def test_its_variables_are_settings_and_it_starts_the_daemon() -> None:
    known = {variable.name for variable in variables()}
    set_here = {name for name in environment(FINAL) if name.startswith(PREFIX)}
    assert set_here <= known and "HOMEOSTAT_HTTP" in set_here
    assert of("ENTRYPOINT", FINAL) == ['["homeostat"]'] and of("CMD", FINAL) == ['["run"]']
    assert of("EXPOSE", FINAL) == [environment(FINAL)["HOMEOSTAT_HTTP"].rpartition(":")[2]]


def test_labels_and_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments(FINAL)["VERSION"] == __version__ == project["version"]
    (labels,) = of("LABEL", FINAL)
    assert f'licenses="{project["license"]}"' in labels and 'version="${VERSION}"' in labels
    extras = re.findall(r"--extra (\w+)", " ".join(of("RUN", BUILD)))
    assert extras == ["mqtt", "otel", "registry"] and set(extras) < set(project["optional-dependencies"])


def test_the_health_check_fails_where_nothing_answers() -> None:
    command = [sys.executable, *health_command()[1:]]
    address = {"HOMEOSTAT_HTTP": f"0.0.0.0:{free_port()}"}
    done = subprocess.run(command, env=address, capture_output=True, timeout=30, check=False)
    assert done.returncode == 1 and b"ConnectionRefusedError" in done.stderr


@pytest.mark.parametrize("speaks", ["http", "https", "mutual TLS"])
def test_the_health_check_hears_whether_the_worker_is_alive(speaks: str, tmp_path: Path) -> None:
    files = {}
    if speaks != "http":
        authority = Authority(tmp_path, "plant")
        pair = authority.issue("homeostat")
        files = {"ssl_certfile": pair.cert, "ssl_keyfile": pair.key}
        files |= {"ssl_cafile": authority.cert} if speaks == "mutual TLS" else {}
    alive = [True]
    certificates = server_certificates(Https(**files)) if files else None

    def probe() -> tuple[bool, str]:
        return alive[0], "so it is"

    web = Web("127.0.0.1:0", CollectorRegistry(), probe, probe, certificates=certificates)
    web.start()
    try:
        variables = {"HOMEOSTAT_HTTP": f"0.0.0.0:{web.port}"}
        variables |= {f"HOMEOSTAT_HTTPS__{name.upper()}": str(path) for name, path in files.items()}
        for expected in (0, 1):
            command = [sys.executable, *health_command()[1:]]
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30, check=False)
            assert (done.returncode, done.stderr) == (expected, "")
            alive[0] = False
    finally:
        web.stop()


@pytest.mark.parametrize("wheel", [None, "torch-2.11.0+jetson-cp311-cp311-linux_aarch64.whl"])
def test_a_wheel_of_torch_is_taken_in_place_of_the_index_s(wheel: str | None, tmp_path: Path) -> None:
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "uv").write_text('#!/bin/sh\nfor each in "$@"; do echo "$each"; done >>called\n')
    (tmp_path / "uv").chmod(0o755)
    if wheel is not None:
        (tmp_path / "wheels" / wheel).touch()
    (line,) = (text for text in of("RUN", BUILD) if "uv venv" in text)
    path = f"{tmp_path}:/usr/bin:/bin"
    environment = {"PATH": path, "TORCH_BACKEND": "" if wheel else "cu130"}
    subprocess.run(["/bin/sh", "-euc", line], cwd=tmp_path, env=environment, check=True, timeout=30)
    called = (tmp_path / "called").read_text().splitlines()
    pinned = re.search("^torch==", (tmp_path / "constraints.txt").read_text(), re.MULTILINE)
    if wheel is None:
        assert called[-1] == "registry" and pinned
        assert called[called.index("--torch-backend") + 1] == "cu130"
    else:
        assert called[-1] == f"wheels/{wheel}" and not pinned
        assert "--torch-backend" not in called
