"""Finds a model, bundle or checkpoint, in a folder or on the Hugging Face hub."""

import dataclasses
import glob
import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from gte_deploy.bundle.manifest import MANIFEST_NAME, is_bundle, read_manifest, require_manifest
from gte_deploy.bundle.signature import SIGNATURE_NAME, TrustedKeys
from gte_deploy.core.errors import BundleError
from gte_deploy.core.hub import HubModel
from gte_deploy.models import CHECKPOINT_PATTERNS, builtin_bundle, is_builtin, locate

# What bundles consist of. A manifest that names a pickle or code is refused: nothing of the kind is ever downloaded.
_SUFFIXES = {
    *(".json", ".txt", ".model", ".safetensors", ".npy", ".md", ".html"),
    *(".onnx", ".onnx_data", ".data", ".plan", ".cache", ".xml", ".pte"),
}


def resolve_model(
    name_or_path: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    trusted: TrustedKeys | None = None,
) -> Path:
    """Find the folder of a bundle or checkpoint; a hub id is downloaded once into the Hugging Face cache.

    The built-in model is a bundle. A repository with a bundle's manifest.json is a bundle: exactly the files that the
    manifest names are downloaded, all of the same commit. Any other repository is a checkpoint, also one with the
    manifest.json of another project. With trusted keys, only the manifest and its signatures are downloaded until a
    signature holds. Other arguments as in `gte_deploy.models.resolve_checkpoint`.

    Raises:
        CheckpointError: the name is unknown, or the download failed; the message says what to do.
        BundleError: the manifest is malformed, or names files that no bundle has.
        SignatureError: what is on the hub is not signed by a trusted key. A folder is left to `read_manifest`.
    """
    found = locate(name_or_path, revision=revision, cache_dir=cache_dir, token=token)
    if isinstance(found, HubModel):
        return _download(found, trusted)
    return builtin_bundle() if is_builtin(name_or_path) else found


def resolve_bundle(name_or_path: str | os.PathLike[str], trusted: TrustedKeys | None = None) -> Path:
    """Find the folder of a bundle, as `resolve_model` does.

    Raises:
        CheckpointError, BundleError: as in `resolve_model`; or what was found is not a bundle.
    """
    path = Path(name_or_path)
    if path.exists():  # its errors are the reader's
        return path
    folder = resolve_model(name_or_path, trusted=trusted)
    if not is_bundle(folder):
        raise BundleError(
            f"{name_or_path} is not a bundle: it has no {MANIFEST_NAME} of gte-export.",
            advice=f"If it is a checkpoint, make a bundle of it with: gte-export {name_or_path}",
        )
    return folder


def _download(model: HubModel, trusted: TrustedKeys | None) -> Path:
    file = model.file(MANIFEST_NAME)
    if trusted is not None:
        require_manifest(None if file is None else file.parent, model.id)
    if file is None or (trusted is None and not is_bundle(file.parent)):
        return model.download(CHECKPOINT_PATTERNS)
    # The commit of the manifest: a push between the downloads must not mix two bundles.
    commit = dataclasses.replace(model, revision=file.parent.name)
    if trusted is not None:
        commit.file(SIGNATURE_NAME)
    names = sorted(read_manifest(file.parent, trusted).files)
    if refused := [name for name in names if not is_data(name, names)]:
        raise BundleError(
            f"{model.id}: its manifest names {', '.join(refused[:5])}. A bundle has no such files, and code and "
            "pickles are never downloaded. Export the bundle again with gte-export."
        )
    return commit.download([MANIFEST_NAME, SIGNATURE_NAME, *map(glob.escape, names)])


def is_data(name: str, names: Collection[str]) -> bool:
    """Whether a file of a bundle may be downloaded: it holds data, and is neither code nor a pickle.

    `names` are all files of the bundle.
    """
    path = PurePosixPath(name)
    # The weights of OpenVINO's own format. Elsewhere, .bin is the suffix of PyTorch's pickles.
    return (
        path.suffix in _SUFFIXES
        or path.name in ("LICENSE", "NOTICE")
        or (path.suffix == ".bin" and str(path.with_suffix(".xml")) in names)
    )
