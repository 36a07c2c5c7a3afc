"""A manifest with one wrong value is refused by name, or read; it never ends in another error."""

import copy
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import gte_deploy
from gte_deploy.bundle.manifest import MANIFEST_NAME, Manifest, _checksum, read_manifest
from gte_deploy.core.errors import BundleError
from gte_deploy.models import builtin_bundle
from json_documents import places, put

# Values of every type of JSON that no field of a manifest has, or that its type alone does not exclude.
WRONG = [
    None,
    True,
    0,
    1,
    -1,
    10**12,
    10**30,
    0.5,
    1.0,
    float("inf"),
    float("nan"),
    "",
    "x",
    "../x",
    "/etc/passwd",
    "\ud800",
    "x" * 5000,
    [],
    [[]],
    ["x", "x"],
    [None],
    {},
    {"x": 1},
    {"": {}},
]
PLAN = {
    "path": "model.onnx",
    "flavour": "tensorrt",
    "version": "11.0.0.1",
    "compute_capabilities": ["9.0"],
    "profiles": [{"min": [1, 1], "opt": [8, 128], "max": [32, 512]}],
    "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
    "outputs": [{"name": "logits", "dtype": "float16", "shape": ["num_masks", 30528]}],
    "layers": {"fused_attention": 4},
    "timing_cache": None,
    "caveats": [],
}
CALIBRATION = {"source": "texts", "languages": ["de"], "texts": 2, "sha256": "00" * 32}
SPARSE = {
    "head": "splade",
    "activation": "relu",
    "pooling": "max",
    "query_weights": None,
    "default_route": "document",
    "max_active_dims": 64,
    "unweighted": [1, 2],
}
MULTI_VECTOR = {
    "query_length": 32,
    "document_length": 300,
    "query_prefix": 1,
    "document_prefix": None,
    "expansion": {"token": 103, "length": 32, "attended": False, "fixed": False},
    "skipped_in_queries": [],
    "skipped_in_documents": [5],
}


def whole() -> dict[str, Any]:
    """A manifest in which every optional part is there; that of the built-in bundle with them."""
    data = json.loads((builtin_bundle() / MANIFEST_NAME).read_bytes())
    del data["checksum"]
    data["spec"]["sparse"] = SPARSE
    return copy.deepcopy({**data, "plan": PLAN, "calibration": CALIBRATION, "missed_bounds": ["a line"]})


def read(folder: Path, data: Any) -> Manifest | BundleError:
    """Seal a manifest as it is, and read it; every error but a BundleError ends the test."""
    (folder / MANIFEST_NAME).write_text(json.dumps({**data, "checksum": _checksum(data)}))
    try:
        return read_manifest(folder)
    except BundleError as error:
        return error


def name_of(path: tuple[Any, ...]) -> str:
    return next(str(key) for key in reversed(path) if isinstance(key, str))


def mutations(data: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Each value of each wrong kind at each place; ... stands for a value that is left out."""
    paths = [path for path in places(data) if path[0] not in ("format", "format_version")]
    return [(path, value) for path in paths for value in (..., *WRONG)]


def assert_read_or_refused(folder: Path, changes: Sequence[tuple[tuple[Any, ...], Any]]) -> None:
    data, refused = whole(), 0
    assert isinstance(read(folder, data), Manifest)
    for path, value in changes:
        found = read(folder, put(data, path, value))
        if isinstance(found, BundleError):
            refused += 1
            assert str(folder / MANIFEST_NAME) in str(found), (path, value)
            assert len(str(found)) < 1000, (path, value)
        else:
            # What is read can be written, and says the same again.
            (folder / MANIFEST_NAME).write_text(json.dumps(found.to_json()))
            assert read_manifest(folder) == found, (path, value)
    assert refused > len(changes) / 2


def test_values_of_every_type(tmp_path, attempts):
    assert_read_or_refused(tmp_path, random.Random(0).sample(mutations(whole()), 500))
    attempts("manifests with one wrong value", 500)


@pytest.mark.slow
def test_every_value_of_every_type_at_every_place(tmp_path, attempts):
    changes = mutations(whole())
    assert len(changes) > 5000
    assert_read_or_refused(tmp_path, changes)
    attempts("manifests with one wrong value", len(changes))


@pytest.mark.parametrize("field", ["spec", "graphs", "files", "versions", "source", "plan", "calibration"])
def test_the_message_names_the_field(tmp_path, field):
    data = whole()
    for path in places(data[field], (field,)):
        found = read(tmp_path, put(data, path, 0.5))
        assert isinstance(found, BundleError), path
        assert name_of(path) in str(found), (path, str(found))
        assert "0.5" in str(found), (path, str(found))


def test_multi_vector_models(tmp_path):
    data = whole()
    data["plan"] = None
    data["spec"] |= {"task": "multi-vector", "similarity": "maxsim", "multi_vector": MULTI_VECTOR, "sparse": None}
    for graph in data["graphs"].values():
        for part in (graph, *graph["parts"]):
            for tensor in part["outputs"]:
                if tensor["name"] == "logits":
                    tensor |= {"name": "token_vectors", "shape": ["batch", "sequence", 256]}
    assert isinstance(read(tmp_path, data), Manifest)
    for path in places(data["spec"]["multi_vector"], ("spec", "multi_vector")):
        for value in (0.5, -1, "x", 10**12, [0.5], *([...] if isinstance(path[-1], str) else [])):
            found = read(tmp_path, put(data, path, value))
            assert isinstance(found, BundleError), (path, value)
            assert "multi_vector" in str(found), (path, value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("graphs", "onnxruntime", "opset"), float("inf"), "opset is inf; expected a whole number"),
        (("graphs", "onnxruntime", "fusions", "rope"), float("inf"), "fusions.* is inf"),
        (("spec", "vocab_size"), 10**12, "spec.vocab_size is 1000000000000; expected a whole number"),
        (("spec", "max_length"), 10**12, "spec.max_length"),
        (("spec", "hidden_size"), 10**12, "spec.hidden_size"),
        (("spec", "default_prompt_name"), [], "spec.default_prompt_name is"),
        (("spec", "default_prompt_name"), "query", "spec.default_prompt_name is 'query'; expected one of null"),
        (("spec", "prompts"), ["query: "], "spec.prompts is .*; expected an object"),
        (("spec", "hidden_size"), 128, r"last_hidden_state of model.onnx .* its last axis is 128"),
        (("spec", "vocab_size"), 30_522, r"the output logits of model.onnx .* its last axis is 30522"),
        (("graphs", "onnxruntime", "path"), "tokenizer.json", "a file whose name ends in .onnx"),
        (("graphs", "openvino", "parts", 0, "path"), "tokenizer.json", "a file whose name ends in .onnx"),
        (("graphs", "onnxruntime", "outputs", 0, "shape", 1), 0.5, r"shape\[1\] is 0.5"),
    ],
)
def test_what_was_read_before(tmp_path, path, value, says):
    """Each of these was accepted, or raised OverflowError, TypeError or MemoryError."""
    data = whole()
    data["spec"]["sparse"] = data["plan"] = None
    found = read(tmp_path, put(data, path, value))
    assert isinstance(found, BundleError)
    with pytest.raises(BundleError, match=says):
        raise found


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_graph_that_is_not_that_of_the_manifest_is_refused(tmp_path, engine):
    """The spec and the manifest's outputs agree, and the graph has other ones."""
    bundle = shutil.copytree(builtin_bundle(), tmp_path / "bundle")
    data = json.loads((bundle / MANIFEST_NAME).read_bytes())
    del data["checksum"]
    data["spec"]["vocab_size"] = 40_000
    for graph in data["graphs"].values():
        for part in (graph, *graph["parts"]):
            for tensor in part["outputs"]:
                if tensor["name"] == "logits":
                    tensor["shape"] = ["num_masks", 40_000]
    (bundle / MANIFEST_NAME).write_text(json.dumps({**data, "checksum": _checksum(data)}))
    with pytest.raises(gte_deploy.GteDeployError, match="has 30528 values in a row, and the model 40000"):
        gte_deploy.load(bundle, backend=engine)
