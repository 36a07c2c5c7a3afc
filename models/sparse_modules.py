"""Reads a checkpoint's settings for sparse embeddings: SparseEncoder's modules, or a head with one weight per token.

It reads modules.json, router_config.json, the configurations of MLMTransformer, Transformer, SpladePooling and
SparseStaticEmbedding, and `max_active_dims` of config_sentence_transformers.json. Importing this needs no torch.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.core.spec import SPARSE_ACTIVATIONS, SPARSE_POOLINGS, SPARSE_ROUTES, SparseRoute, SparseSpec, TaskName
from gte_deploy.models.fields import SPLADE
from gte_deploy.models.folder import CheckpointFiles, Module, kind_of, refuse_arguments
from gte_deploy.models.weight_files import WEIGHTS, refuse_pickle

logger = logging.getLogger(__name__)

QUERY_WEIGHTS_FILE = "query_weights.npy"
"""The file of a bundle with the weights of queries that need no model: float32 [vocabulary]."""

_ROUTER, _SENTENCE_BERT = "router_config.json", "sentence_bert_config.json"
_SENTENCE_TRANSFORMERS = "config_sentence_transformers.json"
_ROUTERS = ("Router", "Asym")
# Modules that only SparseEncoder has. A Transformer for fill-mask is one of its modules, too.
_SPARSE_TYPES = frozenset(("MLMTransformer", "SpladePooling", "SparseStaticEmbedding", "SparseAutoEncoder"))
_ROUTER_FIELDS = frozenset(("default_route", "allow_empty_key", "route_mappings"))


@dataclass(frozen=True)
class SparseModules:
    """The modules of a SparseEncoder's checkpoint.

    Args:
        spec: how the modules compute sparse embeddings; None if they are not supported.
        reason: why they are not supported; "" if they are.
        transformer: folder of the encoder's configuration, weights and tokenizer, relative to the checkpoint; "" for
            the checkpoint's own.
        query: folder of the query weights, if queries do not go through the model.
    """

    spec: SparseSpec | None
    reason: str = ""
    transformer: str = ""
    query: str | None = None


def read_sparse_modules(files: CheckpointFiles) -> SparseModules | None:
    """Read the modules of a checkpoint; return None if they are not a SparseEncoder's.

    Raises:
        CheckpointError: modules.json is not JSON.
        ConfigError: modules.json is not a list of modules.
    """
    modules = files.modules or []
    if not _are_sparse(files, modules):
        return None
    try:
        for module in modules:
            refuse_arguments(module)
        found = _routed(files, modules) if any(m.kind in _ROUTERS for m in modules) else _splade(files, modules)
        if found.spec is not None:
            found = replace(found, spec=replace(found.spec, max_active_dims=_max_active_dims(files)))
        return found
    except (ConfigError, CheckpointError) as error:
        return SparseModules(None, str(error))


def is_sparse_encoder(folder: Path, modules: SparseModules | None) -> bool:
    """Whether the checkpoint's own task is sparse embeddings; modules that are not supported are logged."""
    if modules is not None and modules.spec is None:
        logger.warning("%s gives no sparse embeddings here: %s", folder, modules.reason)
    return modules is not None and modules.spec is not None


def read_sparse_spec(
    files: CheckpointFiles,
    modules: SparseModules | None,
    stored_head: Callable[[], TaskName],
    num_labels: int | None,
    unweighted: Callable[[], tuple[int, ...]],
) -> SparseSpec:
    """Read how a checkpoint computes sparse embeddings: from its modules, else from its head.

    A token classifier with one label gives token weights, whatever modules it has (gte-multilingual-base has a
    Pooling). For a masked-LM head without modules, pooling is SparseEncoder's default: the maximum of log1p(relu(x)).

    Args:
        files: the checkpoint.
        modules: the checkpoint's modules; see `read_sparse_modules`.
        stored_head: function that returns the task of the stored head.
        num_labels: number of labels of a classifier.
        unweighted: function that returns the ids without a weight, for a token-weights head.

    Raises:
        ConfigError: its modules are not supported, or it has no head for sparse embeddings.
        CheckpointError: a file is missing or unreadable.
    """
    folder = files.path
    if modules is not None:
        if modules.spec is None:
            raise ConfigError(f"{folder} gives no sparse embeddings: {modules.reason}")
        return modules.spec
    match stored_head():
        case "fill-mask":
            logger.info("%s has no SpladePooling; the maximum of log1p(relu(x)) is used, as SparseEncoder does", folder)
            return SparseSpec("splade", max_active_dims=_max_active_dims(files))
        case "token-classify" if num_labels == 1:
            return SparseSpec("token-weights", unweighted=unweighted(), max_active_dims=_max_active_dims(files))
        case other:
            labels = f" with {num_labels} labels" if other == "token-classify" else ""
            raise ConfigError(
                f"{folder} has no head for sparse embeddings: they need a masked-LM head or a token classifier of one "
                f"label, and this is {other}{labels}."
            )


