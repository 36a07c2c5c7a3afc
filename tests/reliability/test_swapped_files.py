"""What is verified is what runs: files of a bundle that change while it is loaded, and while it is in use."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import gte_deploy
from factories import make_checkpoint
from gte_deploy import loading
from gte_deploy.bundle.manifest import MANIFEST_NAME, read_manifest
from gte_deploy.bundle.verified import VerifiedBundle
from gte_deploy.core.errors import BackendError, BundleError
from gte_deploy.exporters.bundle.writer import seal
from gte_deploy.exporters.export import export
from gte_deploy.exporters.job import WEIGHTS_PATH

TEXT = "a text of some words"
GRAPHS = ("onnx/model.onnx", "onnx/model_answer.onnx", "onnx/model_openvino.onnx", "onnx/model_openvino_answer.onnx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = make_checkpoint(folder / "checkpoint", task="embed", layers=1, pooling="cls")
    return export(checkpoint, folder / "bundle", max_length=16).path


@pytest.fixture(params=["onnx", "openvino"])
def engine(request) -> str:
    return request.param


@pytest.fixture
def bundle(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture
def expected(exported, engine):
    with gte_deploy.load(exported, backend=engine, num_threads=1) as model:
        return model.encode(TEXT)


def replace(file: Path, content: bytes) -> None:
    """Rename another file over a file."""
    aside = file.with_name("aside")
    aside.write_bytes(content)
    aside.replace(file)


def other_weights(bundle: Path) -> bytes:
    """Weights of the same size that give other answers."""
    return (-np.fromfile(bundle / WEIGHTS_PATH, np.float32)).tobytes()


def after_verification(monkeypatch, act):
    """Let `act` run in `load` when every file is verified, and none is given to an engine yet."""

    def open_and_act(folder, manifest):
        verified = VerifiedBundle(folder, manifest)
        act()
        return verified

    monkeypatch.setattr(loading, "VerifiedBundle", open_and_act)


@pytest.mark.parametrize("name", [WEIGHTS_PATH, *GRAPHS, "tokenizer.json"])
def test_a_file_that_is_replaced_while_it_is_loaded_is_refused(bundle, engine, name, monkeypatch):
    content = other_weights(bundle) if name == WEIGHTS_PATH else (bundle / name).read_bytes()
    after_verification(monkeypatch, lambda: replace(bundle / name, content))
    with pytest.raises(BundleError, match=f"{name} has changed since it was verified"):
        gte_deploy.load(bundle, backend=engine, num_threads=1)


@pytest.mark.parametrize("name", [WEIGHTS_PATH, *GRAPHS])
def test_a_file_that_is_swapped_and_swapped_back_never_runs(bundle, engine, expected, name, monkeypatch):
    """Checks of the paths see nothing of it: the engine has to have the verified file itself."""
    file, kept = bundle / name, bundle / "kept"
    open_graph = loading._open_graph

    def open_between(*arguments):
        os.link(file, kept)
        replace(file, other_weights(bundle) if name == WEIGHTS_PATH else b"\x08\x09")
        try:
            return open_graph(*arguments)
        finally:
            kept.replace(file)

    monkeypatch.setattr(loading, "_open_graph", open_between)
    with gte_deploy.load(bundle, backend=engine, num_threads=1) as model:
        np.testing.assert_array_equal(model.encode(TEXT), expected)


def test_a_bundle_that_is_replaced_in_use_leaves_the_answers_alone(bundle, engine, exported, expected):
    with gte_deploy.load(exported, backend=engine, num_threads=1) as model:
        tokens = model.encode(TEXT, output_value="token_embeddings")
    with gte_deploy.load(bundle, backend=engine, num_threads=1) as model:
        replace(bundle / WEIGHTS_PATH, other_weights(bundle))
        for name in GRAPHS:
            replace(bundle / name, b"no graph")
        np.testing.assert_array_equal(model.encode(TEXT), expected)
        # The first call that needs the whole graph opens it.
        np.testing.assert_array_equal(model.encode(TEXT, output_value="token_embeddings"), tokens)


def test_weights_that_are_written_over_in_use_are_refused(bundle, engine, expected):
    file = bundle / WEIGHTS_PATH
    whole = file.read_bytes()
    with gte_deploy.load(bundle, backend=engine, num_threads=1) as model:
        file.write_bytes(other_weights(bundle))
        with pytest.raises(BackendError, match="has changed since it was loaded"):
            model.encode(TEXT)
        file.write_bytes(whole)
        np.testing.assert_array_equal(model.encode(TEXT), expected)
        file.write_bytes(whole[:-4096])  # to read behind the end would kill the process
        with pytest.raises(BackendError, match="has changed since it was loaded"):
            model.encode(TEXT)


def test_a_new_time_alone_changes_nothing(bundle, engine, expected):
    with gte_deploy.load(bundle, backend=engine, num_threads=1) as model:
        os.utime(bundle / WEIGHTS_PATH, (0, 0))
        np.testing.assert_array_equal(model.encode(TEXT), expected)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(bundle, engine):
    (bundle / "tokenizer.json").unlink()
    os.mkfifo(bundle / "tokenizer.json")
    with pytest.raises(BundleError, match="not a file"):
        gte_deploy.load(bundle, backend=engine)


def test_a_closed_model_holds_no_file(bundle, engine):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list the open files of a process")

    def held():
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{name}"))
            except OSError:  # the listing's own
                continue
        return [path for path in found if str(bundle) in path]

    model = gte_deploy.load(bundle, backend=engine, num_threads=1)
    model.encode(TEXT)
    assert set(held()) == {str(bundle / WEIGHTS_PATH)}
    model.close()
    assert held() == []


def test_weights_beyond_their_file_are_refused(bundle, engine):
    """The manifest agrees with every file, and the graph asks for more than there is."""
    manifest = read_manifest(bundle)
    (bundle / WEIGHTS_PATH).write_bytes((bundle / WEIGHTS_PATH).read_bytes()[:-4096])
    (bundle / MANIFEST_NAME).unlink()
    seal(bundle, dataclasses.replace(manifest, files={}))
    with pytest.raises(BackendError):
        gte_deploy.load(bundle, backend=engine)
