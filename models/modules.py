"""What sentence-transformers' files beside a checkpoint say: modules, pooling, limits, prompts, activation. No torch.

These files matter for the task that they belong to. A masked-LM head answers the same whatever modules stand beside it;
a reranker's settings are read, as the library reads them, where there is a modules.json of its kind.
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
from gte_deploy.core.spec import POOLINGS, SIMILARITIES, Pooling, Similarity, TaskName
from gte_deploy.models.fields import DENSE, POOLING, SENTENCE_BERT, SENTENCE_TRANSFORMERS, check_fields
from gte_deploy.models.folder import MODULES, CheckpointFiles, Module, refuse_arguments
from gte_deploy.models.sparse_modules import encoder_folder, read_sparse_modules
from gte_deploy.models.weight_files import ADAPTER_CONFIG
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.base import Library

logger = logging.getLogger(__name__)

# Old saves name the file after the kind of encoder; the library reads the first that is there.
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
# What a model is loaded with that leaves its answers as they are.
_HARMLESS_MODEL_ARGUMENTS = frozenset(
    {"torch_dtype", "dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "use_safetensors"}
    | {"trust_remote_code", "add_pooling_layer", "use_memory_efficient_attention", "unpad_inputs"}
)
_FORWARD = "forward"
_NO_SIZES = frozenset({"in_features", "out_features"})


@dataclass(frozen=True)
class DenseModule:
    """A Dense module: activation(x W + b), and x added to it where `residual`.

    Args:
        path: of its folder, relative to the checkpoint.
        in_features: width of what it takes.
        out_features: width of what it gives.
        bias: whether it adds one.
        activation: class of torch.nn, constructed without arguments.
        residual: whether the input is added, through a matrix where the widths differ.
    """

    path: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool


@dataclass(frozen=True)
class SentenceSettings:
    """What sentence-transformers' files say for one task; as they stand here where there is no such file.

    Args:
        pooling: of the hidden states; None where no file says.
        normalize: whether a Normalize module comes last.
        dense: what projects the pooled embedding, in order.
        max_length: tokens of a text, None where no file says.
        lowercase: whether a text is lowercased before the tokenizer's own normalizer.
        tokenizer_arguments: of AutoTokenizer.
        config_overrides: fields of config.json that are replaced.
        prompts: name -> text.
        default_prompt_name: the prompt used where the caller names none.
        similarity: how embeddings are meant to be compared.
        truncate_dim: leading dimensions to keep.
        activation: what a reranker's logits go through, a key of `activations.ACTIVATIONS`.
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
    similarity: Similarity | None = None
    truncate_dim: int | None = None
    activation: str | None = None


def model_folder(files: CheckpointFiles) -> Path:
    """Where config.json, weights and tokenizer are: the folder itself, or that of its Transformer module.

    A Router may have that in the folder of a route.

    Raises:
        CheckpointError, ConfigError: modules.json is not readable or not honoured.
    """
    if files.has("config.json") or files.has(ADAPTER_CONFIG):
        return files.path
    if files.has("router_config.json"):
        return encoder_folder(files)
    inner = next((module for module in files.modules or () if module.kind in ("Transformer", "MLMTransformer")), None)
    return files.path if inner is None else inner.folder


def read_settings(files: CheckpointFiles, task: TaskName) -> SentenceSettings:
    """What the files of sentence-transformers in a checkpoint folder say for `task`.

    Raises:
        CheckpointError: a file is not readable.
        ConfigError: a field, a module or a pooling is not honoured; the message names file and field.
    """
    modules = files.modules
    if task == "classify":
        if modules is None or _model_type(files) != _library(task).model_type:
            return SentenceSettings()
        _require_kinds(modules, ("Transformer",), "a reranker")
        return _with_whole(files, task, _transformer_settings(model_folder(files), task))
    if task == "sparse" and read_sparse_modules(files) is not None:
        return _with_whole(files, task, _transformer_settings(model_folder(files), task))
    if task != "embed":
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


def _pooling(files: CheckpointFiles) -> Pooling | None:
    """The mode of the Pooling module, or None where there is no file.

    Raises:
        ConfigError: it is none of the modes that are computed, or several.
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
        return "mean"  # what sentence-transformers takes where no mode is set
    if len(active) > 1:
        raise ConfigError(f"{file} joins {', '.join(active)}; one of {', '.join(POOLINGS)} is supported.")
    return checked_pooling(_LEGACY_POOLING_MODES.get(active[0], active[0]), str(file))


def checked_pooling(pooling: Any, where: str) -> Pooling:
    """`pooling` where it is one of `POOLINGS`.

    Raises:
        ConfigError: it is not.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"{where} asks for pooling {pooling!r}; expected one of {', '.join(POOLINGS)}.")
    return cast(Pooling, pooling)


