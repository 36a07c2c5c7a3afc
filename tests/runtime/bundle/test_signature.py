"""Signed bundles: OpenSSL's command line is the judge of keys and signatures, in both directions."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gte_deploy
from gte_deploy import loading
from gte_deploy.bulk import encode_files
from gte_deploy.bundle import manifest as manifest_module
from gte_deploy.bundle.manifest import MANIFEST_NAME, read_manifest
from gte_deploy.bundle.signature import SIGNATURE_NAME, TrustedKeys, read_signatures
from gte_deploy.bundle.signing import sign_bundle
from gte_deploy.bundle.verified import VerifiedBundle
from gte_deploy.cli import main
from gte_deploy.core.errors import BundleError, InputError, MissingDependencyError, SignatureError
from gte_deploy.models import builtin_bundle, builtin_path
from hub import in_cache

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="the command openssl is not installed")

TEXT = "the [MASK] is old"


def openssl(*words: object, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, check=check, timeout=60)


class Owner:
    """Somebody with a pair of keys, made by OpenSSL."""

    def __init__(self, folder: Path, name: str, algorithm: str = "ed25519") -> None:
        self.private, self.public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
        openssl("genpkey", "-algorithm", algorithm, "-out", self.private)
        openssl("pkey", "-in", self.private, "-pubout", "-out", self.public)


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return SimpleNamespace(alice=Owner(folder, "alice"), bob=Owner(folder, "bob"), rsa=Owner(folder, "rsa", "rsa"))


@pytest.fixture
def bundle(tmp_path) -> Path:
    return shutil.copytree(builtin_bundle(), tmp_path / "bundle")


@pytest.fixture
def signed(bundle, owners) -> Path:
    sign_bundle(bundle, owners.alice.private)
    return bundle


def load(folder, *keys, **options):
    return gte_deploy.load(folder, trusted_keys=keys, num_threads=1, **options)


def test_openssl_verifies_what_is_signed_here(signed, owners):
    verify = ["pkeyutl", "-verify", "-pubin", "-rawin", "-in", signed / MANIFEST_NAME, "-sigfile"]
    assert b"Success" in openssl(*verify, signed / SIGNATURE_NAME, "-inkey", owners.alice.public).stdout
    assert openssl(*verify, signed / SIGNATURE_NAME, "-inkey", owners.bob.public, check=False).returncode != 0


def test_what_openssl_signs_is_verified_here(bundle, owners):
    sign = ["pkeyutl", "-sign", "-rawin", "-in", bundle / MANIFEST_NAME, "-out", bundle / SIGNATURE_NAME]
    openssl(*sign, "-inkey", owners.bob.private)
    with load(bundle, owners.bob.public) as model, gte_deploy.load() as plain:
        assert model.fill_mask(TEXT) == plain.fill_mask(TEXT)
    with pytest.raises(SignatureError, match="by a trusted key .*signed by somebody else, or altered"):
        load(bundle, owners.alice.public)


def test_one_trusted_key_is_enough_and_an_old_key_can_be_replaced(signed, owners):
    for keys in ([owners.alice.public], [owners.bob.public, owners.alice.public]):
        load(signed, *keys).close()
    assert sign_bundle(signed, owners.bob.private).signatures == 2
    assert sign_bundle(signed, owners.bob.private).signatures == 2, "the same key signs once"
    for owner in (owners.alice, owners.bob):
        load(signed, owner.public).close()
    both = (signed / SIGNATURE_NAME).read_bytes()
    (signed / SIGNATURE_NAME).write_bytes(both[64:])  # the old key has leaked, and its signature is gone
    load(signed, owners.bob.public).close()
    with pytest.raises(SignatureError):
        load(signed, owners.alice.public)


def test_keys_may_be_given_as_text(signed, owners):
    pem = owners.alice.public.read_bytes()
    load(signed, pem).close()
    load(signed, pem.decode()).close()
    load(signed, str(owners.alice.public)).close()


def test_nothing_of_an_unsigned_or_altered_bundle_is_parsed(signed, owners, monkeypatch):
    def parse(*_):
        raise AssertionError("parsed before the signature held")

    monkeypatch.setattr(manifest_module, "parse_manifest", parse)
    monkeypatch.setattr(manifest_module.json, "loads", parse)
    with pytest.raises(AssertionError, match="parsed before"):
        load(signed, owners.alice.public)  # what is parsed last, so that the rest of the test means something
    with pytest.raises(SignatureError):
        load(signed, owners.bob.public)
    (signed / MANIFEST_NAME).write_bytes(b"[" * 100_000)
    with pytest.raises(SignatureError, match="altered"):
        load(signed, owners.alice.public)
    (signed / SIGNATURE_NAME).unlink()
    with pytest.raises(SignatureError, match=f"is not signed: it has no {SIGNATURE_NAME}"):
        load(signed, owners.alice.public)


def test_the_bytes_that_are_verified_are_the_bytes_that_are_parsed(signed, owners, monkeypatch):
    """The manifest changes right after its signature held; a second reading would take the new one."""
    other = json.loads((signed / MANIFEST_NAME).read_text())
    verify = TrustedKeys.require_signature

    def swap(keys, folder, content):
        found = verify(keys, folder, content)
        (folder / MANIFEST_NAME).write_text(json.dumps(other | {"checksum": "0" * 64}))
        return found

    monkeypatch.setattr(TrustedKeys, "require_signature", swap)
    with load(signed, owners.alice.public) as model:
        assert model.fill_mask(TEXT)
    with pytest.raises(BundleError, match="checksum"):
        read_manifest(signed)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_that_is_swapped_and_swapped_back_is_never_read(signed, owners, name, monkeypatch):
    file, kept = signed / name, signed / "kept"

    class Swapping(VerifiedBundle):
        def __init__(self, folder, manifest):
            super().__init__(folder, manifest)
            os.link(file, kept)
            (folder / "aside").write_text("{}")
            (folder / "aside").replace(file)

        def require_same_paths(self):
            kept.replace(file)
            super().require_same_paths()

    monkeypatch.setattr(loading, "VerifiedBundle", Swapping)
    with load(signed, owners.alice.public) as model, gte_deploy.load() as plain:
        assert model.fill_mask(TEXT) == plain.fill_mask(TEXT)


def test_the_signature_covers_every_file_that_is_read(signed, owners):
    """By the manifest's hashes. What the manifest does not name is refused by its name, or never read."""
    for name in read_manifest(signed).files:
        whole = (signed / name).read_bytes()
        (signed / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BundleError, match="and the manifest says"):
            load(signed, owners.alice.public)
        (signed / name).write_bytes(whole)
    (signed / "evil.py").write_text("raise SystemExit")
    load(signed, owners.alice.public).close()
    (signed / "config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"config\.json would be read, and the manifest does not name it"):
        load(signed, owners.alice.public)


def test_what_is_never_signed_is_refused_by_name(owners, tmp_path):
    checkpoint = builtin_path()
    with pytest.raises(SignatureError, match=f"{checkpoint} is not signed: only bundles are"):
        load(checkpoint, owners.alice.public)
    with pytest.raises(SignatureError, match="is not signed"):
        load(None, owners.alice.public)
    with pytest.raises(SignatureError, match="is not signed: only bundles are"):
        load(None, owners.alice.public, backend="torch")
    (tmp_path / "text.txt").write_text("a text\n")
    with pytest.raises(SignatureError):
        encode_files(
            str(tmp_path / "text.txt"), tmp_path / "out.npy", load_options={"trusted_keys": [str(owners.alice.public)]}
        )


def test_keys_that_are_none_are_refused_by_name(bundle, owners, tmp_path):
    locked = tmp_path / "locked.pem"
    openssl("pkey", "-in", owners.alice.private, "-aes256", "-passout", "pass:x", "-out", locked)
    two, junk = tmp_path / "two.pem", tmp_path / "junk.pem"
    two.write_bytes(owners.alice.public.read_bytes() + owners.bob.public.read_bytes())
    junk.write_bytes(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    for key, said in (
        (owners.alice.private, "is a private key"),
        (owners.rsa.public, r"another kind \(.*RSA.*\); expected Ed25519"),
        (two, "has 2 blocks of PEM; expected one"),
        (junk, "not a key in PEM that can be read"),
        (b"AAAA", "that was given as text has 0 blocks of PEM"),
        (tmp_path / "nowhere.pem", "cannot be read: .*No such file"),
        (tmp_path, "cannot be read: .*directory"),
        (7, "a key is 7; expected a path"),
    ):
        with pytest.raises(InputError, match=said):
            load(bundle, key)
    for keys, said in (([], "is empty, and trusts nobody"), (str(owners.alice.public), "expected a list")):
        with pytest.raises(InputError, match=said):
            gte_deploy.load(bundle, trusted_keys=keys)
    for key, said in (
        (owners.alice.public, "is not a private key in PEM"),
        (owners.rsa.private, r"another kind \(.*RSA.*\); expected Ed25519"),
        (locked, "has a passphrase.*openssl pkeyutl -sign"),
    ):
        with pytest.raises(InputError, match=said):
            sign_bundle(bundle, key)
    assert not (bundle / SIGNATURE_NAME).exists()


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"x" * 65, b"x" * 64 * 65])
def test_a_file_of_signatures_that_is_none_is_refused(signed, owners, content):
    (signed / SIGNATURE_NAME).write_bytes(content)
    for act in (lambda: load(signed, owners.alice.public), lambda: sign_bundle(signed, owners.alice.private)):
        with pytest.raises(SignatureError, match=SIGNATURE_NAME):
            act()


