"""Bundles with a TensorRT plan where there is no TensorRT: what reads the manifest takes the file for a plan."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from gte_deploy.bundle.manifest import MANIFEST_NAME, FileEntry, PlanEntry, read_manifest
from gte_deploy.core.files import sha256_file
from gte_deploy.core.spec import Profile


def make_plan_bundle(bundle: Path, folder: Path, profiles: Sequence[Profile]) -> Path:
    """Copy a bundle of the CPU, and give the copy a plan with the inputs and outputs of its graph."""
    shutil.copytree(bundle, folder)
    manifest = read_manifest(folder)
    graph = manifest.graphs["onnxruntime"]
    file = folder / "tensorrt" / "model.plan"
    file.parent.mkdir()
    file.write_bytes(b"plan")
    plan = PlanEntry(
        path="tensorrt/model.plan",
        variant="tensorrt",
        version="10.9.0.34",
        compute_capabilities=("8.9",),
        profiles=tuple(profiles),
        inputs=graph.inputs,
        outputs=graph.outputs,
        layers={},
    )
    files = {**manifest.files, plan.path: FileEntry(4, sha256_file(file))}
    manifest = dataclasses.replace(manifest, plan=plan, files=files)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest.to_json()), encoding="utf-8")
    return folder
