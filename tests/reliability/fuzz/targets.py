"""The parsers of data of strangers, each as a function of bytes, for a fuzzer and for its corpus.

A target takes any bytes. It raises nothing but `Refused`: an error of the package, whose message is not empty. It
raises AssertionError if what it accepts is not what the parser promises. It needs neither torch nor an engine.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gte_deploy.bundle.inspection import inspect_bytes, with_data_as_inputs
from gte_deploy.bundle.manifest import MANIFEST_NAME, _checksum, read_manifest
from gte_deploy.core.errors import GteDeployError
from gte_deploy.models.weight_files import tensor_names
from gte_deploy.serving.failures import RequestError
from gte_deploy.serving.json_body import parse_json
from gte_deploy.text.tokenization import load_tokenizer

LONGEST_MESSAGE = 5000
TOKENIZER_CONFIG = json.dumps({f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")})


class Refused(Exception):
    """A parser has refused the bytes, as it should where they are not what it reads."""


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (GteDeployError, RequestError) as error:
        assert 0 < len(str(error)) < LONGEST_MESSAGE, "an error that says nothing, or repeats the file"
        raise Refused(str(error)) from error


@contextlib.contextmanager
def _folder_with(name: str, data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        yield Path(folder)


def graph(data: bytes) -> None:
    """The inspection of an ONNX graph, and the change that gives it its weights as inputs."""
    with _refusals():
        contents = inspect_bytes(data, "a graph")
        if contents.external:
            again = inspect_bytes(with_data_as_inputs(data, contents.external), "a graph")
            assert again.operators == contents.operators and not again.external


def manifest(data: bytes) -> None:
    """manifest.json: as it is, and, if it is an object, with a checksum that is right."""
    with _folder_with(MANIFEST_NAME, data) as folder, _refusals():
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(data)
            if isinstance(content, dict):
                content.pop("checksum", None)
                sealed = json.dumps({**content, "checksum": _checksum(content)})
                (folder / MANIFEST_NAME).write_text(sealed, encoding="utf-8")
        found = read_manifest(folder)
        (folder / MANIFEST_NAME).write_text(json.dumps(found.to_json()), encoding="utf-8")
        assert read_manifest(folder) == found


def tokenizer(data: bytes) -> None:
    """tokenizer.json, and a text for what it builds."""
    with _folder_with("tokenizer.json", data) as folder, _refusals():
        (folder / "tokenizer_config.json").write_text(TOKENIZER_CONFIG, encoding="utf-8")
        loaded = load_tokenizer(folder)
        (ids,) = loaded.encode_texts(["the king [MASK] \u00e9\u4e2d"], max_length=64, truncation=True)
        assert 0 < len(ids) <= 64


def safetensors_header(data: bytes) -> None:
    """The names of the tensors of a safetensors file, from its header."""
    with _folder_with("model.safetensors", data) as folder, _refusals():
        assert all(isinstance(name, str) for name in tensor_names(folder / "model.safetensors"))


def request_body(data: bytes) -> None:
    """The JSON of a request. What it accepts, json reads alike."""
    with _refusals():
        assert parse_json(data) == json.loads(data.decode())


TARGETS: dict[str, Callable[[bytes], Any]] = {
    target.__name__: target for target in (graph, manifest, tokenizer, safetensors_header, request_body)
}
