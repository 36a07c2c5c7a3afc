"""The manifests of examples/kubernetes, without a cluster.

Every combination that docs/scaling.md names is built as `kubectl kustomize` builds it, checked against Kubernetes' own
schemas (kubernetes-validate ships them) and against schemas of the custom resources' published fields
(tests/kubernetes/custom_resources.yaml), and then for what no schema sees: names, labels, ports, paths, metrics and
options that have to exist somewhere else. `BREAKS` breaks the manifests in one place each and names the complaint.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml

import triton_server
from gte_deploy.exporters.triton.configs import ENCODER, TOKENIZER
from gte_deploy.exporters.triton.readme import TRITON_TAG

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "kubernetes"
ADAPTER = EXAMPLES / "components" / "hpa" / "values.yaml"
RECORDED = Path(__file__).with_name("kubernetes")
CUSTOM = yaml.safe_load((RECORDED / "custom_resources.yaml").read_text(encoding="utf-8"))
_RECORDED = yaml.safe_load((RECORDED / "triton.yaml").read_text(encoding="utf-8"))
METRICS = {*_RECORDED["metrics"], *_RECORDED["gpu_metrics"]}
OPTIONS = set(_RECORDED["options"])

KUBERNETES_VERSIONS = ("1.35", kubernetes_validate.latest_version())
MODELS = {TOKENIZER, ENCODER, "gte_embed", "gte_fill_mask"}
FAILURE_REASONS = {"REJECTED", "CANCELED", "BACKEND", "OTHER"}
REPOSITORIES = ("repository-pvc", "repository-object-store", "repository-image")
BUILDS = {
    f"{overlay} {' '.join(components)}".strip(): (overlay, components)
    for overlay in ("cpu", "gpu")
    for components in [(), ("monitoring", "keda"), ("monitoring", "hpa"), *((each,) for each in REPOSITORIES)]
} | {"kserve": ("kserve", ())}

Manifest = dict[str, Any]


# What `kubectl kustomize` does, as far as the examples need it.

# The key by which a list's entries are one another's, in a strategic merge patch; other lists are replaced.
_MERGE_KEYS = {name: "name" for name in ("containers", "initContainers", "volumes", "env")}
_MERGE_KEYS |= {"volumeMounts": "mountPath", "ports": "containerPort"}
_KUSTOMIZATION = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "images"}


def _build(folder: Path, extra_components: tuple[str, ...] = (), onto: tuple[Manifest, ...] = ()) -> list[Manifest]:
    """The manifests that `kubectl kustomize folder` writes; a component is built onto those it is applied to."""
    (kustomization,) = _documents(folder / "kustomization.yaml")
    assert set(kustomization) <= _KUSTOMIZATION, f"{folder}: {set(kustomization) - _KUSTOMIZATION} is not known here"
    manifests = list(copy.deepcopy(onto))
    for name in kustomization.get("resources", ()):
        path = folder / name
        manifests += _build(path) if path.is_dir() else _documents(path)
    for component in [*kustomization.get("components", ()), *(f"../components/{each}" for each in extra_components)]:
        manifests = _build(folder / component, onto=tuple(manifests))
    for patch in (each for entry in kustomization.get("patches", ()) for each in _documents(folder / entry["path"])):
        (index,) = [index for index, manifest in enumerate(manifests) if _id(manifest) == _id(patch)]
        manifests[index] = _merged(manifests[index], patch)
    for manifest in manifests:
        if "namespace" in kustomization:
            field = "name" if manifest["kind"] == "Namespace" else "namespace"
            manifest["metadata"][field] = kustomization["namespace"]
        for image in kustomization.get("images", ()):
            for container in _containers(_pod(manifest)):
                if container["image"].split(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return manifests


def _merged(value: Any, patch: Any, field: str = "") -> Any:
    if isinstance(patch, dict):
        merged = dict(value or {})
        for key, each in patch.items():
            merged[key] = _merged(merged.get(key), each, key)
        return {key: each for key, each in merged.items() if each is not None}
    if isinstance(patch, list) and value and field in _MERGE_KEYS:
        key = _MERGE_KEYS[field]
        entries = {each[key]: each for each in value}
        return list((entries | {each[key]: _merged(entries.get(each[key]), each) for each in patch}).values())
    return patch


def _documents(path: Path) -> list[Manifest]:
    return copy.deepcopy(_parsed(path))


@functools.cache
def _parsed(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def _id(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def _pod(manifest: Manifest) -> Manifest:
    """The pod's spec in a workload; {} elsewhere."""
    if manifest["kind"] == "ServingRuntime":
        return {key: manifest["spec"][key] for key in ("containers", "volumes") if key in manifest["spec"]}
    return manifest["spec"]["template"]["spec"] if manifest["kind"] == "Deployment" else {}