def read_dense(files: CheckpointFiles, path: str) -> DenseModule:
    """The Dense module in the checkpoint's folder `path`.

    Raises:
        ConfigError: a field is missing or not honoured.
    """
    name = posixpath.join(path, "config.json")
    config, file = files.objects[name], files.path / name
    check_fields(config, file, DENSE)
    for name in sorted(_NO_SIZES):
        if type(config.get(name)) is not int or config[name] < 1:
            raise ConfigError(f"{file}: {name} is {config.get(name)!r}; expected a positive integer")
    named = config.get("activation_function", "torch.nn.modules.activation.Tanh")
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
    """What `folder`/config.json says that a reranker's logits go through, in either of its spellings.

    Raises:
        ConfigError: a function of torch that is not computed.
    """
    config_file = folder / "config.json"
    raw = read_json_object(config_file)
    inner = raw.get("sentence_transformers")
    if isinstance(inner, dict) and "activation_fn" in inner:
        return _activation(config_file, "sentence_transformers.activation_fn", inner["activation_fn"])
    name = "sbert_ce_default_activation_function"
    return _activation(config_file, name, raw.get(name))


def _with_whole(files: CheckpointFiles, task: TaskName, settings: SentenceSettings) -> SentenceSettings:
    """`settings` with what config_sentence_transformers.json says, where it is of the same kind of model."""
    config, file = files.objects[_WHOLE], files.path / _WHOLE
    if _model_type(files) != _library(task).model_type:
        logger.info("%s is for a %s, and passed over", file, _model_type(files))
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
    """How `encode` pools a model that is made for something else; modules that it does not have are logged."""
    modules = files.modules
    kinds = [module.kind for module in modules or ()]
    if modules is not None and kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        if kinds:
            logger.info("%s: the modules %s are for another task, and passed over", files.path, ", ".join(kinds))
        return SentenceSettings()
    for module in modules or ():
        _ = module.folder  # or a refusal
    return _with_whole(files, "embed", SentenceSettings(pooling=_pooling(files), normalize="Normalize" in kinds))


def _transformer_settings(folder: Path, task: TaskName) -> SentenceSettings:
    file = next((folder / name for name in _SETTINGS_FILES if (folder / name).is_file()), folder / _SETTINGS_FILES[0])
    config = read_json_object(file)
    check_fields(config, file, SENTENCE_BERT)
    _check_transformer_task(file, config, task)
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
    """Arguments under their older and their newer name; leave to run remote code is taken from nobody."""
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
    """Transformer, Pooling, any Dense, at most one Normalize, in this order."""
    kinds = [module.kind for module in modules if module.kind != "Dropout"]
    known = ("Transformer", "Pooling", "Dense", "Normalize")
    _require_kinds(modules, (*known, "Dropout"), "embeddings")
    dense = kinds.count("Dense")
    orders = ([*known[:2], *["Dense"] * dense], [*known[:2], *["Dense"] * dense, "Normalize"])
    if kinds not in orders and kinds != ["Transformer"]:
        raise ConfigError(
            f"{files.path / MODULES} lists {', '.join(kinds)}; expected Transformer, Pooling, any number of Dense "
            "and at most one Normalize, in this order."
        )


def _require_kinds(modules: list[Module], known: tuple[str, ...], purpose: str) -> None:
    for module in modules:
        file = module.checkpoint / MODULES
        if "." in module.kind:
            raise ConfigError(
                f"{file} has the module {module.kind}, which is code of its own and is never run; expected modules of "
                "sentence_transformers."
            )
        if module.kind not in known:
            raise ConfigError(
                f"{file} has a {module.kind} module; only {', '.join(known)} are honoured for {purpose}, and leaving "
                "it out would change the answers."
            )
        _ = module.folder  # or a refusal
        refuse_arguments(module)


def _library(task: TaskName) -> Library:
    library = TASKS[task].library
    assert library is not None  # the modules of other tasks are not read
    return library


def _model_type(files: CheckpointFiles) -> str:
    return str(files.objects[_WHOLE].get("model_type", "SentenceTransformer"))


def _prompts(file: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict):
        raise CheckpointError(f"{file}: prompts must be an object of name -> text")
    if default is not None and default not in prompts:
        raise ConfigError(f"{file} names the default prompt {default!r}, and has {', '.join(prompts) or 'none'}.")
    return {str(name): str(text or "") for name, text in prompts.items()}, default


def _similarity(file: Path, name: Any) -> Similarity | None:
    if name is None or name in SIMILARITIES:
        return cast(Similarity | None, name)
    # The library passes over names of other kinds of model, such as "maxsim".
    logger.info("%s: similarity_fn_name %r is none of %s, and passed over", file, name, ", ".join(SIMILARITIES))
    return None


def _activation(file: Path, field: str, path: Any) -> str | None:
    if path is None:
        return None
    known = activation_of(str(path))
    if known is None and str(path).startswith("torch."):
        raise ConfigError(f"{file}: {field} is {path!r}; expected {_known_activations()}")
    if known is None:
        # The library does the same: such a path is somebody's code.
        logger.warning(
            "%s: %s is %r, which is code of its own and is never run; the default is taken", file, field, path
        )
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