def test_a_pipe_in_place_of_signatures_or_key_is_refused_at_once(signed, owners, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a pipe"):
        load(signed, tmp_path / "pipe")
    (signed / SIGNATURE_NAME).unlink()
    os.mkfifo(signed / SIGNATURE_NAME)
    with pytest.raises(SignatureError, match="a pipe"):
        load(signed, owners.alice.public)


def test_only_a_whole_bundle_is_signed(bundle, owners):
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json has 2 bytes"):
        sign_bundle(bundle, owners.alice.private)
    assert read_signatures(bundle) == ()


def test_a_pickled_model_asks_for_its_signature_again(signed, owners):
    with load(signed, owners.alice.public) as model:
        data = pickle.dumps(model)
    pickle.loads(data).close()  # by the key's text: the file of the key may be gone
    (signed / SIGNATURE_NAME).unlink()
    with pytest.raises(SignatureError, match="is not signed"):
        pickle.loads(data)


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(signed, owners, tmp_path):
    snapshot = in_cache(signed, tmp_path / "hub")
    assert (snapshot / SIGNATURE_NAME).is_symlink()
    load(snapshot, owners.alice.public).close()


def test_commands_sign_and_verify(bundle, owners, capsys):
    def printed(*words, code=0):
        assert main([str(word) for word in words]) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    alice, bob = owners.alice.public, owners.bob.public
    assert "is not signed" in printed("verify", bundle, "--key", alice, code=1)
    answer = json.loads(printed("sign", bundle, "--key", owners.alice.private, "--json"))
    der = openssl("pkey", "-pubin", "-in", alice, "-outform", "DER").stdout
    hashed = subprocess.run(["openssl", "dgst", "-sha256", "-r"], input=der, capture_output=True, check=True).stdout
    assert answer == {"path": str(bundle / SIGNATURE_NAME), "key": hashed.decode().split()[0], "signatures": 1}
    assert f"signed by the key {answer['key']}" in printed("verify", bundle, "--key", bob, "--key", alice)
    assert json.loads(printed("verify", bundle, "--key", alice, "--json"))["signed_by"] == answer["key"]
    assert "signed by somebody else" in printed("verify", bundle, "--key", bob, code=1)
    assert "signature was not checked" in printed("verify", bundle)
    assert "old" in printed("fill-mask", "-m", bundle, "--trusted-key", alice, TEXT)
    for words in (["fill-mask", "-m", bundle], ["encode-sparse", "-m", bundle], ["serve", bundle]):
        texts = [] if words[0] == "serve" else [TEXT]
        assert "signed by somebody else" in printed(*words, "--trusted-key", bob, *texts, code=1)


def test_a_missing_cryptography_is_named_with_the_command_that_installs_it(signed, owners):
    code = (
        "import sys\n"
        "sys.modules['cryptography'] = None\n"
        "import gte_deploy\n"
        "gte_deploy.load(sys.argv[1]).close()\n"
        "try:\n"
        "    gte_deploy.load(sys.argv[1], trusted_keys=[sys.argv[2]])\n"
        "except gte_deploy.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    run = [sys.executable, "-c", code, signed, owners.alice.public]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    assert "'cryptography' is not installed" in done.stdout and "[sign]" in done.stdout
    assert issubclass(MissingDependencyError, ImportError)
