"""The families of models, and the search for its checkpoints. Importing this needs neither torch nor transformers."""

import os
from pathlib import Path

from gte_deploy.core.errors import CheckpointError
from gte_deploy.models.presets import PRESETS

__all__ = ["BUILTIN_NAME", "builtin_path", "resolve_checkpoint"]

BUILTIN_NAME = "gte-en-mlm-tiny"

# Only data: pickles (*.bin, *.pt) and code (*.py) are never downloaded.
_HUB_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")


def builtin_path() -> Path:
    """Folder of the model that ships inside the package."""
    return Path(__file__).with_name(BUILTIN_NAME.replace("-", "_"))


def resolve_checkpoint(
    name_or_path: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Find a checkpoint's folder; a hub id is downloaded once into the Hugging Face cache.

    Args:
        name_or_path: an existing folder, the name of a preset, a hub id `owner/name`, or None for the built-in model.
        revision: branch, tag or commit on the hub; None takes the default branch. Hub ids only.
        cache_dir: folder for downloads; None takes the Hugging Face cache. `HF_HUB_OFFLINE=1` reads only that folder.

    Raises:
        CheckpointError: the name is none of these, or the download failed; the message says what was tried.
    """
    if name_or_path is None or str(name_or_path) == BUILTIN_NAME:
        return builtin_path()
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError as error:  # the user does not exist, or has no home folder
        raise CheckpointError(f"{name_or_path}: {error} Give the whole path instead of ~.") from error
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} was given for the folder {path}; only hub ids have revisions")
        return path
    name = str(name_or_path)
    if path.exists():
        raise CheckpointError(f"{path} is a file; a checkpoint is the folder that holds config.json")
    return _download(_hub_id(name), revision=revision, cache_dir=cache_dir)


def _hub_id(name: str) -> str:
    if name in PRESETS and PRESETS[name]["hub_id"] is not None:
        return PRESETS[name]["hub_id"]
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith("/"):
        raise CheckpointError(
            f"no folder {name!r} (looked in {Path.cwd()}), and it is not a hub id of the form owner/name. "
            f"Known names: {', '.join(sorted(PRESETS))}."
        )
    return name


def _download(hub_id: str, *, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            allow_patterns=list(_HUB_PATTERNS),
        )
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of the two
        raise CheckpointError(
            f"no folder {hub_id!r} in {Path.cwd()}, and the Hugging Face hub did not give the model "
            f"{hub_id!r} (revision {revision or 'default'}): {type(error).__name__}: {error}. "
            "Check the name, the network and HF_HUB_OFFLINE, or pass the path of a downloaded folder."
        ) from error
    return Path(folder)
