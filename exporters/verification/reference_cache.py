"""Caches what PyTorch computes for long batches, for later exports of the same weights.

An export in another precision, or for another engine, is compared with the same numbers. The encoder takes nearly all
the time of PyTorch's side, so the encoder's outputs are cached; heads are always computed.

Shapes: B rows, S tokens of the longest row, H hidden size.
"""

import contextlib
import datetime
import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from gte_deploy._version import __version__
from gte_deploy.backends.picks import cpu_model
from gte_deploy.core.files import cache_folder, sha256_file
from gte_deploy.exporters.verification.results import ReferenceUse
from gte_deploy.models import heads

OFF = "off"
"""The value of the option that turns the cache off."""

_FORMAT = 1
_SUFFIX = ".outputs"
_TEMPORARY = ".tmp"
_MAX_BYTES = 4 << 30
# Disk space that stays free for other files, such as the bundle's.
_FREE_BYTES = 1 << 30
# A smaller batch takes about as long to read as to compute.
_MIN_TOKENS = 256
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_DIGEST_BYTES = hashlib.sha256().digest_size
_OUTPUTS = ("last_hidden_state", "pooler_output")

Report = Callable[[str], None]


@dataclass(frozen=True)
class EncoderOutputs:
    """The outputs of transformers' encoder: hidden states [B, S, H], and [B, H] if the model has a pooler."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None


@dataclass(frozen=True)
class CachedOutputs:
    """The encoder's outputs for one batch.

    Args:
        arrays: name of the output -> float32 array.
        day: the day on which they were computed, in ISO format.
    """

    arrays: Mapping[str, NDArray[np.float32]]
    day: str


class ReferenceCache:
    """A folder with a file for each batch; the least recently used files are removed when it grows too large.

    A file is read only if no other user can have written it, and if its checksum is right. No error of the file system
    stops an export: what cannot be read is computed again.

    Args:
        folder: the folder; a new one is readable by this user alone.
        max_bytes: the largest total size of the files.
        report: called with one line if the folder cannot be used.
    """

    def __init__(self, folder: Path, *, max_bytes: int = _MAX_BYTES, report: Report | None = None) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        refusal = _prepare(folder)
        self._is_usable = refusal is None
        if refusal is not None and report is not None:
            report(f"PyTorch's outputs are not cached: {refusal}")

    def load(self, key: str) -> CachedOutputs | None:
        """Return the outputs that were stored for `key`; None if there are none, or the file is damaged."""
        data = memoryview(self._read(self._file(key)) if self._is_usable else b"")
        digest, stored = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(stored).digest() != digest:
            return None
        with np.load(io.BytesIO(stored), allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        facts = json.loads(arrays.pop("facts").tobytes())
        # Anyone who can write to the folder can give an old file of this user another name.
        return CachedOutputs(arrays, facts["day"]) if facts["key"] == key else None

    def store(self, key: str, outputs: CachedOutputs) -> None:
        """Store the outputs of a batch, unless the disk is nearly full."""
        if not self._is_usable:
            return
        facts = json.dumps({"key": key, "day": outputs.day}).encode()
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, facts=np.frombuffer(facts, np.uint8), **outputs.arrays)
        data = buffer.getbuffer()
        with contextlib.suppress(OSError):
            if self._make_room(_DIGEST_BYTES + len(data)):
                self._write(self._file(key), [hashlib.sha256(data).digest(), data])

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _read(self, file: Path) -> bytes:
        """Return the contents of a file that only this user can write, and record its use; b"" if there is none."""
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as opened:
                found = os.fstat(descriptor)
                if not (stat.S_ISREG(found.st_mode) and _is_private(found) and found.st_size <= self._max_bytes):
                    return b""
                with contextlib.suppress(OSError):  # a folder that is mounted read-only
                    os.utime(descriptor)
                return opened.read()
        return b""

    def _write(self, file: Path, parts: list[bytes | memoryview]) -> None:
        # Not synced: the checksum finds a file that a power cut left incomplete.
        descriptor, name = tempfile.mkstemp(dir=self._folder, suffix=_TEMPORARY)
        try:
            with open(descriptor, "wb") as opened:
                opened.writelines(parts)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> bool:
        """Remove files, the least recently used first, until `size` more bytes fit; return whether they do."""
        found = sorted(self._files())
        total = size + sum(entry_size for _, entry_size, _ in found)
        for _, entry_size, file in found:
            if total <= self._max_bytes:
                break
            file.unlink(missing_ok=True)
            total -= entry_size
        return total <= self._max_bytes and shutil.disk_usage(self._folder).free - size >= _FREE_BYTES

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield the time of last use in ns, the bytes and the path of each file; other files may be in the folder."""
        for file in self._folder.iterdir():
            if file.suffix in (_SUFFIX, _TEMPORARY):
                with contextlib.suppress(FileNotFoundError):  # another export removed it
                    entry = file.lstat()
                    yield entry.st_mtime_ns, entry.st_size, file


