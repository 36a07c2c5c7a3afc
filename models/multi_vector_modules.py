"""Reads a checkpoint's settings for late interaction, from a folder that one of three libraries wrote.

PyLate puts them into config_sentence_transformers.json, MultiVectorEncoder of sentence-transformers into the files of
its modules, and Stanford's ColBERT into artifact.metadata. Importing this needs no torch.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import LATE_INTERACTIONS, SIMILARITIES, LateInteraction, MultiVectorSpec, QueryExpansion
from gte_deploy.models.fields import (
    ARTIFACT,
    MULTI_VECTOR_MASK,
    PYLATE,
    SENTENCE_BERT,
    SENTENCE_TRANSFORMERS,
    TOKEN_NORMALIZE,
    check_fields,
)
from gte_deploy.models.folder import MODULES_FILE, CheckpointFiles, Module, refuse_arguments

if TYPE_CHECKING:
    from gte_deploy.models.tokenizer import ResolvedTokenizer

MULTI_VECTOR_TYPE = "MultiVectorEncoder"
PYLATE_TYPE = "ColBERT"
PYLATE_DENSE = "pylate.models.Dense.Dense"
"""The class of a projection in PyLate's modules.json. Its activation is the identity unless a field says otherwise."""

_WHOLE = "config_sentence_transformers.json"
_SETTINGS = "sentence_bert_config.json"
_ARTIFACT = "artifact.metadata"
_STANFORD = "HF_ColBERT"
# MultiVectorEncoder reads these as well, but the last one only from files that people have written.
_PYLATE_FIELDS = (*sorted(PYLATE.fields.keys() - SENTENCE_TRANSFORMERS.fields.keys()), "query_expansion")
_PUNCTUATION = tuple(string.punctuation)
_SIDES = ("query", "document")


@dataclass(frozen=True)
class MultiVectorModules:
    """The modules of a multi-vector model, with tokens as words. The defaults are those of MultiVectorEncoder.

    Args:
        layout: the library that wrote the folder.
        dense: paths of the projections in order, each with the name of its class; "" for Stanford's `linear.weight`.
        dense_width: width of Stanford's projection; 0 for other layouts, whose projections have files of their own.
        normalize: whether each embedding is scaled to length 1.
        query_length: most tokens of a query; None for the model's own limit.
        document_length: likewise of a document.
        prefixes: "query" or "document" -> a token that follows the first special token of a text.
        expansion: the token ("" for the mask token), length, attention and strategy of query expansion.
        skipped: "query" or "document" -> words without an embedding.
        similarity: the function that compares the embeddings of two texts.
    """

    layout: Literal["pylate", "sentence-transformers", "stanford"]
    dense: tuple[tuple[str, str], ...]
    dense_width: int = 0
    normalize: bool = True
    query_length: int | None = None
    document_length: int | None = None
    prefixes: Mapping[str, str] = field(default_factory=dict)
    expansion: StoredExpansion | None = None
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    similarity: LateInteraction = "maxsim"


@dataclass(frozen=True)
class StoredExpansion:
    """`QueryExpansion` with its token as a word; "" stands for the mask token, or that of the end without one."""

    length: int
    attended: bool
    fixed: bool = True
    token: str = ""


def is_multi_vector(files: CheckpointFiles) -> bool:
    """Whether a checkpoint's own task is late interaction."""
    kinds = [module.kind for module in files.modules or ()]
    if kinds:
        return _model_type(files) in (MULTI_VECTOR_TYPE, PYLATE_TYPE) or PYLATE_DENSE in kinds
    return _is_stanford(files)


def read_multi_vector_modules(files: CheckpointFiles) -> MultiVectorModules:
    """Read how a checkpoint embeds queries and documents.

    Raises:
        ConfigError: the folder has no modules for late interaction, or a setting that is not supported.
        CheckpointError: a file cannot be read.
    """
    if not is_multi_vector(files):
        raise ConfigError(
            f"{files.path} is no multi-vector model: expected {MODULES_FILE} and {_WHOLE} of PyLate or of "
            f"MultiVectorEncoder, or {_ARTIFACT} of Stanford's ColBERT. An embedding model gives token embeddings with "
            "task embed: encode_multi_vector(…, projection=…)."
        )
    if not files.modules:
        return _stanford(files)
    is_pylate = _model_type(files) != MULTI_VECTOR_TYPE
    return _pylate(files, files.modules) if is_pylate else _multi_vector_encoder(files, files.modules)


