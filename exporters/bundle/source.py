"""The checkpoint that a bundle came from, as the manifest names it."""

import hashlib
import os
from pathlib import Path

from gte_deploy.core.files import sha256_file
from gte_deploy.core.hub import split_revision
from gte_deploy.models import BUILTIN_NAME
from gte_deploy.models.description import Description


def checkpoint_name(model: str | os.PathLike[str] | None) -> str:
    """Return the last part of a hub id or of a folder's real path: a bundle must not contain paths of this machine."""
    if model is None:
        return BUILTIN_NAME
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else split_revision(path.name)[0]


def checkpoint_source(model: str | os.PathLike[str] | None, checkpoint: Description) -> dict[str, str]:
    """Return the name of the checkpoint, the commit of a hub download, and the sha256 of the weights.

    For several weight files, the sha256 is that of the lines which sha256sum prints for the files.
    """
    is_hub_id = model is not None and not Path(model).expanduser().is_dir()
    source = {"name": split_revision(str(model))[0] if is_hub_id else checkpoint_name(model)}
    if checkpoint.folder.parent.name == "snapshots":
        source["revision"] = checkpoint.folder.name
    weights = checkpoint.weight_files
    digests = [sha256_file(file) for file in weights]
    if len(digests) == 1:
        source["sha256"] = digests[0]
    elif digests:
        lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, weights, strict=True))
        source["sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    return source
