"""Downloads of models from the Hugging Face hub, and what its errors mean. Importing this loads no huggingface_hub."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gte_deploy.core.errors import CheckpointError


@dataclass(frozen=True)
class HubModel:
    """A model on the hub, at one revision.

    Args:
        id: owner/name.
        revision: branch, tag or commit; None for the default branch.
        cache_dir: folder for downloads; None for the Hugging Face cache.
        token: access token; None for HF_TOKEN, or the one that `hf auth login` stored. It is never printed.
    """

    id: str
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | None = field(default=None, repr=False)

    def download(self, patterns: Sequence[str]) -> Path:
        """Download the files that match one of the patterns; return their folder in the cache.

        An interrupted download goes on where it stopped. `HF_HUB_OFFLINE=1` reads only the cache.

        Raises:
            CheckpointError: the hub did not give the files, and the cache lacks them; the message says what to do.
        """
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    self.id,
                    revision=self.revision,
                    cache_dir=self._cache_dir,
                    token=self.token,
                    allow_patterns=list(patterns),
                )
            )
        except hub_errors() as error:
            raise CheckpointError(self.explain(error)) from error

    def file(self, name: str) -> Path | None:
        """Download one file; None if this revision, or the cache that is read offline, has no such file.

        Raises:
            CheckpointError: the hub did not answer as expected; the message says what to do.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(
                hf_hub_download(self.id, name, revision=self.revision, cache_dir=self._cache_dir, token=self.token)
            )
        except EntryNotFoundError:
            return None
        except hub_errors() as error:
            raise CheckpointError(self.explain(error)) from error

    @property
    def _cache_dir(self) -> str | None:
        return None if self.cache_dir is None else os.fspath(self.cache_dir)

    def explain(self, error: Exception) -> str:
        """Say what an error of huggingface_hub means for this model, and what to do about it."""
        from huggingface_hub import constants, get_token
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        response = error.response if isinstance(error, HfHubHTTPError) else None
        # requests, which huggingface_hub before 1.0 uses, takes a response of an error for false.
        status = None if response is None else response.status_code
        page, has_token = f"{constants.ENDPOINT}/{self.id}", bool(self.token or get_token())
        log_in = "set HF_TOKEN, or run `hf auth login`, with a token of an account that may read it"
        if isinstance(error, GatedRepoError):
            return f"{self.id} is gated on the hub: accept its terms at {page}, and {log_in}."
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            sent = "the token that was sent may not read it" if has_token else "no token was sent"
            return (
                f"no folder {self.id!r} in {Path.cwd()}, and the hub at {constants.ENDPOINT} shows no such model: it "
                f"does not exist, or it is private and {sent}. Check the name; for a private model {log_in}."
            )
        if isinstance(error, RevisionNotFoundError):
            return f"{self.id} has no branch, tag or commit {self.revision!r}; {page}/tree/main lists the branches."
        if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
            at = "" if self.revision is None else f" --revision {self.revision}"
            return (
                f"no folder {self.id!r} in {Path.cwd()}, and HF_HUB_OFFLINE is set, while the cache does not have "
                f"{self.id} (revision {self.revision or 'default'}). Unset HF_HUB_OFFLINE, or run "
                f"`hf download {self.id}{at}` where there is a network, and give the path of what it wrote."
            )
        said = str(error).rstrip(".")
        return (
            f"no folder {self.id!r} in {Path.cwd()}, and the Hugging Face hub did not give the model {self.id!r} "
            f"(revision {self.revision or 'default'}): {type(error).__name__}: {said}. Check the name, the network "
            "and HF_HUB_OFFLINE, or pass the path of a downloaded folder. The next try goes on with what it had."
        )


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises: its own errors, those of whichever HTTP library it uses, and the system's."""
    from huggingface_hub import errors

    own = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (OSError, ValueError, *errors.HfHubHTTPError.__bases__, *own)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `owner/name@revision` into the id and the revision, None if there is none.

    Raises:
        CheckpointError: nothing stands after the "@".
    """
    hub_id, at, revision = name.partition("@")
    if at and not revision:
        raise CheckpointError(f"{name!r} ends with @; expected a branch, tag or commit after it, as in {hub_id}@main")
    return hub_id, revision or None