def multi_vector_spec(
    found: MultiVectorModules, tokenizer: ResolvedTokenizer, folder: Path, *, own_limit: int, limit: int
) -> MultiVectorSpec:
    """Return the settings with token ids in place of words, and with lengths within the model's limit.

    A skipped word that is no token of the vocabulary is ignored, as MultiVectorEncoder does.

    Args:
        found: the settings as they are stored.
        tokenizer: the checkpoint's tokenizer.
        folder: the checkpoint, for errors.
        own_limit: tokens that other files allow for a text.
        limit: tokens that the model can take.

    Raises:
        ConfigError: a length is above the limit, or a prefix or an expansion token is no token.
    """
    lengths = {
        "query_length": own_limit if found.query_length is None else found.query_length,
        "document_length": own_limit if found.document_length is None else found.document_length,
    }
    expansion = None if found.expansion is None else _expansion(found.expansion, tokenizer, folder)
    if expansion is not None:
        lengths["query_length"] = expansion.length if expansion.fixed else lengths["query_length"]
        if expansion.length > lengths["query_length"]:
            raise ConfigError(
                f"{folder}: queries are lengthened to {expansion.length} tokens, and query_length is "
                f"{lengths['query_length']}; expected no less"
            )
    for name, length in lengths.items():
        if length > limit:
            raise ConfigError(f"{folder}: {name} is {length}; expected at most {limit}, the places of the model")
    prefixes = {side: _prefix(word, side, tokenizer, folder) for side, word in found.prefixes.items() if word}
    skipped = {side: _known_ids(found.skipped.get(side, ()), tokenizer) for side in _SIDES}
    return MultiVectorSpec(
        query_length=lengths["query_length"],
        document_length=lengths["document_length"],
        query_prefix=prefixes.get("query"),
        document_prefix=prefixes.get("document"),
        expansion=expansion,
        skipped_in_queries=skipped["query"],
        skipped_in_documents=skipped["document"],
    )


def limited(found: MultiVectorSpec, limit: int) -> MultiVectorSpec:
    """Return the settings for a model that takes at most `limit` tokens, which cuts queries and documents.

    Raises:
        ConfigError: queries are lengthened to more tokens than that.
    """
    if found.expansion is not None and found.expansion.length > limit:
        raise ConfigError(
            f"queries are lengthened to {found.expansion.length} tokens; expected a max_length of no less, not {limit}"
        )
    lengths = (min(found.query_length, limit), min(found.document_length, limit))
    return replace(found, query_length=lengths[0], document_length=lengths[1])


def _expansion(stored: StoredExpansion, tokenizer: ResolvedTokenizer, folder: Path) -> QueryExpansion:
    if stored.token:
        token = tokenizer.backend.token_to_id(stored.token)
    else:
        token = tokenizer.theirs.mask_token_id
        token = tokenizer.theirs.eos_token_id if token is None else token
    if not isinstance(token, int):
        named = f"the token {stored.token!r}" if stored.token else "no token: the tokenizer has neither mask nor end"
        raise ConfigError(f"{folder}: queries are lengthened by {named}; expected a token of the tokenizer")
    return QueryExpansion(token, stored.length, stored.attended, stored.fixed)


def _prefix(word: str, side: str, tokenizer: ResolvedTokenizer, folder: Path) -> int:
    token = tokenizer.backend.token_to_id(word)
    if token is None:
        raise ConfigError(
            f"{folder}: {side}_prefix is {word!r}; expected a token of the tokenizer. PyLate would add a row of random "
            "weights for it: save the model with PyLate, and take the folder that it writes."
        )
    return int(token)


def _known_ids(words: Sequence[str], tokenizer: ResolvedTokenizer) -> tuple[int, ...]:
    ids = (tokenizer.backend.token_to_id(word) for word in words)
    return tuple(sorted({int(token) for token in ids if token is not None}))


def _model_type(files: CheckpointFiles) -> Any:
    return files.objects[_WHOLE].get("model_type")


def _is_stanford(files: CheckpointFiles) -> bool:
    return _STANFORD in (files.objects["config.json"].get("architectures") or ())


