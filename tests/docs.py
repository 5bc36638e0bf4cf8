"""Tables that are made from the code and the rules: ``python -m tests.docs`` writes them into the documents."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import yaml

from daemon.config import variables
from daemon.monitor import LEVEL_ROWS
from daemon.telemetry import Telemetry

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DEPLOY = ROOT / "deploy" / "README.md"
RULES = ROOT / "deploy" / "prometheus" / "homeostat.rules.yml"
SIGNALS = ("input_shift", "feature_shift", "entropy")


def variables_table() -> str:
    """One row per environment variable."""
    rows = ["| variable | default | what it does |", "|---|---|---|"]
    for variable in variables():
        default = f"`{variable.default}`" if variable.default else ""
        rows.append(f"| `{variable.name}` | {default} | {variable.help.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def metrics_table() -> str:
    """One row per metric family."""
    telemetry = Telemetry(SIGNALS, [*SIGNALS, "error"], [*SIGNALS, "error", "risk", "prior"], ["entropy"])
    rows = ["| metric | type | labels | what it is |", "|---|---|---|---|"]
    for family in sorted(telemetry.registry.collect(), key=lambda family: family.name):
        labels = sorted({name for sample in family.samples for name in sample.labels} - {"le"})
        if family.type == "info":
            labels = []
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        rows.append(f"| `{name}` | {family.type} | {', '.join(labels)} | {family.documentation} |")
    return "\n".join(rows)


def alerts_table() -> str:
    """One row per alert."""
    rows = ["| alert | severity | what it means, and what to do |", "|---|---|---|"]
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                runbook = rule["annotations"]["runbook"].strip()
                rows.append(f"| `{rule['alert']}` | {rule['labels']['severity']} | {runbook} |")
    return "\n".join(rows)


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"variables": variables_table, "metrics": metrics_table},
    DEPLOY: {"alerts": alerts_table},
}


def rendered(document: Path) -> str:
    """The document's text with its tables as they have to be."""
    text = document.read_text(encoding="utf-8")
    for name, make in TABLES[document].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{document} has no place for the table of {name}")
        table = make()
        text = pattern.sub(lambda found, table=table: found[1] + table + found[2], text)
    return text


if __name__ == "__main__":
    for document in TABLES:
        document.write_text(rendered(document), encoding="utf-8")
    print(f"tables written; levels are means over {LEVEL_ROWS} rows")