def read_query_weights(
    files: CheckpointFiles,
    modules: SparseModules | None,
    vocab_size: int,
    token_id: Callable[[str], int | None],
) -> NDArray[np.float32] | None:
    """Read the weights that query tokens get without the model, [vocab_size] float32; None if there are none.

    Entries without a stored weight, such as the rows that pad the vocabulary, weigh 0.

    Args:
        files: the checkpoint.
        modules: its modules; see `read_sparse_modules`.
        vocab_size: rows of the model's vocabulary.
        token_id: function that returns the id of a word, for weights stored by word: the id of [UNK] if the vocabulary
            lacks the word.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: the tokenizer of queries differs from that of documents.
    """
    if modules is None or modules.query is None:
        return None
    place = files.path / modules.query
    _require_same_tokenizer(files, modules.query, modules.transformer)
    path = _object(files.json[posixpath.join(modules.query, "config.json")]).get("path")
    if isinstance(path, str) and path.endswith(".json"):
        stored = _weights_of_json(files, modules.query, path, vocab_size, token_id)
    else:
        stored = _stored_weights(place)
    if stored.ndim != 1 or len(stored) > vocab_size:
        raise CheckpointError(
            f"{place} has query weights of shape {list(stored.shape)}, and the model a vocabulary of {vocab_size:,}"
        )
    if not np.isfinite(stored).all():
        raise CheckpointError(f"{place} has query weights that are NaN or Inf. Download the checkpoint again.")
    weights = np.zeros(vocab_size, np.float32)
    weights[: len(stored)] = stored
    return weights


def _are_sparse(files: CheckpointFiles, modules: Sequence[Module]) -> bool:
    if not modules:
        return False
    if any(module.kind in _SPARSE_TYPES for module in modules):
        return True
    if _object(files.json[_SENTENCE_TRANSFORMERS]).get("model_type") == "SparseEncoder":
        return True
    if modules[0].kind in _ROUTERS:
        # A Router without a configuration counts as sparse; a Router of dense embeddings does not.
        types = _object(files.json[_ROUTER]).get("types")
        return not isinstance(types, dict) or any(kind_of(str(name)) in _SPARSE_TYPES for name in types.values())
    return modules[0].kind == "Transformer" and _is_masked_lm(files, modules[0])


def _object(data: Any) -> dict[str, Any]:
    return data if isinstance(data, dict) else {}


def _is_masked_lm(files: CheckpointFiles, module: Module) -> bool:
    """Whether a module computes the logits of a masked-LM head."""
    default = "fill-mask" if module.kind == "MLMTransformer" else "feature-extraction"
    settings = _object(files.json[module.file(_SENTENCE_BERT)])
    return bool(settings.get("transformer_task", default) == "fill-mask")


def _splade(files: CheckpointFiles, modules: Sequence[Module]) -> SparseModules:
    """Read MLMTransformer, or Transformer for fill-mask, then SpladePooling."""
    kinds = [module.kind for module in modules]
    if len(kinds) != 2 or kinds[0] not in ("MLMTransformer", "Transformer") or kinds[1] != "SpladePooling":
        raise ConfigError(
            f"its modules are {', '.join(kinds)}; expected MLMTransformer (or Transformer for fill-mask) and "
            "SpladePooling."
        )
    transformer, pooling = modules
    if not _is_masked_lm(files, transformer):
        raise ConfigError(f"its {transformer.kind} is not for fill-mask, and SpladePooling needs those logits.")
    return SparseModules(_pooling(files, pooling), transformer=transformer.path)


def _pooling(files: CheckpointFiles, module: Module) -> SparseSpec:
    config = files.json[module.file("config.json")]
    if not isinstance(config, dict):
        raise ConfigError(
            f"{module.path}/config.json, which says how SpladePooling pools, is missing or is not a JSON object."
        )
    known = {"pooling_strategy": SPARSE_POOLINGS, "activation_function": SPARSE_ACTIVATIONS}
    if unknown := sorted(name for name in config if SPLADE.field(name) is None):
        raise ConfigError(f"{module.path}/config.json has the fields {', '.join(unknown)}, which are not honoured.")
    for name, allowed in known.items():
        if (value := config.get(name, allowed[0])) not in allowed:
            raise ConfigError(f"{module.path}/config.json: {name} is {value!r}; expected {' or '.join(allowed)}.")
    activation = config.get("activation_function", "relu")
    return SparseSpec("splade", activation=activation, pooling=config.get("pooling_strategy", "max"))


