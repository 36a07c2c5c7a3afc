"""The Kubernetes manifests of examples/server, without a cluster: every combination is built and checked.

The schemas and the checks that hold for any server are those of `kubernetes_manifests`. The others compare the
manifests with the server itself: its options, its routes, its metrics. `BREAKS` breaks the manifests in one place each
and names the complaint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gte_deploy.core.options import flags_of, options_of
from gte_deploy.serving.metrics import Metrics
from gte_deploy.serving.options import TOKEN_VARIABLE, ServerOptions
from kubernetes_manifests import (
    Manifest,
    build,
    built_by_kubectl,
    identity,
    kinds,
    labels,
    ordered,
    pod_of,
    pods,
    port_names,
    put,
    queries,
    query_problems,
    resources,
    schema,
    unnamed_files,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "server" / "kubernetes"
BUILDS = {
    f"{overlay} {' '.join(components)}".strip(): (overlay, components)
    for overlay in ("cpu", "gpu")
    for components in [(), ("monitoring", "hpa"), ("bundle-pvc",), ("bundle-image",)]
}
PROBES = {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
DEFAULTS = {flag: default for name, (default, one) in options_of(ServerOptions).items() for flag in flags_of(name, one)}
LABELS = dict.fromkeys(("namespace", "pod", "route", "model", "stage", "le"))
LABELS |= {"status": ("200", "429", "500", "503", "504")}


def _metrics() -> set[str]:
    """The names that a scrape gives, those of counters and buckets without a sample included."""
    families = list(text_string_to_metric_families(Metrics().text("text/plain")[0].decode()))
    ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name.removesuffix("_total") + end for family in families for end in ends.get(family.type, ("",))}


def _problems(manifests: list[Manifest]) -> list[str]:
    if problems := [f"schema: {problem}" for problem in schema(manifests)]:
        return problems  # the other checks count on the fields that a schema requires
    checks = (labels, _ports, _probes, _stopping, pods, resources, _options, _scaling, _queries)
    return [f"{check.__name__.lstrip('_')}: {problem}" for check in checks for problem in check(manifests)]


def _ports(manifests: list[Manifest]) -> Iterator[str]:
    (server,) = (container for each in kinds(manifests, "Deployment") for container in pod_of(each)["containers"])
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    if (port := int(_option(server, "--port"))) not in ports.values():
        yield f"the server listens at {port}, and the container has {ports}"
    for kind in PROBES:
        if (name := server[f"{kind}Probe"]["httpGet"]["port"]) not in ports:
            yield f"the {kind} probe asks port {name}, and the container has {ports}"
    for manifest in kinds(manifests, "Service", "NetworkPolicy", "PodMonitor"):
        for name in port_names(manifest):
            if name not in ports:
                yield f"{'/'.join(identity(manifest))} names port {name}, and the pods have {sorted(ports)}"


def _probes(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in kinds(manifests, "Deployment"):
        for container in pod_of(manifest)["containers"]:
            for kind, path in PROBES.items():
                if (found := container[f"{kind}Probe"]["httpGet"]["path"]) != path:
                    yield f"the {kind} probe asks for {found}, expected {path}"
            startup = container["startupProbe"]
            if startup["periodSeconds"] * startup["failureThreshold"] < 600:
                yield "the startup probe gives the models less than ten minutes to load"


def _stopping(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in kinds(manifests, "Deployment"):
        grace = pod_of(manifest)["terminationGracePeriodSeconds"]
        for container in pod_of(manifest)["containers"]:
            asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            draining = float(_option(container, "--drain-seconds"))
            if asleep + draining >= grace:
                yield f"preStop ({asleep} s) and draining ({draining:g} s) do not fit into the {grace} s of grace"


def _options(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in kinds(manifests, "Deployment"):
        for container in pod_of(manifest)["containers"]:
            bundle, *options = container["args"]
            if bundle != "/bundle":
                yield f"{container['name']} serves {bundle}, and the images have /bundle"
            for option in options:
                if option.split("=")[0] not in DEFAULTS:
                    yield f"gte-deploy serve knows no {option}"
            if _option(container, "--host") != "0.0.0.0":
                yield "the server does not listen to other pods"
            if TOKEN_VARIABLE not in {each["name"] for each in container["env"]}:
                yield f"the token does not come in {TOKEN_VARIABLE}"


def _option(container: Manifest, name: str) -> str:
    given = dict(each.split("=", 1) for each in container["args"][1:])
    return given.get(name, str(DEFAULTS[name]))


def _scaling(manifests: list[Manifest]) -> Iterator[str]:
    deployments = {each["metadata"]["name"]: each for each in kinds(manifests, "Deployment")}
    for manifest in kinds(manifests, "HorizontalPodAutoscaler"):
        spec = manifest["spec"]
        target = spec["scaleTargetRef"]["name"]
        if target not in deployments:
            yield f"{'/'.join(identity(manifest))} scales {target}, and there is {sorted(deployments)}"
        elif "replicas" in deployments[target]["spec"]:
            yield f"Deployment/{target} has replicas, which every apply would set"
        if spec["minReplicas"] > spec["maxReplicas"]:
            yield f"at least {spec['minReplicas']} and at most {spec['maxReplicas']} replicas"


def _queries(manifests: list[Manifest]) -> Iterator[str]:
    namespaces = {manifest["metadata"].get("namespace", "") for manifest in manifests} - {""}
    for query in queries(manifests):
        for problem in query_problems(query, _metrics(), LABELS, namespaces):
            yield f"{query}: {problem}"


def _built(name: str) -> list[Manifest]:
    overlay, components = BUILDS[name]
    return build(EXAMPLES / overlay, components)


@pytest.mark.parametrize("name", BUILDS)
def test_manifests_are_valid(name: str) -> None:
    assert _problems(_built(name)) == []


def test_every_file_is_in_a_build() -> None:
    """An orphan would be checked by nothing."""
    assert unnamed_files(EXAMPLES) == set()
    built = {component for _, components in BUILDS.values() for component in components}
    assert {path.name for path in (EXAMPLES / "components").iterdir()} == built


@pytest.mark.parametrize("name", BUILDS)
def test_build_is_what_kubectl_builds(name: str, tmp_path: Path) -> None:
    found = built_by_kubectl(EXAMPLES, *BUILDS[name], tmp_path / "kubernetes")
    assert ordered(_built(name)) == ordered(found)


# fmt: off
_MONITORED = "cpu monitoring hpa"
_POD = "spec.template.spec"
_SERVER = f"{_POD}.containers.0"
_ALERT = "spec.groups.0.rules.1.expr"
# What is broken: the build, the manifest, the path in it, the new value or None to delete, the complaint.
BREAKS: dict[str, tuple[str, str, str, object, str]] = {
    "field": ("cpu", "Deployment", f"{_SERVER}.imagePullPolice", "Always", "schema: .*'imagePullPolice' was unexp"),
    "monitor field": (_MONITORED, "PodMonitor", "spec.endpoints", [], "schema: monitoring.*'endpoints' was unexpected"),
    "service": ("cpu", "Service", "spec.selector", {"app": "gte"}, "labels: Service/gte-serve selects"),
    "policy": ("cpu", "NetworkPolicy", "spec.podSelector.matchLabels", {"app": "x"}, "labels: NetworkPolicy"),
    "target port": ("cpu", "Service", "spec.ports.0.targetPort", "web", "ports: Service/gte-serve names port web"),
    "probe port": ("cpu", "Deployment", f"{_SERVER}.livenessProbe.httpGet.port", 80, "ports: the liveness probe"),
    "port": ("cpu", "Deployment", f"{_SERVER}.args.2", "--port=80", "ports: the server listens at 80"),
    "probe path": ("cpu", "Deployment", f"{_SERVER}.livenessProbe.httpGet.path", "/ready", "probes: .*/health"),
    "start": ("gpu", "Deployment", f"{_SERVER}.startupProbe.failureThreshold", 6, "probes: .*less than ten minutes"),
    "grace": ("cpu", "Deployment", f"{_POD}.terminationGracePeriodSeconds", 40, "stopping: .*do not fit"),
    "drain": ("cpu", "Deployment", f"{_SERVER}.args.3", "--drain-seconds=50", "stopping: .*do not fit"),
    "option": ("cpu", "Deployment", f"{_SERVER}.args.3", "--drain=30", "options: gte-deploy serve knows no --drain"),
    "host": ("cpu", "Deployment", f"{_SERVER}.args.1", "--host=127.0.0.1", "options: .*does not listen"),
    "bundle": ("cpu", "Deployment", f"{_SERVER}.args.0", "/models", "options: .*the images have /bundle"),
    "token": ("cpu", "Deployment", f"{_SERVER}.env.0.name", "TOKEN", f"options: .*{TOKEN_VARIABLE}"),
    "volume": ("cpu", "Deployment", f"{_SERVER}.volumeMounts.0.name", "scratch", "pods: serve mounts scratch"),
    "root": ("cpu", "Deployment", f"{_POD}.securityContext.runAsNonRoot", None, "pods: serve: runAsNonRoot is None"),
    "files": ("gpu", "Deployment", f"{_SERVER}.securityContext.readOnlyRootFilesystem", False, "pods: .*readOnlyRoot"),
    "tag": ("cpu", "Deployment", f"{_SERVER}.image", "registry.example.com/gte-serve:latest", "pods: .*not pinned"),
    "memory": ("cpu", "Deployment", f"{_SERVER}.resources.requests.memory", "9Gi", "resources: .*more than its limit"),
    "scaled": (_MONITORED, "HorizontalPodAutoscaler", "spec.scaleTargetRef.name", "gte", "scaling: .*scales gte"),
    "replicas": (_MONITORED, "Deployment", "spec.replicas", 2, "scaling: Deployment/gte-serve has replicas"),
    "metric": (_MONITORED, "PrometheusRule", _ALERT, "absent(gte_deploy_requests)", "queries: .*no metric gte_"),
    "namespace": (_MONITORED, "PrometheusRule", _ALERT, 'gte_deploy_requests_total{namespace="default"}',
                  "queries: .*not selected by the namespace"),
    "status": (_MONITORED, "PrometheusRule", _ALERT, 'gte_deploy_requests_total{namespace="gte",status="busy"}',
               "queries: .*no status is busy"),
    "label": (_MONITORED, "PrometheusRule", _ALERT, 'gte_deploy_requests_total{namespace="gte",path="/embed"}',
              r"queries: .*no label \['path'\]"),
}
# fmt: on


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_manifest_is_found(name: str) -> None:
    build_name, kind, path, value, complaint = BREAKS[name]
    manifests = _built(build_name)
    put(next(kinds(manifests, kind)), path, value)
    problems = _problems(manifests)
    assert any(re.match(complaint, problem) for problem in problems), problems
