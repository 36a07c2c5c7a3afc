"""Bundles on the hub: huggingface_hub itself, in a process of its own, asks a stand-in for the hub on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gte_deploy.bundle.manifest import FileEntry, read_manifest
from gte_deploy.core.files import sha256_file
from hub import Hub, running_hub

TEXTS = ["the king walked to the river", "paris is a city"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def bundle(bundle_of: Any, word_checkpoints: dict[str, Path]) -> Path:
    return bundle_of(word_checkpoints["embed"])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(hub: Hub, home: Path, *words: object, token: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """Run Python with these words in an environment that asks the stand-in."""
    kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**kept, **hub.environment(home, token=token), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


_LOAD = """
import json, sys, gte_deploy
name, texts, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
with gte_deploy.load(name, **options) as model:
    print(json.dumps([str(model.path), model.backend, model.encode(texts).tolist()]))
"""


def load(hub: Hub, home: Path, name: str, **environment: Any) -> tuple[Path, str, list[list[float]]]:
    options = environment.pop("options", {})
    asked = run(hub, home, "-c", _LOAD, name, json.dumps(TEXTS), json.dumps(options), **environment)
    assert asked.returncode == 0, asked.stderr
    path, backend, embeddings = json.loads(asked.stdout)
    return Path(path), backend, embeddings


_RESOLVE = """
import json, sys
from gte_deploy.bundle.download import resolve_model
from gte_deploy.core.errors import GteDeployError
for name in sys.argv[1:]:
    try:
        print(json.dumps(str(resolve_model(name))))
    except GteDeployError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def resolve(hub: Hub, home: Path, *names: str, **environment: Any) -> list[str]:
    """The folder of each name, or the class and message of its error."""
    asked = run(hub, home, "-c", _RESOLVE, *names, **environment)
    assert asked.returncode == 0, asked.stderr
    return [json.loads(line) for line in asked.stdout.splitlines()]


def test_a_bundle_is_pushed_and_loaded_again_by_revision_and_offline(hub, bundle, tmp_path):
    import gte_deploy

    pushed = run(hub, tmp_path, "-m", "gte_deploy", "push", bundle, "owner/made@dev", "--private", "--json", token=True)
    assert pushed.returncode == 0, pushed.stderr
    answer = json.loads(pushed.stdout)
    repository = hub.repositories["owner/made"]
    assert repository.private and repository.refs["dev"] == answer["commit"] != repository.refs["main"]
    assert repository.commits[answer["commit"]] == {".gitattributes": b"", **files_of(bundle)}
    assert repository.messages[-1].endswith(": embed, fp32")

    repository.commit("dev", {**files_of(bundle), "manifest.json": b"{}"})  # a later commit, which is not asked for
    name = f"owner/made@{answer['commit']}"
    path, backend, first = load(hub, tmp_path, name, token=True, options={"backend": "onnx"})
    assert path.name == answer["commit"] and backend == "onnx"
    with gte_deploy.load(bundle, backend="onnx") as model:
        assert first == model.encode(TEXTS).tolist()

    hub.requests.clear()
    # In the cache, the graph and its weights are links to files elsewhere, which OpenVINO refuses.
    _, backend, second = load(hub, tmp_path, name, HF_HUB_OFFLINE="1", options={"backend": "openvino"})
    assert not hub.requests and backend == "openvino" and (path / "onnx" / "model.onnx").is_symlink()
    with gte_deploy.load(bundle, backend="openvino") as model:
        assert second == model.encode(TEXTS).tolist()
    assert not list(path.parents[1].glob(".gte-deploy-*")), "the copy without links is removed"


def test_only_what_the_manifest_names_is_downloaded(hub, bundle, tmp_path):
    strangers = {"evil.py": b"1", "pytorch_model.bin": b"1", "onnx/other.onnx": b"1", "model.safetensors": b"1"}
    hub.add("owner/more", {**files_of(bundle), **strangers})
    (folder,) = resolve(hub, tmp_path, "owner/more")
    assert files_of(Path(folder)) == files_of(bundle)


