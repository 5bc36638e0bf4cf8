"""Rules and alerts: what they name exists, each is proved to fire and to be silent, and each is explained."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from daemon.telemetry import Telemetry

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "homeostat.rules.yml"
TESTS = DEPLOY / "prometheus" / "tests" / "alerts.test.yml"
SELECTOR = re.compile(r"\b(homeostat_\w+)(?:\{([^}]*)\})?")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def samples() -> dict[str, dict[str, set[str]]]:
    """By a sample's name, as a scrape has it, its labels and their values."""
    telemetry = Telemetry(["entropy"], ["entropy", "error"], ["entropy", "error"], ["entropy"])
    found: dict[str, dict[str, set[str]]] = {}
    for family in telemetry.registry.collect():
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def test_every_metric_that_a_rule_names_is_one_of_the_daemon_s_with_such_labels() -> None:
    known = samples()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    named = 0
    for rule in rules():
        for used in re.findall(r"\bhomeostat:[\w:]+", rule["expr"]):
            assert used in recorded
        for name, matchers in SELECTOR.findall(rule["expr"]):
            named += 1
            assert name in known, name
            for label, value in re.findall(r'(\w+)!?="([^"]*)"', matchers):
                assert value in known[name][label], f"{name}: {label}={value}"
    assert named > 20


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_how_bad_it_is_what_it_means_and_what_to_do(name: str) -> None:
    rule = alerts()[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert "$labels.instance" in rule["annotations"]["summary"]
    assert len(rule["annotations"]["runbook"]) > 100
    for variable in re.findall(r"HOMEOSTAT_\w+", rule["annotations"]["runbook"]):
        assert f"`{variable}`" in (DEPLOY.parent / "README.md").read_text(), variable
    assert f"| `{name}` |" in (DEPLOY / "README.md").read_text()


@pytest.mark.parametrize("name", alerts())
def test_an_alert_is_proved_to_fire_and_to_be_silent(name: str) -> None:
    proofs = [
        proof["exp_samples"][0]["value"]
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for proof in test["promql_expr_test"]
        if f'alertname="{name}"' in proof["expr"] and 'alertstate="firing"' in proof["expr"]
    ]
    assert {0, 1} <= set(proofs)


def test_promtool_takes_the_rules_and_proves_the_alerts() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(TESTS)]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "SUCCESS" in done.stdout