def _routed(files: CheckpointFiles, modules: Sequence[Module]) -> SparseModules:
    """Read a Router that is the only module: documents go through a splade model, queries through it or by weights."""
    if len(modules) != 1 or modules[0].path:
        raise ConfigError(f"its modules are {', '.join(m.kind for m in modules)}; a Router must be the only module.")
    config = files.json[_ROUTER]
    if not isinstance(config, dict):
        raise ConfigError(f"{_ROUTER}, which says what its Router does, is missing or is not a JSON object.")
    routes = _routes(files.path, config)
    if set(routes) != set(SPARSE_ROUTES):
        raise ConfigError(f"its Router has the routes {', '.join(routes)}; expected query and document.")
    documents = _splade(files, routes["document"])
    assert documents.spec is not None
    default = _default_route(config.get("parameters") or {}, list(routes))
    if routes["query"] == routes["document"]:
        return documents
    kinds = [module.kind for module in routes["query"]]
    if kinds != ["SparseStaticEmbedding"]:
        raise ConfigError(f"its queries go through {', '.join(kinds)}; expected SparseStaticEmbedding.")
    spec = replace(documents.spec, query_weights=QUERY_WEIGHTS_FILE, default_route=default)
    (query,) = routes["query"]
    _ = query.folder  # raises if the folder is refused
    return replace(documents, spec=spec, query=query.path)


def _routes(checkpoint: Path, config: Mapping[str, Any]) -> dict[str, list[Module]]:
    try:
        types = {str(path): kind_of(str(name)) for path, name in config["types"].items()}
        return {
            str(route): [Module(checkpoint, types[path], str(path)) for path in paths]
            for route, paths in config["structure"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{_ROUTER} is malformed ({type(error).__name__}: {error}).") from error


def _default_route(parameters: Mapping[str, Any], routes: Sequence[str]) -> SparseRoute | None:
    if unknown := sorted(parameters.keys() - _ROUTER_FIELDS):
        raise ConfigError(f"{_ROUTER} has the parameters {', '.join(unknown)}, which are not honoured.")
    if parameters.get("route_mappings"):
        raise ConfigError(f"{_ROUTER} maps routes by their modality (route_mappings), which is not honoured.")
    default = parameters.get("default_route")
    if default is None:
        default = routes[0] if parameters.get("allow_empty_key", True) else None
    elif default not in routes:
        raise ConfigError(f"{_ROUTER} names the default route {default!r}, and has {', '.join(routes)}.")
    return cast("SparseRoute | None", default)


def _max_active_dims(files: CheckpointFiles) -> int | None:
    value = _object(files.json[_SENTENCE_TRANSFORMERS]).get("max_active_dims")
    if value is not None and (type(value) is not int or value < 1):
        raise CheckpointError(
            f"{files.path / _SENTENCE_TRANSFORMERS}: max_active_dims is {value!r}, not a positive integer"
        )
    return value


def _require_same_tokenizer(files: CheckpointFiles, queries: str, documents: str) -> None:
    """Refuse query weights for another vocabulary: their ids would mean other words."""
    name = posixpath.join(queries, "tokenizer.json")
    own = files.json[name]
    if own is not None and _cutting(own) != _cutting(files.json[posixpath.join(documents, "tokenizer.json")]):
        raise ConfigError(
            f"{files.path / name} is another tokenizer than the one for documents; both must be the same. Replace "
            "it if both split texts alike."
        )


def _cutting(tokenizer: Any) -> dict[str, Any]:
    """Return the part of a tokenizer.json that decides ids: everything except truncation and padding."""
    unimportant = ("truncation", "padding", "version")
    return {name: value for name, value in _object(tokenizer).items() if name not in unimportant}


def _weights_of_json(
    files: CheckpointFiles, query: str, path: str, vocab_size: int, token_id: Callable[[str], int | None]
) -> NDArray[np.float32]:
    """Read weights by word from an idf.json, in the folder `query` or in the checkpoint's own."""
    name = PurePosixPath(path).name
    beside = files.json[posixpath.join(query, name)]
    weights = _object(files.json[name] if beside is None else beside)
    if not weights or not all(type(weight) in (int, float) for weight in weights.values()):
        raise CheckpointError(
            f"{files.path / query} names the query weights {path!r}, but {name} is no object of word -> weight"
        )
    stored = np.zeros(vocab_size, np.float32)
    for word, weight in weights.items():
        token = token_id(word)
        if token is not None and token < vocab_size:
            stored[token] = weight
    return stored


def _stored_weights(folder: Path) -> NDArray[np.float32]:
    """Read the tensor `weight` of the folder's model.safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # unlike safetensors.numpy, it supports bfloat16

    refuse_pickle(folder, WEIGHTS)
    try:
        return load_file(folder / WEIGHTS)["weight"].float().numpy()
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} has no readable tensor `weight` ({type(error).__name__}: {error})"
        ) from error
