"""The manifests of examples/kubernetes, without a cluster.

Every combination that docs/scaling.md names is built, checked against the schemas of kubernetes_manifests, and then for
what no schema sees: names, labels, ports, paths, metrics and options that have to exist somewhere else. `BREAKS` breaks
the manifests in one place each and names the complaint.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import triton_server
from gte_deploy.exporters.triton.configs import ENCODER, TOKENIZER
from gte_deploy.exporters.triton.readme import TRITON_TAG
from kubernetes_manifests import (
    Manifest,
    build,
    built_by_kubectl,
    custom_problems,
    documents,
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

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "kubernetes"
ADAPTER = EXAMPLES / "components" / "hpa" / "values.yaml"
RECORDED = Path(__file__).with_name("kubernetes")
_RECORDED = yaml.safe_load((RECORDED / "triton.yaml").read_text(encoding="utf-8"))
METRICS = {*_RECORDED["metrics"], *_RECORDED["gpu_metrics"]}
OPTIONS = set(_RECORDED["options"])

MODELS = {TOKENIZER, ENCODER, "gte_embed", "gte_fill_mask"}
FAILURE_REASONS = {"REJECTED", "CANCELED", "BACKEND", "OTHER"}
LABELS = dict.fromkeys(("namespace", "pod", "version", "gpu_uuid"))
LABELS |= {"model": MODELS, "reason": FAILURE_REASONS}
REPOSITORIES = ("repository-pvc", "repository-object-store", "repository-image")
BUILDS = {
    f"{overlay} {' '.join(components)}".strip(): (overlay, components)
    for overlay in ("cpu", "gpu")
    for components in [(), ("monitoring", "keda"), ("monitoring", "hpa"), *((each,) for each in REPOSITORIES)]
} | {"kserve": ("kserve", ())}


# What is wrong with a set of manifests. Each check yields sentences; none: fine.


def _problems(manifests: list[Manifest]) -> list[str]:
    if problems := [f"schema: {problem}" for problem in schema(manifests)]:
        return problems  # the other checks count on the fields that a schema requires
    checks = (labels, _ports, _probes, _stopping, pods, resources, _options, _scaling, _queries, _kserve)
    return [f"{check.__name__.lstrip('_')}: {problem}" for check in checks for problem in check(manifests)]


def _ports(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in kinds(manifests, "Deployment", "ServingRuntime"):
        for container in pod_of(manifest)["containers"]:
            ports = {port[key] for port in container["ports"] for key in ("name", "containerPort")}
            for kind in ("startup", "readiness", "liveness"):
                if (port := container[f"{kind}Probe"]["httpGet"]["port"]) not in ports:
                    yield f"the {kind} probe asks port {port}, and {container['name']} has {sorted(map(str, ports))}"
            # Triton's own defaults, unless an option says otherwise.
            served = {"http": 8000, "grpc": 8001, "metrics": 8002}
            for name, option in ((name, _option(container, f"--{name}-port")) for name in served):
                if (port := int(option or served[name])) not in ports:
                    yield f"Triton serves {name} at {port}, and {container['name']} has {sorted(map(str, ports))}"
    servers = [pod_of(manifest)["containers"][0] for manifest in kinds(manifests, "Deployment", "ServingRuntime")]
    names = {port["name"] for server in servers for port in server["ports"]}
    for manifest in kinds(manifests, "Service", "NetworkPolicy", "PodMonitor"):
        for name in port_names(manifest):
            if name not in names:
                yield f"{'/'.join(identity(manifest))} names port {name}, and the pods have {sorted(names)}"


def _probes(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in kinds(manifests, "Deployment", "ServingRuntime"):
        for container in pod_of(manifest)["containers"]:
            for kind, path in {"startup": "ready", "readiness": "ready", "liveness": "live"}.items():
                if (found := container[f"{kind}Probe"]["httpGet"]["path"]) != f"/v2/health/{path}":
                    yield f"the {kind} probe asks for {found}, expected /v2/health/{path}"
            startup = container["startupProbe"]
            if startup["periodSeconds"] * startup["failureThreshold"] < 600:
                yield "the startup probe gives the models less than ten minutes to load"


def _stopping(manifests: list[Manifest]) -> Iterator[str]:
    grace = [pod_of(each)["terminationGracePeriodSeconds"] for each in kinds(manifests, "Deployment")]
    grace += [
        each["spec"]["predictor"]["terminationGracePeriodSeconds"] for each in kinds(manifests, "InferenceService")
    ]
    for manifest in kinds(manifests, "Deployment", "ServingRuntime"):
        for container in pod_of(manifest)["containers"]:
            asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            draining = int(_option(container, "--exit-timeout-secs") or 30)
            if asleep + draining >= min(grace):
                yield f"preStop ({asleep} s) and draining ({draining} s) do not fit into the {min(grace)} s of grace"


def _options(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in kinds(manifests, "Deployment", "ServingRuntime"):
        for container in pod_of(manifest)["containers"]:
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
    deployments = {each["metadata"]["name"]: each for each in kinds(manifests, "Deployment")}
    adapter = documents(ADAPTER)[0]
    offered = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    for manifest in kinds(manifests, "HorizontalPodAutoscaler", "ScaledObject"):
        spec = manifest["spec"]
        target = spec["scaleTargetRef"]["name"]
        if target not in deployments:
            yield f"{'/'.join(identity(manifest))} scales {target}, and there is {sorted(deployments)}"
        elif "replicas" in deployments[target]["spec"]:
            scaler = "/".join(identity(manifest))
            yield f"Deployment/{target} has replicas, which every apply would set against {scaler}"
        for metric in spec.get("metrics", ()):
            if metric["pods"]["metric"]["name"] not in offered:
                yield f"the adapter offers {sorted(offered)}, not {metric['pods']['metric']['name']}"
    for manifest in kinds(manifests, "HorizontalPodAutoscaler", "ScaledObject", "InferenceService"):
        spec = manifest["spec"].get("predictor", manifest["spec"])
        low, high = (next(spec[key] for key in spec if key.startswith(end + "Replica")) for end in ("min", "max"))
        if low > high:
            yield f"{'/'.join(identity(manifest))}: at least {low} and at most {high} replicas"


def _queries(manifests: list[Manifest]) -> Iterator[str]:
    namespace = {manifest["metadata"].get("namespace", "") for manifest in manifests} - {""}
    for query in queries(manifests):
        for problem in _query_problems(query, namespace):
            yield f"{query}: {problem}"


def _query_problems(query: str, namespaces: set[str] | None = None) -> Iterator[str]:
    return query_problems(query, METRICS, LABELS, namespaces)


def _kserve(manifests: list[Manifest]) -> Iterator[str]:
    runtimes = {each["metadata"]["name"]: each["spec"] for each in kinds(manifests, "ServingRuntime")}
    for manifest in kinds(manifests, "InferenceService"):
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
    return build(EXAMPLES / overlay, components)


@pytest.mark.parametrize("name", BUILDS)
def test_manifests_are_valid(name: str) -> None:
    assert _problems(_built(name)) == []


def test_every_file_is_in_a_build() -> None:
    """An orphan would be checked by nothing."""
    assert unnamed_files(EXAMPLES) - {ADAPTER} == set()
    built = {component for _, components in BUILDS.values() for component in components}
    assert {path.name for path in (EXAMPLES / "components").iterdir()} == built


def test_overlays_change_what_they_mean_to() -> None:
    cpu, gpu = ({identity(each): each for each in _built(name)} for name in ("cpu", "gpu"))
    assert {name for name in cpu if cpu[name] != gpu[name]} == {("Deployment", "gte-triton")}
    (cpu_triton,), (gpu_triton,) = (pod_of(each["Deployment", "gte-triton"])["containers"] for each in (cpu, gpu))
    assert set(cpu_triton["args"]) - set(gpu_triton["args"]) == {"--model-config-name=cpu", "--allow-gpu-metrics=false"}
    assert set(gpu_triton["args"]) <= set(cpu_triton["args"])


@pytest.mark.parametrize("name", BUILDS)
def test_build_is_what_kubectl_builds(name: str, tmp_path: Path) -> None:
    found = built_by_kubectl(EXAMPLES, *BUILDS[name], tmp_path / "kubernetes")
    assert ordered(_built(name)) == ordered(found)


def test_adapter_values() -> None:
    values = documents(ADAPTER)[0]
    assert list(custom_problems("prometheus-adapter values", values)) == []
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
    put(next(kinds(manifests, kind)), path, value)
    problems = _problems(manifests)
    assert any(re.match(complaint, problem) for problem in problems), problems


def test_adapter_values_are_checked() -> None:
    values = documents(ADAPTER)[0]
    values["rules"]["custom"][0]["metricQuery"] = values["rules"]["custom"][0].pop("metricsQuery")
    assert any("metricQuery" in problem for problem in custom_problems("prometheus-adapter values", values))


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
    (deployment,) = kinds(_built("cpu"), "Deployment")
    options = [each for each in pod_of(deployment)["containers"][0]["args"][1:] if "model-repository" not in each]
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
