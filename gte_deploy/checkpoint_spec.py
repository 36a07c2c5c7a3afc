"""The facts that the runtime needs of a checkpoint folder, read without torch or transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from gte_deploy.errors import CheckpointError, ConfigError
from gte_deploy.spec import POOLINGS, ModelSpec, Pooling, SparseSpec, Task

# sentence-transformers writes one boolean for each mode ("legacy", which every reader knows) or `pooling_mode`.
_LEGACY_POOLING_PREFIX = "pooling_mode_"
_LEGACY_POOLING_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


class ConfigFacts(Protocol):
    """The fields of transformers.GteConfig that are read here; properties, for they are only read."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def num_labels(self) -> int | None: ...
    @property
    def id2label(self) -> Mapping[int, str] | Mapping[str, str] | None: ...


def spec_from_checkpoint(folder: Path, config: ConfigFacts, task: Task, pooling: str = "auto") -> ModelSpec:
    """The spec of a checkpoint folder whose config has been read.

    `pooling` "auto" takes what 1_Pooling/config.json says; without that file "cls" for an embedding checkpoint, as
    the family was trained, and "mean" for the others.

    Raises:
        ConfigError: the folder asks for a pooling, a module or a prompt rule that is not honoured.
        CheckpointError: a JSON file is unreadable.
    """
    # Modules matter only for the task they belong to.
    modules = _module_types(folder) if task == "embed" else _all_module_types(folder)
    prompts, default_prompt_name = _prompts(folder)
    is_classifier = task in ("classify", "token-classify")
    labels = config.id2label or {}
    return ModelSpec(
        task=task,
        max_length=_max_length(folder, config.max_position_embeddings),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        pad_token_id=config.pad_token_id or 0,
        pooling=_pooling(folder, task, pooling),
        num_labels=(config.num_labels or 0) if is_classifier else 0,
        id2label={int(i): str(label) for i, label in labels.items()} if is_classifier else {},
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        normalize="Normalize" in modules,
        sparse=_sparse(folder, config) if task == "sparse" else None,
    )


def _sparse(folder: Path, config: ConfigFacts) -> SparseSpec:
    from gte_deploy.models.sparse_modules import encoder_folder, read_sparse_spec

    def unweighted() -> tuple[int, ...]:
        from gte_deploy.sparse import unweighted_ids
        from gte_deploy.tokenization import load_tokenizer

        return unweighted_ids(load_tokenizer(encoder_folder(folder)), config.pad_token_id)

    return read_sparse_spec(folder, config.num_labels, unweighted)


def read_json(path: Path) -> Any:
    """Parse a JSON file, or None where there is none.

    Raises:
        CheckpointError: the file is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download the checkpoint again.") from error


def _read_object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if data is not None and not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, and holds {type(data).__name__}")
    return data or {}


def _module_types(folder: Path) -> list[str]:
    types = _all_module_types(folder)
    for name in types:
        if name not in _KNOWN_MODULES:
            raise ConfigError(
                f"{folder / 'modules.json'} has a {name} module; only {', '.join(_KNOWN_MODULES)} are honoured, "
                "and leaving it out would change the embeddings."
            )
    return types


def _all_module_types(folder: Path) -> list[str]:
    modules = read_json(folder / "modules.json") or []
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules
    ):
        raise CheckpointError(f"{folder / 'modules.json'} must list objects with a `type`")
    return [str(module["type"]).rpartition(".")[2] for module in modules]


def _max_length(folder: Path, max_position_embeddings: int) -> int:
    from gte_deploy.models.sparse_modules import encoder_folder

    limit = _read_object(encoder_folder(folder) / "sentence_bert_config.json").get("max_seq_length")
    if type(limit) is int and 0 < limit < max_position_embeddings:
        return limit
    return max_position_embeddings


def _pooling(folder: Path, task: Task, pooling: str) -> Pooling:
    if pooling != "auto":
        return _checked_pooling(pooling, "the `pooling` argument")
    path = folder / "1_Pooling" / "config.json"
    config = _read_object(path)
    if not config:
        return "cls" if task == "embed" else "mean"
    if config.get("include_prompt", True) is not True:
        raise ConfigError(f"{path} has include_prompt false; leaving the prompt out of pooling is not supported.")
    if "pooling_mode" in config:
        return _checked_pooling(config["pooling_mode"], str(path))
    active = [key for key, value in config.items() if key.startswith(_LEGACY_POOLING_PREFIX) and value]
    if not active:
        return "mean"  # what sentence-transformers takes where no mode is set
    if len(active) > 1:
        raise ConfigError(f"{path} joins {', '.join(active)}; one of {', '.join(POOLINGS)} is supported.")
    return _checked_pooling(_LEGACY_POOLING_MODES.get(active[0], active[0]), str(path))


def _checked_pooling(pooling: Any, where: str) -> Pooling:
    if pooling not in POOLINGS:
        raise ConfigError(f"{where} asks for pooling {pooling!r}; expected one of {', '.join(POOLINGS)}.")
    return cast(Pooling, pooling)


def _prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    path = folder / "config_sentence_transformers.json"
    config = _read_object(path)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict):
        raise CheckpointError(f"{path}: prompts must be an object of name -> text")
    if default is not None and default not in prompts:
        raise ConfigError(f"{path} names the default prompt {default!r}, and has {', '.join(prompts) or 'none'}.")
    return {str(name): str(text or "") for name, text in prompts.items()}, default
