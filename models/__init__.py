"""The families of models, and the search for its checkpoints. Importing this needs neither torch nor transformers."""

import os
from pathlib import Path
from typing import Any

from gte_deploy.core.errors import CheckpointError, ConfigError, InputError
from gte_deploy.core.files import read_json, require_utf8
from gte_deploy.core.hub import HubModel, split_revision
from gte_deploy.core.options import did_you_mean
from gte_deploy.models.presets import PRESETS

__all__ = [
    "BUILTIN_EMBED_NAME",
    "BUILTIN_NAME",
    "BUILTIN_NAMES",
    "CHECKPOINT_PATTERNS",
    "TOKENIZER_PATTERNS",
    "builtin_bundle",
    "builtin_embed_bundle",
    "builtin_path",
    "is_builtin",
    "locate",
    "require_checkpoint",
    "resolve_checkpoint",
]

BUILTIN_NAME = "gte-en-mlm-tiny"
BUILTIN_EMBED_NAME = "gte-en-embed-tiny"
BUILTIN_NAMES = (BUILTIN_NAME, BUILTIN_EMBED_NAME)
_KNOWN_NAMES = sorted({*PRESETS, *BUILTIN_NAMES})
_MOST_SHOWN = 200  # characters of a name in a message
_FORMATS = "gte-deploy-"  # how the formats begin that the manifest.json of bundles and repositories name
_FIRST_FILES = ("config.json", "modules.json", "adapter_config.json")
_MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".plan")
_TEXT_MODULES = ("Transformer", "Router", "Asym")  # also MLMTransformer; a Router or Asym has one inside

CHECKPOINT_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "README.md", "LICENSE*", "NOTICE")
"""The files of a checkpoint on the hub, and its licence. Pickles (*.bin, *.pt) and code (*.py) are never downloaded."""
TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.model")
"""Those of its tokenizer."""


def builtin_path() -> Path:
    """Folder of the checkpoint that ships inside the package."""
    return builtin_bundle() / BUILTIN_NAME.replace("-", "_")


def builtin_bundle() -> Path:
    """Folder of the bundle of that checkpoint. Its graphs read the weights from the checkpoint, which lies inside."""
    return Path(__file__).with_name("builtin")


def builtin_embed_bundle() -> Path:
    """Folder of the bundle of `gte-en-embed-tiny`, the embedding model that ships inside the package, in INT8."""
    return Path(__file__).with_name("builtin_embed")


def is_builtin(name_or_path: str | os.PathLike[str] | None) -> bool:
    """Whether this means the built-in model with a checkpoint, as in `resolve_checkpoint`."""
    return name_or_path is None or str(name_or_path) == BUILTIN_NAME


