"""The image's content without an image: the commands of its build stage, run here, and the worker that they install.

Paths are put below a folder of the test. Left out of the build's environment: no cache, copies in place of links, and
compiling, which make the image small and quick, and would cost minutes and gigabytes here. torch is the index's own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.containerfile import ROOT, environment, health_command, of, stages
from tests.daemon_process import eventually, free_port, record

PREFIX = "/opt/homeostat"
ISOLATED = """
mount --bind "$1" "$1"
mount -t tmpfs tmpfs "$2"
mount -o remount,bind,ro /
shift 2
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""
"""As `--read-only --tmpfs /tmp --cap-drop ALL`: all is read-only but the state and a folder for what is temporary."""


class Image(NamedTuple):
    """``root`` stands for the image's; ``state`` is the worker's; ``variables`` are the image's."""

    root: Path
    state: Path
    variables: dict[str, str]

    def popen(self, *command: str, **more: str) -> subprocess.Popen[str]:
        """Without capabilities and with a read-only file system; its user stays the test's own, who owns Python."""
        given = self.variables | more
        away = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-euc", ISOLATED, "sh"]
        line = [*away, str(self.state), given["TMPDIR"], *command]
        return subprocess.Popen(
            line, cwd=self.state, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *command: str, **more: str) -> tuple[int, str]:
        """Exit code, and all that was said."""
        with self.popen(*command, **more) as process:
            out, err = process.communicate(timeout=120)
            return process.returncode, out + err

    def content(self) -> dict[str, tuple[int, int]]:
        """By path, size and time of all files and folders outside of the worker's own."""
        found = {}
        for path in self.root.rglob("*"):
            if path != self.state and self.state not in path.parents:
                at = path.lstat()
                found[str(path)] = (at.st_size, at.st_mtime_ns)
        return found


@pytest.fixture(scope="module")
def image(bundle: Path) -> Iterator[Image]:
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no file system of its own for a process: {probe.stderr.strip()}")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source, state = root / "src", root / "state"
        source.mkdir()
        build, final = stages()[1:]
        for text in of("COPY", build):
            *sources, target = text.split()
            for copied in sources:
                if (ROOT / copied).is_dir():
                    shutil.copytree(ROOT / copied, source / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / copied, source)
        own = {key: value for key, value in os.environ.items() if not key.startswith("HOMEOSTAT_")}
        # Its uv, and its Python, are as good as those that the image has.
        path = f"{ROOT / '.venv' / 'bin'}:{own['PATH']}"
        for command in of("RUN", build):
            line = command.replace(PREFIX, f"{root}{PREFIX}")
            done = subprocess.run(
                ["/bin/sh", "-euc", line],
                cwd=source,
                env=own | {"PATH": path, "TORCH_BACKEND": ""},
                capture_output=True,
                text=True,
                timeout=280,
                check=False,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        shutil.copytree(bundle, root / "bundle")
        state.mkdir(mode=0o750)
        (root / "tmp").mkdir()
        variables = environment(final) | {
            "PATH": f"{root}{PREFIX}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "TMPDIR": str(root / "tmp"),
            "HOMEOSTAT_STATE_DIR": str(state),
            "HOMEOSTAT_HTTP": f"0.0.0.0:{free_port()}",
            "HOMEOSTAT_BUNDLE": str(root / "bundle"),
        }
        yield Image(root, state, variables)


def test_the_command_is_installed_and_imports_nothing_from_here(image: Image) -> None:
    code, said = image.run("homeostat", "--version")
    assert (code, said.split()[0]) == (0, "homeostat")
    where = "import daemon, detectors, adapters; print(daemon.__file__, detectors.__file__, adapters.__file__)"
    code, said = image.run("python", "-c", where)
    assert code == 0
    assert [path.startswith(f"{image.root}{PREFIX}/") for path in said.split()] == [True] * 3
    code, said = image.run("python", "-c", "import paho.mqtt.client, fastavro, jsonschema_rs, crc32c, lz4, snappy")
    assert (code, said) == (0, "")


@pytest.mark.slow
def test_it_checks_answers_and_ends_on_a_read_only_file_system_with_a_state_of_its_own(image: Image) -> None:
    code, said = image.run("touch", str(image.root / "new"))
    assert (code, "Read-only file system" in said) == (1, True)
    before = image.content()
    code, said = image.run("homeostat", "check", HOMEOSTAT_SOURCE=f"file:{image.root / 'bundle' / 'manifest.json'}")
    assert (code, "HOMEOSTAT_SOURCE" in said) == (0, True), said
    rows = image.state / "rows.jsonl"
    rows.write_bytes(b"".join(record(str(number)) + b"\n" for number in range(300)))
    answers = image.state / "answers.jsonl"
    worker = image.popen(
        *("homeostat", "run"),
        HOMEOSTAT_SOURCE=f"file:{rows}?follow=true",
        HOMEOSTAT_SINK=f"file:{answers}",
        HOMEOSTAT_CHECKPOINT__EVERY_S="0.2",
    )
    with worker:
        try:
            eventually("300 answers", lambda: answers.exists() and answers.read_bytes().count(b"\n") == 300)
            assert image.run(*health_command()) == (0, "")
            worker.send_signal(signal.SIGTERM)
            _, err = worker.communicate(timeout=60)
            assert worker.returncode == 0, err
        finally:
            worker.kill()
    assert image.run(*health_command())[0] == 1
    assert list((image.state / "checkpoints").iterdir())
    assert image.content() == before