def test_a_checkpoint_keeps_its_patterns(hub, word_checkpoints, tmp_path):
    checkpoint = files_of(word_checkpoints["embed"])
    hub.add("owner/checkpoint", {**checkpoint, "modeling.py": b"1", "pytorch_model.bin": b"1", "README.md": b"# Hi"})
    (folder,) = resolve(hub, tmp_path, "owner/checkpoint")
    assert files_of(Path(folder)) == {**checkpoint, "README.md": b"# Hi"}
    assert resolve(hub, tmp_path, "owner/checkpoint", HF_HUB_OFFLINE="1") == [folder]


WEB_APP = b'{"name": "Demo", "short_name": "Demo", "icons": [], "start_url": "/"}'


def test_a_checkpoint_with_the_manifest_of_another_project_is_read_and_named(hub, word_checkpoints, tmp_path):
    files = {**files_of(word_checkpoints["embed"]), "manifest.json": WEB_APP}
    hub.add("owner/demo", {**files, "app.py": b"1"})
    asked = run(hub, tmp_path, "-c", _LOAD, "owner/demo", json.dumps(TEXTS), "{}")
    assert asked.returncode == 0, asked.stderr
    folder, backend, embeddings = json.loads(asked.stdout)
    assert backend == "torch" and files_of(Path(folder)) == files
    assert "is read as a checkpoint: its manifest.json is not one of gte-export" in asked.stderr
    path, _, expected = load(hub, tmp_path, str(word_checkpoints["embed"]))
    assert path == word_checkpoints["embed"] and embeddings == expected

    verified = run(hub, tmp_path, "-m", "gte_deploy", "verify", "owner/demo")
    assert verified.returncode == 1 and "owner/demo is not a bundle" in verified.stderr


def test_a_push_does_not_mix_a_bundle_with_the_manifest_of_another_project(hub, bundle, tmp_path):
    hub.add("owner/demo", {".gitattributes": b"", "manifest.json": WEB_APP})
    refused = run(hub, tmp_path, "-m", "gte_deploy", "push", bundle, "owner/demo", token=True)
    assert refused.returncode == 1 and "it holds files that no bundle has: manifest.json" in refused.stderr
    assert len(hub.repositories["owner/demo"].commits) == 1


def test_refusals_say_what_to_do(hub, bundle, tmp_path):
    files = files_of(bundle)
    hub.add("owner/private", files, private=True)
    hub.add("owner/gated", files, gated=True)
    hub.add("owner/public", files)
    names = ("owner/private", "owner/gated", "owner/missing", "owner/public@v9", "owner/public@")
    private, gated, missing, revision, empty = resolve(hub, tmp_path, *names)
    for message in (private, missing):  # the hub does not tell the two apart
        assert "CheckpointError" in message and "no token was sent" in message and "hf auth login" in message
    assert "gated" in gated and f"{hub.url}/owner/gated" in gated and "HF_TOKEN" in gated
    assert "no branch, tag or commit 'v9'" in revision
    assert "expected a branch, tag or commit" in empty

    found, missing = resolve(hub, tmp_path, "owner/private", "owner/missing", token=True)
    assert files_of(Path(found)) == files
    assert "the token that was sent may not read it" in missing and hub.token not in missing

    (offline,) = resolve(hub, tmp_path, "owner/public", HF_HUB_OFFLINE="1")
    assert "CheckpointError" in offline and "HF_HUB_OFFLINE" in offline


