"""README's tables of variables and metrics, made from the code: ``python -m tests.docs`` writes them into README.md."""

from __future__ import annotations

import re
from pathlib import Path

from daemon.config import variables
from daemon.monitor import LEVEL_ROWS
from daemon.telemetry import Telemetry

README = Path(__file__).resolve().parents[1] / "README.md"
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


def rendered(text: str) -> str:
    """``text`` with its two tables as they have to be."""
    for name, table in (("variables", variables_table()), ("metrics", metrics_table())):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no place for the table of {name}")
        text = pattern.sub(lambda found, table=table: found[1] + table + found[2], text)
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README}: tables written; levels are means over {LEVEL_ROWS} rows")
