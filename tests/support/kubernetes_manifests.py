"""Kubernetes manifests without a cluster: what `kubectl kustomize` builds, and what is wrong with it.

Each check takes all manifests of a build and yields sentences; none: fine. `schema` knows Kubernetes' own schemas
(kubernetes-validate ships them) and those of the custom resources' published fields
(tests/kubernetes/custom_resources.yaml); the other checks count on the fields that a schema requires.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml

_CUSTOM = Path(__file__).resolve().parents[1] / "kubernetes" / "custom_resources.yaml"
CUSTOM = yaml.safe_load(_CUSTOM.read_text(encoding="utf-8"))
KUBERNETES_VERSIONS = ("1.35", kubernetes_validate.latest_version())

Manifest = dict[str, Any]

# The key by which a list's entries are one another's, in a strategic merge patch; other lists are replaced.
_MERGE_KEYS = {name: "name" for name in ("containers", "initContainers", "volumes", "env")}
_MERGE_KEYS |= {"volumeMounts": "mountPath", "ports": "containerPort"}
_KUSTOMIZATION = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "images"}


def build(folder: Path, extra_components: tuple[str, ...] = (), onto: tuple[Manifest, ...] = ()) -> list[Manifest]:
    """The manifests that `kubectl kustomize folder` writes; a component is built onto those it is applied to."""
    (kustomization,) = documents(folder / "kustomization.yaml")
    assert set(kustomization) <= _KUSTOMIZATION, f"{folder}: {set(kustomization) - _KUSTOMIZATION} is not known here"
    manifests = list(copy.deepcopy(onto))
    for name in kustomization.get("resources", ()):
        path = folder / name
        manifests += build(path) if path.is_dir() else documents(path)
    for component in [*kustomization.get("components", ()), *(f"../components/{each}" for each in extra_components)]:
        manifests = build(folder / component, onto=tuple(manifests))
    for patch in (each for entry in kustomization.get("patches", ()) for each in documents(folder / entry["path"])):
        (index,) = [index for index, manifest in enumerate(manifests) if identity(manifest) == identity(patch)]
        manifests[index] = _merged(manifests[index], patch)
    for manifest in manifests:
        if "namespace" in kustomization:
            field = "name" if manifest["kind"] == "Namespace" else "namespace"
            manifest["metadata"][field] = kustomization["namespace"]
        for image in kustomization.get("images", ()):
            for container in containers(pod_of(manifest)):
                if container["image"].split(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return manifests


def unnamed_files(folder: Path) -> set[Path]:
    """The manifests below a folder that no kustomization there names; nothing would check them."""
    named: set[Path] = set()
    for path in folder.rglob("kustomization.yaml"):
        (kustomization,) = documents(path)
        entries = [*kustomization.get("resources", ()), *(each["path"] for each in kustomization.get("patches", ()))]
        named |= {path, *(path.parent / entry for entry in entries)}
    return set(folder.rglob("*.yaml")) - named


def built_by_kubectl(root: Path, overlay: str, components: tuple[str, ...], copy: Path) -> list[Manifest]:
    """The manifests that kubectl writes for an overlay of `root` with these components, in a copy of the folder."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    folder = Path(shutil.copytree(root, copy)) / overlay
    with (folder / "kustomization.yaml").open("a", encoding="utf-8") as file:
        yaml.safe_dump({"components": [f"../components/{each}" for each in components]}, file)
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


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


def documents(path: Path) -> list[Manifest]:
    return copy.deepcopy(_parsed(path))