def test_an_interrupted_download_is_finished_by_the_next_load(hub, bundle, tmp_path):
    hub.add("owner/big", files_of(bundle))
    # All but the manifest and smaller files: the client asks for the rest by itself, and gives up after some tries.
    hub.cut_after = len(files_of(bundle)["manifest.json"])
    (broken,) = resolve(hub, tmp_path, "owner/big")
    assert "CheckpointError" in broken, broken
    (offline,) = resolve(hub, tmp_path, "owner/big", HF_HUB_OFFLINE="1")
    assert "Error" in offline, "half a bundle is not taken for a whole one"
    hub.cut_after = None
    (folder,) = resolve(hub, tmp_path, "owner/big")
    assert files_of(Path(folder)) == files_of(bundle)


def test_a_file_that_is_not_the_manifests_is_refused(hub, bundle, tmp_path):
    files = files_of(bundle)
    weights = next(name for name in files if name.startswith("onnx/") and "data" in name)
    hub.add("owner/altered", {**files, weights: files[weights][:-1] + b"\x00"})
    asked = run(hub, tmp_path, "-m", "gte_deploy", "verify", "owner/altered")
    assert asked.returncode == 1
    assert "sha256" in asked.stderr and "download it again" in asked.stderr and weights in asked.stderr


def resealed(bundle: Path, folder: Path, name: str) -> dict[str, bytes]:
    """The files of a bundle whose manifest names one more file."""
    from gte_deploy.exporters.bundle.writer import write_manifest

    shutil.copytree(bundle, folder)
    (folder / name).write_bytes(b"print(1)")
    manifest = read_manifest(folder).to_json()
    entry = FileEntry((folder / name).stat().st_size, sha256_file(folder / name))
    manifest["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    from gte_deploy.bundle.manifest import _checksum

    del manifest["checksum"]
    write_manifest(folder, {**manifest, "checksum": _checksum(manifest)})
    return files_of(folder)


@pytest.mark.parametrize("name", ["modeling.py", "pytorch_model.bin", "weights.pkl"])
def test_code_and_pickles_are_refused_even_if_the_manifest_names_them(hub, bundle, tmp_path, name):
    hub.add("owner/evil", resealed(bundle, tmp_path / "evil", name))
    (message,) = resolve(hub, tmp_path / "home", "owner/evil")
    assert "BundleError" in message and name in message
    assert not list((tmp_path / "home").rglob(name)), "it was not downloaded"
    assert not any(name in request for request in hub.requests)


def test_a_push_replaces_a_bundle_and_nothing_else(hub, bundle, word_checkpoints, tmp_path):
    push = ("-m", "gte_deploy", "push", bundle)
    files = files_of(bundle)
    older = resealed(bundle, tmp_path / "older", "old.json")
    hub.add("owner/bundle", {".gitattributes": b"x", **older})
    pushed = run(hub, tmp_path, *push, "owner/bundle", "--message", "better", token=True)
    assert pushed.returncode == 0, pushed.stderr
    repository = hub.repositories["owner/bundle"]
    assert repository.commits[repository.refs["main"]] == {".gitattributes": b"x", **files}, "old.json is deleted"
    assert repository.messages[-1] == "better" and "gte_deploy.load('owner/bundle@" in pushed.stdout

    hub.add("owner/checkpoint", files_of(word_checkpoints["embed"]))
    refused = run(hub, tmp_path, *push, "owner/checkpoint", token=True)
    assert refused.returncode == 1 and "files that no bundle has" in refused.stderr
    assert len(hub.repositories["owner/checkpoint"].commits) == 1

    without = run(hub, tmp_path, *push, "owner/bundle")
    assert without.returncode == 2 and "HF_TOKEN" in without.stderr
    wrong = run(hub, tmp_path, *push, "owner/bundle", HF_TOKEN="hf_anothertoken")
    assert wrong.returncode == 1 and "may write" in wrong.stderr and "hf_anothertoken" not in wrong.stderr
    unnamed = run(hub, tmp_path, *push, "bundle", token=True)
    assert unnamed.returncode == 2 and "owner/name" in unnamed.stderr


def test_a_bundle_that_does_not_verify_is_not_pushed(hub, bundle, tmp_path):
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    (damaged / "config.json").write_text("{}")
    refused = run(hub, tmp_path, "-m", "gte_deploy", "push", damaged, "owner/new", token=True)
    assert refused.returncode == 1 and "config.json" in refused.stderr
    assert not hub.repositories and not hub.requests


def test_the_cache_can_be_named(hub, bundle, tmp_path):
    hub.add("owner/private", files_of(bundle), private=True, gated=False)
    options = {"cache_dir": str(tmp_path / "mine"), "token": hub.token, "revision": "main"}
    path, _, _ = load(hub, tmp_path / "home", "owner/private", options=options)
    assert path.is_relative_to(tmp_path / "mine")


def test_commands_take_a_hub_id(hub, bundle, tmp_path):
    hub.add("owner/bundle", files_of(bundle))
    for command in (["info"], ["verify"], ["encode", "a river", "-m"]):
        asked = run(hub, tmp_path, "-m", "gte_deploy", *command, "owner/bundle@main", "--json")
        assert asked.returncode == 0, asked.stderr
        assert asked.stdout.strip()


_SIGNED = """
import json, sys, gte_deploy
from gte_deploy.core.errors import GteDeployError
try:
    with gte_deploy.load(sys.argv[1], trusted_keys=[sys.argv[2]], num_threads=1) as model:
        print(json.dumps([str(model.path), model.encode("a text").tolist()]))
except GteDeployError as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def test_a_signed_bundle_keeps_its_signature_and_an_unsigned_one_is_not_downloaded(hub, bundle, tmp_path):
    from gte_deploy.bundle.signing import sign_bundle
    from keys import new_keys

    keys, public = new_keys(), tmp_path / "public.pem"
    public.write_bytes(keys.public)
    signed = shutil.copytree(bundle, tmp_path / "signed")
    sign_bundle(signed, keys.private)
    pushed = run(hub, tmp_path, "-m", "gte_deploy", "push", signed, "owner/signed", token=True)
    assert pushed.returncode == 0, pushed.stderr
    assert hub.repositories["owner/signed"].commits[hub.repositories["owner/signed"].refs["main"]] == {
        ".gitattributes": b"",
        **files_of(signed),
    }

    def load_signed(name: str, home: str) -> Any:
        asked = run(hub, tmp_path / home, "-c", _SIGNED, name, public)
        assert asked.returncode == 0, asked.stderr
        return json.loads(asked.stdout)

    path, _ = load_signed("owner/signed", "one")
    assert files_of(Path(path)) == files_of(signed)
    # Loaded without keys, it brings its signature along, for whoever verifies it later.
    (folder,) = resolve(hub, tmp_path / "two", "owner/signed")
    assert files_of(Path(folder)) == files_of(signed)

    hub.add("owner/unsigned", files_of(bundle))
    hub.add("owner/altered", {**files_of(signed), "manifest.json": files_of(signed)["manifest.json"] + b" "})
    hub.add("owner/checkpoint", {"config.json": b"{}", "model.safetensors": b""})
    for name, said in (
        ("owner/unsigned", "has no manifest.json.sig"),
        ("owner/altered", "altered since"),
        ("owner/checkpoint", "owner/checkpoint is not signed: only bundles are"),
    ):
        hub.requests.clear()
        answer = load_signed(name, "three")
        assert answer.startswith("SignatureError: ") and said in answer
        asked = {request.rpartition("/")[2] for request in hub.requests if f"/{name}/resolve/" in request}
        assert "manifest.json" in asked and asked <= {"manifest.json", "manifest.json.sig"}, "the signature comes first"

    pushed = run(hub, tmp_path, "-m", "gte_deploy", "push", bundle, "owner/signed", token=True)
    assert pushed.returncode == 0, pushed.stderr
    left = hub.repositories["owner/signed"].commits[hub.repositories["owner/signed"].refs["main"]]
    assert "manifest.json.sig" not in left, "the signature of the earlier bundle is of another manifest"
