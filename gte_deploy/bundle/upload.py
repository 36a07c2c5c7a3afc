"""Pushes a verified bundle to the Hugging Face hub. Importing this loads no huggingface_hub."""

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gte_deploy.bundle.download import is_data
from gte_deploy.bundle.inspection import check_graphs
from gte_deploy.bundle.manifest import MANIFEST_NAME, Manifest, is_bundle, open_bundle, read_manifest
from gte_deploy.bundle.signature import SIGNATURE_NAME, read_signatures
from gte_deploy.core.errors import BundleError, ExportError, InputError
from gte_deploy.core.hub import HubModel, hub_errors, split_revision

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What the hub itself puts into a new repository, and a card that somebody wrote in its web page.
_HUB_FILES = {".gitattributes", "README.md"}


@dataclass(frozen=True)
class Pushed:
    """A bundle on the hub.

    Args:
        repository: owner/name.
        commit: the id of the commit; `gte_deploy.load("owner/name@commit")` loads exactly this bundle.
        url: the page of the commit.
    """

    repository: str
    commit: str
    url: str

    def describe(self) -> str:
        """Say for people where it is, and how to load it."""
        return f"pushed to {self.url}\nload it with gte_deploy.load({f'{self.repository}@{self.commit}'!r})"


def push_to_hub(
    bundle: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Verify a bundle and push it to the hub, in one commit.

    The repository then holds exactly the bundle: files of an earlier bundle that this one lacks are deleted. A
    repository or branch that is not there is created.

    Args:
        bundle: the folder of the bundle.
        repository: owner/name, or owner/name@branch.
        private: whether a new repository is private.
        message: the message of the commit.
        token: access token that may write; None for HF_TOKEN, or that of `hf auth login`.

    Raises:
        BundleError: the bundle is incomplete or altered, or misses its bounds.
        InputError: the repository has no name of the form owner/name, or there is no token.
        ExportError: the hub refused the push, or the repository holds something else than a bundle.
    """
    folder = Path(bundle)
    manifest = open_bundle(folder)
    check_graphs(folder, manifest)
    if manifest.missed_bounds:
        raise BundleError(
            f"{folder} misses its bounds, the first: {manifest.missed_bounds[0]}. Only a bundle that keeps them is "
            "pushed; export it in a higher precision."
        )
    if strangers := [name for name in manifest.files if not is_data(name, manifest.files)]:
        raise BundleError(f"{folder} has {', '.join(strangers)}, which no load would download. Export it again.")
    name, branch = require_pushable(repository, token)
    return _push(folder, manifest, HubModel(name, branch, token=token), private=private, message=message)


def require_pushable(repository: str, token: str | None = None) -> tuple[str, str | None]:
    """Check, before a long export, what a push needs; return the id of the repository and the branch, or None.

    Raises:
        InputError: the repository has no name of the form owner/name, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name, branch = split_revision(repository)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{repository!r} is not a repository of the hub: {error}") from error
    if name.count("/") != 1:
        raise InputError(f"{repository!r} is not a repository of the hub; expected owner/name or owner/name@branch")
    if not (token or get_token()):
        raise InputError("a push needs a token that may write: set HF_TOKEN, or run `hf auth login`")
    return name, branch


def _push(folder: Path, manifest: Manifest, target: HubModel, *, private: bool, message: str | None) -> Pushed:
    from huggingface_hub import HfApi

    api, branch = HfApi(token=target.token), target.revision
    names = [MANIFEST_NAME, *([SIGNATURE_NAME] if read_signatures(folder) else []), *manifest.files]
    try:
        api.create_repo(target.id, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(target.id, branch=branch, exist_ok=True)
        stale = _earlier_files(api, target) - set(names)
        commit = api.upload_folder(
            repo_id=target.id,
            folder_path=folder,
            revision=branch,
            allow_patterns=list(map(glob.escape, names)),
            delete_patterns=list(map(glob.escape, sorted(stale))) or None,
            commit_message=message
            or f"{manifest.source.get('name', 'A bundle')}: {manifest.spec.task}, {manifest.precision}",
        )
    except BundleError as error:
        raise ExportError(f"nothing was pushed to {target.id}: {error}") from error
    except hub_errors() as error:
        raise ExportError(
            f"the hub did not take {folder} into {target.id}: {type(error).__name__}: {error} Check that the token may "
            "write there; the bundle is unchanged, and `gte-deploy push` tries again."
        ) from error
    return Pushed(target.id, commit.oid, commit.commit_url)


def _earlier_files(api: "HfApi", target: HubModel) -> set[str]:
    """Return the files of the bundle that the repository holds; nothing if it is new.

    Raises:
        BundleError: it holds anything else, which a push would mix with the bundle.
    """
    found = set(api.list_repo_files(target.id, revision=target.revision))
    earlier: Iterable[str] = ()
    if MANIFEST_NAME in found and (file := target.file(MANIFEST_NAME)) is not None and is_bundle(file.parent):
        earlier = {MANIFEST_NAME, SIGNATURE_NAME, *read_manifest(file.parent).files}
    if strangers := sorted(found - set(earlier) - _HUB_FILES):
        raise BundleError(
            f"it holds files that no bundle has: {', '.join(strangers[:5])}. Choose another repository, or a branch of "
            "its own: owner/name@branch."
        )
    return found & set(earlier)