def _pylate(files: CheckpointFiles, modules: Sequence[Module]) -> MultiVectorModules:
    """Read a folder of PyLate: a Transformer and its projections; the defaults are those of `pylate.models.ColBERT`."""
    raw, file = files.objects[_WHOLE], files.path / _WHOLE
    check_fields(raw, file, PYLATE)
    _require_order(files, modules, ("Transformer",), (PYLATE_DENSE, "Dense"))
    query_length = _length(file, raw, "query_length") or 32
    expands = _boolean(file, raw, "do_query_expansion", True)
    attended = _boolean(file, raw, "attend_to_expansion_tokens", False)
    words = raw.get("skiplist_words")
    return MultiVectorModules(
        layout="pylate",
        dense=tuple((module.path, module.kind) for module in modules[1:]),
        query_length=query_length,
        document_length=_length(file, raw, "document_length") or 180,
        prefixes={
            side: _text(file, raw, f"{side}_prefix", default)
            for side, default in zip(_SIDES, ("[Q] ", "[D] "), strict=True)
        },
        expansion=StoredExpansion(query_length, attended) if expands else None,
        skipped={"document": _PUNCTUATION if words is None else _words(file, "skiplist_words", words)},
        similarity=_similarity(file, raw),
    )


def _multi_vector_encoder(files: CheckpointFiles, modules: Sequence[Module]) -> MultiVectorModules:
    """Read a folder of MultiVectorEncoder: Transformer, projections, then MultiVectorMask and Normalize."""
    raw, file = files.objects[_WHOLE], files.path / _WHOLE
    for name in _PYLATE_FIELDS:
        if raw.get(name) is not None:
            raise ConfigError(
                f"{file}: {name} is {raw[name]!r} beside the model_type {MULTI_VECTOR_TYPE}; expected no field of "
                "PyLate there: the modules have these settings. Save the model with sentence-transformers again."
            )
    _require_order(files, modules, ("Transformer",), ("Dense",), ("MultiVectorMask", "Normalize"))
    by_kind = {module.kind: module for module in modules}
    settings_name = modules[0].file(_SETTINGS)
    settings, settings_file = files.objects[settings_name], files.path / settings_name
    check_fields(settings, settings_file, SENTENCE_BERT)
    expansion = _stored_expansion(settings_file, settings.get("query_expansion"))
    skipped: dict[str, tuple[str, ...]] = {}
    if (mask := by_kind.get("MultiVectorMask")) is not None:
        name = mask.file("config.json")
        skipped = _skipped(files.path / name, files.objects[name])
    elif expansion is not None:
        raise ConfigError(
            f"{settings_file}: query_expansion is set, and {MODULES_FILE} has no MultiVectorMask; expected one: "
            "without it, the tokens that lengthen queries are not scored"
        )
    if (normalize := by_kind.get("Normalize")) is not None:
        name = normalize.file("config.json")
        stored = {"module_input_name": "sentence_embedding", **files.objects[name]}  # the library's default
        check_fields(stored, files.path / name, TOKEN_NORMALIZE)
    return MultiVectorModules(
        layout="sentence-transformers",
        dense=tuple((module.path, module.kind) for module in modules if module.kind == "Dense"),
        normalize=normalize is not None,
        query_length=_length(settings_file, settings, "query_length"),
        document_length=_length(settings_file, settings, "document_length"),
        expansion=expansion,
        skipped=skipped,
        similarity=_similarity(file, raw),
    )


def _stanford(files: CheckpointFiles) -> MultiVectorModules:
    """Read a folder of Stanford's ColBERT, which has the weight of its projection among those of the encoder."""
    file = files.path / _ARTIFACT
    raw = files.objects[_ARTIFACT]
    if not raw:
        raise ConfigError(f"{file} is missing; {_STANFORD} in config.json needs it for the lengths of texts")
    check_fields(raw, file, ARTIFACT)
    missing = [name for name in ("query_maxlen", "doc_maxlen", "dim") if raw.get(name) is None]
    if missing:
        raise ConfigError(f"{file}: {missing[0]} is missing; expected a positive integer")
    query_length = _length(file, raw, "query_maxlen")
    assert query_length is not None  # checked above
    masks = _boolean(file, raw, "mask_punctuation", True)
    return MultiVectorModules(
        layout="stanford",
        dense=(("", "Dense"),),
        dense_width=cast(int, _length(file, raw, "dim")),
        query_length=query_length,
        document_length=_length(file, raw, "doc_maxlen"),
        prefixes={
            "query": _text(file, raw, "query_token_id", "[unused0]"),
            "document": _text(file, raw, "doc_token_id", "[unused1]"),
        },
        expansion=StoredExpansion(query_length, _boolean(file, raw, "attend_to_mask_tokens", False)),
        skipped={"document": _PUNCTUATION if masks else ()},
    )


