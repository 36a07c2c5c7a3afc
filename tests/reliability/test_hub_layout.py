"""Bundles in the Hugging Face cache, where each file is a link to a file of another name, run on every engine."""

import shutil

import pytest

import gte_deploy
from gte_deploy.models import builtin_bundle
from hub import in_cache

TEXT = "the [MASK] is old"


@pytest.fixture(scope="module")
def builtin_in_cache(tmp_path_factory):
    """Its weights lie in a folder of their own."""
    return in_cache(builtin_bundle(), tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_the_built_in_bundle_runs_from_the_cache(builtin_in_cache, backend):
    with gte_deploy.load(builtin_in_cache, backend=backend, num_threads=1) as model:
        found = model.fill_mask(TEXT)
    with gte_deploy.load(backend=backend, num_threads=1) as model:
        assert found == model.fill_mask(TEXT)
    assert not list(builtin_in_cache.parents[1].glob(".gte-deploy-*")), "no copy stays"


def test_it_is_found_by_its_id_without_a_network(builtin_in_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with gte_deploy.load("owner/name", cache_dir=builtin_in_cache.parents[2], num_threads=1) as model:
        assert model.path == builtin_in_cache and model.fill_mask(TEXT)


def test_data_that_are_links_beside_a_graph_that_is_none(tmp_path):
    snapshot = in_cache(builtin_bundle(), tmp_path)
    for graph in snapshot.glob("*.onnx"):
        real = graph.resolve()
        graph.unlink()
        shutil.copyfile(real, graph)
    with gte_deploy.load(snapshot, backend="openvino", num_threads=1) as model:
        assert model.fill_mask(TEXT)
