"""Signatures of a bundle: Ed25519 over the exact bytes of its manifest.json, which has the sha256 of all other files.

Their file holds nothing but signatures of 64 bytes, one after the other, so that OpenSSL writes and verifies it, too.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import InputError, MissingDependencyError, SignatureError
from gte_deploy.core.regular import read_regular

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

logger = logging.getLogger(__name__)

SIGNATURE_NAME = "manifest.json.sig"
SIGNATURE_BYTES = 64
_MOST_SIGNATURES = 64
_MAX_KEY_BYTES = 1 << 16
_BEGIN = b"-----BEGIN "

KeySource = str | os.PathLike[str] | bytes
"""A key in PEM: the path of its file, or its text."""


class TrustedKeys:
    """Public keys. A bundle that one of them has signed is trusted."""

    def __init__(self, keys: Sequence[KeySource]) -> None:
        """Read the keys.

        Raises:
            InputError: there is none, or one cannot be read or is no public Ed25519 key in PEM.
            MissingDependencyError: the [sign] extra is not installed.
        """
        if isinstance(keys, str | bytes | os.PathLike) or not isinstance(keys, Sequence):
            raise InputError(f"trusted_keys is {keys!r}; expected a list of public keys in PEM: paths or bytes")
        if not keys:
            raise InputError("trusted_keys is empty, and trusts nobody; give a public key, or leave it out")
        self.pem = tuple(_pem(key) for key in keys)
        """The keys in PEM, in their order."""
        self._keys = {fingerprint_of(key): key for key in map(_public_key, keys, self.pem)}

    def require_signature(self, folder: Path, manifest: bytes) -> str:
        """Verify that one of the keys has signed a manifest; return the fingerprint of the key.

        Args:
            folder: the bundle, which holds the signatures.
            manifest: the bytes of its manifest.json, as the caller will parse them.

        Raises:
            SignatureError: there is no signature, or none of these keys and this manifest.
        """
        from cryptography.exceptions import InvalidSignature

        signatures = read_signatures(folder)
        if not signatures:
            raise SignatureError(
                f"{folder} is not signed: it has no {SIGNATURE_NAME}, and a trusted key is asked for. Sign it with "
                "gte-deploy sign, or get it from where it is signed."
            )
        for name, key in self._keys.items():
            for signature in signatures:
                try:
                    key.verify(signature, manifest)
                except InvalidSignature:
                    continue
                logger.info("%s is signed by the key %s", folder, name)
                return name
        raise SignatureError(
            f"no signature in {folder / SIGNATURE_NAME} is one of its manifest.json by a trusted key "
            f"({', '.join(self._keys)}): the bundle was signed by somebody else, or altered since. Do not use it."
        )


def read_signatures(folder: Path) -> tuple[bytes, ...]:
    """Return the signatures of a bundle, each of 64 bytes; none if it is not signed. Nothing verifies them here.

    Raises:
        SignatureError: their file cannot be read, or holds something else.
    """
    file = folder / SIGNATURE_NAME
    try:
        data = read_regular(file, _MOST_SIGNATURES * SIGNATURE_BYTES)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise SignatureError(f"{file} cannot be read as signatures: {error}. Remove it, and sign again.") from error
    if not data or len(data) % SIGNATURE_BYTES:
        raise SignatureError(
            f"{file} has {len(data)} bytes; expected Ed25519 signatures of {SIGNATURE_BYTES} bytes each. Remove it, "
            "and sign again."
        )
    return tuple(data[start : start + SIGNATURE_BYTES] for start in range(0, len(data), SIGNATURE_BYTES))


def read_private_key(source: KeySource) -> "Ed25519PrivateKey":
    """Read the key that signs.

    Raises:
        InputError: it cannot be read, is encrypted, or is no private Ed25519 key in PEM.
        MissingDependencyError: the [sign] extra is not installed.
    """
    serialization, pem = _serialization(), _pem(source)
    what = f"the private key {_name_of(source)}"
    if b"PRIVATE KEY-----" not in pem:
        raise InputError(f"{what} is not a private key in PEM. {_MAKE_ONE}")
    try:
        key = _loaded(what, lambda: serialization.load_pem_private_key(pem, None))
    except TypeError as error:  # it is encrypted
        raise InputError(
            f"{what} has a passphrase, which gte-deploy does not ask for. Sign with OpenSSL, which asks: openssl "
            f"pkeyutl -sign -inkey KEY -rawin -in BUNDLE/manifest.json -out BUNDLE/{SIGNATURE_NAME}"
        ) from error
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{what} is of another kind ({type(key).__name__}); expected Ed25519. {_MAKE_ONE}")
    return key


_MAKE_ONE = "Make one with: openssl genpkey -algorithm ed25519 -out private.pem"
_GIVE_PUBLIC = "Write the public key of a private one with: openssl pkey -in private.pem -pubout -out public.pem"


def _public_key(source: KeySource, pem: bytes) -> "Ed25519PublicKey":
    serialization = _serialization()
    what = f"the public key {_name_of(source)}"
    if b"PRIVATE KEY-----" in pem:
        raise InputError(f"{what} is a private key, which belongs to nobody but its owner. {_GIVE_PUBLIC}")
    # What follows the first key would be ignored, and its owner would wonder.
    if pem.count(_BEGIN) != 1:
        raise InputError(f"{what} has {pem.count(_BEGIN)} blocks of PEM; expected one. {_GIVE_PUBLIC}")
    key = _loaded(what, lambda: serialization.load_pem_public_key(pem))
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{what} is of another kind ({type(key).__name__}); expected Ed25519. {_GIVE_PUBLIC}")
    return key


def fingerprint_of(key: "Ed25519PublicKey") -> str:
    """Return the name of a public key in messages: the sha256 of its DER form, in hex."""
    serialization = _serialization()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ModuleNotFoundError as error:
        raise MissingDependencyError("cryptography", "sign") from error
    return serialization


def _loaded(what: str, load: Callable[[], object]) -> object:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{what} is not a key in PEM that can be read ({error}). {_MAKE_ONE}") from error


def _pem(source: KeySource) -> bytes:
    """Return the text of a key, from its file unless it is the text itself."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and source.lstrip().startswith(_BEGIN.decode()):
        return source.encode()
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"a key is {source!r}; expected a path, or the bytes of a key in PEM")
    try:
        return read_regular(Path(source), _MAX_KEY_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"the key {os.fspath(source)} cannot be read: {error}") from error


def _name_of(source: KeySource) -> str:
    """Return the path of a key for messages; of a text nothing is shown."""
    if isinstance(source, bytes) or str(source).lstrip().startswith(_BEGIN.decode()):
        return "that was given as text"
    return os.fspath(source)
