"""The Helm chart: what it makes is Kubernetes', what it runs is the daemon's, and wrong values are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from daemon import __version__
from daemon.config import variables
from tests.chart import CHART, COPIES, NEWEST, Refused, helm, rendered
from tests.containerfile import environment, of, stages
from tests.prometheus import binary, told

CUSTOM = {"PodMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds that operators bring: Kubernetes has no schema for them."""
EVERYTHING: dict[str, Any] = {
    "config": {
        "HOMEOSTAT_SOURCE": "kafka://one:9092,two:9092/sensors",
        "HOMEOSTAT_KAFKA__GROUP": "line-4",
        "HOMEOSTAT_SLOW__MEMORY_BYTES": 268435456,
        "HOMEOSTAT_PROBABILITIES": True,
    },
    "secrets": [
        {"variable": "HOMEOSTAT_KAFKA__PASSWORD_FILE", "secret": "kafka-login", "key": "password"},
        {"variable": "HOMEOSTAT_OPERATOR__TOKEN_FILE", "secret": "operator", "key": "token"},
    ],
    "bundle": {"volume": {"persistentVolumeClaim": {"claimName": "bundle"}}, "subPath": "v3"},
    "app": {"volume": {"configMap": {"name": "plant-model"}}},
    "gpu": {"enabled": True},
    "runtimeClassName": "nvidia",
    "priorityClassName": "plant",
    "imagePullSecrets": [{"name": "mirror"}],
    "persistence": {"storageClass": "fast", "size": "20Gi"},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboard": {"enabled": True},
    "nodeSelector": {"kubernetes.io/arch": "arm64"},
    "tolerations": [{"key": "edge", "operator": "Exists"}],
    "podLabels": {"team": "plant"},
    "podAnnotations": {"note": "x"},
}
KINDS = {"StatefulSet", "Service", "ServiceAccount", "PodDisruptionBudget", "Pod"}