def _containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", ()), *pod.get("containers", ())]


# What is wrong with a set of manifests. Each check yields sentences; none: fine.


def _problems(manifests: list[Manifest]) -> list[str]:
    if problems := [f"schema: {problem}" for problem in _schema(manifests)]:
        return problems  # the other checks count on the fields that a schema requires
    checks = (_labels, _ports, _probes, _stopping, _pods, _resources, _options, _scaling, _queries, _kserve)
    return [f"{check.__name__[1:]}: {problem}" for check in checks for problem in check(manifests)]


def _of(manifests: list[Manifest], *kinds: str) -> Iterator[Manifest]:
    return (manifest for manifest in manifests if manifest["kind"] in kinds)


def _schema(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        name = f"{manifest['apiVersion']} {manifest['kind']}"
        if name in CUSTOM:
            yield from _custom_problems(name, manifest)
            if manifest["kind"] == "ServingRuntime":
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "of-runtime"}, "spec": _pod(manifest)}
                yield from _kubernetes_problems(json.dumps(pod))
        else:
            yield from _kubernetes_problems(json.dumps(manifest))


def _custom_problems(name: str, value: object) -> Iterator[str]:
    validator = jsonschema.Draft202012Validator({"$defs": CUSTOM["$defs"], **CUSTOM[name]})
    for error in validator.iter_errors(value):
        yield f"{name}: {error.json_path}: {error.message}"


@functools.cache  # most manifests are in most builds
def _kubernetes_problems(text: str) -> list[str]:
    manifest, problems = json.loads(text), []
    for version in KUBERNETES_VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            problems.append(f"{'/'.join(_id(manifest))} in Kubernetes {version}: {error.message}")
    return problems


def _labels(manifests: list[Manifest]) -> Iterator[str]:
    pods = [manifest["spec"]["template"]["metadata"]["labels"] for manifest in _of(manifests, "Deployment")]
    # What KServe puts on the pods of an InferenceService.
    isvc = "serving.kserve.io/inferenceservice"
    pods += [{isvc: manifest["metadata"]["name"]} for manifest in _of(manifests, "InferenceService")]
    for manifest in manifests:
        for selector in _selectors(manifest):
            if not any(selector.items() <= labels.items() for labels in pods):
                yield f"{'/'.join(_id(manifest))} selects {selector}, which no pod has"


def _selectors(manifest: Manifest) -> Iterator[dict[str, str]]:
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Service":
        yield spec["selector"]
    elif manifest["kind"] == "NetworkPolicy":
        yield spec["podSelector"]["matchLabels"]
    elif manifest["kind"] in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        yield spec["selector"]["matchLabels"]
    for constraint in _pod(manifest).get("topologySpreadConstraints", ()):
        yield constraint["labelSelector"]["matchLabels"]