def resolve_checkpoint(
    name_or_path: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Path:
    """Find a checkpoint's folder; a hub id is downloaded once into the Hugging Face cache.

    Args:
        name_or_path: an existing folder, the name of a preset, a hub id `owner/name`, or None for the built-in model.
            A hub id and a preset may end with a revision: `owner/name@v1`.
        revision: branch, tag or commit on the hub; None takes the default branch. Hub ids only.
        cache_dir: folder for downloads; None takes the Hugging Face cache. `HF_HUB_OFFLINE=1` reads only that folder.
        token: access token for gated and private models; None takes HF_TOKEN, or that of `hf auth login`.

    Raises:
        CheckpointError: the name is none of these, or the download failed; the message says what was tried.
    """
    found = locate(name_or_path, revision=revision, cache_dir=cache_dir, token=token)
    return found.download(CHECKPOINT_PATTERNS) if isinstance(found, HubModel) else found


def require_checkpoint(name_or_path: str | os.PathLike[str] | None) -> None:
    """Refuse what is plainly no checkpoint, before the libraries that read one are imported, which takes seconds.

    A hub id is not looked up.

    Raises:
        CheckpointError: the name is none, or the folder holds a bundle or no model.
        ConfigError: the model's architecture is not supported.
    """
    folder = locate(name_or_path)
    if isinstance(folder, HubModel):
        return
    manifest, config = read_json(folder / "manifest.json"), read_json(folder / "config.json")
    if isinstance(manifest, dict) and str(manifest.get("format")).startswith(_FORMATS):
        raise CheckpointError(
            f"{folder} is a bundle, which was exported already, and no checkpoint.",
            advice=f"Run it with `gte-deploy serve {folder}`, or give the checkpoint that it was exported from: "
            f"`gte-deploy info {folder}` names it.",
        )
    if not any((folder / name).is_file() for name in _FIRST_FILES):
        raise CheckpointError(
            f"{folder} is no checkpoint: it has no config.json{_what_is_in(folder)}.",
            advice="Give the folder that save_pretrained of transformers or sentence-transformers wrote, or a hub id.",
        )
    _require_text_modules(folder)
    if isinstance(config, dict) and "model_type" in config:
        from gte_deploy.models.families import family_of_fields

        family_of_fields(config, folder / "config.json")


def _what_is_in(folder: Path) -> str:
    """Say what a folder without config.json has instead: models of other tools, or nothing."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return ", and is empty"
    foreign = [name for name in names if name.endswith(_MODEL_SUFFIXES)]
    return f", only {', '.join(foreign[:3])}" if foreign else ""


def _require_text_modules(folder: Path) -> None:
    """Refuse a folder of sentence-transformers whose modules include none that reads texts with a transformer.

    Raises:
        ConfigError: the modules are of another kind, for images for example.
    """
    modules = read_json(folder / "modules.json")
    if (folder / "config.json").is_file() or not isinstance(modules, list):
        return
    kinds = [str(each.get("type")).rpartition(".")[2] for each in modules if isinstance(each, dict)]
    if kinds and not any(kind.endswith(_TEXT_MODULES) for kind in kinds):
        raise ConfigError(
            f"{folder / 'modules.json'} lists {', '.join(kinds)}; expected a Transformer among them.",
            advice="Only encoders of text are exported; docs/families.md lists them.",
        )


def locate(
    name_or_path: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Path | HubModel:
    """Say where a model is, without a download: in a folder, or on the hub. Arguments as in `resolve_checkpoint`.

    Raises:
        InputError: an argument is no text.
        CheckpointError: the name is neither a folder nor a hub id, or cannot be looked up.
    """
    _require_texts(path=name_or_path, revision=revision, cache_dir=cache_dir, token=token)
    if name_or_path is None or is_builtin(name_or_path):
        return builtin_path()
    if str(name_or_path) == BUILTIN_EMBED_NAME:
        return builtin_embed_bundle()
    try:
        path = Path(name_or_path).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except RuntimeError as error:  # the user does not exist, or has no home folder
        raise CheckpointError(f"{name_or_path}: {error} Give the whole path instead of ~.") from error
    except OSError as error:  # too long a name, or a folder above it that may not be read
        raise CheckpointError(f"{str(name_or_path)[:_MOST_SHOWN]} cannot be looked up: {error.strerror}") from error
    if is_folder:
        require_utf8(path)
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} was given for the folder {path}; only hub ids have revisions")
        return path
    if exists:
        raise CheckpointError(
            f"{path} is a file; a checkpoint or bundle is a folder, with config.json or manifest.json in it.",
            advice=f"Give the folder: {path.parent}",
        )
    name, in_name = split_revision(str(name_or_path))
    if None not in (revision, in_name) and revision != in_name:
        raise CheckpointError(f"two revisions were given: {in_name!r} in {str(name_or_path)!r}, and {revision!r}")
    return HubModel(_hub_id(name), revision or in_name, cache_dir, token)


def _require_texts(**arguments: Any) -> None:
    for name, value in arguments.items():
        takes_paths = name in ("path", "cache_dir")
        text = os.fspath(value) if takes_paths and isinstance(value, os.PathLike) else value
        if text is not None and not isinstance(text, str):
            raise InputError(f"{name} must be a text{' or a Path' if takes_paths else ''}, not {type(text).__name__}")


def _hub_id(name: str) -> str:
    if name in PRESETS and PRESETS[name]["hub_id"] is not None:
        return PRESETS[name]["hub_id"]
    is_path = name.startswith((".", "/", "~")) or any(mark in name for mark in "\\:")
    if is_path or name.count("/") != 1 or name.endswith("/"):
        raise CheckpointError(
            f"no folder {name!r} (looked in {Path.cwd()}), and it is not a hub id of the form owner/name"
            f"{did_you_mean(name, _KNOWN_NAMES) or '.'}",
            advice=f"Known names: {', '.join(_KNOWN_NAMES)}.",
        )
    return name
