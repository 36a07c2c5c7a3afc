"""What `gte-deploy info` says of a bundle or checkpoint, as data for programs and as a table for people."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gte_deploy.backends.tensorrt.variants import VARIANTS
from gte_deploy.bundle.manifest import Manifest, is_bundle, read_manifest
from gte_deploy.core.errors import MissingDependencyError
from gte_deploy.core.spec import Engine, engine_title

_HASH_DIGITS = 12
_MOST_LABELS = 8


def facts_of(folder: Path) -> dict[str, Any]:
    """Return the facts about the bundle or checkpoint in a folder, as plain JSON data; no weights are loaded.

    Raises:
        BundleError, CheckpointError, ConfigError: it cannot be read.
        MissingDependencyError: it is a checkpoint, and transformers is not installed.
    """
    if not is_bundle(folder):
        return _checkpoint_facts(folder)
    from gte_deploy.backends.advice import faster_here
    from gte_deploy.backends.choice import choose_engine, precision_of, streams_of

    manifest = read_manifest(folder)
    choice = choose_engine(manifest)
    return {
        "path": str(folder),
        "kind": "bundle",
        **manifest.to_json(),
        "made_for": made_for(manifest),
        "verified": [title for titles in verified(manifest).values() for title in titles],
        "files": {file: entry.size for file, entry in manifest.files.items()},
        "engine": {**dataclasses.asdict(choice), "precision": precision_of(manifest, choice.precision)},
        "lists": dataclasses.asdict(streams_of(manifest, choice)),
        "faster_here": faster_here(manifest),
    }


def made_for(manifest: Manifest) -> str:
    """Return what runs the bundle, for people."""
    if manifest.plan is not None:
        gpus = ", ".join(f"sm{capability.replace('.', '')}" for capability in manifest.plan.compute_capabilities)
        return f"GPUs of {gpus}, with {VARIANTS[manifest.plan.variant].title}"
    if "tensorrt" in manifest.graphs:
        return "TensorRT; its engine is not built yet"
    if "executorch" in manifest.graphs:
        return "ExecuTorch, on CPUs of phones and other devices"
    return "NVIDIA GPUs, with ONNX Runtime" if manifest.target == "cuda" else "CPUs"


def verified(manifest: Manifest) -> dict[Engine, list[str]]:
    """Return the names of what each graph was verified to compute in, as in the report of the export."""
    return {
        engine: [
            engine_title(
                engine,
                manifest.precision,
                computes,
                device=manifest.target,
                emulated=computes in graph.emulated,
            )
            for computes in graph.computes
        ]
        for engine, graph in manifest.graphs.items()
    }


def info_table(facts: Mapping[str, Any], folder: Path) -> str:
    """Return the facts as lines of a name and a value, for people."""
    rows = list(_model_rows(facts["spec"]))
    if facts["kind"] == "bundle":
        rows += _bundle_rows(facts, read_manifest(folder))
    width = max(len(name) for name, _ in rows)
    lines, before = [f"{facts['path']}: a {facts['kind']}"], ""
    for name, value in rows:
        lines.append(f"  {'' if name == before else name:<{width}}  {value}")
        before = name
    return "\n".join([*lines, "  --json has every fact, such as the inputs and outputs of each graph."])


def _checkpoint_facts(folder: Path) -> dict[str, Any]:
    from gte_deploy.core.quiet import keep_caches_in_ours
    from gte_deploy.models import require_checkpoint
    from gte_deploy.models.description import describe

    require_checkpoint(folder)
    keep_caches_in_ours()
    try:
        spec = describe(folder).spec
    except ModuleNotFoundError as error:
        raise MissingDependencyError("transformers", "torch") from error
    return {"path": str(folder), "kind": "checkpoint", "spec": dataclasses.asdict(spec)}


def _model_rows(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "task", spec["task"]
    yield "texts", f"up to {spec['max_length']:,} tokens, of a vocabulary of {spec['vocab_size']:,}"
    width = spec["embedding_size"] or spec["hidden_size"]
    if spec["task"] in ("embed", "hybrid"):
        normalized = ", normalized" if spec["normalize"] else ""
        yield (
            "embedding",
            f"{width:,} dimensions, {spec['pooling']} pooling{normalized}, compared by {spec['similarity']}",
        )
    else:
        yield "width", f"{width:,} dimensions"
    if labels := list(spec["id2label"].values()):
        more = f" and {len(labels) - _MOST_LABELS} more" if len(labels) > _MOST_LABELS else ""
        yield "labels", f"{', '.join(labels[:_MOST_LABELS])}{more}"
    for name, prompt in spec["prompts"].items():
        yield "prompts", f"{name}: {prompt!r}{' (the default)' if name == spec['default_prompt_name'] else ''}"


def _bundle_rows(facts: Mapping[str, Any], manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "precision", manifest.precision
    for engine, titles in verified(manifest).items():
        yield "graphs", f"{', '.join(titles) or f'{engine}, not verified'}: {manifest.graphs[engine].path}"
    if manifest.plan is not None:
        lines = (*manifest.plan.describe(), *manifest.plan.caveats)
        yield from (("engine", line.removeprefix("engine: ")) for line in lines)
    here, lists = facts["engine"], facts["lists"]
    yield "runs here", f"on {here['backend']}, {here['device']}, in {here['precision']}: {here['reason']}"
    if lists["streams"] > 1:
        yield "runs here", f"lists in {lists['streams']} streams: {lists['reason']}"
    yield from (("faster here", line) for line in facts["faster_here"])
    size = sum(entry.size for entry in manifest.files.values())
    yield "size", f"{size / 1e6:,.1f} MB in {len(manifest.files)} files"
    yield "checksum", facts["checksum"]
    yield "made for", facts["made_for"]
    source = facts["source"]
    yield "made from", f"{source['name']}, weights sha256 {source['sha256'][:_HASH_DIGITS]}…"
    made_with = ("gte-deploy", "torch", "transformers", "onnxruntime", "openvino")
    versions = facts["versions"]
    yield "made with", ", ".join(f"{name} {versions[name]}" for name in made_with if name in versions)
    yield "bounds", "missed, as the export was asked to allow:" if manifest.missed_bounds else "kept"
    yield from (("bounds", line) for line in manifest.missed_bounds)