def _ports(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in _of(manifests, "Deployment", "ServingRuntime"):
        for container in _pod(manifest)["containers"]:
            ports = {port[key] for port in container["ports"] for key in ("name", "containerPort")}
            for kind in ("startup", "readiness", "liveness"):
                if (port := container[f"{kind}Probe"]["httpGet"]["port"]) not in ports:
                    yield f"the {kind} probe asks port {port}, and {container['name']} has {sorted(map(str, ports))}"
            # Triton's own defaults, unless an option says otherwise.
            served = {"http": 8000, "grpc": 8001, "metrics": 8002}
            for name, option in ((name, _option(container, f"--{name}-port")) for name in served):
                if (port := int(option or served[name])) not in ports:
                    yield f"Triton serves {name} at {port}, and {container['name']} has {sorted(map(str, ports))}"
    servers = [_pod(manifest)["containers"][0] for manifest in _of(manifests, "Deployment", "ServingRuntime")]
    names = {port["name"] for server in servers for port in server["ports"]}
    for manifest in _of(manifests, "Service", "NetworkPolicy", "PodMonitor"):
        for name in _port_names(manifest):
            if name not in names:
                yield f"{'/'.join(_id(manifest))} names port {name}, and the pods have {sorted(names)}"


def _port_names(manifest: Manifest) -> Iterator[str]:
    spec = manifest["spec"]
    if manifest["kind"] == "Service":
        yield from (port["targetPort"] for port in spec["ports"])
    elif manifest["kind"] == "PodMonitor":
        yield from (endpoint["port"] for endpoint in spec["podMetricsEndpoints"])
    else:
        yield from (port["port"] for rule in spec.get("ingress", ()) for port in rule["ports"])


def _probes(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in _of(manifests, "Deployment", "ServingRuntime"):
        for container in _pod(manifest)["containers"]:
            for kind, path in {"startup": "ready", "readiness": "ready", "liveness": "live"}.items():
                if (found := container[f"{kind}Probe"]["httpGet"]["path"]) != f"/v2/health/{path}":
                    yield f"the {kind} probe asks for {found}, expected /v2/health/{path}"
            startup = container["startupProbe"]
            if startup["periodSeconds"] * startup["failureThreshold"] < 600:
                yield "the startup probe gives the models less than ten minutes to load"


def _stopping(manifests: list[Manifest]) -> Iterator[str]:
    grace = [_pod(each)["terminationGracePeriodSeconds"] for each in _of(manifests, "Deployment")]
    grace += [each["spec"]["predictor"]["terminationGracePeriodSeconds"] for each in _of(manifests, "InferenceService")]
    for manifest in _of(manifests, "Deployment", "ServingRuntime"):
        for container in _pod(manifest)["containers"]:
            asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            draining = int(_option(container, "--exit-timeout-secs") or 30)
            if asleep + draining >= min(grace):
                yield f"preStop ({asleep} s) and draining ({draining} s) do not fit into the {min(grace)} s of grace"


def _pods(manifests: list[Manifest]) -> Iterator[str]:
    """Pod Security's level "restricted", read-only files, no token, pinned images, volumes that exist."""
    for manifest in _of(manifests, "Deployment", "ServingRuntime"):
        pod = _pod(manifest)
        volumes = {volume["name"]: set(volume) - {"name"} for volume in pod["volumes"]}
        for kinds in volumes.values():
            if not kinds <= {"emptyDir", "persistentVolumeClaim", "image"}:
                yield f"volumes of {kinds} are not allowed"
        if manifest["kind"] == "Deployment" and pod["automountServiceAccountToken"] is not False:
            yield "the service account's token is mounted"
        for container in _containers(pod):
            context = pod.get("securityContext", {}) | container["securityContext"]
            expected = {"runAsNonRoot": True, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
            expected |= {"capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}}
            for key, value in expected.items():
                if context.get(key) != value:
                    yield f"{container['name']}: {key} is {context.get(key)}, expected {value}"
            if not re.fullmatch(r"[a-z0-9./-]+:(?!latest$)[A-Za-z0-9._-]+(@sha256:[0-9a-f]{64})?", container["image"]):
                yield f"{container['name']}: image {container['image']} is not pinned"
            for mount in container["volumeMounts"]:
                if mount["name"] not in volumes:
                    yield f"{container['name']} mounts {mount['name']}, which is no volume"


def _resources(manifests: list[Manifest]) -> Iterator[str]:
    workloads = [
        (each["name"], each["resources"]) for item in _of(manifests, "Deployment") for each in _containers(_pod(item))
    ]
    workloads += [
        (item["metadata"]["name"], item["spec"]["predictor"]["model"]["resources"])
        for item in _of(manifests, "InferenceService")
    ]
    for name, resources in workloads:
        requests, limits = resources["requests"], resources["limits"]
        if set(requests) != set(limits):
            yield f"{name}: requests of {sorted(requests)}, limits of {sorted(limits)}"
        for kind in requests.keys() & limits.keys():
            if _quantity(requests[kind]) > _quantity(limits[kind]):
                yield f"{name}: requests {requests[kind]} of {kind}, more than its limit {limits[kind]}"
        # The static CPU manager gives whole cores to pods whose requests are their limits.
        if requests != limits or _quantity(requests["cpu"]) % 1:
            yield f"{name}: not of the class Guaranteed with whole cores"


def _quantity(text: str | int) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "k": 1e3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


def _options(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in _of(manifests, "Deployment", "ServingRuntime"):
        for container in _pod(manifest)["containers"]:
            program, *options = container["args"]
            if program != "tritonserver":
                yield f"{container['name']} runs {program}, expected tritonserver"
            for option in options:
                if option.split("=")[0] not in OPTIONS:
                    yield f"tritonserver knows no {option}"
            is_gpu = "nvidia.com/gpu" in container.get("resources", {}).get("limits", {})
            if is_gpu == (_option(container, "--model-config-name") == "cpu"):
                yield f"{container['name']} has {'a' if is_gpu else 'no'} GPU and the other configuration"


def _option(container: Manifest, name: str) -> str | None:
    return dict(each.split("=", 1) for each in container["args"][1:]).get(name)


def _scaling(manifests: list[Manifest]) -> Iterator[str]:
    deployments = {each["metadata"]["name"]: each for each in _of(manifests, "Deployment")}
    adapter = _documents(ADAPTER)[0]
    offered = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    for manifest in _of(manifests, "HorizontalPodAutoscaler", "ScaledObject"):
        spec = manifest["spec"]
        target = spec["scaleTargetRef"]["name"]
        if target not in deployments:
            yield f"{'/'.join(_id(manifest))} scales {target}, and there is {sorted(deployments)}"
        elif "replicas" in deployments[target]["spec"]:
            yield f"Deployment/{target} has replicas, which every apply would set against {'/'.join(_id(manifest))}"
        for metric in spec.get("metrics", ()):
            if metric["pods"]["metric"]["name"] not in offered:
                yield f"the adapter offers {sorted(offered)}, not {metric['pods']['metric']['name']}"
    for manifest in _of(manifests, "HorizontalPodAutoscaler", "ScaledObject", "InferenceService"):
        spec = manifest["spec"].get("predictor", manifest["spec"])
        low, high = (next(spec[key] for key in spec if key.startswith(end + "Replica")) for end in ("min", "max"))
        if low > high:
            yield f"{'/'.join(_id(manifest))}: at least {low} and at most {high} replicas"


def _queries(manifests: list[Manifest]) -> Iterator[str]:
    namespace = {manifest["metadata"].get("namespace", "") for manifest in manifests} - {""}
    for query in _promql(manifests):
        for problem in _query_problems(query, namespace):
            yield f"{query}: {problem}"


def _promql(value: object) -> Iterator[str]:
    """The queries anywhere inside."""
    if isinstance(value, list):
        for each in value:
            yield from _promql(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key in ("query", "expr"):
                yield each
            else:
                yield from _promql(each)


def _query_problems(query: str, namespaces: set[str] | None = None) -> Iterator[str]:
    """What is wrong with a query over Triton's metrics; with `namespaces` it must select one of them."""
    try:
        expression = promql_parser.parse(query)
    except ValueError as error:
        yield f"is no PromQL: {error}"
        return
    found: list[promql_parser.Expr] = []
    promql_parser.walk(expression, lambda each: found.append(each))
    selectors = [each for each in found if isinstance(each, promql_parser.VectorSelector)]
    if not selectors:
        yield "reads no metric"
    for selector in selectors:
        matchers = {matcher.name: matcher for matcher in selector.matchers.matchers}
        if selector.name not in METRICS:
            yield f"Triton has no metric {selector.name}"
        if namespaces is not None and ("namespace" not in matchers or matchers["namespace"].value not in namespaces):
            yield f"{selector.name} is not selected by the namespace {namespaces}"
        if unknown := matchers.keys() - {"namespace", "pod", "model", "version", "reason", "gpu_uuid"}:
            yield f"{selector.name} has no label {sorted(unknown)}"
        for name, values in (("model", MODELS), ("reason", FAILURE_REASONS)):
            if name in matchers and not any(re.fullmatch(matchers[name].value, each) for each in values):
                yield f"no {name} is {matchers[name].value}"


def _kserve(manifests: list[Manifest]) -> Iterator[str]:
    runtimes = {each["metadata"]["name"]: each["spec"] for each in _of(manifests, "ServingRuntime")}
    for manifest in _of(manifests, "InferenceService"):
        model = manifest["spec"]["predictor"]["model"]
        if (runtime := runtimes.get(model["runtime"])) is None:
            yield f"no runtime {model['runtime']} in {sorted(runtimes)}"
            continue
        if model["modelFormat"]["name"] not in {each["name"] for each in runtime["supportedModelFormats"]}:
            yield f"the runtime knows no model format {model['modelFormat']['name']}"
        if model["protocolVersion"] not in runtime["protocolVersions"]:
            yield f"the runtime knows no protocol {model['protocolVersion']}"
        (container,) = runtime["containers"]
        if container["name"] != "kserve-container":
            yield f"the container is called {container['name']}; KServe merges the model into kserve-container"
        if (path := _option(container, "--model-repository")) != "/mnt/models":
            yield f"the runtime reads {path}; KServe puts the models into /mnt/models"


def _built(name: str) -> list[Manifest]:
    overlay, components = BUILDS[name]
    return _build(EXAMPLES / overlay, components)


@pytest.mark.parametrize("name", BUILDS)
def test_manifests_are_valid(name: str) -> None:
    assert _problems(_built(name)) == []


def test_every_file_is_in_a_build() -> None:
    """An orphan would be checked by nothing."""
    named = {ADAPTER}
    for path in EXAMPLES.rglob("kustomization.yaml"):
        (kustomization,) = _documents(path)
        entries = [*kustomization.get("resources", ()), *(each["path"] for each in kustomization.get("patches", ()))]
        named |= {path, *(path.parent / entry for entry in entries)}
    assert set(EXAMPLES.rglob("*.yaml")) - named == set()
    built = {component for _, components in BUILDS.values() for component in components}
    assert {path.name for path in (EXAMPLES / "components").iterdir()} == built


def test_overlays_change_what_they_mean_to() -> None:
    cpu, gpu = ({_id(each): each for each in _built(name)} for name in ("cpu", "gpu"))
    assert {name for name in cpu if cpu[name] != gpu[name]} == {("Deployment", "gte-triton")}
    (cpu_triton,), (gpu_triton,) = (_pod(each["Deployment", "gte-triton"])["containers"] for each in (cpu, gpu))
    assert set(cpu_triton["args"]) - set(gpu_triton["args"]) == {"--model-config-name=cpu", "--allow-gpu-metrics=false"}
    assert set(gpu_triton["args"]) <= set(cpu_triton["args"])


@pytest.mark.parametrize("name", BUILDS)
def test_build_is_what_kubectl_builds(name: str, tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    overlay, components = BUILDS[name]
    folder = Path(shutil.copytree(EXAMPLES, tmp_path / "kubernetes")) / overlay
    with (folder / "kustomization.yaml").open("a", encoding="utf-8") as file:
        yaml.safe_dump({"components": [f"../components/{each}" for each in components]}, file)
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    assert _ordered(_built(name)) == _ordered(list(yaml.safe_load_all(done.stdout)))


def _ordered(value: Any, field: str = "") -> Any:
    """Without the order of entries that are merged by name, in which kubectl and `_merged` differ."""
    if isinstance(value, dict):
        return {key: _ordered(each, key) for key, each in value.items()}
    if isinstance(value, list):
        entries = [_ordered(each) for each in value]
        return (
            sorted(entries, key=lambda each: json.dumps(each, sort_keys=True))
            if not field or field in _MERGE_KEYS
            else entries
        )
    return value


def test_adapter_values() -> None:
    values = _documents(ADAPTER)[0]
    assert list(_custom_problems("prometheus-adapter values", values)) == []
    for rule in values["rules"]["custom"]:
        series = rule["seriesQuery"]
        assert list(_query_problems(series)) == []
        # The templates as the adapter fills them in for the pods of a deployment.
        query = rule["metricsQuery"].replace("<<.Series>>", series.split("{")[0])
        query = query.replace("<<.LabelMatchers>>", 'namespace="gte",pod=~"a|b"').replace("<<.GroupBy>>", "pod")
        assert list(_query_problems(query, {"gte"})) == []


# fmt: off
_KEDA, _HPA = "cpu monitoring keda", "cpu monitoring hpa"
_POD = "spec.template.spec"
_TRITON = f"{_POD}.containers.0"
_KSERVE_TRITON = "spec.containers.0"
_QUERY, _ALERT = "spec.triggers.1.metadata.query", "spec.groups.0.rules.1.expr"
# What is broken: the build, the manifest, the path in it, the new value or None to delete, the complaint.
BREAKS: dict[str, tuple[str, str, str, object, str]] = {
    # Kubernetes' schemas
    "field": ("cpu", "Deployment", f"{_TRITON}.imagePullPolice", "Always", "schema: .*'imagePullPolice' was unexp"),
    "type": ("cpu", "Deployment", f"{_POD}.terminationGracePeriodSeconds", 75.5, "schema: .*75.5 is not of type"),
    "version": ("cpu", "PodDisruptionBudget", "apiVersion", "policy/v1beta1", "schema: PodDisruptionBudget"),
    "required": ("cpu", "Deployment", f"{_TRITON}.ports.0.containerPort", None, "schema: .*'containerPort' is a"),
    "hpa field": (_HPA, "HorizontalPodAutoscaler", "spec.minReplicaCount", 2, "schema: .*'minReplicaCount' was unexp"),
    # Schemas of the custom resources
    "keda field": (_KEDA, "ScaledObject", "spec.minReplicas", 2, "schema: keda.*'minReplicas' was unexpected"),
    "keda number": (_KEDA, "ScaledObject", "spec.triggers.0.metadata.threshold", 4, "schema: keda.*4 is not of type"),
    "keda zero": (_KEDA, "ScaledObject", "spec.minReplicaCount", 0, "schema: keda.*0 is less than the minimum"),
    "monitor field": (_KEDA, "PodMonitor", "spec.endpoints", [], "schema: monitoring.*'endpoints' was unexpected"),
    "rule": (_KEDA, "PrometheusRule", "spec.groups.0.rules.0.for", "5 minutes", "schema: .*'5 minutes' does not"),
    "kserve field": ("kserve", "InferenceService", "spec.predictor.autoscaling", {}, "schema: .*'autoscaling' was"),
    "kserve target": ("kserve", "InferenceService", "spec.predictor.autoScaling.metrics.0.external.target",
                      {"type": "AverageValue", "averageValue": "4"}, "schema: .*'value' is a required"),
    "kserve pod": ("kserve", "ServingRuntime", f"{_KSERVE_TRITON}.readinessProbe.period", 5, "schema: Pod/.*'period'"),
    # Names
    "service": ("cpu", "Service", "spec.selector", {"app": "triton"}, "labels: Service/gte-triton selects"),
    "budget": ("cpu", "PodDisruptionBudget", "spec.selector.matchLabels", {"app": "x"}, "labels: PodDisruptionBudget"),
    "policy": ("cpu", "NetworkPolicy", "spec.podSelector.matchLabels", {"app": "x"}, "labels: NetworkPolicy"),
    "monitor": (_KEDA, "PodMonitor", "spec.selector.matchLabels", {"app": "x"}, "labels: PodMonitor"),
    "labels": ("cpu", "Deployment", "spec.template.metadata.labels", {"app": "x"}, "labels: Deployment"),
    "target port": ("cpu", "Service", "spec.ports.0.targetPort", "web", "ports: Service/gte-triton names port web"),
    "policy port": ("cpu", "NetworkPolicy", "spec.ingress.1.ports.0.port", "prom", "ports: .* names port prom"),
    "monitor port": (_KEDA, "PodMonitor", "spec.podMetricsEndpoints.0.port", "web", "ports: PodMonitor.*port web"),
    "probe port": ("cpu", "Deployment", f"{_TRITON}.readinessProbe.httpGet.port", 8080, "ports: the readiness probe"),
    "container port": ("cpu", "Deployment", f"{_TRITON}.ports.2.containerPort", 9090, "ports: Triton serves metrics"),
    "kserve port": ("kserve", "ServingRuntime", f"{_KSERVE_TRITON}.args.3", "--http-port=8000", "ports: Triton serves"),
    "volume": ("cpu", "Deployment", f"{_TRITON}.volumeMounts.0.name", "scratch", "pods: triton mounts scratch"),
    "runtime": ("kserve", "InferenceService", "spec.predictor.model.runtime", "triton", "kserve: no runtime triton"),
    "format": ("kserve", "InferenceService", "spec.predictor.model.modelFormat.name", "onnx", "kserve: .*format onnx"),
    "container": ("kserve", "ServingRuntime", f"{_KSERVE_TRITON}.name", "triton", "kserve: the container is called"),
    "mount": ("kserve", "ServingRuntime", f"{_KSERVE_TRITON}.args.1", "--model-repository=/models", "kserve: .*/mnt/m"),
    "scaled": (_KEDA, "ScaledObject", "spec.scaleTargetRef.name", "triton", "scaling: .*scales triton"),
    "hpa metric": (_HPA, "HorizontalPodAutoscaler", "spec.metrics.0.pods.metric.name", "queue", "scaling: .*not queue"),
    # A life in the cluster
    "probe path": ("cpu", "Deployment", f"{_TRITON}.livenessProbe.httpGet.path", "/v2/health/ready", "probes: .*/live"),
    "start": ("gpu", "Deployment", f"{_TRITON}.startupProbe.failureThreshold", 6, "probes: .*less than ten minutes"),
    "grace": ("cpu", "Deployment", f"{_POD}.terminationGracePeriodSeconds", 30, "stopping: .*do not fit"),
    "replicas": (_HPA, "Deployment", "spec.replicas", 2, "scaling: Deployment/gte-triton has replicas"),
    "bounds": (_HPA, "HorizontalPodAutoscaler", "spec.minReplicas", 11, "scaling: .*at least 11"),
    "option": ("cpu", "Deployment", f"{_TRITON}.args.1", "--model-store-path=/models", "options: tritonserver knows"),
    "configuration": ("gpu", "Deployment", f"{_TRITON}.args.3", "--model-config-name=cpu", "options: .*a GPU and"),
    "memory": ("cpu", "Deployment", f"{_TRITON}.resources.requests.memory", "9Gi", "resources: .*more than its limit"),
    "cores": ("cpu", "Deployment", f"{_TRITON}.resources.limits.cpu", "4500m", "resources: .*Guaranteed"),
    "limit": ("gpu", "Deployment", f"{_TRITON}.resources.requests.nvidia\\.com/gpu", None, "resources: .*limits of"),
    # Security
    "root": ("cpu", "Deployment", f"{_POD}.securityContext.runAsNonRoot", None, "pods: triton: runAsNonRoot is None"),
    "files": ("gpu", "Deployment", f"{_TRITON}.securityContext.readOnlyRootFilesystem", False, "pods: .*readOnlyRoot"),
    "token": ("cpu", "Deployment", f"{_POD}.automountServiceAccountToken", True, "pods: .*token is mounted"),
    "host": ("cpu", "Deployment", f"{_POD}.volumes.0", {"name": "tmp", "hostPath": {"path": "/"}}, "pods: .*hostPath"),
    "tag": ("cpu", "Deployment", f"{_TRITON}.image", "registry.example.com/gte-triton:latest", "pods: .*not pinned"),
    "no tag": ("cpu", "Deployment", f"{_TRITON}.image", "registry.example.com/gte-triton", "pods: .*not pinned"),
    # Queries
    "promql": (_KEDA, "ScaledObject", _QUERY, "sum(rate(nv_inference_count[1m])", "queries: .*is no PromQL"),
    "metric": (_KEDA, "PrometheusRule", _ALERT, "absent(nv_inference_requests)", "queries: .*no metric nv_inference"),
    "model": (_KEDA, "ScaledObject", _QUERY, 'nv_inference_pending_request_count{namespace="gte",model="gte-encoder"}',
              "queries: .*no model is gte-encoder"),
    "namespace": (_KEDA, "ScaledObject", _QUERY, 'nv_inference_pending_request_count{namespace="default"}',
                  "queries: .*not selected by the namespace"),
    "reason": (_KEDA, "PrometheusRule", _ALERT, 'nv_inference_request_failure{namespace="gte",reason="rejected"}',
               "queries: .*no reason is rejected"),
    "label": (_KEDA, "PrometheusRule", _ALERT, 'nv_inference_request_failure{namespace="gte",model_name="gte_embed"}',
              r"queries: .*no label \['model_name'\]"),
}
# fmt: on


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_manifest_is_found(name: str) -> None:
    build, kind, path, value, complaint = BREAKS[name]
    manifests = _built(build)
    _put(next(_of(manifests, kind)), path, value)
    problems = _problems(manifests)
    assert any(re.match(complaint, problem) for problem in problems), problems


def _put(manifest: Manifest, path: str, value: object) -> None:
    *parents, last = (part.replace("\0", ".") for part in path.replace("\\.", "\0").split("."))
    target: Any = manifest
    for part in parents:
        target = target[int(part) if isinstance(target, list) else part]
    if value is None:
        del target[last]
    elif isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value


def test_adapter_values_are_checked() -> None:
    values = _documents(ADAPTER)[0]
    values["rules"]["custom"][0]["metricQuery"] = values["rules"]["custom"][0].pop("metricsQuery")
    assert any("metricQuery" in problem for problem in _custom_problems("prometheus-adapter values", values))


def test_names_are_those_of_a_real_triton(tmp_path: Path) -> None:
    """Its options and metrics; and they tell what the autoscalers and the alerts take them to tell."""
    try:
        folder = triton_server.install()
    except triton_server.Unavailable as error:
        pytest.skip(f"no Triton here: {error}")
    assert _known_options(folder) == OPTIONS
    for name, text in _SLEEPER.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "gte_embed" / "1").mkdir()
    (deployment,) = _of(_built("cpu"), "Deployment")
    options = [each for each in _pod(deployment)["containers"][0]["args"][1:] if "model-repository" not in each]
    with triton_server.Server(tmp_path, *options, folder=folder) as triton, ThreadPoolExecutor(24) as callers:
        metrics = _scrape(triton.metrics)
        assert {name for name, _, _ in metrics} == set(_RECORDED["metrics"])
        # There before the first request: where it is absent, no server has the model.
        assert metrics["nv_inference_request_success", "gte_encoder", ""] == 0
        assert {reason for name, _, reason in metrics if name == "nv_inference_request_failure"} == FAILURE_REASONS

        # Little's law: the time that requests waited is the area under the number of those that wait.
        answers = [callers.submit(_ask, triton.http, 1.0) for _ in range(8)]
        area, then = 0.0, time.monotonic()
        while not all(answer.done() for answer in answers):
            pending = _scrape(triton.metrics)["nv_inference_pending_request_count", "gte_encoder", ""]
            area, then = area + pending * (time.monotonic() - then), time.monotonic()
            time.sleep(0.01)
        assert [answer.result() for answer in answers] == [200] * 8
        waited_s = _scrape(triton.metrics)["nv_inference_queue_duration_us", "gte_encoder", ""] / 1e6
        assert waited_s == pytest.approx(area, rel=0.25)
        assert waited_s > 1

        # A model that answers with an error, and a full queue, are counted by the ensemble alone, and twice.
        assert _ask(triton.http, -1.0) == 400
        answers = [callers.submit(_ask, triton.http, 1.0) for _ in range(24)]
        statuses = [answer.result() for answer in answers]
        refused = statuses.count(503)
        assert refused >= 8 and refused + statuses.count(200) == 24
        metrics = _scrape(triton.metrics)
        assert metrics["nv_inference_request_failure", "gte_embed", "OTHER"] == 2 * (refused + 1)
        assert all(metrics["nv_inference_request_failure", "gte_encoder", reason] == 0 for reason in FAILURE_REASONS)


# A model that takes 0.2 s for a request, one at a time, and refuses negative numbers; and an ensemble around it.
_SLEEPER = {
    "gte_encoder/1/model.py": """
import time
import triton_python_backend_utils as triton

class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.2)
        return [self.answer(triton.get_input_tensor_by_name(request, "X")) for request in requests]

    def answer(self, tensor):
        if tensor.as_numpy().min() < 0:
            return triton.InferenceResponse(error=triton.TritonError("negative", triton.TritonError.INVALID_ARG))
        return triton.InferenceResponse([tensor])
""",
    "gte_encoder/config.pbtxt": """
backend: "python"
max_batch_size: 1
input [{ name: "X" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "X" data_type: TYPE_FP32 dims: [1] }]
instance_group [{ kind: KIND_CPU count: 1 }]
dynamic_batching { default_queue_policy { max_queue_size: 8 } }
""",
    "gte_embed/config.pbtxt": """
platform: "ensemble"
max_batch_size: 1
input [{ name: "X" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [1] }]
ensemble_scheduling {
  step [{
    model_name: "gte_encoder" model_version: -1
    input_map { key: "X" value: "X" } output_map { key: "X" value: "Y" }
  }]
}
""",
}


def _known_options(folder: Path) -> set[str]:
    (program,), (libraries,) = folder.rglob("bin/tritonserver"), folder.rglob("nvidia_pytriton.libs")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run([program, "--help"], env=environment, capture_output=True, text=True)
    return set(re.findall(r"^\s+(--[a-z0-9-]+)", done.stdout + done.stderr, re.MULTILINE))


def _scrape(address: str) -> dict[tuple[str, str, str], float]:
    """(metric, its label model, its label reason) -> value."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    values = {}
    for name, value in (line.rsplit(" ", 1) for line in lines):
        labels = dict(re.findall(r'(\w+)="(.*?)"', name))
        values[name.split("{")[0], labels.get("model", ""), labels.get("reason", "")] = float(value)
    return values


def _ask(address: str, number: float) -> int:
    body = json.dumps({"inputs": [{"name": "X", "shape": [1, 1], "datatype": "FP32", "data": [number]}]}).encode()
    request = urllib.request.Request(f"http://{address}/v2/models/gte_embed/infer", body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_docs() -> None:
    """The queries of docs/scaling.md read metrics that exist, and the files that it names are there."""
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    queries = [line for block in re.findall(r"```promql\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(queries) >= 5
    for query in queries:
        assert list(_query_problems(query)) == []
    for path in set(re.findall(r"examples/kubernetes/[\w./-]*\w", text)):
        assert (ROOT / path).exists(), path
    assert set(re.findall(r"\bnv_[a-z_]+", text)) <= METRICS
    assert set(re.findall(r"nvidia/tritonserver:([\w.-]+)", text)) == {f"{TRITON_TAG}-sdk"}