def open_cache(asked: str | os.PathLike[str] | None, report: Report) -> ReferenceCache | None:
    """Open the cache that an export asks for.

    Args:
        asked: its folder; None for one in the user's cache; `OFF` for no cache.
        report: called with one line if the folder cannot be used.
    """
    if asked == OFF:
        return None
    try:
        folder = cache_folder() / "reference" if asked is None else Path(asked)
    except OSError as error:
        report(f"PyTorch's outputs are not cached: {error}")
        return None
    return ReferenceCache(folder, report=report)


class CachingEncoder:
    """A model's encoder that takes its outputs for long batches from a cache, and stores new ones there.

    Args:
        encoder: transformers' encoder, on the CPU.
        cache: the cache.
    """

    def __init__(self, encoder: torch.nn.Module, cache: ReferenceCache) -> None:
        self._encoder, self._cache = encoder, cache
        self._key = encoder_key(encoder)
        self.use = ReferenceUse()
        """The number of batches so far, and how many of them came from the cache."""

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **types: torch.Tensor | None
    ) -> EncoderOutputs:
        """Return the outputs for a padded batch. Each argument is [B, S] int64, or None if there is none.

        `types` is `token_type_ids`, for an encoder that takes token types.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **types}
        is_cached = input_ids.numel() >= _MIN_TOKENS
        key = _batch_key(self._key, inputs) if is_cached else ""
        found = self._cache.load(key) if is_cached else None
        self.use = self.use.with_batch(None if found is None else found.day)
        if found is not None:
            pooled = found.arrays.get("pooler_output")
            hidden = torch.from_numpy(found.arrays["last_hidden_state"])
            return EncoderOutputs(hidden, None if pooled is None else torch.from_numpy(pooled))
        outputs: Any = self._encoder(**inputs)
        values: dict[str, Any] = {name: getattr(outputs, name, None) for name in _OUTPUTS}
        if is_cached:
            arrays = {name: value.numpy() for name, value in values.items() if value is not None}
            today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            self._cache.store(key, CachedOutputs(arrays, today))
        return EncoderOutputs(**values)


def encoder_key(encoder: torch.nn.Module) -> str:
    """Hash everything that decides an encoder's outputs, its weights included.

    It covers the code of the network and of the libraries, and the CPU's model: another CPU rounds some sums
    differently. The number of threads, which does the same, is not covered.
    """
    config: Any = encoder.config
    facts = {
        "format": _FORMAT,
        "versions": {"gte-deploy": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "class": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
        "config": {name: value for name, value in config.to_dict().items() if name != "_name_or_path"},
        "attention": getattr(config, "_attn_implementation", None),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "code": _code_of(encoder),
        "cpu": cpu_model(),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted({**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}.items()):
        _update(digest, name, tensor)
    return digest.hexdigest()


def _prepare(folder: Path) -> str | None:
    """Create the folder if there is none; return why it cannot be used, or None."""
    if not hasattr(os, "geteuid"):
        return "this system does not tell whose files they are"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        return str(error)
    return None if _is_private(found) else f"{folder} is another user's, or others can write to it"


def _is_private(found: os.stat_result) -> bool:
    """Whether a file or folder is this user's, and no other user can write to it."""
    return found.st_uid == os.geteuid() and not found.st_mode & _WRITABLE_BY_OTHERS


def _code_of(encoder: torch.nn.Module) -> dict[str, str]:
    """Return the sha256 of each Python file that defines a module of the encoder, or runs the encoder."""
    names = {type(module).__module__ for module in encoder.modules()} | {heads.__name__}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return {name: sha256_file(Path(file)) for name, file in files.items() if file is not None}


def _batch_key(encoder: str, inputs: Mapping[str, torch.Tensor | None]) -> str:
    digest = hashlib.sha256(encoder.encode())
    for name, tensor in inputs.items():
        if tensor is not None:
            _update(digest, name, tensor)
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor to a hash: its name, type, shape and bytes."""
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