def pod(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = documents["StatefulSet"]["spec"]["template"]["spec"]
    return found


def container(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (found,) = pod(documents)["containers"]
    assert isinstance(found, dict)
    return found


def given(documents: dict[str, dict[str, Any]]) -> dict[str, str]:
    pairs = [(each["name"], each["value"]) for each in container(documents)["env"]]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("copy", COPIES, ids=lambda path: path.name)
def test_what_the_chart_has_from_elsewhere_is_the_same(copy: Path) -> None:
    assert copy.read_bytes() == COPIES[copy].read_bytes(), "run python -m tests.chart"


def test_helm_finds_nothing_to_warn_of(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    for values in ({}, EVERYTHING, EVERYTHING | {"autoscaling": {"kind": "keda"}}):
        file.write_text(yaml.safe_dump(values))
        said = helm("lint", "--strict", "--kube-version", NEWEST, "--values", str(file), str(CHART))
        assert "0 chart(s) failed" in said and "WARNING" not in said and "ERROR" not in said


@pytest.mark.parametrize("kubernetes", ["1.27", NEWEST])
@pytest.mark.parametrize(
    "values", [{}, EVERYTHING, EVERYTHING | {"autoscaling": {"kind": "hpa"}}], ids=["nothing", "everything", "hpa"]
)
def test_what_it_makes_is_valid(values: dict[str, Any], kubernetes: str, tmp_path: Path) -> None:
    documents = rendered(tmp_path, values, kubernetes)
    for kind, document in documents.items():
        if kind not in CUSTOM:
            assert kubernetes_validate.validate(document, kubernetes, strict=True) == kubernetes
    documents["StatefulSet"]["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(documents["StatefulSet"], kubernetes, strict=True)


def test_which_objects_there_are_is_chosen(tmp_path: Path) -> None:
    assert set(rendered(tmp_path)) == KINDS
    everything = KINDS | {"PodMonitor", "PrometheusRule", "ConfigMap"}
    assert set(rendered(tmp_path, EVERYTHING)) == everything
    scaled = set(rendered(tmp_path, EVERYTHING | {"autoscaling": {"kind": "hpa"}}))
    assert scaled == everything | {"HorizontalPodAutoscaler"}
    off = {"serviceAccount": {"create": False}, "podDisruptionBudget": {"enabled": False}}
    assert set(rendered(tmp_path, off)) == {"StatefulSet", "Service", "Pod"}


@pytest.mark.parametrize("kind", ["StatefulSet", "Pod"])
def test_no_container_may_more_than_it_needs(kind: str, tmp_path: Path) -> None:
    documents = rendered(tmp_path, EVERYTHING)
    spec = pod(documents) if kind == "StatefulSet" else documents["Pod"]["spec"]
    (user,) = of("USER", stages()[-1])
    assert f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}" == user
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    (only,) = spec["containers"]
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in only["resources"]["limits"]


def test_the_image_is_that_of_this_version_or_a_digest(tmp_path: Path) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    assert container(rendered(tmp_path))["image"] == f"homeostat:{__version__}"
    digest = f"sha256:{'0' * 64}"
    named = {"image": {"repository": "mirror/homeostat", "digest": digest}}
    documents = rendered(tmp_path, named)
    assert container(documents)["image"] == f"mirror/homeostat@{digest}"
    assert documents["Pod"]["spec"]["containers"][0]["image"] == f"mirror/homeostat@{digest}"


def test_folders_and_port_are_those_of_the_image(tmp_path: Path) -> None:
    image, documents = environment(stages()[-1]), rendered(tmp_path, EVERYTHING)
    mounts = {mount["name"]: mount for mount in container(documents)["volumeMounts"]}
    assert given(documents)["HOMEOSTAT_HTTP"] == image["HOMEOSTAT_HTTP"]
    assert given(documents)["HOMEOSTAT_STATE_DIR"] == mounts["state"]["mountPath"] == image["HOMEOSTAT_STATE_DIR"]
    assert mounts["app"]["mountPath"] == image["HOMEOSTAT_APP_DIR"]
    assert given(documents)["HOMEOSTAT_BUNDLE"] == mounts["bundle"]["mountPath"]
    (port,) = container(documents)["ports"]
    assert port == {"name": "http", "containerPort": int(image["HOMEOSTAT_HTTP"].rpartition(":")[2])}
    writable = {name for name, mount in mounts.items() if not mount.get("readOnly")}
    assert writable == {"state", "tmp"}
    (claim,) = documents["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "state" and claim["spec"]["resources"]["requests"] == {"storage": "20Gi"}
    assert {volume["name"] for volume in pod(documents)["volumes"]} == set(mounts) - {"state"}


def test_settings_come_through_as_they_are_written_and_secrets_as_files(tmp_path: Path) -> None:
    documents = rendered(tmp_path, EVERYTHING)
    env = given(documents)
    assert set(env) <= {variable.name for variable in variables()}
    assert env["HOMEOSTAT_SLOW__MEMORY_BYTES"] == "268435456" and env["HOMEOSTAT_PROBABILITIES"] == "true"
    (projected,) = (each["projected"] for each in pod(documents)["volumes"] if each["name"] == "secrets")
    (mount,) = (each for each in container(documents)["volumeMounts"] if each["name"] == "secrets")
    for wanted, source in zip(EVERYTHING["secrets"], projected["sources"], strict=True):
        (item,) = source["secret"]["items"]
        assert (source["secret"]["name"], item["key"]) == (wanted["secret"], wanted["key"])
        assert env[wanted["variable"]] == f"{mount['mountPath']}/{item['path']}"


def test_probes_ask_what_the_daemon_answers_and_a_drain_has_its_time(tmp_path: Path) -> None:
    documents = rendered(tmp_path)
    asked = {
        name: container(documents)[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")
    }
    assert asked == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    drain = next(float(each.default) for each in variables() if each.name == "HOMEOSTAT_DRAIN_TIMEOUT_S")
    assert pod(documents)["terminationGracePeriodSeconds"] > drain


def test_with_a_certificate_everyone_who_asks_speaks_https(tmp_path: Path) -> None:
    secret = {"variable": "HOMEOSTAT_HTTPS__SSL_CERTFILE", "secret": "server", "key": "tls.crt"}
    config = {"HOMEOSTAT_HTTPS__SSL_CERTFILE": "/bundle/server.pem"}
    for values, scheme in (({}, "HTTP"), ({"secrets": [secret]}, "HTTPS"), ({"config": config}, "HTTPS")):
        monitor = {"enabled": True, "tlsConfig": {"serverName": "plant"}}
        documents = rendered(tmp_path, values | {"podMonitor": monitor})
        probes = [container(documents)[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
        assert [probe["scheme"] for probe in probes] == [scheme] * 3
        (endpoint,) = documents["PodMonitor"]["spec"]["podMetricsEndpoints"]
        assert (endpoint["scheme"], endpoint["tlsConfig"]) == (scheme.lower(), {"serverName": "plant"})
        assert documents["Pod"]["spec"]["containers"][0]["args"][-1] == scheme


def test_a_gpu_is_asked_for_beside_the_other_resources(tmp_path: Path) -> None:
    assert container(rendered(tmp_path, EVERYTHING))["resources"] == {
        "limits": {"memory": "2Gi", "nvidia.com/gpu": "1"},
        "requests": {"cpu": "500m", "memory": "1Gi"},
    }
    assert "nvidia.com/gpu" not in container(rendered(tmp_path))["resources"]["limits"]


def test_the_rules_are_ours_and_the_job_has_the_name_that_they_know(tmp_path: Path) -> None:
    documents = rendered(tmp_path, EVERYTHING)
    spec = documents["PrometheusRule"]["spec"]
    (original,) = (path for copy, path in COPIES.items() if copy.suffix == ".yml")
    assert spec == yaml.safe_load(original.read_text())
    (endpoint,) = documents["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == container(documents)["ports"][0]["name"]
    (relabeling,) = endpoint["relabelings"]
    (job,) = set(re.findall(r'job="(\w+)"', original.read_text()))
    assert relabeling == {"targetLabel": "job", "replacement": job}
    labels = documents["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("PodMonitor", "PodDisruptionBudget"):
        assert documents[kind]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert (
            not documents[kind]["spec"]["selector"]["matchLabels"].items()
            <= documents["Pod"]["metadata"]["labels"].items()
        )
    assert documents["Service"]["spec"]["selector"].items() <= labels.items()
    assert documents["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(documents["ConfigMap"]["data"]["homeostat.json"])["title"]


def test_promtool_takes_the_rules_of_the_chart(tmp_path: Path) -> None:
    promtool = binary("promtool", "prometheus")
    file = tmp_path / "rules.yml"
    spec = rendered(tmp_path, EVERYTHING)["PrometheusRule"]["spec"]
    file.write_text(yaml.safe_dump(spec))
    count = sum(len(group["rules"]) for group in spec["groups"])
    assert f"{count} rules found" in told(promtool, "check", "rules", str(file))


def test_workers_are_added_when_the_lag_grows(tmp_path: Path) -> None:
    assert rendered(tmp_path)["StatefulSet"]["spec"]["replicas"] == 1
    documents = rendered(tmp_path, EVERYTHING | {"autoscaling": {"kind": "keda", "maxReplicas": 6}})
    target = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "plant-homeostat"}
    spec = documents["ScaledObject"]["spec"]
    assert spec["scaleTargetRef"] == target and "replicas" not in documents["StatefulSet"]["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (1, 6)
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "kafka" and trigger["metadata"] == {
        "bootstrapServers": "one:9092,two:9092",
        "topic": "sensors",
        "consumerGroup": "line-4",
        "lagThreshold": "5000",
        "offsetResetPolicy": "earliest",
    }
    documents = rendered(tmp_path, {"autoscaling": {"kind": "hpa"}})
    (metric,) = documents["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "homeostat_lag_seconds"
    assert documents["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"] == target


def test_the_chart_s_own_test_asks_each_worker_whether_it_is_ready(tmp_path: Path) -> None:
    documents = rendered(tmp_path)
    assert documents["Pod"]["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (only,) = documents["Pod"]["spec"]["containers"]
    script, name, port, scheme = only["args"]
    compile(script, "ready", "exec")
    assert scheme == "HTTP" and "/readyz" in script and only["command"] == ["python", "-I", "-c"]
    service = documents["Service"]
    assert (name, int(port)) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    assert service["spec"]["clusterIP"] == "None"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"replica": 2}, "replica"),
    ({"replicas": "two"}, "replicas"),
    ({"image": {"tags": "1"}}, "tags"),
    ({"image": {"digest": "sha256:1"}}, "digest"),
    ({"config": {"SOURCE": "-"}}, "SOURCE"),
    ({"config": {"HOMEOSTAT_BATCH_ROWS": [1]}}, "HOMEOSTAT_BATCH_ROWS"),
    ({"config": {"HOMEOSTAT_HTTP": "off"}}, "HOMEOSTAT_HTTP"),
    ({"config": {"HOMEOSTAT_KAFKA__PASSWORD": "x"}}, "HOMEOSTAT_KAFKA__PASSWORD"),
    ({"secrets": [{"variable": "HOMEOSTAT_KAFKA__PASSWORD", "secret": "a", "key": "b"}]}, "variable"),
    ({"secrets": [{"variable": "HOMEOSTAT_KAFKA__PASSWORD_FILE", "secret": "a"}]}, "key"),
    ({"bundle": {"volume": {"emptyDir": {}, "hostPath": {}}}}, "volume"),
    ({"persistence": {"size": "much"}}, "size"),
    ({"gpu": {"enabled": "yes"}}, "enabled"),
    ({"autoscaling": {"kind": "vpa"}}, "kind"),
    ({"probes": {"liveness": {"period": 1}}}, "period"),
    ({"terminationGracePeriodSeconds": 20}, "HOMEOSTAT_DRAIN_TIMEOUT_S=20"),
    ({"config": {"HOMEOSTAT_DRAIN_TIMEOUT_S": "90"}}, "HOMEOSTAT_DRAIN_TIMEOUT_S=90"),
    ({"autoscaling": {"kind": "keda"}}, "no kafka:// address"),
    ({"autoscaling": {"kind": "hpa", "minReplicas": 4}}, "above maxReplicas"),
    ({"bundle": {"volume": {"emptyDir": {}}}, "config": {"HOMEOSTAT_BUNDLE": "/b"}}, "bundle.volume sets it"),
]


@pytest.mark.parametrize(("values", "why"), REFUSED, ids=[str(index) for index in range(len(REFUSED))])
def test_wrong_values_are_refused_by_name(values: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=re.escape(why)):
        rendered(tmp_path, values)


def test_the_schema_knows_every_value_and_lets_every_setting_through(tmp_path: Path) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) | {"global"} == set(schema["properties"])
    names = schema["properties"]["config"]["propertyNames"]
    allowed = {each.name for each in variables() if each.name not in names["not"]["enum"]}
    assert all(re.search(names["pattern"], name) for name in allowed)
    secret = {each.name for each in variables() if each.kind == "SecretStr"}
    assert secret == {"HOMEOSTAT_KAFKA__PASSWORD"} and not secret & allowed
    pattern = schema["properties"]["secrets"]["items"]["properties"]["variable"]["pattern"]
    files = {name for name in allowed if re.search(pattern, name)}
    assert {name for name in allowed if name.endswith(("_FILE", "CAFILE", "CERTFILE", "KEYFILE"))} == files
