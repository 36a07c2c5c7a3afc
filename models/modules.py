"""Reads sentence-transformers' files beside a checkpoint: modules, pooling, limits, prompts, activation. No torch.

The files matter only for their own task. A masked-LM head gives the same answers with any modules beside it; a
reranker's settings are read, as in the library, if there is a modules.json of its kind.
"""

import logging
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from gte_deploy.core.activations import TORCH_CLASSES, activation_of
from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.core.files import read_json_object
from gte_deploy.core.spec import POOLINGS, SIMILARITIES, LateInteraction, Pooling, Similarity, TaskName
from gte_deploy.models.fields import DENSE, POOLING, SENTENCE_BERT, SENTENCE_TRANSFORMERS, check_fields
from gte_deploy.models.folder import MODULES_FILE, CheckpointFiles, Module, refuse_arguments
from gte_deploy.models.multi_vector_modules import (
    PYLATE_DENSE,
    MultiVectorModules,
    read_multi_vector_modules,
)
from gte_deploy.models.sparse_modules import read_sparse_modules
from gte_deploy.models.weight_files import ADAPTER_CONFIG
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.base import Library

logger = logging.getLogger(__name__)

# Old saves name the file after the kind of encoder; like the library, this reads the first file that exists.
_SETTINGS_FILES = (
    "sentence_bert_config.json",
    *(
        f"sentence_{kind}_config.json"
        for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)
_WHOLE = "config_sentence_transformers.json"
_LEGACY_POOLING_PREFIX = "pooling_mode_"
_LEGACY_POOLING_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
# Arguments for loading a model that do not change its answers.
_HARMLESS_MODEL_ARGUMENTS = frozenset(
    {"torch_dtype", "dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "use_safetensors"}
    | {"trust_remote_code", "add_pooling_layer", "use_memory_efficient_attention", "unpad_inputs"}
)
_FORWARD = "forward"
_NO_SIZES = frozenset({"in_features", "out_features"})
_ONLY_LATE = ("query_length", "document_length", "query_expansion")


@dataclass(frozen=True)
class DenseModule:
    """A Dense module: activation(x W + b), plus x if it is `residual`.

    Args:
        path: its folder, relative to the checkpoint; "" if its weight is the tensor `linear.weight` of the checkpoint.
        in_features: width of the input.
        out_features: width of the output.
        bias: whether it adds a bias.
        activation: name of a class of torch.nn, constructed without arguments.
        residual: whether the input is added to the output, through a matrix if the widths differ.
    """

    path: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool


@dataclass(frozen=True)
class SentenceSettings:
    """The settings in sentence-transformers' files for one task; the defaults hold if a file is missing.

    Args:
        pooling: pooling of the hidden states; None if no file names one.
        normalize: whether a Normalize module comes last.
        dense: Dense modules that project the pooled embedding, or those of tokens, in order.
        max_length: largest number of tokens in a text; None if no file sets it.
        lowercase: whether a text is lowercased before the tokenizer's own normalizer.
        tokenizer_arguments: arguments of AutoTokenizer.
        config_overrides: fields of config.json to replace.
        prompts: name -> text.
        default_prompt_name: the prompt to use if the caller names none.
        similarity: the function that compares embeddings.
        truncate_dim: leading dimensions to keep.
        activation: activation for a reranker's logits, a key of `activations.ACTIVATIONS`.
        multi_vector: the settings for late interaction, for that task only.
    """

    pooling: Pooling | None = None
    normalize: bool = False
    dense: tuple[DenseModule, ...] = ()
    max_length: int | None = None
    lowercase: bool = False
    tokenizer_arguments: Mapping[str, Any] = field(default_factory=dict)
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: Similarity | LateInteraction | None = None
    truncate_dim: int | None = None
    activation: str | None = None
    multi_vector: MultiVectorModules | None = None


def model_folder(files: CheckpointFiles) -> Path:
    """Return the folder of config.json, weights and tokenizer: `files` itself, or that of its Transformer module.

    In a Router, this may be the folder of a route.

    Raises:
        CheckpointError, ConfigError: modules.json cannot be read, or has a setting that is not supported.
    """
    if files.has("config.json") or files.has(ADAPTER_CONFIG):
        return files.path
    if files.has("router_config.json"):
        found = read_sparse_modules(files)
        return files.path if found is None else files.path / found.transformer
    inner = next((module for module in files.modules or () if module.kind in ("Transformer", "MLMTransformer")), None)
    return files.path if inner is None else inner.folder


def read_settings(files: CheckpointFiles, task: TaskName) -> SentenceSettings:
    """Read the settings for `task` from sentence-transformers' files in a checkpoint folder.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: a field, a module or a pooling is not supported; the message names file and field.
    """
    modules = files.modules
    if task == "classify":
        if modules is None or _model_type(files) != _library(task).model_type:
            return SentenceSettings()
        _require_kinds(modules, ("Transformer",), "a reranker")
        return _with_whole(files, task, _transformer_settings(model_folder(files), task))
    if task == "sparse" and read_sparse_modules(files) is not None:
        return _with_whole(files, task, _transformer_settings(model_folder(files), task))
    if task == "multi-vector":
        return _multi_vector_settings(files)
    if not TASKS[task].pools:
        return _beside_another_task(files)
    if modules is not None:
        _require_embedding(files, modules)
    settings = replace(
        _transformer_settings(model_folder(files), task),
        pooling=_pooling(files),
        normalize="Normalize" in [module.kind for module in modules or ()],
        dense=tuple(read_dense(files, module.path) for module in modules or () if module.kind == "Dense"),
    )
    return _with_whole(files, task, settings)


def _multi_vector_settings(files: CheckpointFiles) -> SentenceSettings:
    found = read_multi_vector_modules(files)
    settings = _transformer_settings(model_folder(files), "multi-vector")
    config, file = files.objects[_WHOLE], files.path / _WHOLE
    if config.get("truncate_dim") is not None:
        raise ConfigError(f"{file}: truncate_dim is {config['truncate_dim']!r}; expected null for late interaction")
    prompts, default = _prompts(file, config)
    if found.layout == "stanford":
        width = files.objects["config.json"].get("hidden_size", 768)  # BertConfig's default
        inner = DenseModule("", width, found.dense_width, bias=False, activation="Identity", residual=False)
        dense: tuple[DenseModule, ...] = (inner,)
    else:
        dense = tuple(
            read_dense(files, path, of="token_embeddings", default="Identity" if kind == PYLATE_DENSE else "Tanh")
            for path, kind in found.dense
        )
    return replace(
        settings,
        normalize=found.normalize,
        dense=dense,
        # PyLate sets this limit before every text, and so stores the one of its last text.
        max_length=settings.max_length if found.layout == "sentence-transformers" else None,
        # MultiVectorEncoder also stores the prefix as the beginning of a prompt.
        prompts={name: text.removeprefix(found.prefixes.get(name, "")) for name, text in prompts.items()},
        default_prompt_name=default,
        similarity=found.similarity,
        multi_vector=found,
    )


def _pooling(files: CheckpointFiles) -> Pooling | None:
    """Read the mode of the Pooling module; return None if there is no file.

    Raises:
        ConfigError: the mode is not supported, or there are several.
    """
    paths = {module.kind: module.path for module in files.modules or ()}
    name = posixpath.join(paths.get("Pooling") or "1_Pooling", "config.json")
    config, file = files.objects[name], files.path / name
    if not config:
        return None
    check_fields(config, file, POOLING)
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return checked_pooling(mode[0] if isinstance(mode, list) and len(mode) == 1 else mode, str(file))
    active = [key for key, value in config.items() if key.startswith(_LEGACY_POOLING_PREFIX) and value]
    if not active:
        return "mean"  # sentence-transformers' default
    if len(active) > 1:
        raise ConfigError(f"{file} joins {', '.join(active)}; one of {', '.join(POOLINGS)} is supported.")
    return checked_pooling(_LEGACY_POOLING_MODES.get(active[0], active[0]), str(file))


def checked_pooling(pooling: Any, where: str) -> Pooling:
    """Return `pooling` if it is one of `POOLINGS`.

    Raises:
        ConfigError: it is another value.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"{where} asks for pooling {pooling!r}; expected one of {', '.join(POOLINGS)}.")
    return cast(Pooling, pooling)


def read_dense(
    files: CheckpointFiles, path: str, *, of: str = "sentence_embedding", default: str = "Tanh"
) -> DenseModule:
    """Read a Dense module.

    Args:
        files: the checkpoint.
        path: the module's folder in it.
        of: sentence-transformers' name of what the module must project.
        default: the activation if no field names one: a class of torch.nn.

    Raises:
        ConfigError: a field is missing or not supported.
    """
    name = posixpath.join(path, "config.json")
    config, file = files.objects[name], files.path / name
    check_fields(config, file, DENSE)
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, of):
            raise ConfigError(f"{file}: {name} is {config[name]!r}; expected {of!r}")
    for name in sorted(_NO_SIZES):
        if type(config.get(name)) is not int or config[name] < 1:
            raise ConfigError(f"{file}: {name} is {config.get(name)!r}; expected a positive integer")
    named = config.get("activation_function", f"torch.nn.{default}")
    known = activation_of(str(named))
    if known is None:
        raise ConfigError(f"{file}: activation_function is {named!r}; expected {_known_activations()}")
    return DenseModule(
        path=path,
        in_features=config["in_features"],
        out_features=config["out_features"],
        bias=_boolean(file, config, "bias", True),
        activation=TORCH_CLASSES[known],
        residual=_boolean(file, config, "use_residual", False),
    )


def reranker_activation(folder: Path) -> str | None:
    """Read the activation for a reranker's logits from `folder`/config.json, in either spelling.

    Raises:
        ConfigError: the activation is a function of torch that is not supported.
    """
    config_file = folder / "config.json"
    raw = read_json_object(config_file)
    inner = raw.get("sentence_transformers")
    if isinstance(inner, dict) and "activation_fn" in inner:
        return _activation(config_file, "sentence_transformers.activation_fn", inner["activation_fn"])
    name = "sbert_ce_default_activation_function"
    return _activation(config_file, name, raw.get(name))


def _with_whole(files: CheckpointFiles, task: TaskName, settings: SentenceSettings) -> SentenceSettings:
    """Return `settings` with those of config_sentence_transformers.json, if that file is for the same kind of model."""
    config, file = files.objects[_WHOLE], files.path / _WHOLE
    if _model_type(files) != _library(task).model_type:
        logger.info("%s is for a %s, and is ignored", file, _model_type(files))
        return settings
    check_fields(config, file, SENTENCE_TRANSFORMERS)
    prompts, default = _prompts(file, config)
    truncate_dim = config.get("truncate_dim")
    if truncate_dim is not None and (type(truncate_dim) is not int or truncate_dim < 1):
        raise ConfigError(f"{file}: truncate_dim is {truncate_dim!r}; expected a positive integer or null")
    return replace(
        settings,
        prompts=prompts,
        default_prompt_name=default,
        similarity=_similarity(file, config.get("similarity_fn_name")),
        truncate_dim=truncate_dim,
        activation=_activation(file, "activation_fn", config.get("activation_fn")) if task == "classify" else None,
    )


def _beside_another_task(files: CheckpointFiles) -> SentenceSettings:
    """Return `encode`'s pooling for a model of another task; modules that cannot apply are logged."""
    modules = files.modules
    kinds = [module.kind for module in modules or ()]
    if modules is not None and kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        if kinds:
            logger.info("%s: the modules %s are for another task, and are ignored", files.path, ", ".join(kinds))
        return SentenceSettings()
    for module in modules or ():
        _ = module.folder  # raises if the folder is refused
    return _with_whole(files, "embed", SentenceSettings(pooling=_pooling(files), normalize="Normalize" in kinds))


def _transformer_settings(folder: Path, task: TaskName) -> SentenceSettings:
    file = next((folder / name for name in _SETTINGS_FILES if (folder / name).is_file()), folder / _SETTINGS_FILES[0])
    config = read_json_object(file)
    check_fields(config, file, SENTENCE_BERT)
    _check_transformer_task(file, config, task)
    for name in _ONLY_LATE:
        if task != "multi-vector" and config.get(name) is not None:
            raise ConfigError(
                f"{file}: {name} is {config[name]!r}; expected null for task {task}, which has one limit for all texts "
                "and does not lengthen them"
            )
    for name in ("model_args", "model_kwargs"):
        for argument in _object(file, config, name):
            if argument not in _HARMLESS_MODEL_ARGUMENTS:
                raise ConfigError(f"{file}: {name} has {argument!r}, which is not honoured; leave it out")
    limit = config.get("max_seq_length")
    arguments = _arguments(file, config, "tokenizer_args", "processor_kwargs")
    is_limit = type(limit) is int and limit > 0 and "model_max_length" not in arguments
    return SentenceSettings(
        max_length=limit if is_limit else None,
        lowercase=_boolean(file, config, "do_lower_case", False),
        tokenizer_arguments=arguments,
        config_overrides=_arguments(file, config, "config_args", "config_kwargs"),
    )


def _arguments(file: Path, config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the arguments under their older and newer names; permission to run remote code is dropped."""
    joined = {key: value for name in names for key, value in _object(file, config, name).items()}
    joined.pop("trust_remote_code", None)
    return joined


def _check_transformer_task(file: Path, config: Mapping[str, Any], task: TaskName) -> None:
    library = _library(task)
    modality = {"text": {"method": _FORWARD, "method_output_name": library.method_output}}
    for name, expected in (
        ("transformer_task", library.transformer_task),
        ("modality_config", modality),
        ("module_output_name", library.module_output),
    ):
        if config.get(name, expected) != expected:
            raise ConfigError(f"{file}: {name} is {config[name]!r}; expected {expected!r} for task {task}")


def _require_embedding(files: CheckpointFiles, modules: list[Module]) -> None:
    """Require a Transformer, a Pooling, any number of Dense and at most one Normalize, in this order."""
    kinds = [module.kind for module in modules if module.kind != "Dropout"]
    known = ("Transformer", "Pooling", "Dense", "Normalize")
    _require_kinds(modules, (*known, "Dropout"), "embeddings")
    dense = kinds.count("Dense")
    orders = ([*known[:2], *["Dense"] * dense], [*known[:2], *["Dense"] * dense, "Normalize"])
    if kinds not in orders and kinds != ["Transformer"]:
        raise ConfigError(
            f"{files.path / MODULES_FILE} lists {', '.join(kinds)}; expected Transformer, Pooling, any number of Dense "
            "and at most one Normalize, in this order."
        )


def _require_kinds(modules: list[Module], known: tuple[str, ...], purpose: str) -> None:
    for module in modules:
        file = module.checkpoint / MODULES_FILE
        if "." in module.kind:
            raise ConfigError(
                f"{file} has the module {module.kind}, which is custom code and is never run; expected modules of "
                "sentence_transformers."
            )
        if module.kind not in known:
            raise ConfigError(
                f"{file} has a {module.kind} module; only {', '.join(known)} are supported for {purpose}, and "
                "ignoring the module would change the answers."
            )
        _ = module.folder  # raises if the folder is refused
        refuse_arguments(module)


def _library(task: TaskName) -> Library:
    library = TASKS[task].library
    assert library is not None  # modules are read only for tasks that the library has
    return library


def _model_type(files: CheckpointFiles) -> str:
    return str(files.objects[_WHOLE].get("model_type", "SentenceTransformer"))


def _prompts(file: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict):
        raise CheckpointError(f"{file}: prompts must be an object of name -> text")
    if wrong := [name for name, text in prompts.items() if text is not None and not isinstance(text, str)]:
        raise CheckpointError(
            f"{file}: the prompt {wrong[0]!r} is {type(prompts[wrong[0]]).__name__}; it must be a text"
        )
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise ConfigError(f"{file} names the default prompt {default!r}, and has {', '.join(prompts) or 'none'}.")
    return {str(name): str(text or "") for name, text in prompts.items()}, default


def _similarity(file: Path, name: Any) -> Similarity | None:
    if name is None or name in SIMILARITIES:
        return cast(Similarity | None, name)
    # Like the library, this ignores the names of other kinds of model, such as "maxsim".
    logger.info("%s: similarity_fn_name %r is none of %s, and is ignored", file, name, ", ".join(SIMILARITIES))
    return None


def _activation(file: Path, field: str, path: Any) -> str | None:
    if path is None:
        return None
    known = activation_of(str(path))
    if known is None and str(path).startswith("torch."):
        raise ConfigError(f"{file}: {field} is {path!r}; expected {_known_activations()}")
    if known is None:
        # The library does the same: such a path names custom code.
        logger.warning("%s: %s is %r, which is custom code and is never run; the default is used", file, field, path)
    return known


def _known_activations() -> str:
    return "torch.nn's " + ", ".join(sorted(TORCH_CLASSES.values()))


def _object(file: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {name} is {value!r}; expected an object")
    return value


def _boolean(file: Path, config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{file}: {name} is {value!r}; expected true or false")
    return value
