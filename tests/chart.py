"""The Helm chart as the tests use it. ``python -m tests.chart`` copies into it what it has from elsewhere.

Helm reads no file that lies outside of the chart, so rules and dashboard are there twice; a test says when they differ.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
CHART = DEPLOY / "helm" / "homeostat"
COPIES = {
    CHART / "files" / "homeostat.rules.yml": DEPLOY / "prometheus" / "homeostat.rules.yml",
    CHART / "files" / "homeostat.json": DEPLOY / "grafana" / "homeostat.json",
}
NEWEST = "1.37"
"""Of Kubernetes, that the chart is made for where a test says nothing else."""


class Refused(Exception):
    """Helm's own words."""


def helm(*arguments: str) -> str:
    """What Helm says; skips, with the reason, where there is none. Raises Refused."""
    binary = shutil.which("helm")
    if binary is None:
        pytest.skip("helm is not installed (go install helm.sh/helm/v3/cmd/helm@v3.19.0)")
    done = subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise Refused(done.stdout + done.stderr)
    return done.stdout


def rendered(folder: Path, values: dict[str, Any] | None = None, kubernetes: str = NEWEST) -> dict[str, dict[str, Any]]:
    """What Helm makes of the chart, by kind. Raises Refused."""
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(values or {}))
    text = helm("template", "plant", str(CHART), "--values", str(file), "--kube-version", kubernetes)
    found = [document for document in yaml.safe_load_all(text) if document]
    by_kind = {document["kind"]: document for document in found}
    assert len(by_kind) == len(found)
    return by_kind


if __name__ == "__main__":
    for copy, original in COPIES.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
        print(f"{copy.relative_to(DEPLOY)} is {original.relative_to(DEPLOY)}")
