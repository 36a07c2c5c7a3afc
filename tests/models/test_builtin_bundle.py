"""The bundle of the built-in model answers as transformers does, from the checkpoint's own weights."""

import dataclasses
import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer, GteForMaskedLM, pipeline

import gte_deploy
from gte_deploy import cli
from gte_deploy.bundle.inspection import inspect_onnx
from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.core.spec import BackendName
from gte_deploy.exporters.triton.repository import export_repository
from gte_deploy.exporters.verification.report import library_versions
from gte_deploy.models import BUILTIN_NAME, builtin_bundle, builtin_path
from loading import load_file

ENGINES: list[BackendName] = ["onnx", "openvino"]
SIZE_LIMIT = 25_000_000
TEXTS = [
    "The president of the united [MASK] of America.",
    "two thirds [MASK] the members were [MASK] on that day.",
    "the database stores the rows in a [MASK]. " + "there is no doubt about it. " * 60,
]


@pytest.fixture(scope="module")
def checkpoint():
    model = GteForMaskedLM.from_pretrained(builtin_path(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(builtin_path())


@pytest.fixture(params=ENGINES)
def model(request):
    with gte_deploy.load(backend=request.param) as opened:
        yield opened


def test_it_fills_masks_as_transformers_does(model, checkpoint):
    network, tokenizer = checkpoint
    theirs = pipeline("fill-mask", model=network, tokenizer=tokenizer, top_k=5)
    for text in TEXTS:
        ours, expected = model.fill_mask(text, top_k=5), theirs(text)
        masks = zip(*([ours], [expected]) if text.count("[MASK]") == 1 else (ours, expected), strict=True)
        for our, their in masks:
            assert [answer["token"] for answer in our] == [answer["token"] for answer in their]
            np.testing.assert_allclose([one["score"] for one in our], [one["score"] for one in their], rtol=1e-4)


@pytest.mark.parametrize("length", [3, 700, 2500])
def test_hidden_states_of_far_positions_are_those_of_transformers(model, checkpoint, length):
    """Far positions show an error in the tables of the rotation, which the graph computes when it is opened."""
    network, tokenizer = checkpoint
    ids = np.random.default_rng(length).integers(1000, 30000, length - 2).tolist()
    text = tokenizer.decode(ids)
    encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)
    with torch.inference_mode():
        states = network.base_model(**encoded).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(model.encode(text, truncation=True, max_length=length), states, atol=2e-5)


def test_the_weights_are_in_the_package_once():
    folder = builtin_bundle()
    manifest = read_manifest(folder)
    graphs = [folder / graph.path for entry in manifest.graphs.values() for graph in entry.files]
    assert len(graphs) == 4
    for graph in graphs:
        assert graph.stat().st_size < 100_000
        assert inspect_onnx(graph).external_files == {"gte_en_mlm_tiny/model.safetensors"}
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < SIZE_LIMIT
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)


def test_constants_are_folded_when_it_is_opened(tmp_path, monkeypatch):
    """Else every call would convert eleven million weights."""
    original = onnxruntime.InferenceSession

    def opened(path, options, **arguments):
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        return original(path, options, **arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    gte_deploy.load(backend="onnx").close()
    # The file has only the nodes that run; its weights are not read.
    run = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert run.count("MultiHeadAttention") == 4
    assert not {"Cos", "Sin"} & set(run) and run.count("Cast") <= 1  # one cast is of the mask


def test_commands_take_it(capsys):
    assert cli.main(["verify", "gte-en-mlm-tiny"]) == 0
    assert "all as the manifest says" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["source"]["name"]) == ("bundle", "gte-en-mlm-tiny")
    assert cli.main(["fill-mask", "The president of the united [MASK] of America.", "-k", "1"]) == 0
    assert "united states of america" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"backend": "torch"}, {"path": BUILTIN_NAME, "task": "embed"}, {"task": "sparse"}])
def test_what_only_a_checkpoint_can_do_is_done_with_the_checkpoint(options):
    with gte_deploy.load(**options) as opened:
        assert (opened.backend, opened.path) == ("torch", builtin_path())
        again = pickle.loads(pickle.dumps(opened))
        assert again.backend == "torch"
        again.close()


def test_triton_is_given_the_checkpoint(tmp_path):
    with pytest.raises(gte_deploy.ExportError, match="stores its weights in float16"):
        export_repository(builtin_bundle(), tmp_path / "repository")
    assert list(tmp_path.iterdir()) == []


def test_a_pickled_one_is_loaded_again():
    with gte_deploy.load() as opened, pickle.loads(pickle.dumps(opened)) as again:
        assert again.path == opened.path == builtin_bundle()
        assert again.fill_mask(TEXTS[0]) == opened.fill_mask(TEXTS[0])


def test_without_an_engine_torch_runs_it(monkeypatch):
    hidden, original = {"onnxruntime", "openvino"}, importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name not in hidden and original(name, *rest))
    with gte_deploy.load() as opened:
        assert opened.backend == "torch"


@pytest.mark.xdist_group("builtin bundle")
def test_it_is_what_the_script_writes(tmp_path, checkpoint):
    tool = load_file(Path(__file__).parents[2] / "tools" / "builtin_bundle.py", "builtin_bundle")
    (tmp_path / builtin_path().name).symlink_to(builtin_path())
    tool.write(tmp_path)
    committed, written = read_manifest(builtin_bundle()), read_manifest(tmp_path)
    unversioned = {"versions": {}, "files": {}}
    assert dataclasses.replace(committed, **unversioned) == dataclasses.replace(written, **unversioned)
    if committed.versions == library_versions():  # others may name the values of a trace in another way
        assert committed.files == written.files
    kinds = {
        graph.path: [
            [node.op_type for node in onnx.load(folder / graph.path, load_external_data=False).graph.node]
            for folder in (builtin_bundle(), tmp_path)
        ]
        for entry in committed.graphs.values()
        for graph in entry.files
    }
    for path, (ours, new) in kinds.items():
        assert sorted(ours) == sorted(new), path
