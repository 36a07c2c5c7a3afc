"""Reads the JSON files of a checkpoint: whole files, and single fields. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.core.regular import MAX_JSON_BYTES, read_regular
from gte_deploy.core.typed_json import MAX_COUNT, JsonValue, Read

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
"""Fields of config.json for the sizes that every encoder has; each is an integer of at least 1."""

_LARGEST = {
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "type_vocab_size": 1 << 16,
    "num_labels": 1 << 20,
    # The names of GPT-2, which Nomic's files have.
    "n_layer": 1 << 10,
    "n_head": 1 << 10,
    "n_embd": 1 << 16,
    "n_inner": 1 << 20,
}
"""The largest values of fields for which modules, tensors or names are made before any weight is compared."""


def read_required_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file that must be there.

    Raises:
        CheckpointError: the file does not exist.
        ConfigError: the file is not a JSON object.
    """
    try:
        value = json.loads(read_regular(file, MAX_JSON_BYTES))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); a checkpoint folder has one") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON ({error}). Copy the checkpoint again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}; expected a JSON object")
    return value


@contextlib.contextmanager
def without_warnings_of_types() -> Iterator[None]:
    """Silence transformers' warnings about types that it does not know and that this package reads itself.

    It warns about the `model_type` "new", on which no tokenizer depends, and about RoPE types that it cannot check; the
    family's own reader has checked these.
    """
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("configuration_utils", "modeling_rope_utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True)
class Reader:
    """Typed access to the fields of one config.json; every error names the file, the field and the value."""

    raw: Mapping[str, Any]
    file: Path
    defaults: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Return the value of a field, or its default.

        Raises:
            ConfigError: the field is missing and has no default.
        """
        if key in self.raw:
            return self.raw[key]
        if key not in self.defaults:
            raise ConfigError(f"{self.file}: {key} is missing; the architecture needs it")
        return self.defaults[key]

    def refuse(self, key: str, value: Any, expected: str) -> ConfigError:
        """Return the error for a value that is not supported."""
        return ConfigError(f"{self.file}: {key} is {value!r}; expected {expected}")

    def integer(self, key: str, *, at_least: int) -> int:
        """Return the integer in a field.

        Raises:
            ConfigError: the field is missing, holds another value, or one that no model has (`_LARGEST`).
        """
        return self._read(key, lambda value: value.whole(at_least, _LARGEST.get(key, MAX_COUNT)))

    def number(self, key: str, *, at_least: float = 0.0, below: float = math.inf) -> float:
        """Return the number in a field, at least `at_least` and below `below`.

        Raises:
            ConfigError: the field is missing, or holds another value.
        """
        return self._read(key, lambda value: value.number(at_least, below))

    def boolean(self, key: str) -> bool:
        """Return true or false in a field.

        Raises:
            ConfigError: the field is missing, or holds another value.
        """
        return self._read(key, JsonValue.flag)

    def one_of(self, key: str, names: Collection[str]) -> str:
        """Return the name in a field.

        Raises:
            ConfigError: the field is missing, or holds none of `names`.
        """
        return self._read(key, lambda value: value.one_of(tuple(names)))

    def _read(self, key: str, read: Callable[[JsonValue], Read]) -> Read:
        try:
            return read(JsonValue(self.get(key), key))
        except ValueError as error:
            raise ConfigError(f"{self.file}: {error}") from error


def encoder_fields(reader: Reader, *, fewest_types: int) -> dict[str, Any]:
    """Return the fields of config.json that the config of every encoder has: sizes, dropouts, epsilon, ids.

    Args:
        reader: the file, with the names of transformers.
        fewest_types: the smallest `type_vocab_size` that the model computes.

    Raises:
        ConfigError: a field is missing or malformed.
    """
    fields: dict[str, Any] = {name: reader.integer(name, at_least=1) for name in SIZES}
    fields["type_vocab_size"] = reader.integer("type_vocab_size", at_least=fewest_types)
    if fields["hidden_size"] % (heads := fields["num_attention_heads"]):
        raise reader.refuse("hidden_size", fields["hidden_size"], f"a multiple of num_attention_heads ({heads})")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        fields[name] = reader.number(name, below=1.0)
    if reader.get("classifier_dropout") is not None:
        fields["classifier_dropout"] = reader.number("classifier_dropout", below=1.0)
    fields["initializer_range"] = float(reader.number("initializer_range"))
    fields["layer_norm_eps"] = float(reader.number("layer_norm_eps"))
    fields["pad_token_id"] = pad_token_id(reader, fields["vocab_size"])
    passed_on = ("bos_token_id", "eos_token_id", "problem_type", "architectures")
    return fields | {name: reader.raw[name] for name in passed_on if name in reader.raw}


def require_rotated_heads(reader: Reader) -> None:
    """Check that heads have the size hidden_size over num_attention_heads, which is even: its halves are rotated.

    Raises:
        ConfigError: they have another size.
    """
    hidden, heads = (reader.integer(name, at_least=1) for name in ("hidden_size", "num_attention_heads"))
    if hidden % heads or hidden // heads % 2:
        raise reader.refuse("hidden_size", hidden, f"num_attention_heads ({heads}) times an even head size")
    if reader.raw.get("head_dim") not in (None, hidden // heads):
        raise reader.refuse("head_dim", reader.raw["head_dim"], f"{hidden // heads}: hidden_size over the heads")


def pad_token_id(reader: Reader, vocab_size: int) -> int | None:
    """Return `pad_token_id` of config.json, or None for null.

    Raises:
        ConfigError: it is not an id of the vocabulary.
    """
    if reader.get("pad_token_id") is None:
        return None
    value = reader.integer("pad_token_id", at_least=0)
    if value >= vocab_size:
        raise reader.refuse("pad_token_id", value, f"an id below vocab_size ({vocab_size})")
    return value


def label_fields(reader: Reader) -> dict[str, Any]:
    """Return the fields of config.json that name or count the labels of a classifier, checked against each other.

    Raises:
        ConfigError: they are malformed or contradict each other.
    """
    labels = reader.raw.get("id2label")
    fields: dict[str, Any] = {}
    if labels is not None:
        if not isinstance(labels, dict) or sorted(labels) != sorted(str(i) for i in range(len(labels))):
            raise reader.refuse("id2label", labels, "an object with the keys 0, 1, …")
        if len(labels) > _LARGEST["num_labels"]:
            raise ConfigError(f"{reader.file}: id2label has {len(labels):,} labels; at most 1,048,576 are read")
        fields["id2label"] = {int(index): str(label) for index, label in labels.items()}
        fields["label2id"] = {label: index for index, label in fields["id2label"].items()}
    if "num_labels" in reader.raw:
        count = reader.integer("num_labels", at_least=1)
        if labels is not None and count != len(labels):
            raise reader.refuse("num_labels", count, f"{len(labels)}, as id2label has")
        if labels is None:
            fields["num_labels"] = count
    return fields
