"""What the manifests say agrees: with each other, with the server that they start and with the image."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from d2o_client._core import DEFAULT_TIMEOUT
from d2o_server.settings import TERMINATION_RESERVE, Settings, _parser, from_arguments
from tests.k8s.conftest import K8S, ROOT
from tests.k8s.kustomize import Manifest, find, render

DOCKERFILE = (ROOT / "Dockerfile").read_text()
# What the server itself may take after its last stream: the RPC server's stop and the workers'.
SECONDS_TO_STOP = 10


def pod(manifests: list[Manifest]) -> Any:
    return find(manifests, "Deployment", "d2o-serve")["spec"]["template"]["spec"]


def container(manifests: list[Manifest]) -> Any:
    (only,) = pod(manifests)["containers"]
    return only


def variables(manifests: list[Manifest]) -> dict[str, str]:
    """The container's environment, as far as the manifests know it."""
    found = dict(find(manifests, "ConfigMap", "d2o-serve")["data"])
    for entry in container(manifests)["env"]:
        if "value" in entry:
            found[entry["name"]] = entry["value"]
        else:
            resource = entry["valueFrom"]["resourceFieldRef"]["resource"].split(".")
            found[entry["name"]] = container(manifests)["resources"][resource[0]][resource[1]]
    return found


def settings(manifests: list[Manifest]) -> Settings:
    return from_arguments([], variables(manifests))


def container_ports(manifests: list[Manifest]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}


def test_every_variable_is_one_of_the_server_s(manifests: list[Manifest]) -> None:
    known = {f"D2O_SERVE_{action.dest.upper()}" for action in _parser({})._actions}
    assert set(variables(manifests)) <= known


def test_the_server_understands_its_settings(manifests: list[Manifest]) -> None:
    read = settings(manifests)
    assert read.listen.host == "0.0.0.0"
    assert read.worker.threads == int(container(manifests)["resources"]["requests"]["cpu"])
    assert read.listen.max_connection_age > 0
    assert read.listen.max_connection_age_grace is None


def test_pause_drain_and_kill_follow_from_one_number(manifests: list[Manifest]) -> None:
    limits, kill = settings(manifests).limits, pod(manifests)["terminationGracePeriodSeconds"]
    assert isinstance(kill, int)
    assert str(kill) == variables(manifests)["D2O_SERVE_TERMINATION_GRACE"]
    pause = container(manifests)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause + limits.drain_window + limits.drain_grace + SECONDS_TO_STOP <= kill
    assert pause + SECONDS_TO_STOP <= TERMINATION_RESERVE


@pytest.mark.parametrize("name", ["base", "overlays/gpu"])
def test_the_longest_call_of_a_client_outlives_the_end_of_a_pod(name: str) -> None:
    assert settings(render(K8S / name)).limits.drain_grace >= DEFAULT_TIMEOUT


def test_all_speak_of_the_same_ports(manifests: list[Manifest]) -> None:
    ports = container_ports(manifests)
    given = variables(manifests)
    assert ports == {"grpc": settings(manifests).listen.port, "metrics": int(given["D2O_SERVE_METRICS_PORT"])}
    service = find(manifests, "Service", "d2o-serve")["spec"]
    assert {port["name"]: (port["port"], port["targetPort"]) for port in service["ports"]} == {
        name: (number, name) for name, number in ports.items()
    }
    policy = find(manifests, "NetworkPolicy", "d2o-serve")["spec"]
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == list(ports)
    assert f"EXPOSE {ports['grpc']} {ports['metrics']}" in DOCKERFILE
    assert f"D2O_SERVE_PORT={ports['grpc']}" in DOCKERFILE


def test_the_service_gives_clients_the_address_of_every_pod(manifests: list[Manifest]) -> None:
    assert find(manifests, "Service", "d2o-serve")["spec"]["clusterIP"] == "None"


def test_all_select_the_same_pods(manifests: list[Manifest]) -> None:
    deployment = find(manifests, "Deployment", "d2o-serve")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    assert find(manifests, "Service", "d2o-serve")["spec"]["selector"] == labels
    assert find(manifests, "PodDisruptionBudget", "d2o-serve")["spec"]["selector"]["matchLabels"] == labels
    assert find(manifests, "NetworkPolicy", "d2o-serve")["spec"]["podSelector"]["matchLabels"] == labels


def test_probes_ask_the_health_service_and_a_first_start_has_time(manifests: list[Manifest]) -> None:
    main, port = container(manifests), container_ports(manifests)["grpc"]
    tls = "D2O_SERVE_TLS_CERTIFICATE" in variables(manifests)
    asked = {"exec": {"command": ["python3", "-m", "d2o_server.healthcheck"]}} if tls else {"grpc": {"port": port}}
    for name in ("startupProbe", "readinessProbe"):
        assert {key: main[name].get(key) for key in ("grpc", "exec") if key in main[name]} == asked
    assert main["livenessProbe"]["tcpSocket"]["port"] == "grpc"
    start = main["startupProbe"]["periodSeconds"] * main["startupProbe"]["failureThreshold"]
    assert start < find(manifests, "Deployment", "d2o-serve")["spec"]["progressDeadlineSeconds"]


def test_the_pod_keeps_to_the_restricted_security_standard(manifests: list[Manifest]) -> None:
    spec, main = pod(manifests), container(manifests)
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert main["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "secret"}
    assert {volume["name"] for volume in spec["volumes"]} == {mount["name"] for mount in main["volumeMounts"]}


def test_the_user_is_the_image_s(manifests: list[Manifest]) -> None:
    context = pod(manifests)["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in DOCKERFILE
    home = {mount["name"]: mount["mountPath"] for mount in container(manifests)["volumeMounts"]}["cache"]
    assert f"VOLUME {home}\n" in DOCKERFILE


def test_the_image_is_of_this_version(manifests: list[Manifest]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(rf"d2o-serve:{re.escape(version)}(-cpu|-gpu)?", container(manifests)["image"])


def test_settings_and_secrets_reach_the_container(manifests: list[Manifest]) -> None:
    assert container(manifests)["envFrom"] == [
        {"configMapRef": {"name": "d2o-serve"}},
        {"secretRef": {"name": "d2o-serve-hub", "optional": True}},
    ]
    mounts = {mount["name"]: mount["mountPath"] for mount in container(manifests)["volumeMounts"]}
    secrets = [mounts[volume["name"]] for volume in pod(manifests)["volumes"] if "secret" in volume]
    files = [value for value in variables(manifests).values() if value.startswith("/")]
    assert {file.rpartition("/")[0] for file in files} == set(secrets)


def test_the_scaler_follows_the_deployment_and_leaves_its_replicas_alone() -> None:
    manifests = render(K8S / "overlays" / "gpu")
    scaler = find(manifests, "ScaledObject", "d2o-serve")["spec"]
    assert find(manifests, "Deployment", scaler["scaleTargetRef"]["name"])["spec"].get("replicas") is None
    assert {trigger["type"] for trigger in scaler["triggers"]} == {"prometheus"}
    # Only averages have a fallback.
    assert {trigger["metricType"] for trigger in scaler["triggers"]} == {"AverageValue"}


def test_the_monitor_scrapes_the_service_s_metrics() -> None:
    manifests = render(K8S / "overlays" / "gpu")
    monitor = find(manifests, "ServiceMonitor", "d2o-serve")["spec"]
    service = find(manifests, "Service", "d2o-serve")
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