@functools.cache
def _parsed(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def identity(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def pod_of(manifest: Manifest) -> Manifest:
    """The pod's spec in a workload; {} elsewhere."""
    if manifest["kind"] == "ServingRuntime":
        return {key: manifest["spec"][key] for key in ("containers", "volumes") if key in manifest["spec"]}
    return manifest["spec"]["template"]["spec"] if manifest["kind"] == "Deployment" else {}


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", ()), *pod.get("containers", ())]


def kinds(manifests: list[Manifest], *kinds: str) -> Iterator[Manifest]:
    return (manifest for manifest in manifests if manifest["kind"] in kinds)


def schema(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        name = f"{manifest['apiVersion']} {manifest['kind']}"
        if name in CUSTOM:
            yield from custom_problems(name, manifest)
            if manifest["kind"] == "ServingRuntime":
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "of-runtime"}, "spec": pod_of(manifest)}
                yield from _kubernetes_problems(json.dumps(pod))
        else:
            yield from _kubernetes_problems(json.dumps(manifest))


def custom_problems(name: str, value: object) -> Iterator[str]:
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
            problems.append(f"{'/'.join(identity(manifest))} in Kubernetes {version}: {error.message}")
    return problems


def labels(manifests: list[Manifest]) -> Iterator[str]:
    pods = [manifest["spec"]["template"]["metadata"]["labels"] for manifest in kinds(manifests, "Deployment")]
    # What KServe puts on the pods of an InferenceService.
    isvc = "serving.kserve.io/inferenceservice"
    pods += [{isvc: manifest["metadata"]["name"]} for manifest in kinds(manifests, "InferenceService")]
    for manifest in manifests:
        for selector in _selectors(manifest):
            if not any(selector.items() <= labels.items() for labels in pods):
                yield f"{'/'.join(identity(manifest))} selects {selector}, which no pod has"


def _selectors(manifest: Manifest) -> Iterator[dict[str, str]]:
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Service":
        yield spec["selector"]
    elif manifest["kind"] == "NetworkPolicy":
        yield spec["podSelector"]["matchLabels"]
    elif manifest["kind"] in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        yield spec["selector"]["matchLabels"]
    for constraint in pod_of(manifest).get("topologySpreadConstraints", ()):
        yield constraint["labelSelector"]["matchLabels"]


def port_names(manifest: Manifest) -> Iterator[str]:
    spec = manifest["spec"]
    if manifest["kind"] == "Service":
        yield from (port["targetPort"] for port in spec["ports"])
    elif manifest["kind"] == "PodMonitor":
        yield from (endpoint["port"] for endpoint in spec["podMetricsEndpoints"])
    else:
        yield from (port["port"] for rule in spec.get("ingress", ()) for port in rule["ports"])


def pods(manifests: list[Manifest]) -> Iterator[str]:
    """Pod Security's level "restricted", read-only files, no token, pinned images, volumes that exist."""
    for manifest in kinds(manifests, "Deployment", "ServingRuntime"):
        pod = pod_of(manifest)
        volumes = {volume["name"]: set(volume) - {"name"} for volume in pod["volumes"]}
        for sources in volumes.values():
            if not sources <= {"emptyDir", "persistentVolumeClaim", "image"}:
                yield f"volumes of {sources} are not allowed"
        if manifest["kind"] == "Deployment" and pod["automountServiceAccountToken"] is not False:
            yield "the service account's token is mounted"
        for container in containers(pod):
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


def resources(manifests: list[Manifest]) -> Iterator[str]:
    workloads = [
        (each["name"], each["resources"])
        for item in kinds(manifests, "Deployment")
        for each in containers(pod_of(item))
    ]
    workloads += [
        (item["metadata"]["name"], item["spec"]["predictor"]["model"]["resources"])
        for item in kinds(manifests, "InferenceService")
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


def put(manifest: Manifest, path: str, value: object) -> None:
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


def ordered(value: Any, field: str = "") -> Any:
    """Without the order of entries that are merged by name, in which kubectl and `_merged` differ."""
    if isinstance(value, dict):
        return {key: ordered(each, key) for key, each in value.items()}
    if isinstance(value, list):
        entries = [ordered(each) for each in value]
        return (
            sorted(entries, key=lambda each: json.dumps(each, sort_keys=True))
            if not field or field in _MERGE_KEYS
            else entries
        )
    return value


def queries(value: object) -> Iterator[str]:
    """The queries anywhere inside."""
    if isinstance(value, list):
        for each in value:
            yield from queries(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key in ("query", "expr"):
                yield each
            else:
                yield from queries(each)


def query_problems(
    query: str,
    metrics: Collection[str],
    known: Mapping[str, Collection[str] | None],
    namespaces: Collection[str] | None = None,
) -> Iterator[str]:
    """What is wrong with a query over these metrics.

    `known` has the labels of the metrics, each with its values; None for any. With `namespaces` the query must select
    one of them.
    """
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
        if selector.name not in metrics:
            yield f"no metric {selector.name}"
        if namespaces is not None and ("namespace" not in matchers or matchers["namespace"].value not in namespaces):
            yield f"{selector.name} is not selected by the namespace {namespaces}"
        if unknown := matchers.keys() - known.keys():
            yield f"{selector.name} has no label {sorted(unknown)}"
        for name, values in known.items():
            if values is None or name not in matchers:
                continue
            if not any(re.fullmatch(matchers[name].value, each) for each in values):
                yield f"no {name} is {matchers[name].value}"
