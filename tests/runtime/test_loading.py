"""gte_deploy.load: what fits which backend, and errors that say what to do."""

import builtins
import shutil
import subprocess
import sys
import textwrap

import pytest

import gte_deploy
from gte_deploy import BackendError, BundleError, CheckpointError, InputError, MissingDependencyError


def test_auto_takes_what_fits(word_checkpoints, bundle_of):
    checkpoint = word_checkpoints["embed"]
    for path, backend in ((checkpoint, "torch"), (str(checkpoint), "torch"), (bundle_of(checkpoint), "onnx")):
        with gte_deploy.load(path) as model:
            assert model.backend == backend


def test_the_wrong_backend_says_what_to_do(word_checkpoints, bundle_of):
    checkpoint = word_checkpoints["embed"]
    with pytest.raises(BackendError, match="not a bundle.*gte-export"):
        gte_deploy.load(checkpoint, backend="onnx")
    with pytest.raises(BackendError, match="is a bundle.*backend='onnx'"):
        gte_deploy.load(bundle_of(checkpoint), backend="torch")
    for path in (checkpoint, bundle_of(checkpoint)):
        with pytest.raises(BackendError, match="no TensorRT engine"):
            gte_deploy.load(path, backend="tensorrt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "jax"}, "backend must be"),
        ({"device": "tpu"}, "device must be"),
        ({"num_threads": 0}, "num_threads"),
        ({"num_threads": 10**6}, "num_threads"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"max_batch_tokens": 2**40}, "max_batch_tokens"),
    ],
)
def test_arguments_out_of_range(word_checkpoints, options, message):
    with pytest.raises(InputError, match=message):
        gte_deploy.load(word_checkpoints["embed"], **options)


def test_cuda_that_is_not_there(word_checkpoints):
    import torch

    index = torch.cuda.device_count()
    with pytest.raises(BackendError, match=f"PyTorch sees {index} CUDA devices"):
        gte_deploy.load(word_checkpoints["embed"], device=f"cuda:{index}")


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no folder"):
        gte_deploy.load(tmp_path / "none")
    with pytest.raises(CheckpointError):
        gte_deploy.load(tmp_path)


def test_a_bundle_is_verified_before_any_loader_sees_it(word_checkpoints, bundle_of, tmp_path, monkeypatch):
    shutil.copytree(bundle_of(word_checkpoints["embed"]), tmp_path / "b")
    file = tmp_path / "b" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"king", b"ring"))

    def opened(*args, **kwargs):
        raise AssertionError("a loader was called")

    monkeypatch.setattr("gte_deploy.backends.onnx_backend.OnnxBackend.__init__", opened)
    monkeypatch.setattr("gte_deploy.loading.load_tokenizer", opened)
    with pytest.raises(BundleError, match=r"tokenizer.json has sha256"):
        gte_deploy.load(tmp_path / "b")


def test_torch_that_is_not_installed(word_checkpoints, monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"gte-deploy\[torch\]"):
        gte_deploy.load(word_checkpoints["embed"])


def test_torch_threads_are_lowered_to_the_cpus_and_otherwise_left(word_checkpoints, monkeypatch):
    import torch

    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for cpus, asked, expected in ((8, None, []), (2, None, [2]), (2, 3, [3]), (8, 4, [])):
        monkeypatch.setattr("gte_deploy.backends.torch_backend.available_cpus", lambda cpus=cpus: cpus)
        calls.clear()
        gte_deploy.load(word_checkpoints["embed"], num_threads=asked).close()
        assert calls == expected


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_import_is_light():
    done = run(
        """
        import time
        started = time.perf_counter()
        import gte_deploy
        elapsed = time.perf_counter() - started
        import sys
        heavy = {"torch", "transformers", "onnxruntime", "tensorrt", "numpy", "tokenizers"} & set(sys.modules)
        assert not heavy, heavy
        assert elapsed < 0.15, elapsed
        assert gte_deploy.__version__ and gte_deploy.errors.InputError is gte_deploy.InputError
        assert callable(gte_deploy.load) and gte_deploy.Model.__name__ == "Model"
        assert not {"torch", "transformers", "onnxruntime"} & set(sys.modules)
        try:
            gte_deploy.nothing
        except AttributeError as error:
            assert "nothing" in str(error)
        else:
            raise AssertionError("an attribute that is not there")
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_whole_onnx_inference_needs_neither_torch_nor_transformers(word_checkpoints, bundle_of):
    done = run(
        """
        import importlib.abc
        import sys

        BLOCKED = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "sentence_transformers"}

        class Blocker(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in BLOCKED:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocker())
        import gte_deploy

        fill_mask, embed, classify = sys.argv[1:]
        with gte_deploy.load(fill_mask) as model:
            assert model.fill_mask("the [MASK] of france", targets="city")[0]["token_str"] == "city"
            assert model.encode(["a", "the king"], show_progress_bar=True).shape == (2, 32)
        with gte_deploy.load(embed) as model:
            assert model.encode_query("a", normalize_embeddings=True).shape == (32,)
            assert len(model.encode(["a", "b"], output_value=None)) == 2
            assert model.tokenize("a")["input_ids"].shape == (1, 3)
            try:
                model.encode("a", convert_to_tensor=True)
            except gte_deploy.MissingDependencyError as error:
                assert "gte-deploy[torch]" in str(error)
            else:
                raise AssertionError("a tensor without torch")
        with gte_deploy.load(classify) as model:
            assert len(model.rank("a", ["b", "c"])) == 2
        try:
            gte_deploy.load(None)
        except gte_deploy.MissingDependencyError as error:
            assert "gte-deploy[torch]" in str(error)
        else:
            raise AssertionError("a checkpoint without torch")
        assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
        """,
        *(bundle_of(word_checkpoints[task]) for task in ("fill-mask", "embed", "classify")),
    )
    assert done.returncode == 0, done.stderr
