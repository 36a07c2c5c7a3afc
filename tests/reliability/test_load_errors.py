"""`load` raises what it documents and nothing else, before an engine starts; command lines show no traceback."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import gte_deploy
from gte_deploy import BackendError, BundleError, CheckpointError, ConfigError, InputError
from gte_deploy.cli import main as deploy
from gte_deploy.core.errors import MissingDependencyError
from gte_deploy.core.exit_codes import FAILURE, USAGE
from gte_deploy.core.files import require_utf8
from gte_deploy.models import builtin_bundle, builtin_path
from gte_deploy.training.cli import main as train

DOCUMENTED = (InputError, BundleError, CheckpointError, ConfigError, BackendError, MissingDependencyError)
NO_UTF8 = os.fsdecode(b"caf\xff")


def copied(source, target):
    """A copy of a folder, of links to the files: nothing here changes the content of one."""
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except (OSError, shutil.Error):  # another disk
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    return target


NAMES = {
    "an unknown user": "~nosuchuser/x",
    "a name that is too long": "a" * 5_000,
    "a path that is too long": "/" + "a" * 5_000,
    "a NUL": "a\0b",
    "lone surrogates": "\udcff\ud800",
    "nothing": "",
    "a device": "/dev/null",
    "a folder of the system": "/proc/self",
    "a number": 7,
    "bytes": b"bundle",
    "a list": [],
    "an id that ends with @": "owner/name@",
    "an id with spaces": "ow ner/na me",
    "an id that is too long": "owner/" + "n" * 300,
}


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_model(name):
    with pytest.raises(DOCUMENTED) as caught:
        gte_deploy.load(NAMES[name])
    assert type(caught.value) in (InputError, CheckpointError) and len(str(caught.value)) < 1_500


ARGUMENTS = {
    "device": [7, "cuda:x", "tpu"],
    "num_threads": ["2", 0, True],
    "backend": [7, [], "onnxruntime"],
    "precision": [[], "int3"],
    "task": [7, {}, "dance"],
    "streams": ["x", 0, []],
    "max_batch_tokens": ["1", 0],
    "join_calls": [[], "yes"],
    "compile": ["no"],
    "revision": [7, b"main"],
    "cache_dir": [7, b"cache"],
    "token": [7],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ARGUMENTS.items() for value in values])
def test_arguments_that_are_none(name, value):
    with pytest.raises(InputError, match=name):
        gte_deploy.load("owner/name" if name in ("revision", "cache_dir", "token") else None, **{name: value})


@pytest.mark.parametrize("backend", ["auto", "onnx", "openvino", "torch"])
def test_a_path_that_is_no_utf8_is_refused_and_a_link_helps(tmp_path, backend):
    source = builtin_path() if backend == "torch" else builtin_bundle()
    folder = copied(source, tmp_path / NO_UTF8)
    with pytest.raises(InputError, match=r"caf\\udcff' is not UTF-8 .* give a link with another name"):
        gte_deploy.load(folder, backend=backend)
    (tmp_path / "café").symlink_to(folder)
    with gte_deploy.load(tmp_path / "café", backend=backend, num_threads=1) as model:
        assert model.fill_mask("the [MASK] is old")


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "model.onnx", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["folder", "nothing", "circle"])
def test_files_of_a_bundle_that_are_none(tmp_path, name, kind):
    folder = copied(builtin_bundle(), tmp_path / "bundle")
    (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "circle":
        (folder / name).symlink_to(name)
    with pytest.raises(DOCUMENTED, match=r"missing|cannot be opened|has no manifest\.json"):
        gte_deploy.load(folder, backend="onnx")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root: acts as another user")
@pytest.mark.parametrize("name", [".", "manifest.json", "tokenizer.json", "model.onnx", "..", "config.json"])
def test_files_that_may_not_be_read_are_named(name):
    backend, source = ("torch", builtin_path()) if name == "config.json" else ("onnx", builtin_bundle())
    gte_deploy.load(None, backend=backend, num_threads=1).close()  # what is imported must be so before
    with tempfile.TemporaryDirectory() as outer:  # not in tmp_path, which other users may not enter
        os.chmod(outer, 0o755)
        folder = copied(source, Path(outer, "closed", "bundle"))
        if (folder / name).is_file():
            shutil.copy(folder / name, folder / "copy")  # the mode of a link is that of the package's own file
            (folder / "copy").replace(folder / name)
        (folder / name).chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(DOCUMENTED, match="(?i)permission denied|cannot be (read|looked up|opened)") as caught:
                gte_deploy.load(folder, backend=backend)
        finally:
            os.seteuid(0)
    assert "No such file" not in str(caught.value)


def test_what_is_written_needs_utf8_too(tmp_path, capsys):
    with pytest.raises(InputError, match="is not UTF-8"):
        require_utf8(tmp_path / NO_UTF8)
    from gte_deploy.exporters.bundle.writer import staging

    with pytest.raises(InputError, match="is not UTF-8"), staging(tmp_path / NO_UTF8, force=False):
        raise AssertionError
    assert not list(tmp_path.iterdir())


def test_the_locale_is_named_where_it_is_the_reason(tmp_path):
    folder = copied(builtin_bundle(), tmp_path / "café")
    done = subprocess.run(
        [sys.executable, "-m", "gte_deploy", "encode", "a", "-m", str(folder)],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == USAGE and b"(encoding ascii)" in done.stderr and b"PYTHONUTF8=1 helps" in done.stderr


@pytest.mark.parametrize("text", ["[" * 5_000 + "]" * 5_000, "a: " + "{a: " * 5_000 + "1" + "}" * 5_000])
@pytest.mark.parametrize("place", ["file", "--set"])
def test_a_recipe_that_is_nested_without_end(tmp_path, capsys, text, place):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    words = [str(file)] if place == "file" else ["gte-en-mlm-base", "--set", f"seed={text}"]
    assert train(["estimate", *words]) == FAILURE
    err = capsys.readouterr().err
    assert "not valid YAML" in err and "Traceback" not in err


def test_an_unknown_user_on_the_command_line(capsys):
    for words in (["encode", "a", "-m", "~nosuchuser/x"], ["verify", "~nosuchuser/x"], ["info", "~nosuchuser/x"]):
        assert deploy(words) == FAILURE
        assert "Give the whole path instead of ~" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_no_path(tmp_path):
    assert isinstance(builtin_bundle(), Path)  # the names above are of the same kinds as those that load
    with pytest.raises(CheckpointError, match="is empty"):
        gte_deploy.load(tmp_path)