def _require_order(files: CheckpointFiles, modules: Sequence[Module], *groups: tuple[str, ...]) -> None:
    """Require one module of the first group, any number of the second, and each of the third at most once."""
    first, many, *rest = groups
    file = files.path / MODULES_FILE
    known = (*first, *many, *(kind for group in rest for kind in group))
    kinds = [module.kind for module in modules if module.kind != "Dropout"]
    for module in modules:
        if module.kind not in (*known, "Dropout"):
            raise ConfigError(
                f"{file} has a {module.kind} module; only {', '.join(known)} are supported for multi-vector models, "
                "and ignoring the module would change the answers."
            )
        _ = module.folder  # raises if the folder is refused
        refuse_arguments(module)
    last = [kind for kind in kinds[1:] if kind not in many]
    middle = [kind for kind in kinds[1:] if kind in many]
    if kinds[:1] != list(first) or kinds[1:] != [*middle, *last] or len(set(last)) < len(last) or "Dropout" in kinds:
        raise ConfigError(f"{file} lists {', '.join(kinds)}; expected {', '.join(known)} in this order.")


def _stored_expansion(file: Path, raw: Any) -> StoredExpansion | None:
    if raw is None:
        return None
    if not isinstance(raw, dict) or not raw.keys() <= {"strategy", "attend", "token", "length"}:
        expected = "an object with strategy, attend, token and length, or null"
        raise ConfigError(f"{file}: query_expansion is {raw!r}; expected {expected}")
    if raw.get("strategy") not in ("fixed", "min"):
        raise ConfigError(f"{file}: query_expansion.strategy is {raw.get('strategy')!r}; expected 'fixed' or 'min'")
    length = _length(file, raw, "length")
    if length is None:
        raise ConfigError(f"{file}: query_expansion.length is missing; expected a positive integer")
    return StoredExpansion(
        length=length,
        attended=_boolean(file, raw, "attend", False),
        fixed=raw["strategy"] == "fixed",
        token=_text(file, raw, "token", ""),
    )


def _skipped(file: Path, raw: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    check_fields(raw, file, MULTI_VECTOR_MASK)
    words = _words(file, "skiplist_words", raw.get("skiplist_words") or [])
    tasks = raw.get("skiplist_tasks")
    tasks = ["document"] if tasks is None else [tasks] if isinstance(tasks, str) else tasks
    if not set(_words(file, "skiplist_tasks", tasks)) <= set(_SIDES):
        raise ConfigError(f"{file}: skiplist_tasks is {tasks!r}; expected query, document or both")
    return dict.fromkeys(tasks, words)


def _similarity(file: Path, raw: Mapping[str, Any]) -> LateInteraction:
    name = raw.get("similarity_fn_name")
    if name is None or name in SIMILARITIES:
        return "maxsim"  # like the library, which ignores the functions of single vectors
    lowered = str(name).lower()
    if lowered not in LATE_INTERACTIONS:
        raise ConfigError(f"{file}: similarity_fn_name is {name!r}; expected {' or '.join(LATE_INTERACTIONS)}")
    return lowered


def _length(file: Path, raw: Mapping[str, Any], name: str) -> int | None:
    value = raw.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{file}: {name} is {value!r}; expected a positive integer")
    return value


def _boolean(file: Path, raw: Mapping[str, Any], name: str, default: bool) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{file}: {name} is {value!r}; expected true or false")
    return default if value is None else value


def _text(file: Path, raw: Mapping[str, Any], name: str, default: str) -> str:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{file}: {name} is {value!r}; expected a text")
    return default if value is None else value


def _words(file: Path, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ConfigError(f"{file}: {name} is {value!r}; expected a list of texts")
    return tuple(value)
