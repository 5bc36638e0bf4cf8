"""compose.yaml: what it mounts is there, each variable is a setting, nothing is published beyond the machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from daemon import __version__
from daemon.broker_runtime import KAFKA_VERSION
from daemon.cli import _parser
from daemon.config import variables
from tests.containerfile import environment, stages
from tests.dashboard import DASHBOARD
from tests.prometheus import FOLDER as PROMETHEUS

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OWN = [name for name, service in SERVICES.items() if "homeostat" in service["image"]]


def test_it_has_the_whole_thing() -> None:
    assert set(SERVICES) == {
        *("kafka", "topics", "bundle", "stream", "homeostat"),
        *("prometheus", "alertmanager", "grafana"),
    }


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_a_variable_with_a_version(name: str) -> None:
    found = re.fullmatch(r"\$\{[A-Z]+_IMAGE:-[\w./-]+:v?(\d+\.\d+\.\d+)\}", SERVICES[name]["image"])
    assert found is not None, SERVICES[name]["image"]
    if name in OWN:
        assert found[1] == __version__
    if "kafka" in SERVICES[name]["image"]:
        assert found[1] == KAFKA_VERSION


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_is_there_and_what_is_published_stays_on_this_machine(name: str) -> None:
    service = SERVICES[name]
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)
    for volume in service.get("volumes", []):
        source, _, rest = volume.partition(":")
        if source.startswith("."):
            assert (DEPLOY / source).exists() and rest.endswith(":ro"), volume
        else:
            assert source in COMPOSE["volumes"], volume
    for other in service.get("depends_on", {}):
        assert other in SERVICES


@pytest.mark.parametrize("name", OWN)
def test_a_container_of_ours_can_write_to_its_volume_alone(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert service["build"] == {"context": "..", "dockerfile": "deploy/Containerfile"}
    state = environment(stages()[-1])["HOMEOSTAT_STATE_DIR"]
    assert service["volumes"] in ([], [f"state:{state}"])


def test_the_worker_s_variables_are_settings_and_it_may_drain() -> None:
    worker = SERVICES["homeostat"]
    known = {variable.name: variable.default for variable in variables()}
    assert set(worker["environment"]) <= set(known)
    assert float(worker["stop_grace_period"].rstrip("s")) > float(known["HOMEOSTAT_DRAIN_TIMEOUT_S"])
    assert worker["hostname"] == "homeostat"


def test_the_stream_is_written_where_the_worker_reads_and_the_topics_are_made() -> None:
    options = _parser().parse_args(SERVICES["stream"]["command"])
    worker = SERVICES["homeostat"]["environment"]
    assert options.command == "simulate" and options.rate > 0
    assert (options.to, options.labels_to) == (worker["HOMEOSTAT_SOURCE"], worker["HOMEOSTAT_LABELS"])
    (script,) = SERVICES["topics"]["command"]
    used = {worker[f"HOMEOSTAT_{name}"].rpartition("/")[2] for name in ("SOURCE", "LABELS", "SINK")}
    assert f"for topic in {' '.join(sorted(used, reverse=True))}; do" in script
    listeners = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    inside = re.findall(r"INSIDE://(\S+?),", listeners)
    assert [worker["HOMEOSTAT_SOURCE"].split("/")[2]] == inside
    assert f"--bootstrap-server {inside[0]}" in script


def test_the_model_is_packed_where_the_worker_looks_for_it() -> None:
    (script,) = SERVICES["bundle"]["command"]
    packing = script.split("|| homeostat ")[1].split()
    options = _parser().parse_args(packing)
    state = environment(stages()[-1])["HOMEOSTAT_STATE_DIR"]
    assert f"{state}/{options.bundle}" == SERVICES["homeostat"]["environment"]["HOMEOSTAT_BUNDLE"]
    assert f"test -e {options.bundle}/manifest.json" in script


def test_prometheus_finds_the_worker_its_rules_and_alertmanager() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["prometheus"]["volumes"])
    folder = Path(mounted["./prometheus/prometheus.yml"]).parent
    assert f"--config.file={folder}/prometheus.yml" in SERVICES["prometheus"]["command"]
    assert [str(folder / name) for name in config["rule_files"]] == [mounted["./prometheus/homeostat.rules.yml"]]
    (job,) = config["scrape_configs"]
    assert (job["job_name"], job["static_configs"]) == ("homeostat", [{"targets": ["homeostat:9464"]}])
    (manager,) = config["alerting"]["alertmanagers"]
    assert manager["static_configs"] == [{"targets": ["alertmanager:9093"]}]
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["alertmanager"]["volumes"])
    assert f"--config.file={mounted['./prometheus/alertmanager.yml']}" in SERVICES["alertmanager"]["command"]


def test_grafana_shows_our_dashboard_with_prometheus_as_its_source() -> None:
    grafana = SERVICES["grafana"]
    mounted = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    (shown,) = (target for source, target in mounted.items() if (DEPLOY / source).resolve() == DASHBOARD)
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == shown
    folder = DEPLOY / "grafana" / "provisioning"
    assert mounted["./grafana/provisioning"] == "/etc/grafana/provisioning"
    (provider,) = yaml.safe_load((folder / "dashboards" / "homeostat.yml").read_text())["providers"]
    assert provider["options"]["path"] == str(Path(shown).parent)
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert source["url"] == "http://prometheus:9090"
    interval = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval
