"""Manifests from anywhere: each malformed one is refused with a BundleError that says why."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from gte_deploy.bundle.manifest import (
    FORMAT,
    FORMAT_VERSION,
    TextsEntry,
    files_besides,
    is_bundle,
    open_bundle,
    read_manifest,
)
from gte_deploy.core.errors import BundleError
from gte_deploy.core.spec import Profile

GRAPH = b"not a graph, but hashed like one"
MANIFEST = {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "spec": {
        "task": "fill-mask",
        "max_length": 128,
        "vocab_size": 256,
        "hidden_size": 32,
        "pad_token_id": 0,
        "pooling": "mean",
        "logits": "masked",
        "num_labels": 0,
        "id2label": {"0": "LABEL_0"},
        "prompts": {},
        "default_prompt_name": None,
        "normalize": False,
        "token_types": True,
        "type_vocab_size": 2,
        "embedding_size": 16,
        "truncate_dim": 8,
        "similarity": "dot",
        "activation": None,
        "multi_vector": None,
        "sparse": {
            "head": "splade",
            "activation": "log1p_relu",
            "pooling": "max",
            "query_weights": "query_weights.npy",
            "default_route": "document",
            "max_active_dims": 64,
            "unweighted": [],
        },
    },
    "precision": "fp32",
    "graphs": {
        "onnxruntime": {
            "path": "onnx/model.onnx",
            "opset": 20,
            "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
            "outputs": [
                {"name": "last_hidden_state", "dtype": "float32", "shape": ["batch", "sequence", 32]},
                {"name": "logits", "dtype": "float32", "shape": ["num_masks", 256]},
            ],
            "fusions": {"attention": 2},
            "computes": ["fp32"],
            "emulated": [],
            "parts": [
                {
                    "path": "onnx/model_answer.onnx",
                    "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
                    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["num_masks", 256]}],
                }
            ],
            "all_logits": None,
        },
    },
    "files": {
        name: {"size": len(GRAPH), "sha256": hashlib.sha256(GRAPH).hexdigest()}
        for name in ("onnx/model.onnx", "onnx/model_answer.onnx")
    },
    "versions": {"onnx": "1.23"},
    "source": {"name": "toy"},
    "target": "cpu",
    "plan": None,
    "missed_bounds": [],
}
WHOLE = MANIFEST["graphs"]["onnxruntime"]
(PART,) = WHOLE["parts"]
PLAN = {
    "path": "onnx/model.onnx",
    "flavour": "tensorrt-rtx",
    "version": "1.7.1.116",
    "compute_capabilities": ["8.9", "12.0"],
    "profiles": [
        {"min": [1, 1], "opt": [8, 128], "max": [32, 512]},
        {"min": [1, 513], "opt": [1, 900], "max": [2, 999]},
    ],
    "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
    "outputs": [{"name": "last_hidden_state", "dtype": "float16", "shape": ["batch", "sequence", 32]}],
    "layers": {"fused_attention": 2},
    "timing_cache": None,
    "caveats": ["the engine was built elsewhere"],
}


@pytest.fixture
def write(tmp_path):
    def write(change=None, text=None):
        manifest = copy.deepcopy(MANIFEST)
        if change:
            change(manifest)
        canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
        (tmp_path / "onnx").mkdir(exist_ok=True)
        for name in MANIFEST["files"]:
            (tmp_path / name).write_bytes(GRAPH)
        (tmp_path / "manifest.json").write_text(json.dumps(manifest) if text is None else text)
        return tmp_path

    return write


def test_a_manifest_survives_the_round_trip(write):
    path = write()
    manifest = open_bundle(path)
    assert is_bundle(path)
    assert manifest.spec.id2label == {0: "LABEL_0"}
    assert manifest.graphs["onnxruntime"].inputs[0].shape == ("batch", "sequence")
    assert json.loads(json.dumps(manifest.to_json())) == json.loads((path / "manifest.json").read_text())


def test_a_manifest_of_an_earlier_version_means_what_it_meant(write):
    def earlier(manifest):
        manifest["format_version"] = 1
        del manifest["target"], manifest["plan"]
        del manifest["graphs"]["onnxruntime"]["parts"], manifest["graphs"]["onnxruntime"]["emulated"]
        for name in (
            "token_types",
            "type_vocab_size",
            "embedding_size",
            "truncate_dim",
            "similarity",
            "activation",
            "sparse",
        ):
            del manifest["spec"][name]

    manifest = read_manifest(write(earlier))
    assert (manifest.target, manifest.plan) == ("cpu", None)
    assert manifest.graphs["onnxruntime"].parts == ()
    assert (manifest.spec.token_types, manifest.spec.embedding_width, manifest.spec.sparse) == (False, 32, None)


@pytest.mark.parametrize("version", [2, 3])
def test_the_manifest_that_an_earlier_gte_deploy_wrote_is_read(tmp_path, version):
    """Each file is the manifest of the built-in model's bundle, as the gte-deploy of that version wrote it."""
    shutil.copy(Path(__file__).with_name(f"manifest_version_{version}.json"), tmp_path / "manifest.json")
    manifest = read_manifest(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["format_version"] == version
    assert (manifest.spec.task, manifest.spec.hidden_size, manifest.precision) == ("fill-mask", 256, "fp32")
    graph = manifest.graphs["onnxruntime"]
    assert (graph.path, graph.computes) == ("onnx/model.onnx", ("fp32",))
    assert [part.path for part in graph.parts] == (["onnx/model_answer.onnx"] if version == 3 else [])
    assert [output.name for output in graph.outputs] == ["last_hidden_state", "logits"]
    assert "onnx/model.onnx.data" in manifest.files


CALIBRATION = {"source": "your texts in mine.txt", "languages": ["de"], "texts": 2, "sha256": "00" * 32}


def test_calibration_texts_survive_the_round_trip(write):
    path = write(lambda manifest: manifest.update(calibration=CALIBRATION))
    manifest = open_bundle(path)
    assert manifest.calibration == TextsEntry("your texts in mine.txt", ("de",), 2, "00" * 32)
    assert json.loads(json.dumps(manifest.to_json())) == json.loads((path / "manifest.json").read_text())
    assert manifest.calibration.describe().startswith("2 texts: your texts in mine.txt; sha256 0000")


@pytest.mark.parametrize("change", [{"texts": 0}, {"texts": "2"}, {"sha256": 5}, {"languages": [1]}, {"more": 1}])
def test_malformed_calibration_texts_are_refused(write, change):
    path = write(lambda manifest: manifest.update(calibration={**CALIBRATION, **change}))
    with pytest.raises(BundleError, match="is malformed"):
        read_manifest(path)


def test_a_plan_survives_the_round_trip_and_needs_no_graph(write):
    path = write(lambda manifest: manifest.update(graphs={}, plan=copy.deepcopy(PLAN)))
    manifest = open_bundle(path)
    assert manifest.plan.profiles[1] == Profile(min=(1, 513), opt=(1, 900), max=(2, 999))
    assert manifest.plan.caveats == ("the engine was built elsewhere",)
    assert json.loads(json.dumps(manifest.to_json())) == json.loads((path / "manifest.json").read_text())


def test_a_plan_of_an_earlier_version_has_no_caveats(write):
    plan = {name: value for name, value in PLAN.items() if name != "caveats"}
    assert read_manifest(write(lambda manifest: manifest.update(plan=plan))).plan.caveats == ()


def test_a_plan_describes_itself(write):
    plan = read_manifest(write(lambda manifest: manifest.update(plan=copy.deepcopy(PLAN)))).plan
    assert plan.describe() == [
        "engine: tensorrt-rtx 1.7.1.116 for sm89, sm120: 2 fused attention",
        "inputs and outputs: input_ids int64, last_hidden_state float16",
        "profiles (batch x sequence, min:opt:max): 1x1:8x128:32x512, 1x513:1x900:2x999",
    ]


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("path", "elsewhere.plan", "elsewhere.plan"),
        ("path", None, "None"),
        ("timing_cache", "elsewhere.cache", "elsewhere.cache"),
        ("flavour", "tensorrt-lite", "tensorrt-lite"),
        ("version", "latest", "latest"),
        ("version", None, "malformed"),
        ("compute_capabilities", [], "compute_capabilities"),
        ("compute_capabilities", ["sm89"], "sm89"),
        ("compute_capabilities", [8.9], "malformed"),
        ("compute_capabilities", "8.9", "form"),
        ("profiles", [], "profiles"),
        ("profiles", [{"min": [1, 1], "opt": [1, 1]}], "malformed"),
        ("profiles", [{"min": [1, 1], "opt": [1, 9], "max": [1, 8]}], "order"),
        ("profiles", [{"min": [0, 1], "opt": [1, 1], "max": [1, 1]}], "whole number"),
        ("profiles", [{"min": [1, True], "opt": [1, 1], "max": [1, 1]}], "whole number"),
        ("profiles", [{"min": [1], "opt": [1, 1], "max": [1, 1]}], "pairs"),
        ("inputs", [], "inputs"),
        ("outputs", {}, "outputs"),
        ("layers", {"fused_attention": -1}, "layers"),
        ("layers", {"fused_attention": "2"}, "layers"),
        ("layers", None, "malformed"),
        ("caveats", "one", "caveats"),
        ("caveats", [1], "caveats"),
    ],
)
def test_a_malformed_plan_is_refused(write, field, value, says):
    with pytest.raises(BundleError, match=says):
        read_manifest(write(change("plan", {**PLAN, field: value})))


def change(path: str, value):
    *parents, last = path.split("/")

    def apply(manifest):
        for key in parents:
            manifest = manifest[key]
        manifest[last] = value

    return apply


@pytest.mark.parametrize(
    "path, value, says",
    [
        ("format", "something", "not the manifest"),
        ("format_version", 5, "format version 5; this gte-deploy reads 1, 2, 3, 4"),
        ("precision", "fp17", "fp17"),
        ("spec/task", "sing", "sing"),
        ("spec/pooling", "max", "max"),
        ("spec/logits", "some", "some"),
        ("spec/max_length", 0, "max_length"),
        ("spec/max_length", True, "max_length"),
        ("spec/vocab_size", "256", "vocab_size"),
        ("spec/pad_token_id", 256, "pad_token_id"),
        ("spec/activation", "swish", "swish"),
        ("spec/unknown", 1, "unknown"),
        ("spec", None, "malformed"),
        ("target", "tpu", "tpu"),
        ("plan", [], "malformed"),
        ("graphs", {}, "no plan"),
        ("graphs", None, "malformed"),
        ("graphs/coreml", MANIFEST["graphs"]["onnxruntime"], "'coreml'; expected one of onnxruntime"),
        ("graphs/openvino", {**MANIFEST["graphs"]["onnxruntime"], "path": "other.onnx"}, "other.onnx"),
        ("graphs/onnxruntime/path", "elsewhere.onnx", "elsewhere.onnx"),
        ("graphs/onnxruntime/parts", 3, "malformed"),
        ("graphs/onnxruntime/parts", [{**PART, "path": "elsewhere.onnx"}], "elsewhere.onnx"),
        ("graphs/onnxruntime/parts", [{**PART, "inputs": []}], "some of the outputs of onnx/model.onnx"),
        ("graphs/onnxruntime/parts", [{**PART, "outputs": []}], "some of the outputs of onnx/model.onnx"),
        ("graphs/onnxruntime/parts", [{**PART, "outputs": WHOLE["outputs"]}], "some of the outputs"),
        ("graphs/onnxruntime/parts", [{**PART, "outputs": PART["inputs"]}], "some of the outputs"),
        ("graphs/onnxruntime/all_logits", {**PART, "path": "elsewhere.onnx"}, "elsewhere.onnx"),
        ("graphs/onnxruntime/all_logits", PART, "the inputs but mask_positions, and the outputs of onnx/model.onnx"),
        ("graphs/onnxruntime/all_logits", {**PART, **WHOLE, "inputs": []}, "the inputs but mask_positions"),
        ("graphs/onnxruntime/inputs", 3, "malformed"),
        ("graphs/onnxruntime/computes", ["fp64"], "fp64"),
        ("missed_bounds", "one", "missed_bounds"),
        ("missed_bounds", [1], "missed_bounds"),
        ("files", [], "malformed"),
        ("files", {"../secret": {"size": 1, "sha256": ""}}, "secret"),
        ("files", {"/etc/passwd": {"size": 1, "sha256": ""}}, "passwd"),
        ("files", {"a//b": {"size": 1, "sha256": ""}}, "a//b"),
        ("files", {"onnx/model.onnx": {"size": -1, "sha256": ""}}, "size"),
        ("files", {"onnx/model.onnx": {"size": 1}}, "malformed"),
    ],
)
def test_a_malformed_manifest_is_refused(write, path, value, says):
    with pytest.raises(BundleError, match=says):
        read_manifest(write(change(path, value)))


def test_a_manifest_that_was_edited_is_refused(write):
    file = write() / "manifest.json"
    file.write_text(file.read_text().replace('"max_length": 128', '"max_length": 129'))
    with pytest.raises(BundleError, match="checksum"):
        read_manifest(file.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 1}', "\x00"])
def test_what_is_not_a_manifest_is_refused(write, text):
    with pytest.raises(BundleError):
        read_manifest(write(text=text))


def test_no_manifest_is_no_bundle(tmp_path):
    assert not is_bundle(tmp_path)
    with pytest.raises(BundleError, match="gte-export"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ('{"format": "gte-deploy-bundle"}', True),
        ('{"format": "gte-deploy-triton-repository"}', True),
        ('{"format": "gte-deploy-bundle", "files": ', True),  # cut off
        ('{"name": "My app", "icons": [], "start_url": "/"}', False),  # that of a web app
        ('{"format": "another"}', False),
        ('{"format": 1}', False),
        ("[]", False),
        (" " * (5 << 20), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_manifest_of_another_project_makes_no_bundle(tmp_path, text, ours):
    (tmp_path / "manifest.json").write_text(text)
    assert is_bundle(tmp_path) is ours
    with pytest.raises(BundleError):
        read_manifest(tmp_path)


def test_a_huge_manifest_is_refused_unread(write):
    with pytest.raises(BundleError, match="bytes"):
        read_manifest(write(text=" " * (5 << 20)))


@pytest.mark.parametrize("name", MANIFEST["files"])
@pytest.mark.parametrize(
    "data, says",
    [(GRAPH[:-1], "bytes"), (GRAPH[:-1] + b"!", "sha256"), (None, "missing")],
    ids=["truncated", "flipped", "gone"],
)
def test_an_altered_file_is_refused(write, name, data, says):
    path = write()
    graph = path / name
    graph.unlink()
    if data is not None:
        graph.write_bytes(data)
    with pytest.raises(BundleError, match=says):
        open_bundle(path)


def test_a_link_out_of_the_bundle_is_refused(write, tmp_path_factory):
    path = write()
    outside = tmp_path_factory.mktemp("outside") / "model.onnx"
    outside.write_bytes(GRAPH)
    (path / "onnx/model.onnx").unlink()
    (path / "onnx/model.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="link"):
        open_bundle(path)


@pytest.mark.parametrize("what", ["onnx", "manifest.json"])
def test_a_linked_folder_or_manifest_is_refused(write, tmp_path_factory, what):
    path = write()
    outside = tmp_path_factory.mktemp("outside") / what
    (path / what).rename(outside)
    (path / what).symlink_to(outside)
    with pytest.raises(BundleError, match="out of the bundle, or is in a linked folder"):
        open_bundle(path)


def test_a_linked_folder_inside_the_bundle_is_read(write):
    path = write()
    (path / "onnx").rename(path / "graphs")
    (path / "onnx").symlink_to("graphs")
    assert open_bundle(path).precision == "fp32"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json", "query_weights.npy"]
)
def test_a_file_that_is_read_and_not_named_is_refused(write, name):
    path = write()
    (path / name).write_text("{}")
    with pytest.raises(BundleError, match=rf"{name} would be read, and the manifest does not name it\. Remove it"):
        read_manifest(path)


def test_files_that_nothing_reads_are_listed_and_allowed(write):
    path = write()
    (path / ".cache").mkdir()
    for name in ("notes.md", "onnx/tool.py", ".gitattributes", ".cache/download"):
        (path / name).write_text("")
    assert files_besides(path, open_bundle(path)) == ["notes.md", "onnx/tool.py"]


def test_a_snapshot_of_a_hub_cache_is_read_through_its_links(write, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "onnx").mkdir(parents=True)
    (repository / "blobs").mkdir()
    source = write()
    for number, name in enumerate(("manifest.json", *MANIFEST["files"])):
        blob = repository / "blobs" / str(number)
        blob.write_bytes((source / name).read_bytes())
        (snapshot / name).symlink_to(blob)
    assert open_bundle(snapshot).precision == "fp32"
