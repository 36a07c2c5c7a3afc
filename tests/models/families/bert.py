"""BERT as a family: the whole of what a second architecture writes. `test_new_family.py` registers it.

Its positions are an embedding of each place, its gated unit is none, and its only layout is that of transformers.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gte_deploy.core.spec import TaskName
from gte_deploy.models.families.base import Family, TensorNames
from gte_deploy.models.fields import FileFields, fixed
from gte_deploy.models.reading import SIZES, Reader

FIELDS = FileFields(
    name="config.json of BERT",
    reads='`model_type` "bert".',
    fields={
        "hidden_act": fixed("Only the exact GELU is computed.", "gelu"),
        "position_embedding_type": fixed("Only an embedding of each place is computed.", "absolute"),
        "is_decoder": fixed("Attention sees both sides.", False),
        "tie_word_embeddings": fixed("The decoder is the word embedding.", True),
    },
    unknown="ignored",
)


def _read_config(raw: Mapping[str, Any], file: Path) -> Any:
    from transformers import BertConfig

    reader = Reader(raw, file, {})
    sizes = {name: reader.integer(name, at_least=1) for name in (*SIZES, "type_vocab_size")}
    return BertConfig(
        **sizes,
        layer_norm_eps=reader.number("layer_norm_eps"),
        pad_token_id=reader.integer("pad_token_id", at_least=0),
        architectures=raw.get("architectures"),
    )


def _native_config(config: Any, *, task: TaskName, dtype: str = "float32") -> dict[str, Any]:
    return {**json.loads(config.to_json_string()), "architectures": [BERT.classes[task]], "dtype": dtype}


def _sites(config: Any) -> dict[str, int]:
    layers = config.num_hidden_layers
    once = dict.fromkeys(("attention", "projections", "qkv", "flash"), layers)
    return {**once, "skip_layer_norm": 2 * layers}


BERT = Family(
    model_types=("bert",),
    fields=FIELDS,
    read_config=_read_config,
    native_config=_native_config,
    classes={"fill-mask": "BertForMaskedLM", "embed": "BertModel"},
    architecture_prefixes=("Bert",),
    heads={"fill-mask": "cls"},
    positions="absolute",
    position_module="embeddings",
    sites=_sites,
    tensors=TensorNames(
        prefixes=("bert.",),
        tied={
            "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        derived=re.compile(r"(^|\.)position_ids$"),
    ),
)
