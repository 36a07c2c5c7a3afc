"""The BERT family: config.json and tensors in the one layout of transformers, with a table of positions.

RoBERTa and XLM-R share the layers, and most of this module.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import TaskName
from gte_deploy.models.families.base import Family, TensorNames
from gte_deploy.models.fields import TRANSFORMERS_FIELDS, Field, FileFields, fixed, honoured, ignored
from gte_deploy.models.reading import Reader, encoder_fields, label_fields, without_warnings_of_types
from gte_deploy.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HIDDEN_ACTIVATIONS = (
    *("gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh"),
    *("relu", "silu", "swish", "tanh"),
)
"""The values of `hidden_act`: functions of one element, under the names of transformers."""

_OTHER_CODE = ignored("The class of transformers does not read it.")

CONFIG_FIELDS: Mapping[str, Field] = {
    "model_type": honoured("It names the family."),
    **TRANSFORMERS_FIELDS,
    "num_attention_heads": honoured("hidden_size must be a multiple of it."),
    "type_vocab_size": honoured("With 2 or more the model gets the token types of the tokenizer."),
    "max_position_embeddings": honoured("The rows of the table of positions."),
    "hidden_act": honoured(f"One of {', '.join(HIDDEN_ACTIVATIONS)}; another is refused."),
    "position_embedding_type": fixed("Only an embedding of each place is computed.", "absolute"),
    "pruned_heads": fixed("Every head is computed.", {}),
    "chunk_size_feed_forward": ignored("It changes the memory that is needed."),
    "add_pooling_layer": ignored("The names of the tensors show it."),
    "directionality": _OTHER_CODE,
    "pooler_*": _OTHER_CODE,
    "output_past": _OTHER_CODE,
}

BERT_FIELDS = FileFields(
    name="config.json of BERT", reads='`model_type` "bert".', fields=CONFIG_FIELDS, unknown="ignored"
)


def config_reader(
    config_class: str,
    module: str = "transformers",
    own_fields: Callable[[Reader], Mapping[str, Any]] = lambda reader: {},
) -> Callable[[Mapping[str, Any], Path], PreTrainedConfig]:
    """A function that makes a config from the contents of config.json and its path.

    A missing field has the default of the class, as in transformers. The function raises a ConfigError for a field that
    is malformed or not supported.

    Args:
        config_class: name of the class.
        module: path of the module that has the class.
        own_fields: reads further fields, or reads some of BERT's in another way.
    """

    def read_config(raw: Mapping[str, Any], file: Path) -> PreTrainedConfig:
        from huggingface_hub.errors import StrictDataclassError

        made: Any = getattr(importlib.import_module(module), config_class)
        reader = Reader(raw, file, {field.name: field.default for field in dataclasses.fields(made)})
        fields = {**_common_fields(reader), **label_fields(reader), **own_fields(reader)}
        try:
            with without_warnings_of_types():
                return made(**fields)
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise ConfigError(f"{file}: {config_class} of {module.partition('.')[0]} refuses it: {error}") from error

    return read_config


def plain_config(config: Any, *, task: TaskName, dtype: str = "float32") -> dict[str, Any]:
    """The fields of config.json; see `Family.native_config`."""
    prefix = type(config).__name__.removesuffix("Config")
    return {**json.loads(config.to_json_string()), "architectures": [class_names(prefix)[task]], "dtype": dtype}


def class_names(prefix: str) -> dict[TaskName, str]:
    """Task -> class of transformers, such as "BertForMaskedLM" for the prefix "Bert"."""
    return {name: prefix + task.architecture for name, task in TASKS.items() if task.architecture is not None}


def sites(config: Any) -> dict[str, int]:
    """How often each fusion pass must fire; see `Family.sites`."""
    layers = config.num_hidden_layers
    return {**dict.fromkeys(("attention", "projections", "qkv", "flash"), layers), "skip_layer_norm": 2 * layers}


def _common_fields(reader: Reader) -> dict[str, Any]:
    activation = reader.one_of("hidden_act", HIDDEN_ACTIVATIONS)
    return {**encoder_fields(reader, fewest_types=1), "hidden_act": activation}


# Names of the first checkpoints, which transformers reads of every model; some of its versions write them again.
FIRST_NAMES = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))

BERT = Family(
    model_types=("bert",),
    fields=BERT_FIELDS,
    read_config=config_reader("BertConfig"),
    native_config=plain_config,
    classes=class_names("Bert"),
    architecture_prefixes=("Bert",),
    other_architectures={"BertForPreTraining": "fill-mask"},
    heads={"fill-mask": "cls", "classify": "classifier", "token-classify": "classifier"},
    positions="absolute",
    sites=sites,
    # The published checkpoints also hold what the pretraining on pairs of sentences had.
    left_out={"fill-mask": ("pooler.", "cls.seq_relationship."), "token-classify": ("pooler.",)},
    tensors=TensorNames(
        prefixes=("bert.",),
        renames=FIRST_NAMES,
        tied={
            "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        derived=re.compile(r"(^|\.)position_ids$"),
    ),
)
