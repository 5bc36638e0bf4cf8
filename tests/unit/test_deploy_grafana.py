"""The dashboard: what it asks for exists, Prometheus understands it, and it is the one that its source makes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dashboard import COLUMNS, DASHBOARD, text
from tests.unit.test_deploy_prometheus import samples

NOT_SHOWN = {
    "homeostat_build_info",
    "homeostat_adapt_seconds",
    "homeostat_batch_rows",
    "homeostat_checkpoint_seconds",
    "homeostat_state_seconds_total",
}
"""For a question that is asked once, not for a picture."""


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """Legend and PromQL, as Grafana would send it."""
    found = [(target["legendFormat"], target["expr"]) for panel in panels() for target in panel["targets"]]
    replaced = {"$__rate_interval": "5m", "$job": "homeostat", "$instance": ".*"}
    for name, value in replaced.items():
        found = [(legend, query.replace(name, value)) for legend, query in found]
    return found


def test_the_file_is_what_its_source_makes() -> None:
    assert DASHBOARD.read_text() == text(), "run python -m tests.dashboard"


def test_every_metric_and_label_that_it_names_exists_and_nothing_is_forgotten() -> None:
    known = samples()
    named = set()
    for legend, query in queries():
        names = re.findall(r"\bhomeostat_\w+", query)
        named |= set(names)
        for name in names:
            assert name in known, name
        for label in re.findall(r"\{\{(\w+)\}\}", legend):
            assert label == "instance" or all(label in known[name] for name in names), f"{label}: {query}"
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known}
    assert families - {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} == NOT_SHOWN


def test_panels_lie_side_by_side_and_each_says_what_it_shows() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= COLUMNS
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        taken |= cells
        assert panel["description"].endswith(".") and panel["title"]


def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    rules = [{"record": f"panel:{number}", "expr": query} for number, (_, query) in enumerate(queries())]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout
