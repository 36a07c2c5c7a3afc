import subprocess
import sys

import huggingface_hub
import pytest

from gte_deploy.core.errors import CheckpointError
from gte_deploy.models import BUILTIN_NAME, builtin_path, resolve_checkpoint


def test_the_default_is_the_built_in_model():
    assert resolve_checkpoint(None) == resolve_checkpoint(BUILTIN_NAME) == builtin_path()
    assert builtin_path().parts[-2:] == ("builtin", "gte_en_mlm_tiny")


def test_a_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(tmp_path) == tmp_path
    assert resolve_checkpoint("owner/name").resolve() == tmp_path / "owner" / "name", "a folder wins over a hub id"


@pytest.mark.parametrize("name", ["./missing", "/missing", "~/missing", "a/b/c", "missing", "owner/"])
def test_what_cannot_be_a_hub_id_is_refused_without_network(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("must not download"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no folder") as caught:
        resolve_checkpoint(name)
    assert repr(name) in str(caught.value) and "owner/name" in str(caught.value)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_checkpoint(tmp_path / "model.safetensors")


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="only hub ids have revisions"):
        resolve_checkpoint(tmp_path, revision="v1")


@pytest.mark.parametrize(
    ("name", "hub_id"), [("owner/name", "owner/name"), ("gte-base-en-v1.5", "Alibaba-NLP/gte-base-en-v1.5")]
)
def test_a_download_takes_data_only(name, hub_id, tmp_path, monkeypatch):
    calls = []

    def snapshot_download(*args, **kwargs):
        calls.append((args, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_checkpoint(name, revision="abc", cache_dir=tmp_path) == tmp_path
    ((args, kwargs),) = calls
    assert args == (hub_id,) and kwargs["revision"] == "abc" and kwargs["cache_dir"] == str(tmp_path)
    data, card = ["*.json", "*.model", "*.safetensors", "*.txt"], ["LICENSE*", "NOTICE", "README.md"]
    assert sorted(kwargs["allow_patterns"]) == data + card


_OFFLINE = """
import sys
from gte_deploy.core.errors import CheckpointError
from gte_deploy.models import resolve_checkpoint
try:
    print(resolve_checkpoint("owner/name", cache_dir=sys.argv[1]))
except CheckpointError as error:
    print("refused:", error)
"""


def _offline(cache) -> str:
    # A process of its own: huggingface_hub reads HF_HUB_OFFLINE at import.
    run = subprocess.run(
        [sys.executable, "-c", _OFFLINE, str(cache)],
        env={"HF_HUB_OFFLINE": "1", "HOME": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_offline_reads_the_cache_alone(tmp_path):
    said = _offline(tmp_path)
    assert said.startswith("refused:") and "'owner/name'" in said
    assert "Unset HF_HUB_OFFLINE" in said and "`hf download owner/name`" in said
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert _offline(tmp_path) == str(snapshot)


def test_importing_needs_neither_torch_nor_transformers():
    code = (
        "import sys, gte_deploy.models, gte_deploy.models.presets, gte_deploy.models.config;"
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'huggingface_hub'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
