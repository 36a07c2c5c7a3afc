"""Signs a bundle: verifies it, and writes the signature of its manifest beside the manifest."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy.bundle.inspection import check_graphs
from gte_deploy.bundle.manifest import manifest_bytes, parse_manifest, verify_bundle
from gte_deploy.bundle.signature import (
    SIGNATURE_NAME,
    KeySource,
    fingerprint_of,
    read_private_key,
    read_signatures,
)
from gte_deploy.core.files import write_bytes


@dataclass(frozen=True)
class Signed:
    """A signed bundle.

    Args:
        path: the file with the signatures.
        key: sha256 of the public key that belongs to the signature, in hex.
        signatures: the number of signatures in the file.
    """

    path: Path
    key: str
    signatures: int

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain JSON data."""
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def describe(self) -> str:
        """Say for people where the signature is, and whose."""
        others = "" if self.signatures == 1 else f", which has {self.signatures} signatures"
        return f"{self.path}{others}: signed by the key {self.key}"


def sign_bundle(bundle: str | os.PathLike[str], key: KeySource) -> Signed:
    """Verify every file of a bundle, and sign its manifest.

    A signature is added to those that are there, so that a new key can take the place of an old one step by step. The
    same key signs the same manifest only once. To begin anew, remove the file.

    Args:
        bundle: the folder of the bundle.
        key: the private Ed25519 key in PEM.

    Raises:
        BundleError: the bundle is incomplete or altered, or its file of signatures holds something else.
        InputError: the key cannot be used.
        MissingDependencyError: the [sign] extra is not installed.
    """
    folder = Path(bundle)
    private = read_private_key(key)
    content = manifest_bytes(folder)
    manifest = parse_manifest(folder, content)
    verify_bundle(folder, manifest)
    check_graphs(folder, manifest)
    signature = private.sign(content)
    signatures = read_signatures(folder)
    if signature not in signatures:
        signatures = (*signatures, signature)
        write_bytes(folder / SIGNATURE_NAME, b"".join(signatures))
    return Signed(folder / SIGNATURE_NAME, fingerprint_of(private.public_key()), len(signatures))
